"""A pruning method: four small answers put together, and the one line that runs them.

masks = expand(distribution(pool(criterion(params)), sparsity))
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxprune import layout as layouts
from jaxprune import tree
from jaxprune.checks import check_leaves, check_sparsity, is_concrete
from jaxprune.criteria import Running, joint_taylor, magnitude, momentum
from jaxprune.distributions import Budget, ByRule, Distribution, Global
from jaxprune.granularity import Element, Granularity, GranularityByRule, granularities
from jaxprune.numerics import settled
from jaxprune.tracing.channels import Channels
from jaxprune.types import Masks, Params, Schedule, Scores, Sparsity, UpdateWhen


@dataclasses.dataclass(frozen=True)
class Method:
    """What to prune and how to choose; says nothing of when.

    Attributes:
        criterion: how much does each weight matter (`jaxprune.criteria`, or a function of your own).
        granularity: which weights live or die together; by leaf with `GranularityByRule`.
        distribution: who competes with whom, and how many win.
        select: which leaves are pruned: a function (name, leaf) -> bool, patterns of names, or rules pattern -> bool;
            a list or mapping is kept as a tuple, so that a method can be hashed.
        layout: which axes of a leaf are its inputs and outputs: `FLAX`, `TORCH`, or one of your own.

    Raises:
        TypeError: an answer is none: a class, or a function that makes a criterion, where an object is expected.
    """

    criterion: Callable[..., Scores] = magnitude
    granularity: Granularity | GranularityByRule | Channels = Element()
    distribution: Distribution = Global()
    select: tree.Select = tree.weights
    layout: layouts.Layout = layouts.FLAX

    def __post_init__(self) -> None:
        object.__setattr__(self, "select", tree.hashable(self.select))
        for makes, call in _FACTORIES:
            if self.criterion is makes:
                raise TypeError(f"`{makes.__name__}` makes criteria and is none: call it, as in `{call}`.")
        _check_answer("criterion", self.criterion, callable(self.criterion), "magnitude")
        pools = hasattr(self.granularity, "pool") and hasattr(self.granularity, "expand")
        known = pools or isinstance(self.granularity, GranularityByRule | Channels)
        _check_answer("granularity", self.granularity, known, "Element()")
        for distribution in (self.distribution, *_rules(self.distribution)):
            _check_answer("distribution", distribution, callable(distribution) or distribution is not self.distribution,
                          "Global()")  # fmt: skip
        _check_answer("layout", self.layout, hasattr(self.layout, "axes"), "FLAX")


_FACTORIES = ((joint_taylor, "joint_taylor(Output())"), (momentum, "momentum(0.9)"))


def _check_answer(what: str, value: Any, fits: bool, example: str) -> None:
    """Refuse what cannot answer, classes first: many of them can be called, and then give nonsense."""
    if isinstance(value, type):
        raise TypeError(
            f"`{what}` must be an object such as `{example}`; the class `{value.__name__}` arrived: call it."
        )
    if not fits:
        raise TypeError(f"`{what}` must be an object such as `{example}`; {value!r} arrived.")


def compute_masks(
    method: Method, params: Params, sparsity: Sparsity | None = None, *, masks: Masks | None = None, **evidence: Any
) -> Masks:
    """Masks of `params` by `method`, a pure function; jit, vmap and scan apply.

    Args:
        method: the composition.
        params: any pytree of arrays.
        sparsity: fraction of the groups of the selected leaves to remove, in [0, 1); may be traced (as float32). None
            for distributions that decide themselves (`Threshold`, `SigmaThreshold`) or may (`NM`, `ByRule`).
        masks: survivors so far. Weights that are dead by them score 0, so that they come back only if the sparsity
            falls; without it every weight is judged by its value alone.
        **evidence: what the criterion looks at besides the weights: grads=, key=, ... Trees with the leaves of the
            params are handed on leaf by leaf, anything else as it is.

    Returns:
        Bool tree with the structure, shapes and (outside jit) shardings of `params`; leaves not selected are True.

    Raises:
        ValueError: a sparsity that is no fraction, NaN or infinity in a weight or score (outside jit; under jit NaN
            counts as the largest score, so that it is kept), evidence of another structure, a leaf that does not fit, a
            leaf that is emptied because all of its scores are zero, as those of zeros are (outside jit).
        TypeError: missing evidence, a leaf that is no floating array.
    """
    if sparsity is not None:
        check_sparsity(sparsity)
    leaves, axes, scores = _scored(method, params, evidence)
    alive: dict[str, Any] = {}
    if masks is not None:
        tree.check_like("The masks", masks, params)
        alive = _evidence("masks", masks, params, leaves, axes)
        scores = {name: jnp.where(alive[name], score, jnp.float32(0)) for name, score in scores.items()}
    dims = {name: layouts.dims(leaf.shape, axes[name]) for name, leaf in leaves.items()}
    if isinstance(method.granularity, Channels):
        found = _channel_masks(method, method.granularity, scores, axes, dims, sparsity, params)
    else:
        by_leaf = granularities(method.granularity, leaves)
        kept = method.distribution(_pooled(by_leaf, scores), sparsity, dims=dims)
        views_of = {name: by_leaf[name].expand(verdicts, scores[name].shape) for name, verdicts in kept.items()}
        found = {name: layouts.from_view(view, axes[name], leaves[name].shape) for name, view in views_of.items()}

    _check_not_emptied(found, scores, alive)

    def mask_of(name: str, leaf: Array) -> Array:
        return placed(found[name], leaf) if name in found else jnp.ones_like(leaf, dtype=bool)

    return tree.map_named(mask_of, params)


def check_start(
    method: Method, params: Params, update_when: UpdateWhen, schedule: Schedule, evidence: dict[str, Any]
) -> None:
    """Refuse a training that empties, at step 0, a leaf that is zero and has learnt nothing yet.

    Args:
        method: the composition.
        params: at the beginning; where they are not known, under jit, all is well.
        update_when: step -> whether masks are computed.
        schedule: step -> sparsity.
        evidence: that is there; gradients, of which none are yet, are taken to be the same everywhere.

    Raises:
        ValueError: what `compute_masks` raises.
    """
    zero = [~jnp.any(leaf != 0) for leaf in tree.selected_leaves(method.select, params).values()]
    step = jnp.int32(0)
    if all(map(is_concrete, zero)) and any(zero) and update_when(step):
        with contextlib.suppress(TypeError):  # other evidence is missing
            compute_masks(method, params, schedule(step), grads=jax.tree.map(jnp.ones_like, params), **evidence)


def group_scores(
    method: Method, params: Params, **evidence: Any
) -> tuple[dict[str, Any], dict[str, layouts.Axes], dict[str, Array]]:
    """The selected leaves, their axes, and the scores of their groups; arguments and errors of `compute_masks`."""
    leaves, axes, scores = _scored(method, params, evidence)
    return leaves, axes, _pooled(granularities(method.granularity, leaves), scores)


def init_statistics(method: Method, params: Params) -> Any:
    """What a `Running` criterion remembers before the first step, leaf name -> array; () for any other criterion."""
    if not isinstance(method.criterion, Running) or not jax.tree.leaves(params):
        return ()
    leaves, axes, views = _seen(method, params)
    return {
        name: layouts.from_view(found, axes[name], jnp.shape(leaves[name]))
        for name, found in method.criterion.init(views).items()
    }


def update_statistics(method: Method, statistics: Any, params: Params, **evidence: Any) -> Any:
    """What it remembers after a step; `compute_masks` takes it as `statistics`.

    Args:
        method: the composition.
        statistics: of `init_statistics`, or of the step before.
        params: weights at this step.
        **evidence: as for `compute_masks`.
    """
    if not isinstance(method.criterion, Running):
        return ()
    leaves, axes, views = _seen(method, params)
    seen = {key: _evidence(key, value, params, leaves, axes) for key, value in {**evidence, "": statistics}.items()}
    found = method.criterion.update(seen.pop(""), views, **seen)
    return {name: layouts.from_view(found[name], axes[name], jnp.shape(leaf)) for name, leaf in leaves.items()}


def _pooled(by_leaf: dict[str, Any], scores: dict[str, Array]) -> dict[str, Array]:
    groups = {}
    for name, score in scores.items():
        try:
            groups[name] = by_leaf[name].pool(score)
        except ValueError as error:
            raise ValueError(f"Leaf {name!r}: {error} Leave it out with `select`, or check `layout`.") from None
    return groups


def _scored(
    method: Method, params: Params, evidence: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, layouts.Axes], dict[str, Array]]:
    """The selected leaves, their axes, and the scores of their weights."""
    leaves, axes, views = _seen(method, params)
    check_leaves("weight", leaves)
    seen = {key: _evidence(key, value, params, leaves, axes) for key, value in evidence.items()}
    return leaves, axes, _checked(method.criterion(views, **seen), views)


def _seen(method: Method, params: Params) -> tuple[dict[str, Any], dict[str, layouts.Axes], dict[str, Array]]:
    """The selected leaves, their axes, and their views."""
    leaves = tree.selected_leaves(method.select, params)
    axes = {name: method.layout.axes(name, jnp.shape(leaf)) for name, leaf in leaves.items()}
    return leaves, axes, {name: layouts.to_view(leaf, axes[name]) for name, leaf in leaves.items()}


def _channel_masks(
    method: Method, channels: Channels, scores: dict[str, Array], axes: dict[str, layouts.Axes],
    dims: dict[str, tuple[int, ...]], sparsity: Sparsity | None, params: Params,
) -> dict[str, Array]:  # fmt: skip
    """Masks of all leaves that the channels reach, selected or not."""
    if any(isinstance(rule, Budget) for rule in (method.distribution, *_rules(method.distribution))):
        raise ValueError(
            "`Budget` adds up what single groups cost; what a channel costs depends on which others are left, in the "
            "layer before and after. Use `masks_within` with `compacted_cost`."
        )
    shapes = {name: jnp.shape(leaf) for name, leaf in tree.named_leaves(params).items()}
    channels.couplings.check(params)
    whole = {name: layouts.from_view(score, axes[name], shapes[name]) for name, score in scores.items()}
    groups = channels.pool_leaves(whole)
    sizes = {layer: dims.get(layer.rpartition(":")[0], (1, group.shape[-1])) for layer, group in groups.items()}
    kept = method.distribution(groups, sparsity, dims=sizes)
    return channels.expand_leaves(kept, {name: shapes[name] for name in channels.couplings.channels})


def _check_not_emptied(found: dict[str, Array], scores: dict[str, Array], alive: dict[str, Array]) -> None:
    """Refuse masks, where they are known, that empty a leaf only because all in it score zero, and others do not."""
    known = {name: jnp.any(found[name]) for name in scores if is_concrete(found[name])}
    for name, some in known.items():
        if not is_concrete(some) or some or not found[name].size:
            continue
        zero = {other: not jnp.any(score > 0) for other, score in scores.items()}
        if zero[name] and not all(zero.values()) and (name not in alive or jnp.any(alive[name])):
            raise ValueError(
                f"All scores of {name!r} are zero, and no weight of it would be left; what is dead stays dead. If it "
                "is zero at the beginning, leave it out with `select`, or begin to prune when it has learnt; if it was "
                "pruned before, hand in `masks=nonzero_masks(params)`."
            )


def _rules(distribution: Any) -> tuple[Any, ...]:
    return tuple(rule for _, rule in distribution.rules) if isinstance(distribution, ByRule) else ()


def _evidence(key: str, value: Any, params: Params, leaves: dict[str, Array], axes: dict[str, layouts.Axes]) -> Any:
    """Evidence as the criterion sees it: by name and as views where it has the leaves of the params."""
    if key == "grads":
        tree.check_like("The `grads`", value, params)
    if jax.tree_util.all_leaves([value]) and not _is_leaf_like(value, params):
        return value
    named = tree.named_leaves(value)
    if not all(name in named for name in leaves):
        return value
    return {
        name: layouts.to_view(named[name], axes[name]) if jnp.shape(named[name]) == leaf.shape else named[name]
        for name, leaf in leaves.items()
    }


def _is_leaf_like(value: Any, params: Params) -> bool:
    """Whether the params are a single array, and `value` one of its shape."""
    return jax.tree_util.all_leaves([params]) and jnp.shape(value) == jnp.shape(params)


def _checked(scores: Scores, views: dict[str, Array]) -> dict[str, Array]:
    for name, view in views.items():
        if name not in scores or jnp.shape(scores[name]) != view.shape:
            arrived = f"shape {jnp.shape(scores[name])}" if name in scores else f"leaves {list(scores)}"
            raise ValueError(f"The criterion must score every weight: {view.shape} at {name!r}, it gave {arrived}.")
    named = {name: jnp.asarray(scores[name]) for name in views}
    for name, score in named.items():
        if not jnp.issubdtype(score.dtype, jnp.floating):
            raise TypeError(f"The criterion must give floating scores, it gave {score.dtype} at {name!r}: cast them.")
    named = {name: score.astype(jnp.float32) for name, score in named.items()}
    check_leaves("score", named, non_negative=True)
    return {name: settled(score) for name, score in named.items()}


def placed(mask: Shaped[Array, "..."], leaf: Any) -> Shaped[Array, "..."]:
    """A mask, or another array, laid out over devices as its leaf is; under jit that is the compiler's to decide."""
    if is_concrete(mask) and is_concrete(leaf) and isinstance(leaf, jax.Array) and mask.sharding != leaf.sharding:
        return jax.device_put(mask, leaf.sharding)
    return mask
