"""Splicing: training in which dead weights go on learning out of sight, and come back when they are worth it.

    params = where(masks, latent, 0)          latent <- latent - step(gradient at params)

The model always has exact zeros; the transformation's state holds the dense weights behind it, which receive the
gradients as if the zeros were not there (`jaxprune.straight_through`), and from which masks are computed.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxprune import schedules
from jaxprune.checks import check_number
from jaxprune.exact.numerics import settled
from jaxprune.masks import straight_through
from jaxprune.methods import Method, compute_masks, init_statistics
from jaxprune.training.inner import evaluated, functions_of, if_due, model_of
from jaxprune.training.transformation import after, begun, evidence, filled, landed, remembered, transformation
from jaxprune.types import Criterion, Masks, Params, Schedule, Scores, UpdateWhen


class SpliceState(NamedTuple):
    """State of `splice`.

    Attributes:
        step: updates so far.
        masks: True = alive, structure of the params.
        latent: the dense weights.
        key: the key handed in, for criteria that draw; () if none.
        statistics: what a `Running` criterion remembers; () for any other.
        inner_state: the inner optimizer's.
    """

    step: Int[Array, ""]
    masks: Masks
    latent: Params
    key: Any
    statistics: Any
    inner_state: Any


def splice(
    inner: optax.GradientTransformation,
    method: Method,
    *,
    sparsity: Schedule | Float[Array, ""] | float | None = None,
    update_when: UpdateWhen | Bool[Array, ""] | bool | None = None,
    margin: Float[Array, ""] | float = 0.0,
    decay: Float[Array, ""] | float = 0.0,
    key: Key[Array, ""] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""`inner`, on dense weights of which the model sees the survivors.

    Masks are computed from the latent weights, so that a weight that grew while it was dead is spliced in again, at the
    value that it has come to. `margin` keeps masks from flickering: scores of the living count 1 + margin times.

    Args:
        inner: the optimizer, its whole chain; its params are the latent weights.
        method: what to prune and how to choose; with `NM(2, 4)` and `decay` this is SR-STE.
        sparsity: schedule, step -> fraction removed; a number is that fraction at every step; None for distributions
            that decide themselves: with `SigmaThreshold(k)` weights die below k / (1 + margin) deviations and come
            back above k.
        update_when: as in `prune`.
        margin: advantage of the living, >= 0.
        decay: $\lambda$ >= 0; gradients of dead weights are $g + \lambda w$, which draws them to zero.
        key: for criteria that draw random numbers; folded with the step.

    Returns:
        A transformation like `prune`'s: params have exact zeros after every update. To `inner` the weights are dense,
        and what it averages are latent weights: evaluate these with masks, `apply_masks(average, masks)`. A line search
        has the loss of the model with its zeros, and takes the gradients of dead weights for slopes.

    Raises:
        ValueError: `sparsity`, `margin` or `decay` is out of range; at `init`, `method` selects no leaf; at `update`,
            no params.

    References:
        Guo, Yao and Chen 2016 (dynamic network surgery), arXiv:1608.04493, there with two thresholds a leaf; Zhou et
        al. 2021 (SR-STE), arXiv:2102.04010, eq. 9.
    """
    check_number(margin, "`splice(margin=...)` is a number of at least 0,")
    check_number(decay, "`splice(decay=...)` is a number of at least 0,")
    inner = optax.with_extra_args_support(inner)
    schedule = schedules.as_schedule(sparsity)
    when = schedules.as_update_when(update_when, schedule)
    favouring = dataclasses.replace(method, criterion=_favouring(method.criterion, margin))

    def init(params: Params) -> SpliceState:
        model, latent = model_of(params), jax.tree.map(jnp.copy, params)
        statistics = init_statistics(method, model)
        return SpliceState(masks=filled(True, model), latent=latent, statistics=statistics, **begun(inner, params, key))

    def update(updates: Any, state: Any, params: Params, **extra: Any) -> tuple[Any, SpliceState]:
        latent, due = state.latent, when(state.step)
        weights, known = model_of(latent), evidence(state.key, state.step, updates, extra)
        statistics, known = remembered(method, state.statistics, weights, known)

        def compute() -> Masks:
            return compute_masks(favouring, weights, schedule(state.step), alive=state.masks, **known)

        masks = if_due(due, compute, state.masks)
        extra = functions_of(extra, functools.partial(straight_through, masks=masks))
        updates, inner_state, extra = evaluated(updates, state.inner_state, weights, extra, due)
        drawn = jax.tree.map(functools.partial(_drawn, decay=decay), updates, weights, masks)
        extra |= {"grad": drawn} if "grad" in extra else {}
        steps, inner_state = inner.update(drawn, inner_state, latent, **extra)
        latent = optax.apply_updates(latent, steps)
        moves = jax.tree.map(_difference, latent, params)
        moved = {"masks": masks, "latent": latent, "statistics": statistics, "inner_state": inner_state}
        return landed(moves, params, masks), state._replace(step=after(state.step), **moved)

    return transformation("splice", init, update, method.select)


def _favouring(criterion: Criterion | Any, margin: Float[Array, ""] | float) -> Criterion:
    def favouring(params: Any, /, *, alive: Any, **evidence: Any) -> Scores:
        scores = criterion(params, **evidence)
        return {
            name: jnp.where(alive[name], settled(score.astype(jnp.float32) * jnp.float32(1 + margin)), score)
            for name, score in scores.items()
        }

    return favouring


def _drawn(grad: Array, weight: Array, mask: Array, *, decay: Float[Array, ""] | float) -> Array:
    return jnp.where(mask, grad, grad + (jnp.asarray(decay, weight.dtype) * weight).astype(grad.dtype))


def _difference(latent: Array, param: Array) -> Array:
    exact = jnp.promote_types(latent.dtype, jnp.float32)
    return latent.astype(exact) - param.astype(exact)
