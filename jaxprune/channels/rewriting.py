"""A program with channels removed: the same operations on smaller arrays, written anew where they name a size.

    reshape (8, 4, 64) -> (8, 256), 10 of the 64 gone      becomes      (8, 4, 54) -> (8, 216)

Works for whatever function was traced, also one that has sizes in it and refuses smaller weights.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Literal
from jaxtyping import Bool

from jaxprune.channels.walk import Walk
from jaxprune.compat import ClosedJaxpr, closed
from jaxprune.tracing.inlined import BODIES, bind, evaluate, with_bodies

Kept = tuple[Bool[np.ndarray, " _"], ...]


class Shrinker:
    """Runs programs whose units were walked, some of them removed.

    Attributes:
        walk: units of the program.
        live: for every unit whether it is kept; of roots.
    """

    def __init__(self, walk: Walk, live: Bool[np.ndarray, " units"]) -> None:
        self.walk, self.live = walk, live

    def run(self, jaxpr: ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
        """Results of a program on inputs whose channels are removed already.

        Args:
            jaxpr: the program, as it was walked.
            values: its inputs, smaller.
        """
        consts = [taken(value, self.kept(var)) for var, value in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)]
        return evaluate(closed(jaxpr.jaxpr, consts), values, self._step)

    def kept(self, atom: Any) -> Kept:
        """For every axis of an array which indices are kept."""
        return tuple(self.live[ids] for ids in self.walk.roots(atom))

    def _step(self, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
        name, params = eqn.primitive.name, dict(eqn.params)
        values = [
            taken(value, self.kept(atom)) if isinstance(atom, Literal) else value
            for atom, value in zip(eqn.invars, values, strict=True)
        ]
        if name in BODIES:
            return self._bodies(eqn, values)
        given, results = [self.kept(atom) for atom in eqn.invars], [self.kept(var) for var in eqn.outvars]
        if name == "iota":  # numbers made out of nothing, of which some are left out afterwards
            return [taken(bind(eqn, values, params)[0], results[0])]
        if name == "slice" and not all(keep.all() for keep in given[0]):
            return [_slice(params, values[0], given[0])]
        return bind(eqn, values, params | _resized(eqn, given, results))

    def _bodies(self, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
        def smaller(body: ClosedJaxpr) -> ClosedJaxpr:
            shapes = [
                jax.ShapeDtypeStruct(_left(var.aval.shape, self.kept(var)), var.aval.dtype) for var in body.jaxpr.invars
            ]
            return jax.make_jaxpr(lambda *inputs: self.run(body, inputs))(*shapes)

        return bind(eqn, values, with_bodies(eqn, smaller))


def taken(value: Any, kept: Kept) -> Any:
    """An array without the indices that are not kept."""
    for axis, keep in enumerate(kept):
        if not keep.all():
            value = jnp.take(value, np.flatnonzero(keep), axis)
    return value


def _slice(params: dict[str, Any], value: Any, kept: Kept) -> Any:
    cuts = [*zip(params["start_indices"], params["limit_indices"], params["strides"] or (1,) * len(kept), strict=True)]
    for axis, keep in enumerate(kept):
        if keep.all():
            continue
        wanted = np.arange(*cuts[axis])
        places = (np.cumsum(keep) - 1)[wanted[keep[wanted]]]  # in the smaller array
        first = int(places[0]) if len(places) and np.all(np.diff(places) == 1) else None
        if first is None:
            value, first = jnp.take(value, places, axis), 0
        cuts[axis] = (first, first + len(places), 1)
    starts, stops, steps = zip(*cuts, strict=True)
    return lax.slice(value, starts, stops, None if params["strides"] is None else steps)


def _left(sizes: Sequence[Any], kept: Kept) -> tuple[Any, ...]:
    """What is left of sizes, symbolic ones too: with these, channels are merged as often as it says."""
    return tuple(
        size if keep.all() else size * int(keep.sum()) // len(keep) for size, keep in zip(sizes, kept, strict=True)
    )


def _resized(eqn: JaxprEqn, given: list[Kept], results: list[Kept]) -> dict[str, Any]:
    """Those parameters of an operation that name sizes, for the smaller arrays."""
    name, params = eqn.primitive.name, eqn.params
    if name in ("broadcast_in_dim", "reshape"):
        word = "shape" if name == "broadcast_in_dim" else "new_sizes"
        return {word: _left(params[word], results[0])}
    if name == "conv_general_dilated" and (groups := params["feature_group_count"]) > 1:
        channels = given[0][params["dimension_numbers"].lhs_spec[1]]
        return {"feature_group_count": int(channels.sum()) // (len(channels) // groups)}
    if name == "pad":
        return {"padding_config": tuple(map(_padding, params["padding_config"], results[0]))}
    if name == "split":
        return {"sizes": _left(params["sizes"], tuple(kept[params["axis"]] for kept in results))}
    if name in ("gather", "dynamic_slice"):  # axes that are taken whole stay whole
        sizes = zip(params["slice_sizes"], given[0], strict=True)
        return {"slice_sizes": tuple(int(keep.sum()) if size == len(keep) else size for size, keep in sizes)}
    return {}


def _padding(config: tuple[Any, Any, Any], keep: Any) -> tuple[Any, Any, Any]:
    low, high, inside = config
    if min(low, high) < 0 or inside:  # then all channels stay
        return config
    return int(keep[:low].sum()), int(keep[len(keep) - high :].sum()), 0
