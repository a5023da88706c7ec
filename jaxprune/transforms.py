"""Optimizers that prune: they decide *when* masks are computed, and make every update land on exact zero.

The update of a dead weight is minus the weight, so that `optax.apply_updates` gives w + (-w) = +0 to the bit,
whatever the inner optimizer remembers. For that nothing may change the update afterwards: in `optax.chain`,
`keep_params_sparse` goes last, and `prune` goes around everything else.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int, Key

from jaxprune import schedules, tree
from jaxprune.checks import is_concrete
from jaxprune.methods import Method, compute_masks, init_statistics, placed, update_statistics
from jaxprune.types import Masks, Params, Schedule, UpdateWhen


class PruneState(NamedTuple):
    """State of `prune`; `optax.tree.get(opt_state, "masks")` finds the masks in any nesting.

    Attributes:
        step: updates so far.
        masks: True = alive, structure of the params.
        key: the key handed in, for criteria that draw; () if none.
        statistics: what a `Running` criterion remembers; () for any other.
        inner_state: the inner optimizer's.
    """

    step: Int[Array, ""]
    masks: Masks
    key: Any
    statistics: Any
    inner_state: Any


class KeepSparseState(NamedTuple):
    """State of `keep_params_sparse`: the masks, an argument of the compiled step like every array."""

    masks: Masks


def prune(
    inner: optax.GradientTransformation,
    method: Method,
    *,
    sparsity: Schedule | float | None = None,
    update_when: UpdateWhen = schedules.every(100),
    key: Key[Array, ""] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, on a model that `method` prunes as it trains.

    At steps where `update_when` says so, masks are computed from the params, the gradients and `sparsity(step)`.
    Gradients of dead weights are zero to `inner`, so that norms, momentum and statistics are those of the pruned model.

    Args:
        inner: the optimizer, its whole chain.
        method: what to prune and how to choose.
        sparsity: schedule, step -> fraction removed; a number is that fraction at every step; None for distributions
            that decide themselves.
        update_when: step -> bool. Steps are calls of `update`, from 0; inside `optax.MultiSteps` they are its updates.
        key: for criteria that draw random numbers; folded with the step.

    Returns:
        A transformation whose `update` needs `params`, and hands keyword arguments both to the criterion, as evidence,
        and to `inner`.

    Raises:
        ValueError: `sparsity` is no fraction; at `init`, `method` selects no leaf; at `update`, no params.
    """
    inner = optax.with_extra_args_support(inner)
    if sparsity is None or callable(sparsity):
        schedule: Any = sparsity or (lambda step: None)
    else:
        schedule = schedules.constant(sparsity)

    def init(params: Params) -> PruneState:
        if jax.tree.leaves(params):  # `optax.tree.map_params` looks at the state of a tree without leaves
            tree.selected_leaves(method.select, params)
        masks = jax.tree.map(lambda param: jnp.ones_like(param, dtype=bool), params)
        # A copy of the key: a donated state must not take the caller's with it.
        own_key = () if key is None else jnp.copy(key)
        statistics = init_statistics(method, params)
        return PruneState(jnp.zeros((), jnp.int32), masks, own_key, statistics, inner.init(params))

    def update(updates: Any, state: Any, params: Params | None = None, **extra: Any) -> tuple[Any, PruneState]:
        if params is None:
            raise ValueError("`prune` needs the params: call `tx.update(grads, opt_state, params)`.")
        known = {} if key is None else {"key": jax.random.fold_in(state.key, state.step)}
        known |= {**extra, "grads": updates}
        statistics = update_statistics(method, state.statistics, params, **known)
        known |= {"statistics": statistics} if statistics else {}

        def compute() -> Masks:
            return compute_masks(method, params, schedule(state.step), masks=state.masks, **known)

        due = update_when(state.step)
        # Outside jit a branch of Python's: `lax.cond` would be compiled anew at every step.
        choose = _choose if is_concrete(due) else lax.cond
        masks = choose(due, compute, lambda: state.masks)
        alive = jax.tree.map(lambda u, m: jnp.where(m, u, jnp.zeros((), u.dtype)), updates, masks)
        steps, inner_state = inner.update(alive, state.inner_state, params, **extra)
        new_state = PruneState(jnp.asarray(optax.safe_increment(state.step)), masks, state.key, statistics, inner_state)
        return jax.tree.map(_land, steps, params, masks), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def keep_params_sparse(masks: Masks) -> optax.GradientTransformation:
    """Fixed masks: whatever came before it in the chain, dead weights stay, or become, exactly zero.

    Args:
        masks: True = alive, leaves and shapes of the params. They are copied into the optimizer's state, where
            `optax.tree.get(opt_state, "masks")` finds them.

    Returns:
        A transformation for the end of `optax.chain`.

    Raises:
        ValueError: at `init`, the masks have other leaves or shapes than the params; at `update`, no params.
    """

    def init(params: Params) -> KeepSparseState:
        if not jax.tree.leaves(params):
            return KeepSparseState(params)
        tree.check_like("The masks", masks, params)
        # Copies: a donated state must not take the caller's masks with it.
        copies = jax.tree.map(lambda mask: jnp.array(mask, copy=True), tree.match(masks, params))
        return KeepSparseState(jax.tree.map(placed, copies, params))

    def update(updates: Any, state: Any, params: Params | None = None) -> tuple[Any, KeepSparseState]:
        if params is None:
            raise ValueError("`keep_params_sparse` needs the params: call `tx.update(grads, opt_state, params)`.")
        return jax.tree.map(_land, updates, params, state.masks), state

    return optax.GradientTransformation(init, update)


def _choose(due: Any, compute: Callable[[], Masks], keep: Callable[[], Masks]) -> Masks:
    return compute() if due else keep()


def _land(update: Array, param: Array, mask: Array) -> Array:
    """The update where alive, minus the param where dead, in a dtype that holds both exactly."""
    exact = jnp.promote_types(update.dtype, param.dtype)
    return jnp.where(mask, update.astype(exact), -param.astype(exact))
