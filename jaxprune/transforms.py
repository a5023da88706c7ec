"""Optimizers that prune: they decide *when* masks are computed, and make every update land on exact zero.

The update of a dead weight is minus the weight, so that `optax.apply_updates` gives w + (-w) = +0 to the bit,
whatever the inner optimizer remembers. For that nothing may change the update afterwards: in `optax.chain`,
`keep_params_sparse` goes last, and `prune` goes around everything else.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Int, Key, Shaped

from jaxprune import schedules, tree
from jaxprune.checks import is_concrete
from jaxprune.criteria import gradient, random
from jaxprune.masks import pack_masks, unpack_masks
from jaxprune.methods import Method, check_start, compute_masks, init_statistics, placed, update_statistics
from jaxprune.regrowth import check_regrowth, regrow_masks
from jaxprune.types import Criterion, Masks, Params, Schedule, UpdateWhen

T = TypeVar("T")


class PruneState(NamedTuple):
    """State of `prune`; `optax.tree.get(opt_state, "masks")` finds the masks in any nesting.

    Attributes:
        step: updates so far.
        masks: True = alive, structure of the params; packed on request, see `prune`.
        key: the key handed in, for criteria that draw; () if none.
        statistics: what a `Running` criterion remembers; () for any other.
        inner_state: the inner optimizer's.
    """

    step: Int[Array, ""]
    masks: Any
    key: Any
    statistics: Any
    inner_state: Any


class RegrowState(NamedTuple):
    """State of `regrow`.

    Attributes:
        step: updates so far.
        masks: True = alive, structure of the params.
        key: the key handed in.
        statistics: what `Running` criteria remember, (of the dropping one, of the growing one).
        inner_state: the inner optimizer's.
    """

    step: Int[Array, ""]
    masks: Masks
    key: Key[Array, ""]
    statistics: tuple[Any, Any]
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
    packed: bool = False,
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
        packed: keep masks at one bit a weight instead of a byte; in the state they then are what `pack_masks` gives,
            and `unpack_masks(masks, params)` brings them back. A step unpacks them, which takes it a little time.

    Returns:
        A transformation whose `update` needs `params`, and hands keyword arguments both to the criterion, as evidence,
        and to `inner`.

    Raises:
        ValueError: `sparsity` is no fraction; at `init`, `method` selects no leaf, or the masks of step 0 would empty
            one that is all zero; at `update`, no params.
    """
    inner = optax.with_extra_args_support(inner)
    schedule = schedules.as_schedule(sparsity)
    stored = pack_masks if packed else lambda masks: masks

    def init(params: Params) -> PruneState:
        if jax.tree.leaves(params):  # `optax.tree.map_params` looks at the state of a tree without leaves
            tree.selected_leaves(method.select, params)
            check_start(method, params, update_when, schedule, {} if key is None else {"key": key})
        masks = jax.tree.map(lambda param: jnp.ones_like(param, dtype=bool), params)
        # A copy of the key: a donated state must not take the caller's with it.
        own_key = () if key is None else jnp.copy(key)
        statistics = init_statistics(method, params)
        return PruneState(jnp.zeros((), jnp.int32), stored(masks), own_key, statistics, inner.init(params))

    def update(updates: Any, state: Any, params: Params | None = None, **extra: Any) -> tuple[Any, PruneState]:
        if params is None:
            raise ValueError("`prune` needs the params: call `tx.update(grads, opt_state, params)`.")
        known = {} if key is None else {"key": jax.random.fold_in(state.key, state.step)}
        known |= {**extra, "grads": updates}
        statistics = update_statistics(method, state.statistics, params, **known)
        known |= {"statistics": statistics} if statistics else {}

        def compute() -> Any:
            before = unpack_masks(state.masks, params) if packed else state.masks
            return stored(compute_masks(method, params, schedule(state.step), masks=before, **known))

        kept = if_due(update_when(state.step), compute, state.masks)
        masks = unpack_masks(kept, params) if packed else kept
        steps, inner_state = _inner(inner, updates, state, params, masks, extra)
        new_state = PruneState(jnp.asarray(optax.safe_increment(state.step)), kept, state.key, statistics, inner_state)
        return jax.tree.map(land, steps, params, masks), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def regrow(
    inner: optax.GradientTransformation,
    method: Method,
    *,
    sparsity: float,
    key: Key[Array, ""],
    drop_fraction: Schedule | float = 0.3,
    grow: Criterion | Any = gradient,
    update_when: UpdateWhen = schedules.every(100),
) -> optax.GradientTransformationExtraArgs:
    """`inner`, on a model that is sparse from the first step on, and whose living weights move.

    Masks begin at random, with as many weights in each leaf as `method`'s distribution has it. At steps where
    `update_when` says so, a fraction of the living dies, the lowest by the method's criterion, and as many dead weights
    come to life at zero, the highest by `grow`. With `grow=random` this is SET, with `gradient` RigL, with `momentum()`
    sparse momentum within each leaf.

    Args:
        inner: the optimizer, its whole chain.
        method: what to drop, and by which distribution to begin: `Method(distribution=ERK())`.
        sparsity: fraction removed, all the time.
        key: for the masks at the beginning and criteria that draw; folded with the step.
        drop_fraction: fraction of the living that moves, or a schedule of it: `optax.cosine_decay_schedule(0.3, n)`.
        grow: criterion for dead weights.
        update_when: step -> bool, as in `prune`; give it an end, after which masks stay.

    Returns:
        A transformation like `prune`'s. Params come to their zeros with the first update; `apply_masks` with the masks
        in the state does it before.

    Raises:
        ValueError: `sparsity` or a known `drop_fraction` is out of range; a composition whose pattern would break.

    References:
        Mocanu et al. 2018 (SET), arXiv:1707.04780; Evci et al. 2020 (RigL), arXiv:1911.11134; Dettmers and Zettlemoyer
        2019, arXiv:1907.04840.
    """
    inner = optax.with_extra_args_support(inner)
    check_regrowth(method)
    if not callable(drop_fraction) and not 0 <= drop_fraction <= 1:
        raise ValueError(f"`drop_fraction` is a fraction of the living weights, in [0, 1]; got {drop_fraction}.")
    fraction: Any = drop_fraction if callable(drop_fraction) else lambda step: drop_fraction
    first, growing = (dataclasses.replace(method, criterion=criterion) for criterion in (random, grow))

    def init(params: Params) -> RegrowState:
        # `optax.tree.map_params` looks at the state of a tree without leaves.
        masks = compute_masks(first, params, sparsity, key=key) if jax.tree.leaves(params) else params
        statistics = (init_statistics(method, params), init_statistics(growing, params))
        return RegrowState(jnp.zeros((), jnp.int32), masks, jnp.copy(key), statistics, inner.init(params))

    def update(updates: Any, state: Any, params: Params | None = None, **extra: Any) -> tuple[Any, RegrowState]:
        if params is None:
            raise ValueError("`regrow` needs the params: call `tx.update(grads, opt_state, params)`.")
        known = {**extra, "key": jax.random.fold_in(state.key, state.step), "grads": updates}
        statistics = tuple(
            update_statistics(one, had, params, **known)
            for one, had in zip((method, growing), state.statistics, strict=True)
        )

        def compute() -> Masks:
            return regrow_masks(method, grow, params, state.masks, fraction(state.step), statistics=statistics, **known)

        masks = if_due(update_when(state.step), compute, state.masks)
        steps, inner_state = _inner(inner, updates, state, params, masks, extra)
        step = jnp.asarray(optax.safe_increment(state.step))
        return jax.tree.map(land, steps, params, masks), RegrowState(step, masks, state.key, statistics, inner_state)

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
        return jax.tree.map(land, updates, params, state.masks), state

    return optax.GradientTransformation(init, update)


def if_due(due: Any, compute: Callable[[], T], masks: T) -> T:
    """`compute()` where it is due, the masks there are, packed or not, where it is not; traced once in either case."""
    # Outside jit a branch of Python's: `lax.cond` would be compiled anew at every step.
    if is_concrete(due):
        return compute() if due else masks
    return lax.cond(due, compute, lambda: masks)


def _inner(
    inner: Any, updates: Any, state: Any, params: Params, masks: Masks, extra: dict[str, Any]
) -> tuple[Any, Any]:
    """The inner optimizer's step, to which gradients of dead weights are zero."""
    alive = jax.tree.map(lambda u, m: jnp.where(m, u, jnp.zeros((), u.dtype)), updates, masks)
    return inner.update(alive, state.inner_state, params, **extra)


def land(update: Shaped[Array, "..."], param: Shaped[Array, "..."], mask: Bool[Array, "..."]) -> Shaped[Array, "..."]:
    """The update where alive, minus the param where dead, in a dtype that holds both exactly."""
    exact = jnp.promote_types(update.dtype, param.dtype)
    return jnp.where(mask, update.astype(exact), -param.astype(exact))
