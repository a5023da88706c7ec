"""Optimizers that prune: after every update the dead are +0 to the bit, and exactly as many as asked for.

Models are trees of noise and gradients are more noise: what holds must hold for any.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transforms_helpers import (
    ALWAYS,
    METHOD,
    OPTIMIZERS,
    STEPS,
    WEIGHTS,
    assert_all_finite,
    assert_close,
    assert_exact_zeros,
    draw,
    expected_removed,
    gradients,
    make_model,
    make_step,
    make_tree,
    named,
    put,
    removed,
    same_bits,
    take,
    train,
)

import jaxprune as jp

PRECISIONS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]


@pytest.fixture(autouse=True)
def as_users_have_it(relaxed):
    """optax promotes dtypes in Adam and in `apply_updates`; what this package does itself is tested strict below."""


# ---- exact zeros and exact counts, whatever the optimizer


@functools.cache
def trainer(name, around):
    """`train` compiled once for an optimizer: sparsities, dates and gradients are arguments."""

    @jax.jit
    def run(params, grads, sparsities, due):
        tx = jp.prune(OPTIMIZERS[name](), METHOD, sparsity=lambda t: sparsities[t], update_when=lambda t: due[t])
        tx = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation() if around else tx
        params, states = train(tx, params, grads)
        return params, optax.tree.get(states, "masks"), optax.tree.get(states, "step")

    return run


def assert_promises(history, sparsities, due):
    params, masks, steps = history
    assert_exact_zeros(params, masks)
    step_before = 0
    for i, step in enumerate(steps.tolist()):
        if step > step_before and due[step_before]:
            assert removed(take(masks, i)) == expected_removed(sparsities[step_before])
        elif i > 0:
            assert same_bits(take(masks, i), take(masks, i - 1))
        else:
            assert removed(take(masks, i)) == 0
        step_before = step
    return step_before


schedules = st.lists(st.floats(0, 0.984375, width=32), min_size=STEPS, max_size=STEPS)
dates = st.lists(st.booleans(), min_size=STEPS, max_size=STEPS)
seeds = st.integers(0, 2**16)
CASES = [(name, *PRECISIONS[0], False) for name in OPTIMIZERS]
CASES += [(name, *precision, False) for precision in PRECISIONS[1:] for name in ("plain", "adamw")]
# `MultiSteps` around: with params and gradients of one dtype and of two.
CASES += [("adamw", *precision, True) for precision in PRECISIONS[::2]]


@pytest.mark.parametrize(("optimizer", "dtype", "grad_dtype", "multi_steps_around"), CASES)
@given(sparsities=schedules, due=dates, seed=seeds)
def test_zeros_and_counts_are_exact(optimizer, dtype, grad_dtype, multi_steps_around, sparsities, due, seed):
    arguments = make_model(seed, dtype), gradients(seed=seed + 1, dtype=grad_dtype)
    history = trainer(optimizer, multi_steps_around)(*arguments, jnp.float32(sparsities), jnp.asarray(due))
    steps = assert_promises(jax.device_get(history), sparsities, due)
    assert steps == (STEPS // 2 if multi_steps_around else STEPS)


@functools.cache
def fine_tuner(name):
    @jax.jit
    def run(params, grads, masks):
        return train(optax.chain(OPTIMIZERS[name](), jp.keep_params_sparse(masks)), params, grads)[0]

    return run


# Every precision; updates of the gradients' dtype ("plain") and of the params' ("adamw") where these differ.
@pytest.mark.parametrize(
    ("optimizer", "dtype", "grad_dtype"),
    [("adamw", *precision) for precision in PRECISIONS] + [("plain", *precision) for precision in PRECISIONS[2:]],
)
@given(seed=seeds)
def test_fixed_masks_hold(optimizer, dtype, grad_dtype, seed):
    params, grads = make_model(seed, dtype), gradients(seed=seed + 1, dtype=grad_dtype)
    masks = jp.compute_masks(METHOD, params, 0.75)
    history = jax.device_get(fine_tuner(optimizer)(params, grads, masks))
    assert_exact_zeros(history, jax.tree.map(lambda mask: np.stack([mask] * STEPS), masks))
    assert not same_bits(take(history, 0), take(history, STEPS - 1))


@pytest.mark.parametrize("optimizer", ["nesterov", "clipped", "multi_steps"])
def test_nothing_removed_is_the_plain_optimizer(optimizer):
    params, grads = make_model(0), gradients()
    inner = OPTIMIZERS[optimizer]()
    plain = jax.jit(lambda: train(inner, params, grads)[0])()
    pruned = jax.jit(lambda: train(jp.prune(inner, METHOD, sparsity=0.0, update_when=ALWAYS), params, grads)[0])()
    assert_close(plain, pruned)


def test_nothing_is_promoted_by_chance():
    params, grads = make_model(0), make_tree(1)
    method = jp.Method(criterion=jp.taylor)
    pruner = jp.prune(optax.sgd(0.1), method, sparsity=jp.cubic(0.5, begin=0, end=1), update_when=ALWAYS)
    tx = optax.chain(pruner, jp.keep_params_sparse(jp.compute_masks(METHOD, params, 0.5)))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.jit(make_step(tx))(params, tx.init(params), grads)


def test_masked_momentum_in_numpy():
    """The whole algorithm written out, gradient masking included, for one matrix."""
    rng = np.random.default_rng(0)
    w, grads = rng.normal(size=(5, 7)).astype(np.float32), rng.normal(size=(4, 5, 7)).astype(np.float32)
    tx = jp.prune(optax.sgd(0.1, momentum=0.9), METHOD, sparsity=jp.cubic(0.8, begin=0, end=3), update_when=ALWAYS)
    history, _ = train(tx, {"first": {"kernel": jnp.asarray(w)}}, {"first": {"kernel": jnp.asarray(grads)}})
    alive, velocity = np.ones(w.shape, bool), np.zeros_like(w)
    for t in range(4):
        count = round(35 * (0.8 - 0.8 * (1 - t / 3) ** 3))
        order = np.argsort(np.where(alive, np.abs(w), 0).ravel(), kind="stable")
        alive = np.ones(35, bool)
        alive[order[:count]] = False
        alive = alive.reshape(w.shape)
        velocity = np.float32(0.9) * velocity + np.where(alive, grads[t], 0)
        w = np.where(alive, w - np.float32(0.1) * velocity, 0)
        np.testing.assert_allclose(history["first"]["kernel"][t], w, rtol=1e-5, atol=1e-6)


# ---- when masks move


def masks_after(tx, grads, params=None):
    """Masks after every step, and the params."""
    params, states = jax.jit(lambda p, g: train(tx, p, g))(make_model(0) if params is None else params, grads)
    return jax.device_get((optax.tree.get(states, "masks"), params))


def test_cubic_schedule_reaches_the_exact_count():
    tx = jp.prune(optax.adam(0.05), METHOD, sparsity=jp.cubic(0.9, begin=2, end=9), update_when=jp.every(3, begin=2))
    masks, params = masks_after(tx, gradients(12))
    counts = [removed(take(masks, i)) for i in range(12)]
    ramp = {t: round(WEIGHTS * (0.9 - 0.9 * (1 - (t - 2) / 7) ** 3)) for t in (2, 5, 8)} | {11: round(WEIGHTS * 0.9)}
    assert counts == [0, 0, *[ramp[2]] * 3, *[ramp[5]] * 3, *[ramp[8]] * 3, ramp[11]]
    assert_exact_zeros(take(params, 11), take(masks, 11))


def test_the_dead_stay_dead_while_the_sparsity_does_not_fall():
    """Under random scores, which would bring a zero back as soon as any other weight."""
    levels = jnp.float32([0.3, 0.3, 0.5, 0.5, 0.5, 0.9])
    method, key = jp.Method(criterion=jp.criteria.random), jax.random.key(0)
    masks, _ = masks_after(
        jp.prune(optax.sgd(0.1), method, sparsity=lambda t: levels[t], update_when=ALWAYS, key=key), gradients()
    )
    for name, leaf in named(masks).items():
        assert not np.any(leaf[1:] & ~leaf[:-1]), name
    assert [removed(take(masks, i)) for i in range(STEPS)] == [round(WEIGHTS * float(s)) for s in levels]


def test_the_dead_come_back_when_the_sparsity_falls():
    """AC/DC: the sparsity alternates between 0 and 0.75, two steps each."""
    levels = jnp.float32([0.75, 0.75, 0.0, 0.0, 0.75, 0.75])
    tx = jp.prune(optax.sgd(0.1), METHOD, sparsity=lambda t: levels[t], update_when=jp.every(2))
    masks, params = masks_after(tx, gradients())
    assert [removed(take(masks, i)) for i in range(STEPS)] == [42, 42, 0, 0, 42, 42]
    dead, back = ~named(masks)["first/kernel"][0], named(params)["first/kernel"]
    assert np.all(back[1][dead] == 0)
    assert np.all(back[2][dead] != 0)


def test_a_distribution_that_decides_itself_needs_no_sparsity():
    method = jp.Method(distribution=jp.NM(1, 5), select="first/kernel")
    masks, _ = masks_after(jp.prune(optax.sgd(0.1), method, update_when=jp.schedules.at(0)), gradients(2))
    assert np.array_equal(named(masks)["first/kernel"][1].sum(axis=0), np.ones(7))


def test_random_criterion_draws_anew_at_every_step():
    method, params = jp.Method(criterion=jp.criteria.random), make_model(0)

    @jax.jit
    def masks_of(key, step):
        tx = jp.prune(optax.sgd(0.0), method, sparsity=0.5, update_when=lambda t: t == step, key=key)
        state = tx.init(params)._replace(step=step)
        return tx.update(make_tree(1), state, params)[1].masks

    def drawn(seed, step):
        return masks_of(jax.random.key(seed), jnp.int32(step))

    assert same_bits(drawn(0, 3), drawn(0, 3))
    assert not same_bits(drawn(0, 3), drawn(0, 4))
    assert not same_bits(drawn(0, 3), drawn(1, 3))


def test_taylor_is_handed_the_gradients():
    params, grads = make_model(0), make_tree(1)
    method = jp.Method(criterion=jp.taylor)
    tx = jp.prune(optax.sgd(0.1), method, sparsity=0.5, update_when=jp.schedules.at(0))
    masks = tx.update(grads, tx.init(params), params)[1].masks
    assert same_bits(masks, jp.compute_masks(method, params, 0.5, grads=grads))
    assert not same_bits(masks, jp.compute_masks(METHOD, params, 0.5))


# ---- what the inner optimizer sees


def recorder():
    """An optimizer that remembers what it was handed."""

    def update(updates, state, params=None, **extra):
        return updates, {"seen": updates, "extra": extra}

    return optax.GradientTransformationExtraArgs(lambda params: {"seen": params, "extra": {}}, update)


def test_the_inner_optimizer_sees_no_gradient_of_the_dead():
    params, grads = make_model(0), make_tree(1)
    tx = jp.prune(recorder(), METHOD, sparsity=0.75, update_when=jp.schedules.at(0))
    state = tx.update(grads, tx.init(params), params)[1]
    seen = state.inner_state["seen"]
    assert same_bits(seen, jp.apply_masks(grads, state.masks))
    assert optax.tree.norm(seen) < optax.tree.norm(grads)


def test_norms_are_those_of_the_pruned_model():
    params, grads = make_model(0), make_tree(1)
    tx = jp.prune(optax.clip_by_global_norm(0.5), METHOD, sparsity=0.75, update_when=jp.schedules.at(0))
    updates, state = tx.update(grads, tx.init(params), params)
    alive = jp.apply_masks(updates, state.masks)
    np.testing.assert_allclose(optax.tree.norm(alive), 0.5, rtol=1e-6)


def test_extra_arguments_reach_inner_and_criterion():
    def by_loss(params, /, *, value, **_):
        return {name: jnp.abs(leaf) + value for name, leaf in params.items()}

    params, grads = make_model(0), make_tree(1)
    tx = jp.prune(recorder(), jp.Method(criterion=by_loss), sparsity=0.5, update_when=jp.schedules.at(0))
    assert tx.update(grads, tx.init(params), params, value=jnp.float32(2.0))[1].inner_state["extra"] == {"value": 2.0}
    with pytest.raises(TypeError, match="value"):
        tx.update(grads, tx.init(params), params)


@pytest.mark.parametrize("optimizer", ["momentum", "clipped", "fixed"])
def test_nan_under_a_dead_weight_does_no_harm(optimizer):
    params = make_model(0)
    masks = jp.compute_masks(METHOD, params, 0.75)
    if fixed := optimizer == "fixed":
        tx = optax.chain(optax.sgd(0.1), jp.keep_params_sparse(masks))
    else:
        tx = jp.prune(OPTIMIZERS[optimizer](), METHOD, sparsity=0.75, update_when=jp.every(2))
    grads = draw(1, lead=(STEPS,))
    for leaf, mask in zip(jax.tree.leaves(grads), jax.tree.leaves(masks), strict=True):
        leaf[1:, ~np.asarray(mask)] = np.nan
    params, state = jax.device_get(jax.jit(lambda p, g: train(tx, p, g))(params, put(grads)))
    assert_all_finite(params)
    assert_all_finite([] if fixed else state.inner_state)
    assert same_bits(take(optax.tree.get(state, "masks"), -1), masks)


# ---- refusals


@pytest.mark.parametrize("name", ["prune", "keep_params_sparse"])
def test_missing_params_are_asked_for(name):
    params = make_model(0)
    masks = jp.compute_masks(METHOD, params, 0.5)
    tx = jp.prune(optax.sgd(0.1), METHOD, sparsity=0.5) if name == "prune" else jp.keep_params_sparse(masks)
    with pytest.raises(ValueError, match=rf"`{name}` needs the params: call `tx.update\(grads, opt_state, params\)`"):
        tx.update(params, tx.init(params))


def broken_masks(change):
    masks = jp.compute_masks(METHOD, make_model(0), 0.5)
    change(masks)
    return masks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: masks.pop("second"), r"no leaf 'second/kernel', the params do"),
        (lambda masks: masks["first"].update(extra=jnp.ones(2, bool)), r"a leaf 'first/extra', the params do not"),
        (lambda masks: masks["first"].update(kernel=jnp.ones((7, 5), bool)), r"shape \(7, 5\) at 'first/kernel'"),
    ],
)
def test_masks_of_another_structure_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        jp.keep_params_sparse(broken_masks(change)).init(make_model(0))


def test_a_percentage_is_no_sparsity():
    with pytest.raises(ValueError, match=r"Did you mean 0\.9\?"):
        jp.prune(optax.sgd(0.1), METHOD, sparsity=90)


@pytest.mark.parametrize("select", ["third/*", lambda name, leaf: False])
def test_a_method_that_selects_nothing_is_refused_before_training(select):
    with pytest.raises(ValueError, match="first/kernel"):
        jp.prune(optax.sgd(0.1), jp.Method(select=select), sparsity=0.5).init(make_model(0))


# ---- memory


def state_bytes(tx, params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params)))


def test_state_is_a_byte_a_weight_or_a_bit():
    """Beyond the inner optimizer's: the masks, and a counter."""
    params = {"a": jnp.ones((64, 100)), "b": jnp.ones((33, 3))}
    inner, weights = optax.adam(0.1), 6499
    plain = state_bytes(inner, params)
    assert state_bytes(jp.prune(inner, METHOD, sparsity=0.5), params) == plain + weights + 4
    packed = jp.prune(inner, METHOD, sparsity=0.5, packed=True)
    assert state_bytes(packed, params) == plain + 6400 // 8 + -(-99 // 8) + 4


def test_packed_masks_train_like_others():
    grads, params = gradients(), make_model(0)
    runs = {}
    for packed in (False, True):
        tx = jp.prune(optax.adam(0.05), METHOD, sparsity=0.6, update_when=jp.every(2), packed=packed)
        runs[packed] = train(tx, params, grads)
    assert same_bits(runs[False][0], runs[True][0])
    last = take(optax.tree.get(runs[True][1], "masks"), -1)
    plain = take(optax.tree.get(runs[False][1], "masks"), -1)
    jax.tree.map(np.testing.assert_array_equal, jp.unpack_masks(last, params), plain)
