r"""Compaction: physically smaller dense params that compute what the masked ones do.

    small = compact(apply_fn, params, masks, x)
    small.apply(small.params, x)  =  apply_fn(apply_masks(params, masks), x)         up to rounding

A channel goes when nobody reads it (`jaxprune.channels.liveness`), with everything that belongs to it: its column here,
its row there, its bias, its statistics (`jaxprune.channels.coupling`). A channel that is a constant is read by nobody
once that constant is in the next bias. What goes is found from the values alone, so masks may come from anywhere.

References:
    Fang et al. 2023, DepGraph, arXiv:2301.12900 (groups of layers that shrink together, for PyTorch modules).
"""

import dataclasses
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util

from jaxprune import tree
from jaxprune.channels.choices import walk
from jaxprune.channels.constant_propagation import constants
from jaxprune.channels.constant_rules import all_of, nothing
from jaxprune.channels.coupling import couplings_of
from jaxprune.channels.liveness import Live, find_sums, folded, live_units
from jaxprune.channels.rewriting import Shrinker
from jaxprune.channels.walk import Removed, Walk
from jaxprune.compat import ClosedJaxpr, primitive_name
from jaxprune.masks import apply_masks
from jaxprune.tables import columns
from jaxprune.tracing.finder import arrays_of, jaxpr_of
from jaxprune.tracing.inlined import inlined
from jaxprune.tracing.symbolic import at_numbers
from jaxprune.types import Leaves, Masks, Params


@dataclasses.dataclass(frozen=True)
class Compacted:
    """A smaller model; printed, the leaves that are smaller and their shapes before and now.

    Attributes:
        params: pytree of the structure of the params, arrays smaller.
        apply: what `apply_fn` computes, on the smaller params: (params, *args, **kwargs) -> results.
        removed: leaf -> for each of its axes the indices that are gone; plain data, see `uncompact`.
        refusal: "" if `apply_fn` itself takes the smaller params and computes the same; else where it does not, since
            it has sizes in it.
    """

    params: Params
    apply: Callable[..., Any]
    removed: Removed
    refusal: str

    def __str__(self) -> str:
        """A line for each leaf that is smaller; then `refusal`."""
        rows = [
            (name, str(shape_before(leaf, self.removed[name])), str(np.shape(leaf)))
            for name, leaf in tree.named_leaves(self.params).items()
            if any(self.removed.get(name, ()))
        ]
        refusal = f"\n\nThe function itself does not take them: {self.refusal}" if self.refusal else ""
        return columns(("leaf", "before", "now"), rows, 3) + refusal


def compact(
    apply_fn: Callable[..., Any], params: Params, masks: Masks, *args: Any, round_to: int = 1, **kwargs: Any
) -> Compacted:
    """Removes all channels that the masked model does not need; of a layer that it does not need at all, all but one.

    Args:
        apply_fn: the model, a function of its params.
        params: any pytree of arrays, statistics of batches included.
        masks: True where a weight is alive.
        args: of `apply_fn`, arrays or `jax.ShapeDtypeStruct`; only shapes count.
        round_to: channels side by side are kept in multiples of this where there are as many, dead ones among them.
        kwargs: likewise.

    Raises:
        ValueError: the masks do not fit; `apply_fn` consumes none of the params, or holds weights of its own.
    """
    masked = jax.jit(apply_masks)(params, masks)
    jaxpr, _ = at_numbers(inlined(jaxpr_of(apply_fn, masked, *args, **kwargs)))
    found = walk(jaxpr, masked)
    leaves = tree.named_leaves(masked)
    inputs = [all_of(leaves[name]) for name in found.leaves]
    inputs += [nothing(var.aval) for var in jaxpr.jaxpr.invars[len(inputs) :]]
    facts, sums = constants(jaxpr, inputs), find_sums(jaxpr.jaxpr, found)
    live = live_units(sums, found, facts)
    while not np.array_equal(more := _rounded(_one_of_each(live, found), found, round_to), live):
        live = live_units(sums, found, facts, more)
    names = dict(zip(jaxpr.jaxpr.invars, found.leaves, strict=False))
    extra = {names[var]: vector for var, vector in folded(sums, found, facts, live).items()}
    kept = {name: tuple(live[found.units.roots(ids)] for ids in axes) for name, axes in found.leaves.items()}

    def small_leaf(name: str, leaf: Any) -> Any:
        if name not in kept or tree.is_key(leaf):
            return leaf
        whole = leaf + extra[name].astype(leaf.dtype) if name in extra else leaf
        return jnp.asarray(np.asarray(whole)[np.ix_(*kept[name])])

    small = tree.map_named(small_leaf, masked)
    removed = {name: tuple(tuple(map(int, np.flatnonzero(~keep))) for keep in axes) for name, axes in kept.items()}
    apply = apply_compacted(apply_fn, removed, masked)
    wanted = inlined(jaxpr_of(apply, small, *args, **kwargs))
    return Compacted(small, apply, removed, refusal_of(apply_fn, wanted, small, args, kwargs))


def apply_compacted(apply_fn: Callable[..., Any], removed: Removed, params: Leaves) -> Callable[..., Any]:
    """`apply_fn` for params from which channels are removed; for arguments of symbolic sizes too, see `jax.export`.

    Args:
        apply_fn: the model, a function of its params.
        removed: see `Compacted`.
        params: of the model before, arrays or `jax.ShapeDtypeStruct`.
    """
    shapes = jax.tree.map(_shape_of, params)

    def apply(small: Leaves, *args: Any, **kwargs: Any) -> Any:
        outputs: list[Any] = []

        def traced(params: Leaves, *args: Any, **kwargs: Any) -> Any:
            leaves, structure = jax.tree.flatten(apply_fn(params, *args, **kwargs))
            outputs.append(structure)
            return leaves

        jaxpr = inlined(jaxpr_of(traced, shapes, *args, **kwargs))
        found = walk(jaxpr, shapes, removed)
        values, _ = arrays_of((small, args, kwargs))
        return jax.tree.unflatten(outputs[-1], Shrinker(found, live_without(found)).run(jaxpr, values))

    return apply


def live_without(found: Walk) -> Live:
    """For every unit of a program walked with what is removed, whether it is kept."""
    return ~found.units.gone(np.arange(found.units.count))


def shape_before(leaf: Any, gone: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape that a leaf had.

    Args:
        leaf: smaller.
        gone: for each of its axes the indices that it lost.
    """
    return tuple(size + len(lost) for size, lost in zip(np.shape(leaf), gone, strict=True))


def uncompact(small: Params, removed: Removed) -> Params:
    """Smaller params brought back to their full shapes, zeros where channels were removed.

    Args:
        small: of a `Compacted`, trained further or not.
        removed: of the same.
    """

    def full(name: str, leaf: Any) -> Any:
        for axis, gone in enumerate(removed.get(name, ())):
            size = leaf.shape[axis] + len(gone)
            shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
            kept = np.setdiff1d(np.arange(size), gone)
            leaf = jnp.zeros(shape, leaf.dtype).at[(slice(None),) * axis + (kept,)].set(leaf)
        return leaf

    return tree.map_named(full, small)


def _shape_of(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if tree.is_array(leaf) else leaf


def _one_of_each(live: Live, found: Walk) -> Live:
    """With the first of the channels of every layer that has none left: arrays of no size are no layers."""
    live = live.copy()
    for roots in (found.units.roots(ids) for axes in found.leaves.values() for ids in axes):
        if len(roots) and not live[roots].any():
            live[roots[0]] = True
    return live


def _rounded(live: Live, found: Walk, round_to: int) -> Live:
    """With the first of the dead channels of every layer brought back, up to a multiple."""
    if round_to == 1:
        return live
    live = live.copy()
    channels = couplings_of(found)
    for side_by_side in channels.layers:
        name, axis = channels.members[side_by_side[0]][0]
        place = {int(channel): i for i, channel in enumerate(channels.channels[name][axis])}
        roots = found.units.roots(found.leaves[name][axis][[place[channel] for channel in side_by_side]])
        alive = live[roots]
        wanted = min(-(-int(alive.sum()) // round_to) * round_to, len(roots))
        live[roots[~alive][: wanted - int(alive.sum())]] = True
    return live


def refusal_of(apply_fn: Callable[..., Any], wanted: ClosedJaxpr, small: Params, args: Any, kwargs: Any) -> str:
    """Where the function itself does not do on smaller params what it should; "" if it does.

    Args:
        apply_fn: the model, a function of its params.
        wanted: what it should do, without calls.
        small: params that are smaller.
        args: further arguments of the function.
        kwargs: likewise.
    """
    try:
        own = inlined(jaxpr_of(apply_fn, small, *args, **kwargs))
    except Exception as error:  # whatever a user's function raises on shapes that it does not expect
        return (
            f"it raises {type(error).__name__} at {_place(error)}: {(str(error) or 'without a word').splitlines()[0]}"
        )
    for a, b in zip(wanted.jaxpr.eqns, own.jaxpr.eqns, strict=False):
        if not _alike(a, b):
            return f"it has a size in it at {source_info_util.summarize(b.source_info)} ({primitive_name(b)})"
    return "" if len(wanted.jaxpr.eqns) == len(own.jaxpr.eqns) else "it takes other steps on smaller params"


def _place(error: Exception) -> str:
    """The innermost line outside of jax and of this package."""
    ours = (Path(jax.__file__).parent, Path(__file__).parents[1])
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if not any(Path(frame.filename).is_relative_to(folder) for folder in ours)
    ]  # fmt: skip
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].name})" if frames else "some line of jax"


def _alike(a: Any, b: Any) -> bool:
    def told(eqn: Any) -> str:
        literals = [atom.val for atom in eqn.invars if hasattr(atom, "val")]
        params = {word: value for word, value in eqn.params.items() if value is not None}
        whole = jax.tree.map(lambda value: int(value) if isinstance(value, np.integer) else value, params)
        return f"{eqn.primitive} {[atom.aval for atom in (*eqn.invars, *eqn.outvars)]} {literals} {whole}"

    return told(a) == told(b)
