"""Optimizers that prune, under JAX's transformations, inside optax's and over eight devices: the zeros stay exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from transforms_helpers import (
    ALWAYS,
    METHOD,
    OPTIMIZERS,
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


@pytest.fixture(autouse=True)
def as_users_have_it(relaxed):
    """optax promotes dtypes itself; what this package does is tested strict in `test_transforms`."""


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
    method = jp.Method(criterion=jp.criteria.random)
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
    kernel = np.array(params["second"]["kernel"])
    kernel[0, 0] = np.nan
    params["second"]["kernel"] = jnp.asarray(kernel)
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
    history, states = jax.device_get(jax.jit(lambda p, g: train(tx, p, g))(params, gradients()))
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
    params, _ = jax.device_get(jax.jit(lambda p, g: train(tx, p, g))(make_model(0), gradients()))
    assert_exact_zeros({"first": take(params, -1)["first"]}, {"first": masks["first"]})
    assert np.all(named(params)["second/kernel"] != 0)
    marked = optax.tree.map_params(pruned, lambda leaf: "param", pruned.init(make_model(0)))
    assert set(jax.tree.leaves(optax.tree.get(marked, "masks"))) == {"param"}


def test_a_refused_update_moves_neither_masks_nor_weights():
    tx = optax.apply_if_finite(jp.prune(optax.adam(0.05), METHOD, sparsity=0.5, update_when=ALWAYS), 3)
    grads = draw(1, lead=(4,))
    for leaf in jax.tree.leaves(grads):
        leaf[2] = np.nan
    params, states = jax.device_get(jax.jit(lambda p, g: train(tx, p, g))(make_model(0), put(grads)))
    masks = optax.tree.get(states, "masks")
    assert list(optax.tree.get(states, "step")) == [1, 2, 2, 3]
    assert same_bits(take(params, 1), take(params, 2))
    assert same_bits(take(masks, 1), take(masks, 2))
    assert_exact_zeros(take(params, 3), take(masks, 3))
    assert_all_finite(params)


# ---- over eight devices

# One axis over all devices, two axes over both of the mesh, one axis over part of it.
MESH_SHAPES = {"first": {"bias": (8,), "kernel": (16, 8)}, "convolution": {"kernel": (3, 3, 8, 16)}}
PLACES = {
    "first": {"bias": P("x"), "kernel": P(("x", "y"), None)},
    "convolution": {"kernel": P(None, None, "y", "x")},
}


def mesh_tree(seed):
    return put(draw(seed, MESH_SHAPES))


def spread(tree):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, PLACES)


def assert_placed_alike(tree, params):
    for leaf, param in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
        assert len(param.sharding.device_set) == 8
        assert leaf.sharding.is_equivalent_to(param.sharding, param.ndim), (leaf.sharding, param.sharding)


@pytest.mark.parametrize(
    ("optimizer", "distribution"),
    [
        ("momentum", jp.Global()),
        ("adamw", jp.Uniform()),
        ("lion", jp.PerOutput()),
        ("adamw", jp.distributions.SigmaThreshold(0.5)),
    ],
)
def test_eight_devices_train_the_masks_and_params_of_one(optimizer, distribution):
    method = jp.Method(distribution=distribution)
    ramp = jp.cubic(0.9, begin=0, end=18)
    decides_itself = isinstance(distribution, jp.distributions.SigmaThreshold)
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
