"""Optimizers that prune: they decide *when* masks are computed, and make every update land on exact zero.

The update of a dead weight is minus the weight, so that `optax.apply_updates` gives w + (-w) = +0 to the bit,
whatever the inner optimizer remembers. For that nothing may change the update afterwards: in `optax.chain`,
`keep_params_sparse` goes last, and `prune` goes around everything else, averages of weights above all:
`prune(optax.lookahead(...))`, `prune(optax.contrib.schedule_free(...))`, never the other way around.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxprune import schedules, tree
from jaxprune.checks import check_number, is_concrete
from jaxprune.criteria import gradient, magnitude, random
from jaxprune.masks import pack_masks, sparsity_of, unpack_masks
from jaxprune.methods import Method, check_start, compute_masks, init_statistics, update_statistics
from jaxprune.training.inner import dense_gradients, if_due, model_of, update_inner
from jaxprune.training.regrowth import check_regrowth, regrow_masks
from jaxprune.training.transformation import after, begun, evidence, filled, landed, owned, remembered, transformation
from jaxprune.types import Criterion, Masks, Params, Schedule, UpdateWhen


class PruneState(NamedTuple):
    """State of `prune`; `optax.tree.get(opt_state, "masks")` finds the masks in any nesting.

    Attributes:
        step: updates so far.
        masks: True = alive, structure of the params; packed on request, see `prune`.
        key: the key handed in, for criteria that draw; () if none.
        statistics: what a `Running` criterion remembers; () for any other.
        inner_state: the inner optimizer's; weights that it keeps are zero where they are dead.
        start: the masks handed in, packed like the others; () if none.
    """

    step: Int[Array, ""]
    masks: Any
    key: Any
    statistics: Any
    inner_state: Any
    start: Any = ()


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
    sparsity: Schedule | Float[Array, ""] | float | None = None,
    update_when: UpdateWhen | Bool[Array, ""] | bool | None = None,
    masks: Masks | None = None,
    key: Key[Array, ""] | None = None,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, on a model that `method` prunes as it trains.

    At steps where `update_when` says so, masks are computed from the params, the gradients and `sparsity(step)`. To
    `inner` the model is pruned: dead weights and their gradients are zero, so that norms, momentum, averages of weights
    and statistics are those of what is left, and a line search looks at the loss without them.

    Args:
        inner: the optimizer, its whole chain.
        method: what to prune and how to choose.
        sparsity: schedule, step -> fraction removed; a number is that fraction at every step; None for distributions
            that decide themselves.
        update_when: step -> bool; a bool is that at every step; None follows from the schedule, with the last update
            where it ends, and every 100 steps if it does not know when it changes. Steps are calls of `update`, from 0;
            inside `optax.MultiSteps` they are its updates.
        masks: of a model that is sparse already, such as `nonzero_masks(params)`: what is dead by them is dead from the
            first update on, counts, and never comes back. Without, zeros of the params are weights like others. With
            `update_when=False` these masks are the last.
        key: for criteria that draw random numbers; folded with the step.
        packed: keep masks at one bit a weight instead of a byte; in the state they then are what `pack_masks` gives,
            and `unpack_masks(masks, params)` brings them back. A step unpacks them, which takes it a little time.

    Returns:
        A transformation whose `update` needs `params`, and hands keyword arguments both to the criterion, as evidence,
        and to `inner`. Evidence besides are the updates, as `grads`, and the key; `grads=` and `key=` handed in take
        their place. Updates have the wider dtype of gradient and param, which holds both exactly: where
        `optax.apply_if_finite` around it wants that of the gradients, hand in `optax.tree.cast_like(grads, params)`.

    Raises:
        ValueError: `sparsity` is no fraction; at `init`, `method` selects no leaf, the masks of step 0 would empty one
            that is all zero, `masks` have other leaves or shapes than the params or more dead weights than `sparsity`
            ends with; at `update`, no params.
    """
    inner = optax.with_extra_args_support(inner)
    schedule = schedules.as_schedule(sparsity)
    when = schedules.as_update_when(update_when, schedule)
    stored = pack_masks if packed else lambda masks: masks

    def init(params: Params) -> PruneState:
        model = model_of(params)
        if masks is None and jax.tree.leaves(model):
            check_start(method, model, when, schedule, {} if key is None else {"key": key})
        if masks is not None:
            _check_end(method, schedule, masks)
        start = () if masks is None else stored(owned(masks, model))
        # A copy: a donated state must not give away one leaf twice.
        first = stored(filled(True, model)) if masks is None else jax.tree.map(jnp.copy, start)
        return PruneState(
            masks=first, start=start, statistics=init_statistics(method, model), **begun(inner, params, key)
        )

    def update(updates: Any, state: Any, params: Params, **extra: Any) -> tuple[Any, PruneState]:
        model, due = model_of(params), when(state.step)
        known = evidence(state.key, state.step, updates, extra)
        statistics, known = remembered(method, state.statistics, model, known)

        def compute() -> Any:
            before = unpack_masks(state.masks, model) if packed else state.masks
            found = compute_masks(method, model, schedule(state.step), masks=before, **known)
            if masks is not None:
                start = unpack_masks(state.start, model) if packed else state.start
                found = jax.tree.map(jnp.logical_and, found, start)
            return stored(found)

        kept = if_due(due, compute, state.masks)
        alive = unpack_masks(kept, model) if packed else kept
        # Masks handed in are new at the first step, if they are not those of a step before it.
        new = due | (state.step == 0) if masks is not None else due
        steps, inner_state = update_inner(inner, updates, state.inner_state, params, alive, extra, new)
        moved = {"masks": kept, "statistics": statistics, "inner_state": inner_state}
        return landed(steps, params, alive), state._replace(step=after(state.step), **moved)

    return transformation("prune", init, update, method.select)


def _check_end(method: Method, schedule: Schedule, masks: Masks) -> None:
    """Refuse a schedule that ends below the sparsity that is there already."""
    if not all(map(is_concrete, jax.tree.leaves(masks))):
        return
    with jax.ensure_compile_time_eval():
        last = schedule(jnp.int32(2**30))
        if last is None or not is_concrete(last) or not 0 <= last < 1:  # one that goes on beyond its end says nothing
            return
        ones = jax.tree.map(lambda mask: jnp.asarray(mask, jnp.float32), masks)
        chosen = tree.selected_leaves(method.select, ones)
        # The method's own rounding: what it would take from weights that are 0 and 1.
        taken = compute_masks(dataclasses.replace(method, criterion=magnitude), ones, last)
        there, then = (sparsity_of(one, lambda name, _: name in chosen) for one in (masks, taken))
        if then < there:
            raise ValueError(
                f"`masks` have {float(there):.4g} of the selected weights removed already, `sparsity` ends at "
                f"{float(last):.4g}, and what is dead by `masks` stays dead. Ask for more than there is, or leave "
                "`masks` out, so that all weights compete again."
            )


def regrow(
    inner: optax.GradientTransformation,
    method: Method,
    *,
    sparsity: Float[Array, ""] | float,
    key: Key[Array, ""],
    drop_fraction: Schedule | Float[Array, ""] | float = 0.3,
    grow: Criterion | Any = gradient,
    update_when: UpdateWhen | Bool[Array, ""] | bool = schedules.every(100),
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
    if not callable(drop_fraction):
        said = "`drop_fraction` is a fraction of the living weights, in [0, 1];"
        check_number(drop_fraction, said, high=1, ends="[]")
    fraction: Any = drop_fraction if callable(drop_fraction) else lambda step: drop_fraction
    when = schedules.as_update_when(update_when)
    first, growing = (dataclasses.replace(method, criterion=criterion) for criterion in (random, grow))

    def init(params: Params) -> RegrowState:
        model = model_of(params)
        # `optax.tree.map_params` looks at the state of a tree without leaves.
        masks = compute_masks(first, model, sparsity, key=key) if jax.tree.leaves(model) else model
        statistics = (init_statistics(method, model), init_statistics(growing, model))
        return RegrowState(masks=masks, statistics=statistics, **begun(inner, params, key))

    def update(updates: Any, state: Any, params: Params, **extra: Any) -> tuple[Any, RegrowState]:
        model, due = model_of(params), when(state.step)
        # A line search has forgotten the gradients of dead weights; statistics need them at every step.
        grads = dense_gradients(updates, model, extra, due if state.statistics == ((), ()) else True)
        known = evidence(state.key, state.step, grads, extra)
        statistics = tuple(
            update_statistics(one, had, model, **known)
            for one, had in zip((method, growing), state.statistics, strict=True)
        )

        def compute() -> Masks:
            return regrow_masks(method, grow, model, state.masks, fraction(state.step), statistics=statistics, **known)

        masks = if_due(due, compute, state.masks)
        # Params come to the first masks at the first step.
        new = due | (state.step == 0)
        steps, inner_state = update_inner(inner, updates, state.inner_state, params, masks, extra, new)
        moved = {"masks": masks, "statistics": statistics, "inner_state": inner_state}
        return landed(steps, params, masks), state._replace(step=after(state.step), **moved)

    return transformation("regrow", init, update, method.select)


def keep_params_sparse(masks: Masks) -> optax.GradientTransformationExtraArgs:
    """Fixed masks: whatever came before it in the chain, dead weights stay, or become, exactly zero.

    What came before it looks at the dense model and remembers that: after a line search, or for averages of weights
    that are as sparse as the weights, take `prune(inner, method, masks=masks, update_when=False)`.

    Args:
        masks: True = alive, leaves and shapes of the params. They are copied into the optimizer's state, where
            `optax.tree.get(opt_state, "masks")` finds them.

    Returns:
        A transformation for the end of `optax.chain`.

    Raises:
        ValueError: at `init`, the masks have other leaves or shapes than the params; at `update`, no params, or the
            function of a line search.
    """

    def init(params: Params) -> KeepSparseState:
        return KeepSparseState(owned(masks, model_of(params)))

    def update(
        updates: Any, state: Any, params: Params, *, value_fn: Any = None, **extra: Any
    ) -> tuple[Any, KeepSparseState]:
        if value_fn is not None:
            raise ValueError(
                "`keep_params_sparse` comes after the line search, whose points and values are then not those of the "
                "params. Put the optimizer inside: `prune(inner, method, masks=masks, update_when=False)`."
            )
        return landed(updates, params, state.masks), state

    return transformation("keep_params_sparse", init, update)
