"""Native formats: groups of outputs, 8-bit weights and bfloat16 are what NumPy makes of them, at every edge."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quick import quick_jit
from sparse_helpers import INSTRUCTION_SETS, LAYOUTS, check_under, compress_one, make_leaf, make_x, needs_kernels

from jaxprune import sparse
from jaxprune.granularity import Block

TILED = ["native", "native_row", "native_block", "native_int8"]
NATIVE = [*TILED, "native_bits", "native_bits_int8"]
each_native = pytest.mark.parametrize("format", NATIVE)

pytestmark = [pytest.mark.filterwarnings("error"), needs_kernels, pytest.mark.usefixtures("quick")]


def to_numpy(array):
    return np.asarray(array).astype(np.float64)


def stored_leaf(leaf, format):
    """What a format makes of a leaf (in, out), in float64: the leaf itself, unless it rounds."""
    if not format.endswith("int8"):
        return to_numpy(leaf)
    scale, rounded = oracle.rounded_to_8_bits(to_numpy(leaf).T)
    return rounded.T.astype(np.float64) * scale


def assert_product(y, x, w, dtype):
    """Sums of float32, rounded once to the dtype of the result."""
    want, scale = x @ w, np.abs(x) @ np.abs(w)
    assert (y.shape, y.dtype) == (want.shape, dtype)
    once = jnp.finfo(dtype).eps / 2 if dtype != jnp.float32 else 0
    assert np.all(np.abs(to_numpy(y) - want) <= once * np.abs(want) + 3e-6 * scale + 1e-30)


def look(weight):
    """((rows, cols), leaf), in NumPy."""
    return jax.tree.map(np.asarray, quick_jit(lambda weight: (weight.coordinates(), weight.decompress()))(weight))


def product_as(dtype):
    """x @ leaf with a result of this dtype, as a model has it."""
    return sparse.apply(lambda x, leaf: jax.lax.dot(x, leaf, preferred_element_type=jnp.dtype(dtype)))


def products_as(dtype):
    """The same for several x, by one program."""
    return quick_jit(lambda xs, leaf: [product_as(dtype)(x, leaf) for x in xs])


floats = st.sampled_from(["float32", "bfloat16"])
problems = {
    "format": st.sampled_from(NATIVE),
    "n_in": st.sampled_from([1, 2, 127, 128, 129, 300]),
    "groups": st.sampled_from([1, 2, 5, 17]),
    "batch": st.one_of(st.sampled_from([1, 2, 7, 16, 33, 64, 65, 100, 130]), st.integers(1, 200)),
    "density": st.sampled_from([0.02, 0.1, 0.5, 1.0]),
    "weights": floats,
    "activations": floats,
    "results": floats,
    "seed": st.integers(0, 2**16),
}
usual = {"n_in": 30, "groups": 3, "batch": 5, "density": 0.3, "weights": "float32", "activations": "float32"}
usual |= {"results": "float32", "seed": 0}


@settings(max_examples=25)
@example(**usual | {"format": "native_block", "n_in": 0})
@example(**usual | {"format": "native_int8", "groups": 0})
@example(**usual | {"format": "native_int8", "density": 0.0, "results": "bfloat16"})
@example(**usual | {"format": "native_block", "batch": 0})
@given(**problems)
def test_products_equal_numpy(format, n_in, groups, batch, density, weights, activations, results, seed):
    leaf, x = make_leaf((n_in, 4 * groups), density, weights, seed), make_x((batch, n_in), activations, seed)
    [y] = products_as(results)([x], compress_one(leaf, format))
    assert_product(y, to_numpy(x), stored_leaf(leaf, format), results)


CHECK = """
import itertools
import jax, jax.numpy as jnp, numpy as np
import test_conv, test_native_nm, test_native_formats as formats
from sparse_helpers import compress_one, make_leaf, make_x
from jaxprune import sparse
for format, dtype in itertools.product(formats.NATIVE, ("float32", "bfloat16")):
    leaf = make_leaf((300, 68), 0.2, dtype)
    weight, w = compress_one(leaf, format), formats.stored_leaf(leaf, format)
    batches = (1, 2, 3, 4, 5, 7, 8, 16, 33, 64, 65, 100, 130) if dtype == "float32" else (1, 3, 16, 65)
    xs = [make_x((batch, 300), dtype) for batch in batches]
    for x, y in zip(xs, formats.products_as(dtype)(xs, weight), strict=True):
        formats.assert_product(y, formats.to_numpy(x), w, dtype)
    if format in ("native", "native_block", "native_int8"):  # of which "native_row" a convolution is another tile
        test_conv.check(format, dtype)
for n_in, n_out in [(1, 1), (127, 5), (129, 66), (320, 257)]:
    leaf, xs = make_leaf((n_in, n_out), 0.2, "float32"), [make_x((batch, n_in)) for batch in (1, 17, 65)]
    for x, y in zip(xs, formats.products_as("float32")(xs, compress_one(leaf, "native")), strict=True):
        formats.assert_product(y, formats.to_numpy(x), formats.to_numpy(leaf), "float32")
for kind, dtype in itertools.product([(2, 4), (1, 4)], ("float32", "bfloat16")):
    leaf, x = test_native_nm.nm_leaf(320, 70, *kind, dtype), make_x((1, 320), dtype)
    [y] = formats.products_as(dtype)([x], compress_one(leaf, "native_nm"))
    formats.assert_product(y, formats.to_numpy(x), formats.to_numpy(leaf), dtype)
print(sparse.native.instruction_set())
"""


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_equals_numpy(isa, tmp_path):
    check_under(isa, CHECK, tmp_path)


# How weights lie in memory.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 4), (3, 8), (30, 4), (2, 12)])
def test_a_mask_of_blocks_stores_no_zeros(layout, rows, cols):
    rng = np.random.default_rng(0)
    kept = rng.random((1, 30 // rows, 24 // cols)) < 0.6
    mask = np.asarray(Block(rows, cols).expand(jnp.asarray(kept), (1, 30, 24)))[0]
    matrix = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    leaf = jnp.asarray(matrix if layout == "in_out" else matrix.T)
    weight = compress_one(leaf, "native_block", layout)
    assert (weight.nse, weight.index.size) == (mask.sum(), mask.sum() // 4)
    back, product = quick_jit(lambda x, w: (w.decompress(), sparse.matmul(x, w)))(np.eye(30, dtype=np.float32), weight)
    assert np.array_equal(back, leaf)
    np.testing.assert_allclose(product, matrix)


@settings(max_examples=8)  # each a program to compile
@given(n_in=st.integers(0, 40), groups=st.integers(0, 5), density=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_any_mask_stores_what_one_of_four_outputs_needs(n_in, groups, density, seed):
    leaf = make_leaf((n_in, 4 * groups), density, "float32", seed)
    weight = compress_one(leaf, "native_block")
    needed = (np.asarray(leaf).reshape(n_in, groups, 4) != 0).any(axis=-1).sum()
    assert (weight.index.size, weight.nse) == (needed, 4 * needed)
    (rows, cols), back = look(weight)
    assert back.tobytes() == np.asarray(leaf).tobytes()
    assert np.array_equal(weight.values, np.asarray(leaf)[cols, rows])


def test_outputs_that_are_not_groups_of_four_are_refused_or_stay_dense():
    params = {"a": make_leaf((8, 6), 0.5, "float32"), "b": make_leaf((6, 8), 0.5, "float32")}
    layout = LAYOUTS["in_out"]
    with pytest.raises(ValueError, match=r"'a' \(8, 6\) has no such form: .*groups of 4, here are 6"):
        sparse.compress(params, "native_block", layout=layout)
    kept = sparse.compress(params, "native_block", layout=layout, unsupported="dense")
    assert kept["a"] is params["a"]
    assert type(kept["b"]) is sparse.FORMATS["native_block"]
    with pytest.raises(ValueError, match=r"'b' \(6, 8\).*here are 6"):  # as (out, in)
        sparse.compress(params, "native_block", layout=LAYOUTS["out_in"])


@pytest.mark.parametrize(
    ("format", "n_in", "density", "tile"),
    [
        ("native", 700, 0.5, 128),
        ("native", 700, 0.1, 192),
        ("native", 700, 0.05, 256),
        ("native", 3000, 0.01, 1024),
        ("native_int8", 700, 0.5, 128),
        ("native_block", 700, 0.5, 128),
        ("native_block", 700, 0.01, 256),  # a group needs 4 % of its inputs
        ("native_row", 70000, 0.01, 65536),
    ],
)
def test_tiles_are_those_of_the_density(format, n_in, density, tile):
    leaf, x = make_leaf((n_in, 8), density, "float32"), make_x((3, n_in))
    weight = compress_one(leaf, format)
    n_tiles, byte = -(-n_in // tile), 1 if tile <= 256 else 2
    assert (weight.tile, weight.index.dtype.itemsize) == (tile, byte)
    assert weight.bounds.size == n_tiles * (8 // weight.group + 1)
    scales = 4 * 8 if format == "native_int8" else 0
    size = weight.nse * weight.values.dtype.itemsize + weight.index.size * byte + 4 * weight.bounds.size + scales
    assert weight.nbytes == size
    assert_product(quick_jit(sparse.matmul)(x, weight), to_numpy(x), stored_leaf(leaf, format), "float32")


# 8 bits.


@settings(max_examples=8)  # each a program to compile
@given(
    n_in=st.integers(0, 40),
    n_out=st.integers(0, 9),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=floats,
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 2**16),
)
def test_int8_is_the_nearest_of_255_steps_of_an_output(n_in, n_out, density, dtype, layout, seed):
    # Outputs of very different sizes; a power of two, so that bfloat16 has them too.
    leaf = np.asarray(make_leaf((n_in, n_out), density, dtype, seed))
    leaf = leaf * np.exp2(np.arange(n_out) - 4).astype(leaf.dtype)
    weight = compress_one(jnp.asarray(leaf if layout == "in_out" else leaf.T), "native_int8", layout)
    scale, rounded = oracle.rounded_to_8_bits(to_numpy(leaf).T)
    assert (weight.shape, weight.dtype) == (leaf.shape if layout == "in_out" else leaf.T.shape, leaf.dtype)
    assert np.array_equal(weight.scale, scale)
    (rows, cols), back = look(weight.astype(jnp.float32))
    assert weight.values.dtype == jnp.int8
    assert np.array_equal(weight.values, rounded[rows, cols])
    assert weight.nse == np.count_nonzero(to_numpy(leaf))
    back = back.T if layout == "in_out" else back
    assert np.all(np.abs(back - to_numpy(leaf).T) <= scale[:, None] * (0.5 + 1e-5))


def test_int8_weights_cast_to_another_dtype_keep_what_is_stored():
    leaf, x = make_leaf((64, 8), 0.5, "float32"), make_x((3, 64), "bfloat16")
    weight = compress_one(leaf, "native_int8")
    half = weight.astype(jnp.bfloat16)
    assert (half.dtype, half.values.dtype, half.scale.dtype) == (jnp.bfloat16, jnp.int8, jnp.float32)
    y = jax.jit(sparse.apply(lambda x, w: x @ w.astype(jnp.bfloat16)))(x, weight)
    assert_product(y, to_numpy(x), stored_leaf(leaf, "native_int8"), "bfloat16")
    assert np.array_equal(y, sparse.matmul(x, half))
    assert half.decompress().dtype == jnp.bfloat16
    by_format = {format: compress_one(leaf, format).nbytes for format in ("native", "native_int8", "bcsr")}
    assert by_format["native"] - by_format["native_int8"] == 3 * weight.nse - 4 * 8
    assert compress_one(leaf.astype(jnp.bfloat16), "native").nbytes == by_format["native"] - 2 * weight.nse


def test_int8_is_used_only_where_it_is_named():
    assert [name for name, format in sparse.FORMATS.items() if format.lossy] == [
        "native_int8",
        "native_bits_int8",
        "int8",
    ]


# Transformations.


@each_native
def test_gradients_equal_dense(format):
    leaf, x, dx = make_leaf((30, 12), 0.3, "float32"), make_x((9, 30)), make_x((9, 30), seed=5)
    weight = compress_one(leaf, format)
    dense = weight.decompress()

    def loss(x, leaf):
        return jnp.sum(jnp.sin(x @ leaf))

    on_weight = sparse.apply(loss)

    @quick_jit
    def derivatives(x, weight, dense):
        got = *jax.jvp(lambda x: on_weight(x, weight), (x,), (dx,)), jax.grad(on_weight)(x, weight)
        want = *jax.jvp(lambda x: loss(x, dense), (x,), (dx,)), *jax.grad(loss, (0, 1))(x, dense)
        if format.endswith("int8"):  # whose values are integers
            return got, want, None
        of_values = jax.grad(lambda values: on_weight(x, weight.with_values(values)))(weight.values)
        return got, want, (of_values, weight.coordinates())

    got, (*want, want_leaf), of_values = jax.device_get(derivatives(x, weight, dense))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    if of_values:
        got_values, (rows, cols) = of_values
        np.testing.assert_allclose(got_values, want_leaf[cols, rows], rtol=1e-5, atol=1e-5)


@each_native
def test_vmap_adds_rows_to_one_call(format):
    leaf, x = make_leaf((30, 12), 0.3, "float32"), make_x((3, 30, 5))
    weight = compress_one(leaf, format)
    mapped = jax.jit(jax.vmap(sparse.apply(lambda x, leaf: x.T @ leaf), (0, None)))
    assert mapped.lower(x, weight).compile().as_text().count('custom_call_target="jaxprune_product"') == 1
    want = np.einsum("kib,io->kbo", to_numpy(x), stored_leaf(leaf, format))
    np.testing.assert_allclose(mapped(x, weight), want, rtol=1e-5, atol=1e-5)
