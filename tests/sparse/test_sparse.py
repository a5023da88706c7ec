"""Compressed weights: the same numbers as dense, the same leaves back, or a refusal that says why."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quick import quick_jit
from sparse_helpers import (
    FORMATS,
    LAYOUTS,
    compress_all,
    compress_one,
    each_format,
    least,
    make_leaf,
    make_x,
    put,
    sparse_leaves,
)

from jaxprune import sparse
from jaxprune.layout import FLAX, Axes

# Half a unit in the last place for the rounding of inputs and result, the rest for the order of sums.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.6e-2, "float16": 2e-3}
DOT = jax.lax.dot_general
FLOAT64 = ("bcoo", "bcsr", "block")  # the native kernels have float32 sums

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick")]


def in_out(leaf, layout):
    """The leaf as float64 (in, out)."""
    matrix = np.asarray(leaf).astype(np.float64)
    return matrix if layout == "in_out" else matrix.T


def assert_near(got, want, scale, dtype, format):
    """Error relative to the sum of absolute products, as every summation is bounded."""
    assert got.shape == want.shape
    error = np.abs(np.asarray(got).astype(np.float64) - want)
    assert np.all(error <= TOLERANCE[dtype] * scale + least(dtype)), format


sizes = st.sampled_from([0, 1, 2, 5, 16, 17])
problems = {
    "n_in": sizes,
    "n_out": sizes,
    "batches": st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 7]), max_size=3), min_size=2, max_size=2),
    "density": st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    "dtype": st.sampled_from(sorted(TOLERANCE)),
    "layout": st.sampled_from(sorted(LAYOUTS)),
    "seed": st.integers(0, 2**16),
}


@quick_jit
def look(xs, weights):
    """Every weight as its leaf and as W (out, in), and its two products with each x."""

    def products(weight):
        return [(sparse.matmul(x, weight), sparse.reference.matmul(x, weight)) for x in xs]

    return {f: (weight.decompress(), weight.stored.todense(), products(weight)) for f, weight in weights.items()}


# Two batches of each leaf, since every leaf is a program to compile.
@settings(max_examples=14)
@example(n_in=17, n_out=17, batches=[[3, 7], []], density=0.02, dtype="float16", layout="out_in", seed=1)  # below 6e-5
@given(**problems)
def test_matmul_equals_numpy_and_the_round_trip_is_bit_exact(n_in, n_out, batches, density, dtype, layout, seed):
    shape = (n_in, n_out) if layout == "in_out" else (n_out, n_in)
    leaf, xs = make_leaf(shape, density, dtype, seed), [make_x((*batch, n_in), dtype, seed) for batch in batches]
    w, weights = in_out(leaf, layout), compress_all(leaf, layout)
    for format, (back, stored, products) in look(xs, weights).items():
        weight = weights[format]
        assert back.dtype == leaf.dtype
        assert np.asarray(back).tobytes() == np.asarray(leaf).tobytes(), format
        # Blocks store the zeros inside of them.
        assert weight.nse - np.count_nonzero(w) in (range(weight.nse + 1) if format == "block" else [0])
        assert (weight.shape, weight.dtype, weight.name) == (leaf.shape, leaf.dtype, "kernel")
        assert np.array_equal(in_out(stored, "out_in"), w), format
        for x, both in zip(xs, products, strict=True):
            x64 = np.asarray(x).astype(np.float64)
            for y in both:
                assert y.dtype == x.dtype
                assert_near(y, x64 @ w, np.abs(x64) @ np.abs(w), dtype, format)


@each_format
def test_round_trip_of_odd_values(format):
    leaf = np.array([[1e-45, -0.0, np.inf], [0.0, -np.inf, -1e-40]], np.float32)  # subnormals stay, -0.0 does not
    weight = compress_one(jnp.asarray(leaf), format)
    assert weight.nse == 4
    assert np.asarray(jax.jit(sparse.decompress)(weight)).tobytes() == (np.where(leaf == 0, 0, leaf)).tobytes()


def derivatives(fn, w, x):
    """Gradients and a directional derivative of a sum of fn(w, x)."""

    def loss(w, x):
        return jnp.sum(jnp.sin(fn(w, x)))

    return *jax.grad(loss, (0, 1))(w, x), jax.jvp(loss, (w, x), (w, x))[1]


# Every batch in both layouts; of a leaf without weights one batch.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("density", "batch"), [(0.3, ()), (0.3, (0,)), (0.3, (3, 5)), (0.0, (3, 5))])
def test_gradients_equal_dense(layout, density, batch):
    leaf, x = make_leaf((6, 9), density, "float32"), make_x((*batch, 6 if layout == "in_out" else 9))
    weights = compress_all(leaf, layout)

    def of_weight(weight, x):
        return derivatives(lambda values, x: sparse.matmul(x, weight.with_values(values)), weight.values, x)

    @quick_jit
    def run(leaf, weights, x):
        dense = derivatives(lambda leaf, x: x @ (leaf if layout == "in_out" else leaf.T), leaf, x)
        return dense, {format: (*of_weight(w, x), w.coordinates()) for format, w in weights.items()}

    (dense_d_leaf, dense_d_x, dense_forward), found = jax.device_get(run(leaf, weights, x))
    stored = dense_d_leaf.T if layout == "in_out" else dense_d_leaf
    for format, (d_values, d_x, forward, places) in found.items():
        np.testing.assert_allclose(d_x, dense_d_x, rtol=1e-5, atol=1e-5, err_msg=format)
        np.testing.assert_allclose(d_values, stored[places], rtol=1e-5, atol=1e-5, err_msg=format)
        np.testing.assert_allclose(forward, dense_forward, rtol=1e-4, atol=1e-5, err_msg=format)


def test_vmap_over_stored_values():
    leaf, x = make_leaf((7, 4), 0.4, "float32"), make_x((5, 7))
    want = np.asarray(x) @ np.asarray(leaf)

    def mapped(weight, axis, x):
        many = jnp.stack([weight.values, 2 * weight.values])
        return jax.vmap(lambda values, x: sparse.matmul(x, weight.with_values(values)), (0, axis))(many, x)

    @quick_jit
    def run(weights, x):
        return {f: (mapped(w, None, x), mapped(w, 0, jnp.stack([x, x]))) for f, w in weights.items()}

    for format, both in run(compress_all(leaf), x).items():
        for got in both:
            np.testing.assert_allclose(got, np.stack([want, 2 * want]), rtol=1e-5, atol=1e-5, err_msg=format)


def test_bfloat16_weights_float32_inputs():
    leaf, x = make_leaf((64, 8), 0.5, "bfloat16"), make_x((3, 64))
    weights, narrow = compress_all(leaf), make_x((3, 64), "bfloat16")
    mixed = functools.partial(DOT, dimension_numbers=(((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    for weight in weights.values():
        with pytest.raises(Exception, match="promotion"):
            sparse.matmul(x, weight)

    @quick_jit
    def run(weights, x, narrow):
        def products(w):
            return sparse.matmul(x, w), sparse.apply(jnp.matmul)(x, w), sparse.apply(mixed)(narrow, w)

        return jnp.matmul(x, leaf), {format: products(w) for format, w in weights.items()}

    with jax.numpy_dtype_promotion("standard"):
        want, found = run(weights, x, narrow)
    want_mixed = np.asarray(narrow).astype(float) @ np.asarray(leaf).astype(float)
    for format, (got, from_apply, from_mixed) in found.items():
        assert got.dtype == want.dtype == from_apply.dtype == from_mixed.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=format)
        np.testing.assert_allclose(from_apply, want, rtol=1e-5, atol=1e-5, err_msg=format)
        np.testing.assert_allclose(from_mixed, want_mixed, atol=1e-4, err_msg=format)


@pytest.mark.parametrize("dtype", ["int8", "int32", "float16"])
def test_other_inputs_of_at_most_32_bits_equal_jnp_matmul(dtype):
    leaf, x = make_leaf((64, 8), 0.5, "float32"), put(3 * np.asarray(make_x((3, 64))), dtype)

    @quick_jit
    def run(leaf, weights, x):
        def products(matmul, w):
            return matmul(x, w), matmul(x, w.astype(jnp.float16))

        return products(jnp.matmul, leaf), {f: products(sparse.matmul, w) for f, w in weights.items()}

    with jax.numpy_dtype_promotion("standard"):
        (want, want_half), found = run(leaf, compress_all(leaf), x)
    for format, (got, half) in found.items():
        assert got.dtype == want.dtype == jnp.float32
        assert half.dtype == want_half.dtype
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4, err_msg=format)
        np.testing.assert_allclose(np.float32(half), want, rtol=1e-2, atol=1e-1, err_msg=format)


def test_16_bit_sums_are_rounded_once():
    leaf = jnp.ones((4096, 1), jnp.bfloat16)  # added one by one, bfloat16 ones stop at 256
    run = jax.jit(lambda x, weights: {format: sparse.matmul(x, weight) for format, weight in weights.items()})
    for y in run(leaf.T, compress_all(leaf)).values():
        assert float(y[0, 0]) == 4096


def test_float64():
    with jax.enable_x64(True):
        leaf, x = make_leaf((20, 9), 0.3, "float64"), make_x((4, 20), "float64")
        weights = [compress_one(leaf, format) for format in FLOAT64]
        for y in jax.jit(lambda x, weights: [sparse.matmul(x, weight) for weight in weights])(x, weights):
            np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(leaf), rtol=1e-13, atol=1e-13)
        for format in set(FORMATS) - set(FLOAT64):
            with pytest.raises(TypeError, match=r"'kernel'.*float32, here float64"):
                sparse.matmul(x, compress_one(leaf, format))


@each_format
def test_is_a_pytree(format):
    weight = compress_one(make_leaf((7, 4), 0.4, "float32"), format)
    leaves, treedef = jax.tree.flatten(weight)
    assert jax.tree.structure(jax.tree.unflatten(treedef, leaves)) == treedef
    twice = 2 * np.asarray(weight.decompress())
    assert jax.tree.structure(compress_one(jnp.asarray(twice), format)) == treedef
    assert weight.nbytes == sum(leaf.nbytes for leaf in leaves) == sparse.nbytes({"a": weight})
    doubled = jax.tree.map(lambda leaf: leaf * 2 if leaf.dtype == jnp.float32 else leaf, weight)
    assert np.array_equal(doubled.decompress(), twice)
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

    def kernels(fn, x):
        return jax.jit(fn).lower(x, weight).compile().as_text().count('custom_call_target="cpu_csr_sparse_dense_ffi"')

    assert kernels(sparse.matmul, x) == 1
    assert kernels(jax.vmap(sparse.matmul, (0, None)), x) == 1
    assert kernels(jax.vmap(sparse.apply(jnp.matmul), (1, None)), x) == 1
    assert kernels(sparse.apply(jax.vmap(lambda x, w: w.T @ x, (0, None))), jax.ShapeDtypeStruct((4, 64), dtype)) == 1


def refuse_compress(error, message, params, *args, **options):
    with pytest.raises(error, match=message):
        sparse.compress(params, *args, **options)


def test_compress_refusals(unchecked):
    leaf = make_leaf((5, 4), 0.5, "float32")
    conv, stacked = (
        {"conv": {"kernel": jnp.ones((3, 3, 1, 2))}, "w": leaf},
        FLAX.with_rules({"s": Axes((0,), (), (1,), (2,))}),
    )
    names = ", ".join(map(repr, (*sparse.FORMATS, "dense")))
    refuse_compress(ValueError, rf"'csc'\. There are: {names}\.", {"w": leaf}, "csc")
    refuse_compress(ValueError, r"`unsupported`.*'maybe'", {"w": leaf}, unsupported="maybe")
    refuse_compress(
        ValueError, r"'conv/kernel' \(3, 3, 1, 2\) is a convolution kernel.*select.*unsupported", conv, "bcoo"
    )
    refuse_compress(
        ValueError, r"'s' \(2, 3, 4\) is stacked layers", {"s": jnp.ones((2, 3, 4))}, "bcoo", layout=stacked
    )
    refuse_compress(ValueError, r"'v' \(3,\) is no matrix", {"v": jnp.ones(3)}, "bcoo", select=lambda name, leaf: True)
    refuse_compress(ValueError, r"'w2' holds a NaN", {"w1": leaf, "w2": leaf.at[1, 1].set(jnp.nan)})
    refuse_compress(
        TypeError, r"'w' is compressed already.*decompress", {"w": compress_one(leaf, "bcoo").replace(name="w")}
    )
    refuse_compress(TypeError, r"'i' is int32", {"i": jnp.ones((3, 3), jnp.int32)}, select="i")
    kept = sparse.compress(conv, "bcoo", unsupported="dense")
    assert kept["conv"]["kernel"] is conv["conv"]["kernel"]
    assert isinstance(kept["w"], sparse.BCOOWeight)
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
