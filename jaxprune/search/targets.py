"""Targets: as sparse as it must be for a model to have a size, an amount of work, or a speed.

    masks, sparsity = masks_within(method, params, cost, bound)          cost(masks) <= bound < cost(less sparse masks)

The cost is any function of masks. `compacted_cost` gives those of the model after `compact`, which is what channels are
removed for; for single weights a count of survivors will do.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxprune.channels.compaction import compact
from jaxprune.methods import Method, compute_masks
from jaxprune.sparse.tuning import timing
from jaxprune.tracing import trace
from jaxprune.types import Masks, Params

Cost = Callable[[Masks], float]


class MasksWithin(NamedTuple):
    """Masks whose cost is within the bound.

    Attributes:
        masks: see `compute_masks`.
        sparsity: with which they were computed.
        cost: of these masks.
    """

    masks: Masks
    sparsity: float
    cost: float


def masks_within(
    method: Method, params: Params, cost: Cost, bound: float, *, steps: int = 8, most: float = 0.9, **evidence: Any
) -> MasksWithin:
    """Masks of the least sparsity whose cost is at most `bound`, by halving the range of sparsities.

    The cost is taken to fall as the sparsity rises; where it does not quite, as with measured seconds, the masks
    returned still have the cost that is returned with them.

    Args:
        method: how masks are chosen.
        params: any pytree of arrays.
        cost: (masks) -> number.
        bound: what it must not exceed.
        steps: halvings; the sparsity is found to within most / 2 ** steps.
        most: sparsity beyond which nothing is tried, in (0, 1); low enough that every layer keeps a channel.
        evidence: see `compute_masks`.

    Raises:
        ValueError: the cost at sparsity `most` is above the bound.
    """
    masks_at = jax.jit(lambda params, sparsity: compute_masks(method, params, sparsity, **evidence))

    def at(sparsity: float) -> MasksWithin:
        masks = masks_at(params, np.float32(sparsity))
        return MasksWithin(masks, sparsity, cost(masks))

    dense = at(0.0)
    if dense.cost <= bound:
        return dense
    low, best = 0.0, at(most)
    if best.cost > bound:
        raise ValueError(
            f"The bound {bound:g} cannot be reached: the cost is {dense.cost:g} without pruning and {best.cost:g} at a "
            f"sparsity of {most}. Ask for less, or raise `most`."
        )
    for _ in range(steps):
        middle = at((low + best.sparsity) / 2)
        if middle.cost <= bound:
            best = middle
        else:
            low = middle.sparsity
    return best


def compacted_cost(
    apply_fn: Callable[..., Any], params: Params, *args: Any, of: Literal["macs", "weights", "seconds"] = "macs"
) -> Cost:
    """The cost of a model after `compact`, as a function of masks.

    Args:
        apply_fn: the model, a function of its params.
        params: any pytree of arrays.
        args: of `apply_fn`.
        of: multiply-adds of one call; weights, all arrays counted; or seconds, the median of nine jitted calls on this
            machine after one to warm up.
    """

    def cost(masks: Masks) -> float:
        small = compact(apply_fn, params, masks, *args)
        if of == "macs":
            return sum(site.macs for site in trace(small.apply, small.params, *args))
        if of == "weights":
            return sum(leaf.size for leaf in jax.tree.leaves(small.params))
        call = jax.jit(small.apply).lower(small.params, *args).compile()
        runs = timing.interleaved({"model": lambda: call(small.params, *args)}, repeats=9)
        return float(np.median(runs["model"]))

    return cost
