"""A pruning method: four small answers put together, and the one line that runs them.

masks = expand(distribution(pool(criterion(params)), sparsity))
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune import layout as layouts
from jaxprune import tree
from jaxprune.checks import check_leaves, check_sparsity, is_concrete
from jaxprune.criteria import BY_AXES, FACTORIES, Running, magnitude
from jaxprune.distributions import Distribution, Global
from jaxprune.exact.meshes import lying_like, placed
from jaxprune.exact.numerics import settled
from jaxprune.granularity import (
    AcrossLeaves,
    ByRule,
    Element,
    Geometry,
    Granularity,
    expand_leaves,
    granularities,
    pool_leaves,
)
from jaxprune.types import Masks, Params, Schedule, Scores, Sparsity, UpdateWhen


@dataclasses.dataclass(frozen=True)
class Method:
    """What to prune and how to choose; says nothing of when.

    Attributes:
        criterion: how much does each weight matter (`jaxprune.criteria`, or a function of your own).
        granularity: which weights live or die together; by leaf with `granularity.ByRule`.
        distribution: who competes with whom, and how many win.
        select: which leaves are pruned: a function (name, leaf) -> bool, patterns of names, or rules pattern -> bool;
            a list or mapping is kept as a tuple, so that a method can be hashed.
        layout: which axes of a leaf are its inputs and outputs: told by its name (`BY_NAME`), `FLAX`, `TORCH`, one of
            your own, or `layout_of(sites)`.

    Raises:
        TypeError: an answer is none: a class, or a function that makes a criterion, where an object is expected.
    """

    criterion: Callable[..., Scores] = magnitude
    granularity: Granularity | ByRule | AcrossLeaves = Element()
    distribution: Distribution = Global()
    select: tree.Select = tree.weights
    layout: layouts.Layout = layouts.BY_NAME

    def __post_init__(self) -> None:
        object.__setattr__(self, "select", tree.hashable(self.select))
        for makes, call in FACTORIES.items():
            if self.criterion is makes:
                raise TypeError(f"`{makes.__name__}` makes criteria and is none: call it, as in `{call}`.")
        _check_answer("criterion", self.criterion, callable(self.criterion), "magnitude")
        pools = hasattr(self.granularity, "pool") and hasattr(self.granularity, "expand")
        known = pools or isinstance(self.granularity, ByRule | AcrossLeaves)
        _check_answer("granularity", self.granularity, known, "Element()")
        _check_answer("distribution", self.distribution, callable(self.distribution), "Global()")
        for _, rule in getattr(self.distribution, "rules", ()):
            _check_answer("distribution", rule, True, "Global()")
        _check_answer("layout", self.layout, hasattr(self.layout, "axes"), "FLAX")


def _check_answer(what: str, value: Any, fits: bool, example: str) -> None:
    """Refuse what cannot answer, classes first: many of them can be called, and then give nonsense."""
    if isinstance(value, type):
        raise TypeError(
            f"`{what}` must be an object such as `{example}`; the class `{value.__name__}` arrived: call it."
        )
    if not fits:
        raise TypeError(f"`{what}` must be an object such as `{example}`; {value!r} arrived.")


@lying_like("params")
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
    _check_priced(method)
    geometry = _geometry(params, axes)
    groups = pool_leaves(method.granularity, scores, geometry)
    dims = {name: _dims(name, group, geometry) for name, group in groups.items()}
    found = expand_leaves(method.granularity, method.distribution(groups, sparsity, dims=dims), geometry)
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


@lying_like("params")
def group_scores(
    method: Method, params: Params, **evidence: Any
) -> tuple[dict[str, Any], dict[str, layouts.Axes], dict[str, Array]]:
    """The selected leaves, their axes, and the scores of their groups; arguments and errors of `compute_masks`."""
    leaves, axes, scores = _scored(method, params, evidence)
    return leaves, axes, pool_leaves(method.granularity, scores, _geometry(params, axes))


@lying_like("params")
def init_statistics(method: Method, params: Params) -> Any:
    """What a `Running` criterion remembers before the first step, leaf name -> array; () for any other criterion."""
    if not isinstance(method.criterion, Running) or not jax.tree.leaves(params):
        return ()
    leaves, axes, views = _seen(method, params)
    return {
        name: layouts.from_view(found, axes[name], jnp.shape(leaves[name]))
        for name, found in method.criterion.init(views).items()
    }


@lying_like("params")
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


def _geometry(params: Params, axes: dict[str, layouts.Axes]) -> Geometry:
    return Geometry(axes, {name: jnp.shape(leaf) for name, leaf in tree.named_leaves(params).items()})


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
    _check_axes(method, leaves)
    return leaves, axes, {name: layouts.to_view(leaf, axes[name]) for name, leaf in leaves.items()}


def _check_axes(method: Method, leaves: dict[str, Any]) -> None:
    """Refuse leaves of which it matters to the method, and is not known, which axes are inputs and outputs."""
    distribution = method.distribution
    looks = getattr(distribution, "looks_at_axes", False) or method.criterion in BY_AXES
    spans = getattr(distribution, "spans_axes", False)
    across = isinstance(method.granularity, AcrossLeaves)
    by_leaf = dict.fromkeys(leaves, Element()) if across else granularities(method.granularity, leaves)
    for name, leaf in leaves.items():
        if looks or getattr(by_leaf[name], "looks_at_axes", True):
            method.layout.check_named(name, jnp.shape(leaf))
        if spans or getattr(by_leaf[name], "spans_axes", True):
            method.layout.check_stacked(name, jnp.shape(leaf))


def _dims(name: str, group: Array, geometry: Geometry) -> tuple[int, ...]:
    """Sizes of the leaf whose groups these are; groups across leaves are named by one and an axis, "conv1/kernel:3"."""
    leaf = name if name in geometry.axes else name.rpartition(":")[0]
    return layouts.dims(geometry.shapes[leaf], geometry.axes[leaf]) if leaf in geometry.axes else (1, group.shape[-1])


def _check_priced(method: Method) -> None:
    """Refuse prices of groups that have none of their own."""
    if getattr(method.distribution, "is_priced", False) and isinstance(method.granularity, AcrossLeaves):
        raise ValueError(
            "`Budget` adds up what single groups cost; what a channel costs depends on which others are left, in the "
            "layer before and after. Use `masks_within` with `compacted_cost`."
        )


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
