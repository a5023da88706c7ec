"""Sparse and masked dense models call every MNIST test image the same digit; needs the images, JAXPRUNE_DATA."""

import functools
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_helpers import needs_kernels, sparse_leaves

from jaxprune import sparse
from jaxprune.lab.models import shapes
from jaxprune.lab.recipe.config import Model

BATCH = 500
# Without the files of the images, or the kernels, there is nothing to compare.
FOLDER = Path(os.environ.get("JAXPRUNE_DATA", "nowhere")) / "mnist"
SPARSITY, STEPS = 0.9, {"lenet_300_100": 300, "lenet_5": 100}
CASES = [
    ("lenet_300_100", "native"),
    ("lenet_300_100", "native_row"),
    ("lenet_300_100", "bcsr"),
    ("lenet_5", "native"),
    ("lenet_5", "native_block"),
    ("lenet_5", "bcsr"),
]

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.skipif(not FOLDER.is_dir(), reason="JAXPRUNE_DATA names no folder with mnist/ in it"),
    needs_kernels,
]


@functools.cache
def images_and_labels(split):
    images = np.frombuffer((FOLDER / f"{split}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    labels = np.frombuffer((FOLDER / f"{split}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    return images.reshape(-1, 28, 28, 1), labels.astype(np.int32)


def as_input(images):
    return images.astype(np.float32) / np.float32(255)


def draw(shape, rng):
    """Weights of variance 1 / inputs, biases zero."""
    inputs = math.prod(shape[:-1])
    return np.float32(rng.normal(size=shape) / np.sqrt(inputs) if len(shape) > 1 else np.zeros(shape))


def mask(leaf):
    magnitude = np.abs(leaf)
    return np.float32(magnitude > np.quantile(magnitude, SPARSITY) if leaf.ndim > 1 else np.ones_like(leaf))


@functools.cache
def trained(name):
    """A network after a few hundred steps, its matrices and kernels pruned by magnitude half-way, and zeros kept."""
    steps = STEPS[name]
    network, optimiser, rng = shapes(Model(name=name), (28, 28, 1), 10), optax.adam(3e-3), np.random.default_rng(0)
    images, labels = images_and_labels("train")

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(network.apply(params, x), y).mean()

    @jax.jit
    def step(params, state, masks, x, y):
        updates, state = optimiser.update(jax.grad(loss)(params, x, y), state, params)
        return jax.tree.map(jnp.multiply, optax.apply_updates(params, updates), masks), state

    params = jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape, rng)), network.params)
    state, masks = optimiser.init(params), jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), network.params)
    for number in range(steps):
        if number == steps // 2:
            masks = jax.tree.map(mask, params)
        chosen = rng.integers(0, len(labels), 32)
        params, state = step(params, state, masks, as_input(images[chosen]), labels[chosen])
    return network, params


@functools.cache
def dense_logits(name):
    return logits(trained(name)[0].apply, trained(name)[1])


def logits(apply, params):
    predict, (images, _) = jax.jit(apply), images_and_labels("t10k")
    batches = [predict(params, as_input(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
    return np.concatenate(batches)


@pytest.mark.parametrize(("name", "format"), CASES)
def test_every_image_has_the_class_of_the_masked_dense_model(relaxed, name, format):
    network, params = trained(name)
    compressed = sparse.compress(params, format, unsupported="dense")
    matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    able = [
        leaf
        for leaf in matrices
        if (leaf.ndim == 2 or format != "bcsr") and (leaf.shape[-1] % 4 == 0 or format != "native_block")
    ]
    assert len(sparse_leaves(compressed)) == len(able)
    want, got = dense_logits(name), logits(sparse.apply(network.apply), compressed)
    _, labels = images_and_labels("t10k")
    assert np.mean(np.argmax(want, axis=1) == labels) > 0.8  # a model, no noise
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.array_equal(np.argmax(got, axis=1), np.argmax(want, axis=1))
