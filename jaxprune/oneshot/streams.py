r"""Streams: the batches on their way through the segments of a program, of the dense model or of the pruned one.

    totals = moments(segment, ...)        H = X^T X  and  C = X^T X_dense  of every product in the segment
    stream = advanced(segment, ...)       what later segments read, of one batch

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
    """Leaf name -> the layers of it that the products of a segment multiply by."""
    found: dict[str, set[int]] = {}
    for step in segment.products:
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

    def advanced(self, segment: Segment, leaves: Mapping[str, Any], streams: Sequence[Stream]) -> list[Stream]:
        """The batches behind the segment.

        Args:
            segment: of `segments`.
            leaves: name -> weights of the selected leaves.
            streams: the batches before it.
        """

        def advance(operands: list[Any], fixed: list[Any], before: list[Any]) -> list[Any]:
            known, _ = _run(segment, operands, fixed, before)
            return [known[var] for var in segment.after]

        operands, fixed = _operands(segment, leaves), self._fixed(segment)
        run = self._compiled(advance, segment, operands, fixed, _from_host(streams[0]))
        return [to_host(run(operands, fixed, _from_host(stream))) for stream in streams]

    def moments(
        self,
        segment: Segment,
        leaves: Mapping[str, Any],
        streams: Sequence[tuple[Stream, Stream | None]],
    ) -> dict[str, dict[str, Float[Array, "layers features features"]]]:
        """Leaf name -> "moments" and, where there is a dense stream, "cross", of the layers of its unit.

        Args:
            segment: of `segments`.
            leaves: name -> weights, those of the segment not pruned yet.
            streams: for every batch, the stream of the pruned model, and that of the dense one or None.
        """
        found = units(segment)

        names = list(found)

        def add(operands: list[Any], fixed: list[Any], stream: list[Any], dense: Any, totals: list[Sums]) -> Any:
            _, pruned = _run(segment, operands, fixed, stream)
            theirs = pruned if dense is None else _run(segment, operands, fixed, dense)[1]
            totals = list(totals)
            for product, other in zip(pruned, theirs, strict=True):
                site, ours = product.site, inputs_of(product)
                place = names.index(site.name)
                rows = [found[site.name].layers.index(int(layer)) for layer in places(site).layers]
                share = jnp.float32(share_of(site))
                sums = {"moments": second_moments(ours, ours) * share}
                if dense is not None:
                    sums["cross"] = second_moments(ours, inputs_of(other)) * share
                totals[place] = added(totals[place], jnp.asarray(rows), sums)
            return totals

        operands, fixed = _operands(segment, leaves), self._fixed(segment)
        words = ("moments",) if streams[0][1] is None else ("moments", "cross")
        totals = [_zeros(segment, unit, words) for unit in found.values()]
        first = [None if one is None else _from_host(one) for one in streams[0]]
        run = self._compiled(add, segment, operands, fixed, *first, totals)
        for stream, dense in streams:
            totals = run(operands, fixed, _from_host(stream), None if dense is None else _from_host(dense), totals)
        return dict(zip(names, _exact(totals), strict=True))

    def _fixed(self, segment: Segment) -> list[Any]:
        return [self.fixed[var] for var in segment.fixed]

    def _compiled(self, fn: Callable[..., Any], segment: Segment, *args: Any) -> Callable[..., Any]:
        """`fn` under jit, compiled once for all segments with the same text.

        What a text does not show are the constants of a program: here orders of features and numbers of layers.
        """
        shapes = jax.tree.map(lambda one: jax.ShapeDtypeStruct(jnp.shape(one), one.dtype), args)
        program = jax.make_jaxpr(fn)(*shapes)
        constants = tuple(np.asarray(one).tobytes() for one in program.consts)
        orders = tuple(places(_site(step)).order.tobytes() for step in segment.products)
        key = (str(program), constants, orders, str(jax.tree.structure(args)))
        return self._programs.setdefault(key, jax.jit(fn))


@jax.jit
def _exact(totals: list[Sums]) -> list[dict[str, Array]]:
    return [{word: high + low for word, (high, low) in sums.items()} for sums in totals]


def _site(step: Step) -> Any:
    return step.site


def _zeros(segment: Segment, unit: Unit, words: Sequence[str]) -> Sums:
    site = next(_site(step) for step in segment.products if _site(step).name == unit.name)
    features = places(site).order.size
    zeros = np.zeros((len(unit.layers), features, features), np.float32)
    return dict.fromkeys(words, (zeros, zeros))


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


def _product(step: Step, given: list[Any]) -> Product:
    place = 1 - _site(step).weight_first
    plain = lambda: bind(step.eqn, given, step.eqn.params)[0]  # noqa: E731
    return Product(_site(step), 0, given[place], given[1 - place], (), plain)
