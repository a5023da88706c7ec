"""Optimizers that prune: after every update the dead are +0 to the bit, and exactly as many as asked for.

Models are trees of noise and gradients are more noise: what holds must hold for any.
"""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

SHAPES = {"first": {"bias": (7,), "kernel": (5, 7)}, "second": {"kernel": (7, 3)}}
KERNELS = {"first/kernel": 35, "second/kernel": 21}
WEIGHTS = sum(KERNELS.values())
STEPS = 6
METHOD = jp.Method(distribution=jp.Global())
ALWAYS = jp.every(1)

OPTIMIZERS = {
    "plain": lambda: optax.sgd(0.1),  # alone in giving updates of the gradients' dtype
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.05),
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
    "lion": lambda: optax.lion(0.01, weight_decay=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(0.1, 9))),
    "averaged": lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "multi_steps": lambda: optax.MultiSteps(optax.adamw(0.05), every_k_schedule=2).gradient_transformation(),
}
PRECISIONS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]


# ---- what everything below is made of


@pytest.fixture(autouse=True)
def as_users_have_it(relaxed):
    """optax promotes dtypes in Adam and in `apply_updates`; what this package does itself is tested strict below."""


def is_shape(node):
    return isinstance(node, tuple)


def make_tree(seed, dtype="float32", lead=()):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=(*lead, *shape)), dtype), SHAPES, is_leaf=is_shape)


def make_model(seed, dtype="float32"):
    """Noise with the values that make trouble: zeros of both signs, equals, and numbers below the normal ones."""
    params = make_tree(seed, dtype)
    odd = jnp.asarray([-0.0, 0.0, 0.5, -0.5, 0.5, 1e-39, -1e-39], dtype)
    params["first"]["kernel"] = params["first"]["kernel"].at[2].set(odd)
    return params


def named(tree):
    return {"/".join(p.key for p in path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def bits(array):
    return np.asarray(array).view(f"u{np.asarray(array).dtype.itemsize}")


def same_bits(first, second):
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.array_equal(bits(a), bits(b)) for a, b in pairs)


def removed(masks):
    return sum(int(np.sum(~mask)) for mask in named(masks).values())


def expected_removed(sparsity, n=WEIGHTS):
    """round(n * s) of the float32 that `prune` sees, in exact arithmetic."""
    return round(n * Fraction(float(np.float32(sparsity))))


def assert_exact_zeros(params, masks):
    for name, mask in named(masks).items():
        assert not np.any(bits(named(params)[name])[~mask]), name
    assert all(np.all(mask) for name, mask in named(masks).items() if name not in KERNELS)


def assert_close(tree, other):
    """Equal but for what the compiler contracts (a * b + c) in one program and not in another."""
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def assert_all_finite(tree):
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


def train(tx, params, grads):
    """One update a gradient, all in one scan: params and states after every step, stacked."""

    def step(carry, grad):
        carry = make_step(tx)(*carry, grad)
        return carry, carry

    state = tx.init(params)
    if params["first"]["kernel"].dtype != grads["first"]["kernel"].dtype:
        # Moments start in the dtype of the params and then take that of the gradients; a loop needs one dtype.
        settled = jax.eval_shape(make_step(tx), params, state, take(grads, 0))[1]
        state = jax.tree.map(lambda leaf, like: jax.lax.convert_element_type(leaf, like.dtype), state, settled)
    return jax.lax.scan(step, (params, state), grads)[1]


def take(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def make_step(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def gradients(steps=STEPS, seed=1, dtype="float32"):
    return make_tree(seed, dtype, (steps,))


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
    masks_before, step_before = None, 0
    for i in range(STEPS):
        params, masks, step = take(history, i)
        assert_exact_zeros(params, masks)
        if step > step_before and due[step_before]:
            assert removed(masks) == expected_removed(sparsities[step_before])
        elif masks_before is not None:
            assert same_bits(masks, masks_before)
        else:
            assert removed(masks) == 0
        masks_before, step_before = masks, int(step)
    return step_before


schedules = st.lists(st.floats(0, 0.984375, width=32), min_size=STEPS, max_size=STEPS)
dates = st.lists(st.booleans(), min_size=STEPS, max_size=STEPS)
seeds = st.integers(0, 2**16)
CASES = [(name, *PRECISIONS[0], False) for name in OPTIMIZERS]
CASES += [(name, *precision, False) for precision in PRECISIONS[1:] for name in ("plain", "adamw")]
CASES += [("adamw", *precision, True) for precision in PRECISIONS]


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


@pytest.mark.parametrize(("dtype", "grad_dtype"), PRECISIONS)
@pytest.mark.parametrize("optimizer", ["plain", "adamw"])
@given(seed=seeds)
def test_fixed_masks_hold(optimizer, dtype, grad_dtype, seed):
    params, grads = make_model(seed, dtype), gradients(seed=seed + 1, dtype=grad_dtype)
    masks = jp.compute_masks(METHOD, params, 0.75)
    history = jax.device_get(fine_tuner(optimizer)(params, grads, masks))
    for i in range(STEPS):
        assert_exact_zeros(take(history, i), masks)
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
    return optax.tree.get(states, "masks"), params


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
    method, key = jp.Method(criterion=jp.random), jax.random.key(0)
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
    masks, _ = masks_after(jp.prune(optax.sgd(0.1), method, update_when=jp.at(0)), gradients(2))
    assert np.array_equal(named(masks)["first/kernel"][1].sum(axis=0), np.ones(7))


def test_random_criterion_draws_anew_at_every_step():
    def drawn(seed, step):
        method = jp.Method(criterion=jp.random)
        key = jax.random.key(seed)
        tx = jp.prune(optax.sgd(0.0), method, sparsity=0.5, update_when=lambda t: t == step, key=key)
        state = tx.init(make_model(0))._replace(step=jnp.int32(step))
        return tx.update(make_tree(1), state, make_model(0))[1].masks

    assert same_bits(drawn(0, 3), drawn(0, 3))
    assert not same_bits(drawn(0, 3), drawn(0, 4))
    assert not same_bits(drawn(0, 3), drawn(1, 3))


def test_taylor_is_handed_the_gradients():
    params, grads = make_model(0), make_tree(1)
    method = jp.Method(criterion=jp.taylor)
    tx = jp.prune(optax.sgd(0.1), method, sparsity=0.5, update_when=jp.at(0))
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
    tx = jp.prune(recorder(), METHOD, sparsity=0.75, update_when=jp.at(0))
    state = tx.update(grads, tx.init(params), params)[1]
    seen = state.inner_state["seen"]
    assert same_bits(seen, jp.apply_masks(grads, state.masks))
    assert optax.tree.norm(seen) < optax.tree.norm(grads)


def test_norms_are_those_of_the_pruned_model():
    params, grads = make_model(0), make_tree(1)
    tx = jp.prune(optax.clip_by_global_norm(0.5), METHOD, sparsity=0.75, update_when=jp.at(0))
    updates, state = tx.update(grads, tx.init(params), params)
    alive = jp.apply_masks(updates, state.masks)
    np.testing.assert_allclose(optax.tree.norm(alive), 0.5, rtol=1e-6)


def test_extra_arguments_reach_inner_and_criterion():
    def by_loss(params, /, *, value, **_):
        return {name: jnp.abs(leaf) + value for name, leaf in params.items()}

    params, grads = make_model(0), make_tree(1)
    tx = jp.prune(recorder(), jp.Method(criterion=by_loss), sparsity=0.5, update_when=jp.at(0))
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
    grads = jax.tree.map(lambda g, m: g.at[1:].set(jnp.where(m, g[1:], jnp.nan)), gradients(), masks)
    params, state = jax.jit(lambda p, g: train(tx, p, g))(params, grads)
    assert_all_finite(params)
    assert_all_finite([] if fixed else state.inner_state)
    assert same_bits(take(optax.tree.get(state, "masks"), -1), masks)


# ---- under every transformation of JAX


def test_one_compilation_serves_all_steps():
    """Step and sparsity are traced, and nothing of the state changes its type."""
    traces = []
    tx = jp.prune(optax.adam(0.05), METHOD, sparsity=jp.cubic(0.9, begin=1, end=8), update_when=jp.every(2))

    @jax.jit
    def step(params, state, grads):
        traces.append(1)
        return make_step(tx)(params, state, grads)

    params = make_model(0)
    state = tx.init(params)
    for i in range(10):
        params, state = step(params, state, take(gradients(10), i))
    assert len(traces) == 1
    assert step._cache_size() == 1
    assert removed(state.masks) == round(WEIGHTS * 0.9)


def test_donated_params_and_state_leave_masks_and_key_to_their_owner():
    masks = jp.compute_masks(METHOD, make_model(0), 0.5)
    key = jax.random.key(0)
    method = jp.Method(criterion=jp.random)
    pruner = jp.prune(optax.adam(0.05), method, sparsity=0.75, update_when=ALWAYS, key=key)
    tx = optax.chain(pruner, jp.keep_params_sparse(masks))
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    for _ in range(2):  # the second round starts from what the first has left
        params = make_model(0)
        state = tx.init(params)
        for i in range(3):
            before = params, optax.tree.get_all_with_path(state, "masks")
            params, state = step(params, state, take(gradients(3), i))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before) if isinstance(leaf, jax.Array))
            assert_exact_zeros(params, masks)
    assert removed(masks) == 28
    assert not key.is_deleted()


@pytest.mark.parametrize("step_is_batched", [False, True])
def test_an_ensemble_under_vmap_equals_its_members(step_is_batched):
    """Trained as a whole (one step counter, a real branch), or step by step from stacked states (a counter each)."""
    tx = jp.prune(optax.adam(0.05), METHOD, sparsity=0.75, update_when=jp.every(2))
    models = [make_model(seed) for seed in range(3)]
    grads = [gradients(3, seed=seed + 9) for seed in range(3)]
    params, moves = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (models, grads))
    run = jax.jit(functools.partial(train, tx))
    if step_is_batched:
        step, states = jax.jit(jax.vmap(make_step(tx))), jax.vmap(tx.init)(params)
        for i in range(3):
            params, states = step(params, states, jax.tree.map(lambda leaf, i=i: leaf[:, i], moves))
    else:
        params, states = jax.tree.map(lambda leaf: leaf[:, -1], jax.jit(jax.vmap(run))(params, moves))
    for i in range(3):
        alone_params, alone_states = take(run(models[i], grads[i]), -1)
        assert same_bits(take(states.masks, i), alone_states.masks)
        assert_close(take(params, i), alone_params)
        assert_exact_zeros(take(params, i), take(states.masks, i))


def test_outside_jit_the_same_masks_come_out():
    tx = jp.prune(optax.sgd(0.1), METHOD, sparsity=jp.cubic(0.9, begin=0, end=3), update_when=jp.every(2))
    slow = fast = make_model(0), tx.init(make_model(0))
    step = make_step(tx)
    for i in range(4):
        slow, fast = step(*slow, take(gradients(), i)), jax.jit(step)(*fast, take(gradients(), i))
        assert same_bits(slow[1].masks, fast[1].masks)
        assert_exact_zeros(*slow[:1], slow[1].masks)
        assert_close(slow[0], fast[0])


def test_outside_jit_a_weight_that_is_nan_is_refused():
    params = make_model(0)
    params["second"]["kernel"] = params["second"]["kernel"].at[0, 0].set(jnp.nan)
    tx = jp.prune(optax.sgd(0.1), METHOD, sparsity=0.5)
    with pytest.raises(ValueError, match=r"'second/kernel' has 1 NaN weight"):
        tx.update(make_tree(1), tx.init(params), params)


def test_masks_may_be_computed_in_a_branch_over_known_weights():
    params = make_model(0)

    def none():
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)

    masks = jax.lax.cond(jnp.array(True), lambda: jp.compute_masks(METHOD, params, 0.5), none)
    assert same_bits(masks, jp.compute_masks(METHOD, params, 0.5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_updates_in_one_program_are_exact_too(dtype):
    """Unrolled, the compiler may compute a weight twice, in two fusions: zero must come out all the same."""
    tx = jp.prune(optax.adamw(0.05), METHOD, sparsity=jp.cubic(0.9, begin=0, end=2), update_when=ALWAYS)

    @jax.jit
    def steps(params, grads):
        state, history = tx.init(params), []
        for i in range(3):
            grad = jax.tree.map(jnp.multiply, take(grads, i), params)
            params, state = make_step(tx)(params, state, grad)
            history.append((params, state.masks))
        return history

    for params, masks in steps(make_model(0, dtype), gradients(3, dtype=dtype)):
        assert_exact_zeros(params, masks)


# ---- inside other transformations


def pruner(rate=0.05):
    return jp.prune(optax.adam(rate), METHOD, sparsity=0.5, update_when=jp.every(2))


ONLY_FIRST = {"first": {"bias": True, "kernel": True}, "second": {"kernel": False}}
LABELS = {"first": {"bias": "pruned", "kernel": "pruned"}, "second": {"kernel": "dense"}}
NESTINGS = {
    "alone": (pruner, WEIGHTS),
    "chain": (lambda: optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(0)), pruner()), WEIGHTS),
    "partition": (lambda: optax.partition({"pruned": pruner(), "dense": optax.sgd(0.1)}, LABELS), 35),
    "masked": (lambda: optax.masked(pruner(), ONLY_FIRST), 35),
    "apply_if_finite": (lambda: optax.apply_if_finite(pruner(), max_consecutive_errors=3), WEIGHTS),
    "inject_hyperparams": (lambda: optax.inject_hyperparams(pruner)(rate=0.05), WEIGHTS),
    "multi_steps": (lambda: optax.MultiSteps(pruner(), every_k_schedule=3).gradient_transformation(), WEIGHTS),
}
each_nesting = pytest.mark.parametrize("nesting", NESTINGS)


@each_nesting
def test_every_nesting_keeps_the_promises(nesting):
    make, n = NESTINGS[nesting]
    tx = make()
    params = make_model(0)
    history, states = jax.jit(lambda p, g: train(tx, p, g))(params, gradients())
    masks = take(optax.tree.get(states, "masks"), -1)
    assert removed(masks) == expected_removed(0.5, n)
    assert_exact_zeros(take(history, -1), masks)
    assert not same_bits(take(history, -1), take(history, -2)) or nesting == "multi_steps"
    assert np.all(named(history)["second/kernel"] != 0) or n == WEIGHTS


@each_nesting
def test_params_of_the_state_are_known_to_optax(nesting):
    """`optax.tree.map_params` finds masks and moments, and no more: what is placed like the params."""
    tx = NESTINGS[nesting][0]()
    state = tx.init(make_model(0))
    marked = optax.tree.map_params(tx, lambda leaf: "param", state, transform_non_params=lambda leaf: "other")
    assert set(jax.tree.leaves(optax.tree.get(marked, "masks"))) == {"param"}
    assert set(jax.tree.leaves(optax.tree.get(marked, "mu"))) == {"param"}
    assert optax.tree.get(marked, "step") == "other"


def test_fixed_masks_inside_partition_and_map_params():
    masks = jp.compute_masks(METHOD, make_model(0), 0.5)
    pruned = optax.chain(optax.adam(0.05), jp.keep_params_sparse(masks))
    tx = optax.partition({"pruned": pruned, "dense": optax.sgd(0.1)}, LABELS)
    params, _ = jax.jit(lambda p, g: train(tx, p, g))(make_model(0), gradients())
    assert_exact_zeros({"first": take(params, -1)["first"]}, {"first": masks["first"]})
    assert np.all(named(params)["second/kernel"] != 0)
    marked = optax.tree.map_params(pruned, lambda leaf: "param", pruned.init(make_model(0)))
    assert set(jax.tree.leaves(optax.tree.get(marked, "masks"))) == {"param"}


def test_a_refused_update_moves_neither_masks_nor_weights():
    tx = optax.apply_if_finite(jp.prune(optax.adam(0.05), METHOD, sparsity=0.5, update_when=ALWAYS), 3)
    grads = jax.tree.map(lambda g: g.at[2].set(jnp.nan), gradients(4))
    params, states = jax.jit(lambda p, g: train(tx, p, g))(make_model(0), grads)
    masks = optax.tree.get(states, "masks")
    assert list(optax.tree.get(states, "step")) == [1, 2, 2, 3]
    assert same_bits(take(params, 1), take(params, 2))
    assert same_bits(take(masks, 1), take(masks, 2))
    assert_exact_zeros(take(params, 3), take(masks, 3))
    assert_all_finite(params)


# ---- over eight devices

MESH_SHAPES = {
    "first": {"bias": (8,), "kernel": (16, 8)},
    "second": {"kernel": (8, 12)},
    "convolution": {"kernel": (3, 3, 8, 16)},
}
PLACES = {
    "first": {"bias": P("x"), "kernel": P("x", "y")},
    "second": {"kernel": P(("x", "y"), None)},
    "convolution": {"kernel": P(None, None, "y", "x")},
}


def mesh_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), MESH_SHAPES, is_leaf=is_shape)


def spread(tree):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, PLACES)


def assert_placed_alike(tree, params):
    for leaf, param in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
        assert len(param.sharding.device_set) == 8
        assert leaf.sharding.is_equivalent_to(param.sharding, param.ndim), (leaf.sharding, param.sharding)


@pytest.mark.parametrize(
    ("optimizer", "distribution"),
    [("momentum", jp.Global()), ("adamw", jp.Uniform()), ("lion", jp.PerOutput()), ("adamw", jp.SigmaThreshold(0.5))],
)
def test_eight_devices_train_the_masks_and_params_of_one(optimizer, distribution):
    method = jp.Method(distribution=distribution)
    ramp = jp.cubic(0.9, begin=0, end=18)
    decides_itself = isinstance(distribution, jp.SigmaThreshold)
    tx = jp.prune(OPTIMIZERS[optimizer](), method, sparsity=None if decides_itself else ramp, update_when=jp.every(3))
    step = jax.jit(make_step(tx))

    def trained(place):
        params = place(mesh_tree(0))
        state = tx.init(params)
        for i in range(20):
            params, state = step(params, state, place(mesh_tree(i + 1)))
        return params, state

    one, eight = trained(lambda tree: tree), trained(spread)
    assert same_bits(one[1].masks, eight[1].masks)
    assert same_bits(one[0], eight[0])
    assert float(jp.sparsity_of(eight[1].masks, jp.weights)) > 0.3
    assert_placed_alike(eight[1].masks, spread(mesh_tree(0)))


def test_masks_start_where_their_params_are():
    params = spread(mesh_tree(0))
    masks = jp.compute_masks(METHOD, params, 0.5)
    assert_placed_alike(masks, params)
    assert_placed_alike(jp.prune(optax.sgd(0.1), METHOD, sparsity=0.5).init(params).masks, params)
    assert_placed_alike(jp.keep_params_sparse(masks).init(params).masks, params)
    elsewhere = jp.compute_masks(METHOD, mesh_tree(0), 0.5)
    assert_placed_alike(jp.keep_params_sparse(elsewhere).init(params).masks, params)


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
