r"""Streams: the batches on their way through the segments of a program, of the dense model or of the pruned one.

    totals = moments(segment, ...)     H = X^T X  and  C = X^T X_dense  of every product that the segment is solved for
    advance(segment, ..., streams)     each batch becomes what later segments read of it

Between two segments the arrays of a batch lie in the host's memory. Segments that are the same but for their weights
are compiled once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, Var
from jaxtyping import Array, Float

from jaxprune import tree
from jaxprune.criteria.calibration import Sums, added, second_moments
from jaxprune.oneshot.cuts import Segment
from jaxprune.oneshot.program import Step
from jaxprune.tracing.features import inputs_of, places, share_of
from jaxprune.tracing.inlined import bind
from jaxprune.tracing.paths import replay
from jaxprune.tracing.products import Product

Stream = tuple[Any, ...]
"""The arrays of one batch between two segments, in the order of `Segment.before`; on the host."""


class Unit(NamedTuple):
    """What is solved together in a segment: some layers of a leaf, one after the other."""

    name: str
    layers: tuple[int, ...]


def units(segment: Segment) -> dict[str, Unit]:
    """Leaf name -> the layers of it that a segment is solved for."""
    found: dict[str, set[int]] = {}
    for step in segment.solved:
        found.setdefault(_site(step).name, set()).update(map(int, places(_site(step)).layers))
    return {name: Unit(name, tuple(sorted(layers))) for name, layers in found.items()}


def to_host(arrays: Sequence[Any]) -> Stream:
    """Arrays in the host's memory; of those on several devices, with how they lay there."""
    return tuple(map(_kept, arrays))


class _Kept(NamedTuple):
    array: np.ndarray
    sharding: Any


def _kept(array: Any) -> Any:
    if tree.is_key(array):
        return array
    several = isinstance(array, jax.Array) and len(array.sharding.device_set) > 1
    return _Kept(np.asarray(array), array.sharding) if several else np.asarray(array)


def _from_host(stream: Stream) -> list[Any]:
    return [jax.device_put(*one) if isinstance(one, _Kept) else one for one in stream]


class Runner:
    """Runs segments, and remembers what it has compiled.

    Args:
        fixed: of the program.
    """

    def __init__(self, fixed: Mapping[Var, Any]) -> None:
        self.fixed = fixed
        self._programs: dict[Any, Callable[..., Any]] = {}

    def advance(self, segment: Segment, leaves: Mapping[str, Any], streams: list[Stream]) -> None:
        """Takes the batches behind the segment, one after the other.

        Args:
            segment: of `blocks`.
            leaves: name -> weights of the selected leaves.
            streams: the batches before it, in whose place those behind it come.
        """

        def advance(operands: list[Any], fixed: list[Any], before: list[Any]) -> list[Any]:
            known, _ = _run(segment, operands, fixed, before)
            return [known[var] for var in segment.after]

        operands, fixed = _operands(segment, leaves), self._fixed(segment)
        run = self._compiled(advance, segment, operands, fixed, _from_host(streams[0]))
        for i, stream in enumerate(streams):
            streams[i] = to_host(run(operands, fixed, _from_host(stream)))

    def moments(
        self,
        segment: Segment,
        leaves: Mapping[str, Any],
        streams: Sequence[Stream],
        dense: tuple[Mapping[str, Any], Sequence[Stream]] | None = None,
    ) -> dict[str, dict[str, Float[Array, "layers features features"]]]:
        """Leaf name -> "moments" and, where there is a dense model, "cross", of the layers of its unit.

        Args:
            segment: of `blocks`.
            leaves: name -> weights, those to be solved not pruned yet.
            streams: the batches before it, of the pruned model.
            dense: the same of the dense one.
        """
        found = units(segment)
        names = list(found)

        def add(operands: Any, fixed: list[Any], stream: list[Any], theirs: Any, totals: list[Sums]) -> Any:
            pruned = _solved(segment, operands, fixed, stream)
            others = pruned if theirs is None else _solved(segment, theirs[0], fixed, theirs[1])
            totals = list(totals)
            for product, other in zip(pruned, others, strict=True):
                site, ours = product.site, inputs_of(product)
                place = names.index(site.name)
                rows = [found[site.name].layers.index(int(layer)) for layer in places(site).layers]
                share = jnp.float32(share_of(site))
                sums = {"moments": second_moments(ours, ours) * share}
                if theirs is not None:
                    sums["cross"] = second_moments(ours, inputs_of(other)) * share
                totals[place] = added(totals[place], jnp.asarray(rows), sums)
            return totals

        operands, fixed = _operands(segment, leaves), self._fixed(segment)
        theirs = None if dense is None else _operands(segment, dense[0])
        words = ("moments",) if dense is None else ("moments", "cross")
        totals = [_zeros(segment, unit, words) for unit in found.values()]
        run = None
        for i, stream in enumerate(streams):
            other = None if dense is None else (theirs, _from_host(dense[1][i]))
            given = (operands, fixed, _from_host(stream), other, totals)
            run = run or self._compiled(add, segment, *given, donate=4)
            totals = run(*given)
        return dict(zip(names, _exact(totals), strict=True))

    def _fixed(self, segment: Segment) -> list[Any]:
        return [self.fixed[var] for var in segment.fixed]

    def _compiled(
        self, fn: Callable[..., Any], segment: Segment, *args: Any, donate: int | None = None
    ) -> Callable[..., Any]:
        """`fn` under jit, one of its arguments donated, compiled once for all segments with the same text.

        What a text does not show are the constants of a program: here orders of features and numbers of layers.
        """
        shapes = jax.tree.map(lambda one: jax.ShapeDtypeStruct(jnp.shape(one), one.dtype), args)
        program = jax.make_jaxpr(fn)(*shapes)
        constants = tuple(np.asarray(one).tobytes() for one in program.consts)
        orders = tuple(places(_site(step)).order.tobytes() for step in segment.products)
        key = (str(program), constants, orders, str(jax.tree.structure(args)))
        return self._programs.setdefault(key, jax.jit(fn, donate_argnums=donate))


@jax.jit
def _exact(totals: list[Sums]) -> list[dict[str, Array]]:
    return [{word: high + low for word, (high, low) in sums.items()} for sums in totals]


def _site(step: Step) -> Any:
    return step.site


def _zeros(segment: Segment, unit: Unit, words: Sequence[str]) -> Sums:
    site = next(_site(step) for step in segment.solved if _site(step).name == unit.name)
    features = places(site).order.size
    shape = (len(unit.layers), features, features)
    return {word: (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)) for word in words}


def _operands(segment: Segment, leaves: Mapping[str, Any]) -> list[Any]:
    return [_operand(_site(step).weight_transforms, leaves[_site(step).name]) for step in segment.products]


_operand = jax.jit(replay, static_argnums=0)


def _run(
    segment: Segment, operands: Sequence[Any], fixed: Sequence[Any], before: Sequence[Any]
) -> tuple[dict[Var, Any], list[Product]]:
    """The arrays of a segment by their variables, and its products."""
    known = dict(zip([*segment.fixed, *segment.before], [*fixed, *before], strict=True))
    weights = iter(operands)
    products = []
    for step in segment.steps:
        given: list[Any] = [atom.val if isinstance(atom, Literal) else known.get(atom) for atom in step.eqn.invars]
        if step.site is not None:
            given[1 - step.site.weight_first] = next(weights)
            products.append(_product(step, given))
        known |= zip(step.eqn.outvars, bind(step.eqn, given, step.eqn.params), strict=True)
    return known, products


def _solved(segment: Segment, operands: Sequence[Any], fixed: Sequence[Any], before: Sequence[Any]) -> list[Product]:
    """The products of a segment that are to be solved."""
    return _run(segment, operands, fixed, before)[1][-len(segment.solved) :]


def _product(step: Step, given: list[Any]) -> Product:
    place = 1 - _site(step).weight_first
    plain = lambda: bind(step.eqn, given, step.eqn.params)[0]  # noqa: E731
    return Product(_site(step), 0, given[place], given[1 - place], (), plain)
