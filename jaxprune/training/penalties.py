r"""Penalties: what draws weights, or groups of them, to zero before they are cut.

    tx = optax.chain(group_lasso(1e-3), optax.sgd(0.1))         # the loss plus a penalty, by its derivative

Each adds the derivative of a penalty to the updates, and so goes before the optimizer, for which it is a part of the
loss: momentum and Adam's moments take it in. They bring weights near zero, not to it; `prune` and `apply_masks` cut.
Nothing here depends on how weights are sharded.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jaxprune import layout as layouts
from jaxprune import tree
from jaxprune.checks import check_number, check_sparsity
from jaxprune.criteria import squared_magnitude
from jaxprune.exact.meshes import lying_like
from jaxprune.exact.numerics import at_least_float32, settled
from jaxprune.granularity import Granularity, Output
from jaxprune.methods import Method, compute_masks, group_scores, init_statistics
from jaxprune.training.inner import if_due
from jaxprune.training.transformation import after, evidence, filled, remembered, transformation
from jaxprune.types import Masks, Params, Schedule

Slopes = dict[str, Array]
"""Leaf name -> derivative of a penalty of strength 1, for the leaves that have one."""


class PenaltyState(NamedTuple):
    """State of a penalty whose strength is a schedule; one with a number has none.

    Attributes:
        penalty_step: updates so far; a name of its own, since `prune` has a step too.
    """

    penalty_step: Int[Array, ""]


class GrowingPenaltyState(NamedTuple):
    """State of `growing_penalty`; `optax.tree.get(opt_state, "unwanted")` finds its choice in any nesting.

    Attributes:
        penalty_step: updates so far.
        unwanted: True = is to go, structure of the params; all False before the first update.
    """

    penalty_step: Int[Array, ""]
    unwanted: Masks


def l1(
    strength: float | Float[Array, ""] | Schedule, select: tree.Select = tree.weights
) -> optax.GradientTransformation:
    r"""The penalty $\lambda \sum |w|$: adds $\lambda \, \mathrm{sign}(w)$, and 0 to a weight that is zero.

    With a fixed learning rate weights end up going back and forth within $\eta \lambda$ of zero.

    Args:
        strength: $\lambda \ge 0$, or a schedule step -> $\lambda$; steps are updates, from 0.
        select: which leaves, in any form of `Method.select`.

    Returns:
        A transformation for `optax.chain`, before the optimizer. Updates keep their dtype.

    Raises:
        ValueError: `strength` is negative or not finite; at `init`, nothing is selected; at `update`, no params.

    References:
        Tibshirani 1996 (the lasso); Han et al. 2015, arXiv:1506.02626, section 3.1 (L1 against L2 before pruning).
    """

    def slopes(params: Params) -> Slopes:
        return {name: jnp.sign(leaf) for name, leaf in tree.selected_leaves(select, params).items()}

    return _penalty("l1", strength, select, slopes)


def group_lasso(
    strength: float | Float[Array, ""] | Schedule,
    granularity: Granularity = Output(),
    select: tree.Select = tree.weights,
    layout: layouts.Layout = layouts.BY_NAME,
) -> optax.GradientTransformation:
    r"""The penalty $\lambda \sum_g \sqrt{|g|} \, \lVert w_g \rVert_2$: whole groups go to zero, others stay.

    Adds $\lambda \sqrt{|g|} \, w / \lVert w_g \rVert_2$, the weight over the root mean square of its group, whatever
    the group's size; 0 to a group at zero. With `Element()` it is `l1`. Stacked layers have groups of their own.

    Args:
        strength: $\lambda \ge 0$, or a schedule step -> $\lambda$; steps are updates, from 0.
        granularity: what a group is; that of the `Method` which is to cut them.
        select: which leaves, in any form of `Method.select`.
        layout: which axes of a leaf are its inputs and outputs.

    Returns:
        A transformation for `optax.chain`, before the optimizer. Updates keep their dtype.

    Raises:
        ValueError: `strength` is negative or not finite; at `init`, nothing is selected, or a leaf does not divide into
            groups; at `update`, no params, or (outside jit) NaN in a weight.
        TypeError: `granularity` is none of those that cut up one leaf at a time.

    References:
        Yuan and Lin 2006 (the group lasso, with $\sqrt{|g|}$); Wen et al. 2016, arXiv:1608.03665, who leave the root
        out and sum over filters and channels at once: chain two of these.
    """
    if not isinstance(granularity, Granularity):
        raise TypeError(
            f"`group_lasso` needs groups within one leaf, such as `Output()`; got {type(granularity).__name__}, "
            "which does not `pool` and `expand` single leaves."
        )
    method = Method(squared_magnitude, granularity, select=select, layout=layout)

    @lying_like("params")
    def slopes(params: Params) -> Slopes:
        leaves, axes, squares = group_scores(method, params)
        return {name: _over_group(leaf, axes[name], granularity, squares[name]) for name, leaf in leaves.items()}

    return _penalty("group_lasso", strength, select, slopes)


def growing_penalty(
    method: Method,
    sparsity: float | None,
    *,
    rise: float | Float[Array, ""],
    every: int,
    ceiling: float | Float[Array, ""],
    key: Key[Array, ""] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GReg-1: weights that are to go are chosen once, and drawn to zero by an L2 penalty that grows.

    At the first update the masks are `compute_masks(method, params, sparsity)`. From then on it adds $\lambda_t w$ to
    the updates of what is to go, and nothing to those of the rest, with
    $\lambda_t = \min(\tau, \delta (\lfloor t / K \rfloor + 1))$. Then cut:

        masks = jax.tree.map(jnp.logical_not, optax.tree.get(opt_state, "unwanted"))
        params = apply_masks(params, masks)

    Args:
        method: what is to go. It is handed evidence as by `prune`: the updates that arrive as `grads`, the key, and the
            keyword arguments of `update`.
        sparsity: fraction that is to go; None for distributions that decide themselves.
        rise: $\delta > 0$, added every K updates; 1e-4 in the authors' code.
        every: K, at least 1; 5 there.
        ceiling: $\tau > 0$; 1 there. Plain SGD with a learning rate $\eta$ needs $\eta \tau < 2$.
        key: for criteria that draw random numbers; used as `prune` does at step 0.

    Returns:
        A transformation for `optax.chain`, before the optimizer. Updates keep their dtype.

    Raises:
        ValueError: a number is out of range; at `init`, `method` selects no leaf; at `update`, no params.

    References:
        Wang et al. 2021, arXiv:2012.09243, algorithm 1. There layers have sparsities of their own (`ByRule`), and the
        penalty stays at its ceiling for a while before the cut: train on.
    """
    if sparsity is not None:
        check_sparsity(sparsity)
    _check_number("growing_penalty", "rise", rise, "> 0")
    _check_number("growing_penalty", "ceiling", ceiling, "> 0")
    if every < 1:
        raise ValueError(f"`growing_penalty` needs `every` >= 1 updates, got {every}.")

    def init(params: Params) -> GrowingPenaltyState:
        return GrowingPenaltyState(jnp.zeros((), jnp.int32), filled(False, params))

    def update(updates: Any, state: Any, params: Params, **extra: Any) -> tuple[Any, GrowingPenaltyState]:
        step, known = state.penalty_step, evidence(key, state.penalty_step, updates, extra)
        unwanted = if_due(step == 0, lambda: _unwanted(method, params, sparsity, known), state.unwanted)
        grown = jnp.asarray(rise, jnp.float32) * (step // every + 1).astype(jnp.float32)
        strength = jnp.minimum(jnp.asarray(ceiling, jnp.float32), grown)
        drawn = jax.tree.map(lambda u, p, gone: _drawn(u, p, gone, strength), updates, params, unwanted)
        return drawn, GrowingPenaltyState(after(step), unwanted)

    return transformation("growing_penalty", init, update, method.select)


def _unwanted(method: Method, params: Any, sparsity: float | None, known: dict[str, Any]) -> Masks:
    """True where `method` removes; a `Running` criterion has seen this one step."""
    _, known = remembered(method, init_statistics(method, params), params, known)
    return jax.tree.map(jnp.logical_not, compute_masks(method, params, sparsity, **known))


def _drawn(update: Array, param: Array, gone: Array, strength: Array) -> Array:
    """The update with the derivative of the L2 penalty where the weight is to go, untouched elsewhere."""
    if not jnp.issubdtype(param.dtype, jnp.floating):
        return update
    return jnp.where(gone, _added(update, param, strength), update)


def _over_group(leaf: Array, axes: layouts.Axes, granularity: Any, squares: Array) -> Array:
    """Each weight over the root mean square of its group; `squares` are the groups' means of squares."""
    view = layouts.to_view(leaf, axes).astype(at_least_float32(leaf.dtype))
    # At least the root of the smallest normal number: below it squares are flushed, and a group at zero stays there.
    size = jnp.maximum(jnp.sqrt(squares), math.sqrt(jnp.finfo(squares.dtype).tiny))
    slope = view / granularity.expand(size, view.shape).astype(view.dtype)
    return layouts.from_view(slope, axes, leaf.shape)


def _penalty(
    name: str, strength: Any, select: tree.Select, slopes: Callable[[Params], Slopes]
) -> optax.GradientTransformation:
    """The transformation that adds strength times `slopes(params)`."""
    scheduled = callable(strength)
    if not scheduled:
        _check_number(name, "strength", strength)

    def init(params: Params) -> Any:
        if jax.tree.leaves(params):
            jax.eval_shape(slopes, params)  # leaves that do not fit are refused before training
        return PenaltyState(jnp.zeros((), jnp.int32)) if scheduled else optax.EmptyState()

    def update(updates: Any, state: Any, params: Params, **_: Any) -> tuple[Any, Any]:
        now = strength(state.penalty_step) if scheduled else strength
        _check_number(name, "strength", now)
        slope = slopes(params)

        def penalised(leaf: str, update: Array) -> Array:
            return _added(update, slope[leaf], now) if leaf in slope else update

        return tree.map_named(penalised, updates), PenaltyState(after(state.penalty_step)) if scheduled else state

    return transformation(name, init, update, select)


def _added(update: Array, slope: Array, strength: Any) -> Array:
    """update + strength * slope, computed in float32 at least and rounded once, to the update's dtype."""
    wide = at_least_float32(update.dtype, slope.dtype)
    penalty = settled(jnp.asarray(strength, wide) * slope.astype(wide))
    return (update.astype(wide) + penalty).astype(update.dtype)


def _check_number(name: str, what: str, value: Any, bound: str = ">= 0") -> None:
    if jnp.ndim(value) != 0:
        raise ValueError(f"`{name}` needs one number as its `{what}`, got an array of shape {jnp.shape(value)}.")
    check_number(value, f"`{name}` needs a finite `{what}` {bound},", ends="[)" if bound == ">= 0" else "()")
