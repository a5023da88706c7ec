"""Formats of a bit for each weight: what is stored, and products at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import quick_jit
from sparse_helpers import LAYOUTS, compress_one, make_leaf, make_x, needs_kernels

from jaxprune import sparse
from jaxprune.sparse.bits import PAGE

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick")]
each_bits = pytest.mark.parametrize("format", ["native_bits", "native_bits_int8"])


@settings(max_examples=8)
@given(
    n_in=st.integers(0, 200),
    n_out=st.integers(0, 9),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 2**16),
)
def test_stores_a_bit_for_each_weight_and_the_values_that_are_there(n_in, n_out, density, dtype, layout, seed):
    leaf = np.asarray(make_leaf((n_in, n_out), density, dtype, seed))
    weight = compress_one(jnp.asarray(leaf if layout == "in_out" else leaf.T), "native_bits", layout)
    words = -(-n_in // 64)
    bits = np.zeros((n_out, 64 * words), np.uint8)
    bits[:, :n_in] = leaf.T != 0
    eighths = bits.reshape(n_out, 8 * words, 8) << np.arange(8, dtype=np.uint8)
    assert np.array_equal(weight.index, eighths.sum(axis=2).ravel())
    assert np.array_equal(weight.values, leaf.T[leaf.T != 0])
    assert np.array_equal(np.diff(weight.bounds), (leaf != 0).sum(axis=0))
    assert weight.nbytes == weight.nse * leaf.dtype.itemsize + 8 * words * n_out + 4 * (n_out + 1)
    back = quick_jit(lambda weight: weight.decompress())(weight)
    assert np.asarray(back).tobytes() == (leaf if layout == "in_out" else leaf.T).tobytes()


@needs_kernels
@pytest.mark.parametrize("batch", [0, 1, 3, 8, 9])
def test_products_with_float16_weights_equal_numpy(batch):
    leaf, x = make_leaf((130, 21), 0.5, "float16"), make_x((batch, 130))
    weight = compress_one(leaf, "native_bits")
    assert weight.values.dtype == jnp.float16
    mixed = sparse.apply(lambda x, leaf: jax.lax.dot(x, leaf, preferred_element_type=jnp.float32))
    y = jax.jit(mixed)(x, weight)
    want = np.asarray(x, np.float64) @ np.asarray(leaf, np.float64)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@each_bits
def test_what_is_not_stored_meets_no_infinity(format, bad):
    leaf, x = np.array(make_leaf((100, 7), 0.5, "float32")), np.array(make_x((3, 100)))
    leaf[37] = 0
    leaf[37, 2] = 1.5
    x[1, 37] = bad
    weight = compress_one(jnp.asarray(leaf), format)
    y = np.array(sparse.matmul(jnp.asarray(x), weight))
    x[1, 37] = 0
    want = x.astype(np.float64) @ np.asarray(weight.decompress(), np.float64)
    assert not np.isfinite(y[1, 2])
    y[1, 2] = want[1, 2]
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-4)


@needs_kernels
@each_bits
@pytest.mark.parametrize(("batch", "dtype"), [(1, "float32"), (3, "bfloat16"), (8, "float32"), (19, "float16")])
def test_the_other_way_round_runs_on_the_bits(format, batch, dtype):
    """x W for W (out, in), as a tied embedding needs it: no dense copy, gradients and `vmap` as dense."""
    leaf, x = make_leaf((21, 130), 0.5, dtype), make_x((batch, 21))
    weight = compress_one(leaf, format, "out_in")
    exact = np.asarray(weight.astype(jnp.float32).decompress(), np.float64)
    dot = sparse.apply(lambda x, leaf: jax.lax.dot(x, leaf, preferred_element_type=jnp.float32))
    program = jax.jit(dot).lower(x, weight).compile().as_text()
    assert program.count('custom_call_target="jaxprune_transposed"') == 1
    np.testing.assert_allclose(jax.jit(dot)(x, weight), np.asarray(x, np.float64) @ exact, rtol=1e-5, atol=1e-4)
    apart = jax.vmap(dot, (0, None))(x[:, None], weight)
    np.testing.assert_allclose(apart[:, 0], np.asarray(x, np.float64) @ exact, rtol=1e-5, atol=1e-4)
    of_x = jax.grad(lambda x: jnp.sum(jnp.sin(dot(x, weight))))(x)
    want = np.cos(np.asarray(x, np.float64) @ exact) @ exact.T
    np.testing.assert_allclose(of_x, want, rtol=1e-3, atol=2e-2 if dtype != "float32" else 1e-3)


@needs_kernels
def test_the_other_way_round_meets_no_infinity_where_nothing_is_stored():
    leaf, x = np.array(make_leaf((9, 100), 0.5, "float32")), np.array(make_x((2, 9)))
    leaf[4] = 0
    leaf[4, 7] = 1.5
    x[1, 4] = np.inf
    dot = jax.jit(sparse.apply(lambda x, leaf: x @ leaf))
    y = np.array(dot(jnp.asarray(x), compress_one(jnp.asarray(leaf), "native_bits", "out_in")))
    assert y[1, 7] == np.inf
    x[1, 4] = y[1, 7] = leaf[4, 7] = 0
    y[0, 7] -= x[0, 4] * 1.5
    want = x.astype(np.float64) @ leaf
    want[1, 7] = 0
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_int8_products_err_by_no_more_than_a_part_of_the_largest_activation():
    leaf, x = make_leaf((300, 40), 0.5, "float32"), np.array(make_x((5, 300)))
    x[:, 3] = 1e4
    x[4] *= 1e-30
    weight = compress_one(leaf, "native_bits_int8")
    y = np.asarray(sparse.matmul(jnp.asarray(x), weight), np.float64)
    exact = np.asarray(weight.decompress(), np.float64)
    allowed = np.abs(x).max(axis=1, keepdims=True) * np.abs(exact).sum(axis=0) * 2.0**-22
    assert np.all(np.abs(y - x.astype(np.float64) @ exact) <= allowed)


def test_bits_that_do_not_fit_are_refused():
    weight = compress_one(make_leaf((70, 5), 0.5, "float32"), "native_bits")
    fields = {"leaf_shape": weight.leaf_shape, "name": "kernel", "values": weight.values, "bounds": weight.bounds}
    index = np.array(weight.index)
    kind = sparse.NativeBitsWeight
    with pytest.raises(ValueError, match="needs a `tile` of 0 and 80 bytes of bits, 0 and uint8"):
        kind(**fields, index=index[:-8], tile=0)
    with pytest.raises(ValueError, match="needs a `tile` of 0"):
        kind(**fields, index=index, tile=64)
    for place, bit in [(9, 7), (0, 0)]:  # beyond the 70 inputs; one more, or one less, than the bounds say
        other = index.copy()
        other[place] ^= 1 << bit
        with pytest.raises(ValueError, match="has bits that do not fit its 70 inputs or its bounds"):
            kind(**fields, index=other, tile=0)


@needs_kernels
def test_bits_that_lead_outside_are_found_in_the_call():
    weight = compress_one(make_leaf((70, 5), 0.5, "float32"), "native_bits")
    more = weight.replace(index=weight.index.at[0].set(255))
    with pytest.raises(jax.errors.JaxRuntimeError, match="`index` or `bounds` lead outside"):
        jax.block_until_ready(sparse.matmul(make_x((1, 70)), more))


@each_bits
def test_convolutions_have_no_such_form(format):
    with pytest.raises(ValueError, match=r"'conv' .* is a convolution kernel"):
        compress_one(make_leaf((3, 4, 5), 0.5, "float32"), format)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs alone")
def test_large_arrays_begin_where_large_pages_do():
    weight = compress_one(jnp.asarray(np.ones((1024, 1024), np.float32)), "native_bits")
    assert weight.values.nbytes >= PAGE
    assert weight.values.unsafe_buffer_pointer() % PAGE == 0
