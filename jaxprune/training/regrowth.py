"""Masks that move: a part of the living weights dies, and as many dead ones come to life.

    masks = regrow_masks(method, gradient, params, masks, 0.3, grads=grads)        # RigL's step

Every leaf (a stacked leaf: every layer) keeps the number of groups it has.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt32

from jaxprune import layout as layouts
from jaxprune import tree
from jaxprune.distributions.contest import LAYER
from jaxprune.exact.meshes import lying_like, placed
from jaxprune.exact.ranking import top_k_mask
from jaxprune.granularity import AcrossLeaves, granularities
from jaxprune.methods import Method, group_scores
from jaxprune.types import Criterion, Masks, Params


def check_regrowth(method: Method) -> None:
    """Refuse compositions whose pattern would not survive.

    Raises:
        ValueError: N:M, whose runs would get other numbers of survivors; channels.
    """
    pattern = getattr(method.distribution, "is_pattern", False)
    if pattern or isinstance(method.granularity, AcrossLeaves):
        name = type(method.distribution if pattern else method.granularity).__name__
        raise ValueError(f"Regrowth moves weights within a leaf, which would break the pattern of `{name}`.")


@lying_like("params")
def regrow_masks(
    method: Method,
    grow: Criterion | Any,
    params: Params,
    masks: Masks,
    fraction: Float[Array, ""] | float,
    *,
    statistics: tuple[Any, Any] = ((), ()),
    **evidence: Any,
) -> Masks:
    r"""Masks after one step of dropping and growing.

    Of the a living groups of a leaf $\mathrm{round}(f a)$ die, those with the lowest scores by the method's criterion;
    then as many of the dead come to life, those with the highest by `grow`, the ones that just died among them.

    Args:
        method: its criterion, granularity, leaves and layout; its distribution has no say.
        grow: the criterion for the dead.
        params: weights.
        masks: survivors so far; a group is alive if any of its weights is.
        fraction: f, of the living groups, in [0, 1]; may be traced.
        statistics: what `Running` criteria remember, (of the method's, of `grow`).
        **evidence: what either criterion looks at.

    Returns:
        Masks with as many living groups in every leaf.

    Raises:
        ValueError: see `check_regrowth` and `compute_masks`.

    References:
        Evci et al. 2020, arXiv:1911.11134, algorithm 1.
    """
    check_regrowth(method)
    growing = dataclasses.replace(method, criterion=grow)
    (leaves, axes, drops), (_, _, grows) = (
        group_scores(one, params, **evidence, **({"statistics": remembered} if remembered else {}))
        for one, remembered in zip((method, growing), statistics, strict=True)
    )
    tree.check_like("The masks", masks, params)
    named = tree.named_leaves(masks)
    by_leaf = granularities(method.granularity, leaves)
    found = {}
    for name, leaf in leaves.items():
        view = layouts.to_view(named[name], axes[name])
        alive = by_leaf[name].pool(view.astype(jnp.float32)) > 0
        moved = _move(alive, drops[name], grows[name], fraction)
        found[name] = layouts.from_view(by_leaf[name].expand(moved, view.shape), axes[name], leaf.shape)
    return tree.map_named(lambda name, leaf: placed(found[name], leaf) if name in found else named[name], params)


def _move(
    alive: Bool[Array, "*layers s i o"], drop: Float[Array, "*layers s i o"], grow: Float[Array, "*layers s i o"],
    fraction: Any,
) -> Bool[Array, "*layers s i o"]:  # fmt: skip
    living = jnp.sum(alive, axis=LAYER, keepdims=True, dtype=jnp.uint32)
    leaving = _rounded(living, fraction)
    kept = top_k_mask(_only(alive, drop), living - leaving, LAYER)
    return kept | top_k_mask(_only(~kept, grow), leaving, LAYER)


def _rounded(count: UInt32[Array, "..."], fraction: Any) -> UInt32[Array, "..."]:
    return jnp.round(jnp.clip(jnp.float32(fraction), 0.0, 1.0) * count.astype(jnp.float32)).astype(jnp.uint32)


def _only(chosen: Bool[Array, "..."], scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scores one step up where chosen, 0 elsewhere, so that whoever is chosen is above all others."""
    pattern = lax.bitcast_convert_type(jnp.abs(scores), jnp.uint32)
    raised = lax.bitcast_convert_type(jnp.minimum(pattern + jnp.uint32(1), jnp.uint32(0x7F800000)), jnp.float32)
    return jnp.where(chosen, raised, 0.0)
