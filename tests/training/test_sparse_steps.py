"""Sparse steps between updates of the masks: the training of the masked dense model, step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_helpers import needs_kernels

import jaxprune as jp
from jaxprune.training.sparse_steps import SparseSteps

pytestmark = [pytest.mark.usefixtures("quick", "relaxed"), needs_kernels]
RNG = np.random.default_rng(0)
SHAPES = {"conv": (3, 3, 2, 4), "first": (64, 48), "second": (48, 10)}
BATCHES = [(jnp.float32(RNG.normal(size=(16, 4, 4, 2))), jnp.float32(RNG.normal(size=(16, 10)))) for _ in range(10)]
METHOD = jp.Method(layout=jp.FLAX)
SGD, ADAM = optax.sgd(0.1), optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2))
GRADUAL = functools.partial(jp.prune, method=METHOD, sparsity=jp.cubic(0.9, begin=0, end=6))
MOVING = functools.partial(jp.regrow, method=METHOD, sparsity=0.8, key=jax.random.key(0))


def params(dtype="float32"):
    kernels = {name: {"kernel": jnp.asarray(RNG.normal(size=shape) / 6, dtype)} for name, shape in SHAPES.items()}
    return kernels | {"bias": jnp.zeros(10, dtype)}


def loss(params, x, y):
    x = jax.lax.conv_general_dilated(
        x.astype(params["bias"].dtype), params["conv"]["kernel"], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    x = jnp.tanh(x.reshape(x.shape[0], -1) @ params["first"]["kernel"]) @ params["second"]["kernel"] + params["bias"]
    return jnp.mean(jnp.square(x.astype(jnp.float32) - y))


def masked_dense(tx, params, batches):
    @jax.jit
    def step(params, state, batch):
        lost, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, lost

    state, losses = tx.init(params), []
    for batch in batches:
        params, state, lost = step(params, state, batch)
        losses.append(lost)
    return params, state.masks, losses


@pytest.mark.parametrize(
    ("around", "inner"), [(GRADUAL, ADAM), (GRADUAL, SGD), (MOVING, SGD)], ids=["gradual, adam", "gradual", "moving"]
)
def test_it_is_the_masked_dense_training(around, inner):
    start, when = params(), jp.every(3)
    steps = SparseSteps(loss, inner, around, update_when=when)
    state, losses = steps.init(start), []
    for batch in BATCHES:
        state, lost = steps(state, *batch)
        losses.append(lost)
    found, masks = steps.dense(state)
    wanted, alive, told = masked_dense(around(inner, update_when=when), start, BATCHES)
    np.testing.assert_allclose(losses, told, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, masks, alive)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6), found, wanted)
    assert all(
        not np.any(np.asarray(leaf)[~np.asarray(mask)])
        for leaf, mask in zip(*map(jax.tree.leaves, (found, masks)), strict=True)
    )


def test_between_updates_nothing_has_the_size_of_the_leaf():
    steps = SparseSteps(loss, ADAM, MOVING, update_when=jp.every(4))
    state, _ = steps(steps.init(params()), *BATCHES[0])
    living = int(steps.dense(state)[1]["first"]["kernel"].sum())
    assert 0.1 * 64 * 48 < living < 0.3 * 64 * 48
    assert sorted(state.masks) == ["conv/kernel"]
    for _ in range(2):
        sizes = {leaf.size for leaf in jax.tree.leaves((state.values, state.inner_state, state.outer))}
        assert max(sizes) == living
        state, _ = steps(state, *BATCHES[1])


def test_moving_masks_compile_nothing_anew():
    steps = SparseSteps(loss, SGD, MOVING, update_when=jp.every(2))
    state = steps.init(params())
    for batch in BATCHES:
        state, _ = steps(state, *batch)
    assert steps._go_on._cache_size() == 1
    assert steps._move._cache_size() == 1


def test_bfloat16_leaves():
    steps = SparseSteps(loss, SGD, GRADUAL, update_when=jp.every(3))
    start = params("bfloat16")
    state = steps.init(start)
    for batch in BATCHES:
        state, _ = steps(state, *batch)
    found, masks = steps.dense(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.bfloat16.dtype}
    assert float(jp.sparsity_of(masks["first"])) > 0.8


def test_leaves_with_few_zeros_stay_dense():
    steps = SparseSteps(loss, SGD, MOVING, update_when=jp.every(4), least=0.9)
    state, _ = steps(steps.init(params()), *BATCHES[0])
    assert sorted(state.masks) == ["conv/kernel", "first/kernel", "second/kernel"]
    state, _ = steps(state, *BATCHES[1])
    found, masks = steps.dense(state)
    np.testing.assert_array_equal(np.asarray(found["first"]["kernel"])[~np.asarray(masks["first"]["kernel"])], 0)


def test_refusals():
    with pytest.raises(ValueError, match="`least` is the fraction"):
        SparseSteps(loss, SGD, MOVING, update_when=True, least=90)
    with pytest.raises(ValueError, match="`packed=True`"):
        SparseSteps(loss, SGD, functools.partial(GRADUAL, packed=True), update_when=True).init(params())
    remembering = functools.partial(MOVING, grow=jp.criteria.momentum())
    with pytest.raises(ValueError, match="looks at the gradients of all weights at every step"):
        SparseSteps(loss, SGD, remembering, update_when=True).init(params())
