"""Sums over more rows than a tile of the compiler's holds, against NumPy.

jaxlib 0.10.2 computes some of them wrongly (jax-ml/jax#39103): where a product W X^T is fused with a sum over W's rows,
X has three columns and between 32,769 and about 43,500 rows, the last rows get the sums of rows 128 before them. Models
in the layout (out, in) under `vmap` are written like that. What is computed here from any model never sums so.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import sparse, storage
from jaxprune.criteria import evidence
from jaxprune.lab.data.samples import Samples
from jaxprune.lab.runs import train

# (rows, inputs, outputs): within the wrong sums' bounds twice, and a layer's own.
SIZES = [(40_000, 3, 3), (40_000, 3, 2), (70_000, 64, 10)]
LAYOUTS = ["in_out", "out_in"]
each = pytest.mark.parametrize("layout", LAYOUTS)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def draw(size, layout):
    """(params, x) and both as float64, the weight (in, out)."""
    n, n_in, n_out = size
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape, np.float32) for shape in ((n, n_in), (n_in, n_out)))
    params = {"w": jnp.asarray(w if layout == "in_out" else w.T)}
    return params, jnp.asarray(x), w.astype(np.float64), x.astype(np.float64)


def apply_of(layout):
    if layout == "in_out":
        return lambda params, x: x @ params["w"]
    return lambda params, x: jax.vmap(lambda row: params["w"] @ row)(x)


def as_stored(w, layout):
    return w if layout == "in_out" else w.T


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def close(found, wanted, within=1e-5):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-4, atol=within * np.abs(wanted).max())


def labels_of(size):
    return np.random.default_rng(1).integers(0, size[2], size[0]).astype(np.int32)


@each
@sizes
def test_sums_of_activations(size, layout):
    params, x, w, x64 = draw(size, layout)
    apply = apply_of(layout)
    for values, wanted in (
        (jax.jit(lambda params, x: evidence.activations(jax.nn.relu(apply(params, x)))), np.maximum(x64 @ w, 0)),
        (jax.jit(lambda params, x: evidence.activations(apply(params, x).T)), (x64 @ w).T),
        (jax.jit(lambda params, x: evidence.activations(x)), x64),
    ):
        found = values(params, x)
        assert float(found.tokens) == len(wanted)
        close(found.squares, np.square(wanted).sum(0))
        close(found.magnitudes, np.abs(wanted).sum(0))
        close(found.zeros, (wanted == 0).sum(0))


@each
@sizes
def test_gradients_and_what_is_made_of_them(size, layout):
    params, x, w, x64 = draw(size, layout)
    apply, labels = apply_of(layout), labels_of(size)
    n, _, n_out = size

    def loss(params, x):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(apply(params, x), labels))

    slopes = softmax(x64 @ w) - np.eye(n_out)[labels]
    grad = x64.T @ slopes / n
    close(jax.jit(jax.grad(loss))(params, x)["w"], as_stored(grad, layout))

    share, along = softmax(x64 @ w), x64 @ grad
    turned = share * (along - (share * along).sum(1, keepdims=True))
    found = jax.jit(lambda params, x: evidence.hessian_grads(lambda params: loss(params, x), params))(params, x)
    close(found["w"], as_stored(x64.T @ turned / n, layout), within=1e-4)

    found = jax.jit(lambda params, x: evidence.flow_grads(apply, params, x))(params, x)
    close(found["w"], np.full(params["w"].shape, n))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_squares_of_gradients(layout):
    params, x, w, x64 = draw(SIZES[0], layout)
    apply = apply_of(layout)

    def loss(params, row):
        return jnp.sum(jnp.square(apply(params, row[None])))

    found = jax.jit(lambda params, x: evidence.squared_grads(loss, params, x))(params, x)
    wanted = np.einsum("no,ni->io", np.square(2 * x64 @ w), np.square(x64)) / len(x64)
    close(found["w"], as_stored(wanted, layout), within=1e-4)


@each
@sizes
def test_losses_and_accuracies(size, layout):
    params, _, w, _ = draw(size, layout)
    pixels = np.random.default_rng(2).integers(0, 256, (size[0], 1, 1, size[1])).astype(np.uint8)
    labels = labels_of(size)
    samples = Samples(jnp.asarray(pixels), jnp.asarray(labels), jnp.float32(255))
    inputs = pixels.reshape(size[0], -1).astype(np.float64) / 255

    def apply(params, images, key=None):
        return apply_of(layout)(params, images.reshape(len(images), -1))

    logits = inputs @ w
    first, second = np.sort(logits, 1)[:, -2:].T
    surely = np.argmax(logits, 1)[first < second - 1e-5]
    loss, (correct, _) = jax.jit(lambda params: train.mean_loss(apply, params, samples, jnp.arange(size[0]), None))(
        params
    )
    close(loss, -np.log(softmax(logits)[np.arange(size[0]), labels]).mean())
    right, unsure = int(np.sum(np.argmax(logits, 1) == labels)), size[0] - len(surely)
    assert abs(int(correct) - right) <= unsure
    classes = train.predict(jax.jit(apply), params, samples)
    assert np.array_equal(classes[first < second - 1e-5], surely)
    assert train.accuracy(classes, samples) == pytest.approx(right / size[0], abs=(unsure + 0.1) / size[0])


@each
@sizes
def test_ranges_and_integers(size, layout):
    params, x, w, x64 = draw(size, layout)
    apply = apply_of(layout)
    ranges = storage.calibrate(apply, params, [x])
    assert ranges["w"] == ((float(x64.min()), float(x64.max())),)
    found = jax.jit(storage.int8(apply, ranges))(params, x)
    error = np.abs(np.asarray(found) - x64 @ w)
    assert error.max() < 0.02 * np.abs(x64).max() * np.abs(w).sum(0).max()


@pytest.mark.parametrize("format", ["bcoo", "bcsr", "block", "dense"])
def test_sparse_products_and_sums_of_them(format):
    for size in SIZES[:2]:
        params, x, w, x64 = draw(size, "in_out")
        compressed = sparse.compress(params, format)
        apply = sparse.apply(apply_of("in_out"))
        close(jax.jit(apply)(compressed, x), x64 @ w)
        # Each row's sum over its outputs, the first axis of the product (out, in) @ (in, rows) that is computed.
        summed = jax.jit(lambda params, x, apply=apply: jnp.sum(jnp.square(apply(params, x)), 1))(compressed, x)
        close(summed, np.square(x64 @ w).sum(1))


@pytest.mark.parametrize("shape", [(40_000, 3), (3, 40_000)], ids=str)
def test_scores_and_penalties_of_long_leaves(shape):
    rng = np.random.default_rng(0)
    w, grads = (rng.standard_normal(shape, np.float32) for _ in range(2))
    params, slopes = {"kernel": jnp.asarray(w)}, {"kernel": jnp.asarray(grads)}
    w64 = w.astype(np.float64)
    for axis, granularity in ((0, jp.Output()), (1, jp.Input())):
        sizes = np.abs(w64).mean(axis, keepdims=True)
        method = jp.Method(granularity=granularity)
        masks = np.asarray(
            jax.jit(lambda params, method=method: jp.compute_masks(method, params, 0.5))(params)["kernel"]
        )
        alive = np.broadcast_to(sizes, shape)[masks].min(initial=np.inf)
        dead = np.broadcast_to(sizes, shape)[~masks].max(initial=0)
        assert alive > dead * (1 - 1e-6)
        assert abs(int(masks.any(axis).sum()) - sizes.size / 2) <= 0.5

        lasso = jp.training.group_lasso(1.0, granularity)
        updates, _ = jax.jit(lasso.update)(slopes, lasso.init(params), params)
        roots = np.sqrt(np.square(w64).mean(axis, keepdims=True))
        np.testing.assert_allclose(updates["kernel"], grads + w64 / roots, rtol=1e-4, atol=1e-5)

    found = jax.jit(lambda params, grads: jp.criteria.snip(params, grads=grads))(
        {"kernel": params["kernel"][None]}, {"kernel": slopes["kernel"][None]}
    )
    products = np.abs(w64 * grads)
    close(np.squeeze(found["kernel"], 0), products / products.sum())
