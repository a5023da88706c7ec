"""N:M weights: 16 stored of every 32 or 64 inputs, right at every batch, and refused where they do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quick import quick_jit
from sparse_helpers import compress_one, make_x, needs_kernels, put
from test_native_formats import assert_product, floats, product_as, to_numpy

import jaxprune as jp
from jaxprune import sparse

pytestmark = [pytest.mark.filterwarnings("error"), needs_kernels, pytest.mark.usefixtures("quick")]


def nm_leaf(n_in, n_out, n, m, dtype="float32", dead=0.0, seed=0):
    """A leaf (in, out) under a mask of `NM(n, m)`, a fraction of whose survivors is zero as well."""
    rng = np.random.default_rng(seed)
    scores = rng.random((n_out, n_in // m, m))
    kept = scores >= np.sort(scores, axis=-1)[..., m - n, None]
    values = np.where(
        kept.reshape(n_out, n_in) & (rng.random((n_out, n_in)) >= dead), rng.normal(size=(n_out, n_in)), 0
    )
    return put(values.T, dtype)


BATCHES = (1, 2, 17, 65)  # a batch of one has kernels of its own


# All batches in one program, since every leaf is one to compile.
@settings(max_examples=12)
@example(inputs=0, n_out=3, kind=(2, 4), weights="float32", activations="float32", dead=0.0, seed=0)
@example(inputs=2, n_out=0, kind=(1, 4), weights="float32", activations="float32", dead=0.0, seed=0)
@example(inputs=9, n_out=70, kind=(1, 4), weights="float32", activations="float32", dead=1.0, seed=0)
@given(
    inputs=st.sampled_from([1, 2, 3, 8, 9, 10, 17]),
    n_out=st.sampled_from([1, 2, 7, 63, 64, 65, 130]),
    kind=st.sampled_from([(2, 4), (1, 4), (1, 2), (4, 8), (1, 8)]),
    weights=floats,
    activations=floats,
    dead=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_products_equal_numpy(inputs, n_out, kind, weights, activations, dead, seed):
    leaf = nm_leaf(32 * inputs, n_out, *kind, weights, dead, seed)
    weight, xs = compress_one(leaf, "native_nm"), [make_x((n, 32 * inputs), activations, seed) for n in BATCHES]
    stored = inputs % 2 == 0 and kind[0] / kind[1] <= 0.25
    assert weight.nse >= 32 * inputs * n_out // (4 if stored else 2) // (1 if dead == 0 else 2)
    dot = product_as(activations)
    back, ys = quick_jit(lambda xs, w: (w.decompress(), [dot(x, w) for x in xs]))(xs, weight)
    assert np.array_equal(back, leaf)
    for x, y in zip(xs, ys, strict=True):
        assert_product(y, to_numpy(x), to_numpy(leaf), activations)


def test_masks_of_nm_store_no_zeros():
    params = {"kernel": make_x((256, 24))}
    for n, m, share in ((2, 4, 2), (4, 8, 2), (1, 4, 4)):
        masks = jp.compute_masks(jp.Method(distribution=jp.NM(n, m)), params, None)
        weight = sparse.compress(jp.apply_masks(params, masks), "native_nm")["kernel"]
        assert weight.nse == 256 * 24 // share
        assert weight.index.dtype == jnp.uint8


def test_gradients_of_a_batch_of_one_equal_dense():
    leaf, x = nm_leaf(96, 40, 2, 4), make_x((1, 96))
    weight = compress_one(leaf, "native_nm")

    def loss(x, w):
        return jnp.sum(jnp.sin(x @ w))

    def of_values(values):
        return sparse.apply(loss)(x, weight.with_values(values))

    @quick_jit
    def derivatives(x, weight, leaf):
        got = jax.grad(sparse.apply(loss))(x, weight), jax.grad(of_values)(weight.values)
        return got, jax.grad(loss, (0, 1))(x, leaf), weight.coordinates()

    (got_x, got_values), (want_x, want_w), (rows, cols) = jax.device_get(derivatives(x, weight, leaf))
    np.testing.assert_allclose(got_x, want_x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got_values, want_w.T[rows, cols], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused_or_stays_dense():
    for leaf, says in (
        (jnp.ones((33, 4)), r"'w' \(33, 4\).*inputs in runs of 32, here are 33"),
        (jnp.ones((64, 4)).at[3:9].set(0), r"'w' \(64, 4\).*16 non-zeros of every 32 inputs.*up to 32"),
    ):
        with pytest.raises(ValueError, match=says):
            sparse.compress({"w": leaf}, "native_nm")
        assert sparse.compress({"w": leaf}, "native_nm", unsupported="dense")["w"] is leaf
    with pytest.raises(ValueError, match=r"'k' has no such form.*up to 17"):
        sparse.FORMATS["native_nm"].pack(
            np.ones(17, np.float32), np.zeros(17, int), np.arange(17), (32, 1), outputs_last=True, name="k"
        )
