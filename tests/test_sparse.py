"""Compressed weights: the same numbers as dense, the same leaves back, or a refusal that says why."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sparse_helpers import FORMATS, LAYOUTS, compress_one, each_format, least, make_leaf, make_x, sparse_leaves

from jaxprune import sparse
from jaxprune.layout import FLAX, Axes

# Half a unit in the last place for the rounding of inputs and result, the rest for the order of sums.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.6e-2, "float16": 2e-3}
DOT = jax.lax.dot_general
FLOAT64 = ("bcoo", "bcsr", "block")  # the native kernels have float32 sums

pytestmark = pytest.mark.filterwarnings("error")


def in_out(leaf, layout):
    """The leaf as float64 (in, out)."""
    matrix = np.asarray(leaf).astype(np.float64)
    return matrix if layout == "in_out" else matrix.T


def assert_near(got, want, scale, dtype):
    """Error relative to the sum of absolute products, as every summation is bounded."""
    assert got.shape == want.shape
    assert np.all(np.abs(np.asarray(got).astype(np.float64) - want) <= TOLERANCE[dtype] * scale + least(dtype))


sizes = st.sampled_from([0, 1, 2, 5, 16, 17])
problems = {
    "n_in": sizes,
    "n_out": sizes,
    "batch": st.lists(st.sampled_from([0, 1, 2, 3, 7]), max_size=3),
    "density": st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    "dtype": st.sampled_from(sorted(TOLERANCE)),
    "layout": st.sampled_from(sorted(LAYOUTS)),
    "seed": st.integers(0, 2**16),
}


@each_format
@example(n_in=17, n_out=17, batch=[3, 7], density=0.02, dtype="float16", layout="out_in", seed=1)  # results below 6e-5
@given(**problems)
def test_matmul_equals_numpy(format, n_in, n_out, batch, density, dtype, layout, seed):
    shape = (n_in, n_out) if layout == "in_out" else (n_out, n_in)
    leaf, x = make_leaf(shape, density, dtype, seed), make_x((*batch, n_in), dtype, seed)
    weight = compress_one(leaf, format, layout)
    w, x64 = in_out(leaf, layout), np.asarray(x).astype(np.float64)
    for y in jax.jit(lambda x, weight: (sparse.matmul(x, weight), sparse.reference.matmul(x, weight)))(x, weight):
        assert y.dtype == x.dtype
        assert_near(y, x64 @ w, np.abs(x64) @ np.abs(w), dtype)


@each_format
@given(**problems)
def test_round_trip_is_bit_exact(format, n_in, n_out, batch, density, dtype, layout, seed):
    del batch
    leaf = make_leaf((n_in, n_out), density, dtype, seed)
    weight = compress_one(leaf, format, layout)
    back, stored = jax.jit(lambda weight: (weight.decompress(), weight.stored.todense()))(weight)
    assert back.dtype == leaf.dtype
    assert np.asarray(back).tobytes() == np.asarray(leaf).tobytes()
    # Blocks store the zeros inside of them.
    assert weight.nse - np.count_nonzero(np.asarray(leaf)) in (range(weight.nse + 1) if format == "block" else [0])
    assert (weight.shape, weight.dtype, weight.name) == (leaf.shape, leaf.dtype, "kernel")
    assert np.array_equal(in_out(stored, "out_in"), in_out(leaf, layout))


@each_format
def test_round_trip_of_odd_values(format):
    leaf = np.array([[1e-45, -0.0, np.inf], [0.0, -np.inf, -1e-40]], np.float32)  # subnormals stay, -0.0 does not
    weight = compress_one(jnp.asarray(leaf), format)
    assert weight.nse == 4
    assert np.asarray(jax.jit(sparse.decompress)(weight)).tobytes() == (np.where(leaf == 0, 0, leaf)).tobytes()


@each_format
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("density", [0.0, 0.3])
@pytest.mark.parametrize("batch", [(), (0,), (3, 5)])
def test_gradients_equal_dense(format, layout, density, batch):
    leaf, x = make_leaf((6, 9), density, "float32"), make_x((*batch, 6 if layout == "in_out" else 9))
    weight = compress_one(leaf, format, layout)

    def loss(values, x):
        return jnp.sum(jnp.sin(sparse.matmul(x, weight.with_values(values))))

    def dense_loss(leaf, x):
        return jnp.sum(jnp.sin(x @ (leaf if layout == "in_out" else leaf.T)))

    d_values, d_x = jax.jit(jax.grad(loss, (0, 1)))(weight.values, x)
    dense_d_leaf, dense_d_x = jax.grad(dense_loss, (0, 1))(leaf, x)
    stored = dense_d_leaf.T if layout == "in_out" else dense_d_leaf
    np.testing.assert_allclose(d_x, dense_d_x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_values, stored[weight.coordinates()], rtol=1e-5, atol=1e-5)
    forward = jax.jvp(loss, (weight.values, x), (weight.values, x))[1]
    np.testing.assert_allclose(forward, jax.jvp(dense_loss, (leaf, x), (leaf, x))[1], rtol=1e-4, atol=1e-5)


@each_format
def test_vmap_over_stored_values(format):
    leaf, x = make_leaf((7, 4), 0.4, "float32"), make_x((5, 7))
    weight = compress_one(leaf, format)
    many = jnp.stack([weight.values, 2 * weight.values])
    for axis, batch in ((None, x), (0, jnp.stack([x, x]))):
        got = jax.vmap(lambda values, x: sparse.matmul(x, weight.with_values(values)), (0, axis))(many, batch)
        np.testing.assert_allclose(got, jnp.stack([x @ leaf, 2 * x @ leaf]), rtol=1e-5, atol=1e-5)


@each_format
def test_bfloat16_weights_float32_inputs(format):
    leaf, x = make_leaf((64, 8), 0.5, "bfloat16"), make_x((3, 64))
    weight = compress_one(leaf, format)
    with pytest.raises(Exception, match="promotion"):
        sparse.matmul(x, weight)
    with jax.numpy_dtype_promotion("standard"):
        got, want = sparse.matmul(x, weight), jnp.matmul(x, leaf)
        from_apply = jax.jit(sparse.apply(jnp.matmul))(x, weight)
    assert got.dtype == want.dtype == from_apply.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(from_apply, want, rtol=1e-5, atol=1e-5)
    mixed = functools.partial(DOT, dimension_numbers=(((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    x = x.astype(jnp.bfloat16)
    got = jax.jit(sparse.apply(mixed))(x, weight)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.asarray(x).astype(float) @ np.asarray(leaf).astype(float), atol=1e-4)


@each_format
@pytest.mark.parametrize("dtype", ["int8", "int32", "float16"])
def test_other_inputs_of_at_most_32_bits_equal_jnp_matmul(format, dtype):
    leaf, x = make_leaf((64, 8), 0.5, "float32"), (3 * make_x((3, 64))).astype(dtype)
    weight = compress_one(leaf, format)
    with jax.numpy_dtype_promotion("standard"):
        got, want = jax.jit(sparse.matmul)(x, weight), jnp.matmul(x, leaf)
        half = sparse.matmul(x, weight.astype(jnp.float16))
        assert half.dtype == jnp.matmul(x, leaf.astype(jnp.float16)).dtype
    assert got.dtype == want.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(half.astype(jnp.float32), want, rtol=1e-2, atol=1e-1)


def test_16_bit_sums_are_rounded_once():
    leaf = jnp.ones((4096, 1), jnp.bfloat16)  # added one by one, bfloat16 ones stop at 256
    for format in FORMATS:
        y = sparse.matmul(jnp.ones((1, 4096), jnp.bfloat16), compress_one(leaf, format))
        assert float(y[0, 0]) == 4096


def test_float64():
    with jax.enable_x64(True):
        leaf, x = make_leaf((20, 9), 0.3, "float64"), make_x((4, 20), "float64")
        for format in FLOAT64:
            y = jax.jit(sparse.matmul)(x, compress_one(leaf, format))
            np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(leaf), rtol=1e-13, atol=1e-13)
        for format in set(FORMATS) - set(FLOAT64):
            with pytest.raises(TypeError, match=r"'kernel'.*float32, here float64"):
                sparse.matmul(x, compress_one(leaf, format))


@each_format
def test_is_a_pytree(format):
    weight = compress_one(make_leaf((7, 4), 0.4, "float32"), format)
    leaves, treedef = jax.tree.flatten(weight)
    assert jax.tree.structure(jax.tree.unflatten(treedef, leaves)) == treedef
    assert jax.tree.structure(compress_one(2 * weight.decompress(), format)) == treedef
    assert weight.nbytes == sum(leaf.nbytes for leaf in leaves) == sparse.nbytes({"a": weight})
    doubled = jax.tree.map(lambda leaf: leaf * 2 if leaf.dtype == jnp.float32 else leaf, weight)
    assert np.array_equal(doubled.decompress(), 2 * weight.decompress())
    shapes = jax.eval_shape(lambda weight: weight, weight)
    assert (shapes.shape, shapes.dtype, shapes.nse) == (weight.shape, weight.dtype, weight.nse)


def test_nbytes():
    params = sparse.compress({"w": make_leaf((50, 40), 1.0, "float32"), "bias": jnp.zeros(40)}, "bcoo")
    assert sparse.nbytes(params) == 50 * 40 * (4 + 8) + 40 * 4
    params = sparse.compress({"w": make_leaf((50, 40), 1.0, "bfloat16"), "bias": jnp.zeros(40)}, "bcsr")
    assert sparse.nbytes(params) == 50 * 40 * (2 + 4) + 41 * 4 + 40 * 4


def test_dense_format_and_leaves_without_weights_stay():
    params = {"w": make_leaf((5, 4), 0.5, "float32"), "bias": jnp.ones(4), "step": jnp.array(3)}
    assert sparse.compress(params, "dense")["w"] is params["w"]
    compressed = sparse.compress(params, "bcsr")
    assert compressed["bias"] is params["bias"]
    assert compressed["step"] is params["step"]
    assert sparse.apply(lambda p: p["w"])(compressed).nse == compressed["w"].nse  # a returned leaf stays compressed


def test_select_by_name():
    params = {"a": {"w": make_leaf((5, 4), 0.5, "float32")}, "b": {"w": make_leaf((5, 4), 0.5, "float32")}}
    assert [weight.name for weight in sparse_leaves(sparse.compress(params, select="b/*"))] == ["b/w"]
    with pytest.raises(ValueError, match=r"'c/\*'"):
        sparse.compress(params, select="c/*")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="Eigen's kernel is CPU's")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bcsr_runs_eigen_under_jit_and_vmap(dtype):
    weight, x = compress_one(make_leaf((64, 32), 0.1, dtype), "bcsr"), make_x((4, 6, 64), dtype)

    def kernels(fn, *args):
        return jax.jit(fn).lower(*args).compile().as_text().count('custom_call_target="cpu_csr_sparse_dense_ffi"')

    assert kernels(sparse.matmul, x, weight) == 1
    assert kernels(jax.vmap(sparse.matmul, (0, None)), x, weight) == 1
    assert kernels(jax.vmap(sparse.apply(jnp.matmul), (1, None)), x, weight) == 1
    assert kernels(sparse.apply(jax.vmap(lambda x, w: w.T @ x, (0, None))), x[:, 0], weight) == 1


def refuse_compress(error, message, params, *args, **options):
    with pytest.raises(error, match=message):
        sparse.compress(params, *args, **options)


def test_compress_refusals(unchecked):
    leaf = make_leaf((5, 4), 0.5, "float32")
    conv, stacked = (
        {"conv": {"kernel": jnp.ones((3, 3, 1, 2))}, "d": leaf},
        FLAX.with_rules({"s": Axes((0,), (), (1,), (2,))}),
    )
    names = ", ".join(map(repr, (*sparse.FORMATS, "dense")))
    refuse_compress(ValueError, rf"'csc'\. There are: {names}\.", {"w": leaf}, "csc")
    refuse_compress(ValueError, r"`unsupported`.*'maybe'", {"w": leaf}, unsupported="maybe")
    refuse_compress(ValueError, r"'conv/kernel' \(3, 3, 1, 2\) is a convolution kernel.*select.*unsupported", conv)
    refuse_compress(ValueError, r"'s' \(2, 3, 4\) is stacked layers", {"s": jnp.ones((2, 3, 4))}, layout=stacked)
    refuse_compress(ValueError, r"'v' \(3,\) is no matrix", {"v": jnp.ones(3)}, select=lambda name, leaf: True)
    refuse_compress(ValueError, r"'b' holds a NaN", {"a": leaf, "b": leaf.at[1, 1].set(jnp.nan)})
    refuse_compress(
        TypeError, r"'w' is compressed already.*decompress", {"w": compress_one(leaf, "bcoo").replace(name="w")}
    )
    refuse_compress(TypeError, r"'i' is int32", {"i": jnp.ones((3, 3), jnp.int32)}, select="i")
    kept = sparse.compress(conv, unsupported="dense")
    assert kept["conv"]["kernel"] is conv["conv"]["kernel"]
    assert isinstance(kept["d"], sparse.BCOOWeight)
    with pytest.raises(TypeError, match=r"'w' is traced.*outside"):
        jax.jit(lambda leaf: sparse.compress({"w": leaf}))(leaf)
    with pytest.raises(ValueError, match=r"`unsupported`.*'maybe'"):  # asked of `apply`
        sparse.apply(jnp.matmul, unsupported="maybe")


def test_matmul_refuses_other_inputs():
    weight = compress_one(make_leaf((5, 4), 0.5, "float32"), "bcsr")
    for shape in ((4,), (5, 4)):
        with pytest.raises(ValueError, match=r"'kernel' needs x of shape \(\*batch, 5\)"):
            sparse.matmul(jnp.ones(shape), weight)
    with pytest.raises(sparse.SparseUseError, match="'kernel'"):
        weight.materialise()
    assert weight.replace(unsupported="dense").materialise().shape == (5, 4)


ONE, TWO = np.ones(1, np.float32), np.ones(2, np.float32)
BAD_PARTS = {
    "unsorted outputs": (sparse.BCOOWeight, (TWO, [[1, 0], [0, 0]]), "sorted"),
    "unsorted inputs": (sparse.BCOOWeight, (TWO, [[1, 1], [1, 0]]), "sorted"),
    "twice": (sparse.BCOOWeight, (TWO, [[1, 1], [1, 1]]), "each once"),
    "output too large": (sparse.BCOOWeight, (ONE, [[3, 0]]), "outside its 3 outputs and 2 inputs"),
    "input too large": (sparse.BCOOWeight, (ONE, [[0, 2]]), "outside"),
    "negative": (sparse.BCOOWeight, (ONE, [[-1, 0]]), "outside"),
    "too few": (sparse.BCOOWeight, (TWO, [[0, 0]]), r"indices \(2, 2\), \(1, 2\) arrived"),
    "csr unsorted": (sparse.BCSRWeight, (TWO, [1, 0], [0, 2, 2, 2]), "sorted"),
    "csr input too large": (sparse.BCSRWeight, (TWO, [0, 2], [0, 2, 2, 2]), "outside"),
    "csr bounds too few": (sparse.BCSRWeight, (TWO, [0, 1], [0, 2, 2]), "4 run bounds"),
    "csr bounds fall": (sparse.BCSRWeight, (TWO, [0, 1], [0, 2, 1, 2]), "climb"),
    "csr bounds end early": (sparse.BCSRWeight, (TWO, [0, 1], [0, 1, 1, 1]), "its 2 values"),
    "csr too few": (sparse.BCSRWeight, (TWO, [0], [0, 2, 2, 2]), "2 values, but 1 input"),
    "float index": (sparse.BCOOWeight, (ONE, [[0.0, 0.0]]), "integers"),
    "integer values": (sparse.BCOOWeight, (np.ones(1, np.int32), [[0, 0]]), "floating values"),
    "matrix of values": (sparse.BCOOWeight, (np.ones((1, 1), np.float32), [[0, 0]]), "floating values"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_are_checked(case):
    cls, (values, *indices), message = BAD_PARTS[case]
    with pytest.raises((ValueError, TypeError), match=rf"(?s){message}"):
        cls(values, *(np.asarray(part) for part in indices), leaf_shape=(2, 3), name="w")


def test_traced_parts_are_refused_and_good_ones_taken():
    good = sparse.BCSRWeight(TWO, np.array([0, 1]), np.array([0, 1, 1, 2]), leaf_shape=(2, 3), name="w")
    assert np.array_equal(good.decompress(), [[1, 0, 0], [0, 0, 1]])
    with pytest.raises(TypeError, match=r"'w'.*traced"):
        jax.jit(lambda i: sparse.BCSRWeight(good.values, i, good.indptr, leaf_shape=(2, 3), name="w"))(good.indices)
