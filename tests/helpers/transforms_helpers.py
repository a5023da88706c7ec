"""Models that are trees of noise, optimizers to train them with, and what must hold after every step.

Shared by the tests of the transformations of optimizers.
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def is_shape(node):
    return isinstance(node, tuple)


def draw(seed, shapes=SHAPES, lead=()):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: rng.normal(size=(*lead, *shape)), shapes, is_leaf=is_shape)


def put(tree, dtype="float32"):
    """NumPy's arrays in JAX, without a program to compile for every shape."""
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf, jnp.dtype(dtype))), tree)


def make_tree(seed, dtype="float32", lead=()):
    return put(draw(seed, lead=lead), dtype)


def make_model(seed, dtype="float32"):
    """Noise with the values that make trouble: zeros of both signs, equals, and numbers below the normal ones."""
    params = draw(seed)
    params["first"]["kernel"][2] = [-0.0, 0.0, 0.5, -0.5, 0.5, 1e-39, -1e-39]
    return put(params, dtype)


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
    """Of one step, or of several that are stacked."""
    leaves = named(params)
    for name, mask in named(masks).items():
        assert not np.any(bits(leaves[name])[~mask]), name
        assert name in KERNELS or np.all(mask), name


def assert_close(tree, other):
    """Equal but for what the compiler contracts (a * b + c) in one program and not in another."""
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def assert_all_finite(tree):
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(jax.device_get(tree)))


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
