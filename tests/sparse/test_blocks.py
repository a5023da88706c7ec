"""Blocks: the shape is found, nothing is lost, the product is the dense one whatever the blocks are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from quick import quick_jit
from sparse_helpers import RUNS, compress_one, least, make_leaf, make_x

import jaxprune as jp
from jaxprune import sparse
from jaxprune.layout import FLAX
from jaxprune.sparse import blocks

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick")]
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3}  # the latter: x, values and the result are rounded
SHAPES = sparse.BlockWeight.shapes


def block_leaf(n_in, n_out, block, density, dtype="float32", seed=0):
    """A leaf (in, out) of full blocks and empty ones; at the edges of sizes that do not divide, parts of blocks."""
    tall, wide = block
    keep = np.random.default_rng(seed).random((-(-n_in // tall), -(-n_out // wide))) < density
    whole = np.kron(keep, np.ones(block))[:n_in, :n_out]
    return jnp.asarray(np.where(whole > 0, make_leaf((n_in, n_out), 1.0, dtype, seed), 0), dtype)


problems = {
    "n_in": st.sampled_from([1, 5, 16, 64]),
    "n_out": st.sampled_from([1, 7, 32, 96]),
    "block": st.sampled_from(SHAPES),
    "density": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "dtype": st.sampled_from(sorted(TOLERANCE)),
    "layout": st.sampled_from(["in_out", "out_in"]),
    "batch": st.sampled_from([(), (0,), (1,), (7,), (2, 3)]),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=10)
@given(**problems)
def test_products_and_round_trip(n_in, n_out, block, density, dtype, layout, batch, seed):
    w = np.asarray(block_leaf(n_in, n_out, block, density, dtype, seed))  # (in, out)
    leaf = jnp.asarray(w if layout == "in_out" else w.T)
    weight = compress_one(leaf, "block", layout)
    x, y = make_x((*batch, n_in), dtype, seed), make_x((*batch, n_out), dtype, seed)

    @quick_jit
    def run(weight, x, y):
        return (
            weight.decompress(),
            sparse.matmul(x, weight),
            sparse.apply(lambda y, w: y @ turned(w, layout))(y, weight),
        )

    back, *products = run(weight, x, y)
    assert np.asarray(back).tobytes() == np.asarray(leaf).tobytes()
    assert weight.nbytes == sum(part.nbytes for part in jax.tree.leaves(weight))
    for inputs, matrix, got in zip((x, y), (w, w.T), products, strict=True):
        x64, w64 = (np.asarray(array).astype(np.float64) for array in (inputs, matrix))
        assert (got.shape, got.dtype) == ((*batch, matrix.shape[1]), dtype)
        error = np.abs(np.asarray(got).astype(np.float64) - x64 @ w64)
        assert np.all(error <= TOLERANCE[dtype] * (np.abs(x64) @ np.abs(w64)) + least(dtype))


def turned(leaf, layout):
    """The leaf as (out, in): x @ it sums over the outputs."""
    return leaf.T if layout == "in_out" else leaf


@pytest.mark.parametrize("block", SHAPES)
def test_the_shape_of_the_blocks_is_found(block):
    n_in, n_out = 3 * block[0], 5 * block[1]
    keep = np.zeros((3, 5))
    keep[[0, 1, 1, 2], [0, 0, 2, 4]] = 1  # blocks that do not pair up to a larger one
    leaf = np.asarray(make_leaf((n_in, n_out), 1.0, "float32")) * np.kron(keep, np.ones(block))
    for layout, one in (("in_out", leaf), ("out_in", leaf.T)):
        weight = compress_one(jnp.asarray(one, jnp.float32), "block", layout)
        assert (weight.block, weight.index.size) == (block, 4)
        assert weight.nse == np.count_nonzero(leaf)  # no zero is stored
        assert weight.nbytes == 4 * 4 * block[0] * block[1] + 4 * 4 + 4 * 6


def test_masks_of_the_same_granularity_store_no_zeros():
    params = {"kernel": make_leaf((128, 96), 1.0, "float32")}
    method = jp.Method(criterion=jp.magnitude, granularity=jp.Block(16, 32), distribution=jp.Global())
    pruned = jp.apply_masks(params, jp.compute_masks(method, params, 0.75))
    weight = sparse.compress(pruned, "block")["kernel"]
    assert weight.nse == np.count_nonzero(pruned["kernel"]) == 128 * 96 // 4
    assert weight.block == (16, 16)  # the largest known shape that fills such blocks
    assert sparse.nbytes(weight) < sparse.nbytes(sparse.compress(pruned, "bcsr"))


def test_a_leaf_without_blocks_is_right_and_says_what_it_weighs():
    leaf, x = make_leaf((64, 64), 0.05, "float32"), make_x((5, 64))
    weight = compress_one(leaf, "block")
    assert weight.nse >= np.count_nonzero(leaf)
    assert weight.nbytes <= compress_one(leaf, "bcoo").nbytes
    np.testing.assert_allclose(sparse.matmul(x, weight), np.asarray(x) @ np.asarray(leaf), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("block", "density"), [((32, 32), 0.5), ((16, 1), 0.5), ((16, 1), 0.0)])
def test_gradients_jvp_and_vmap_equal_dense(block, density):
    leaf, x = block_leaf(96, 64, block, density), make_x((5, 96))
    weight = compress_one(leaf, "block")
    rows, cols = quick_jit(lambda weight: weight.coordinates())(weight)

    def loss(values, x):
        return jnp.sum(jnp.sin(sparse.matmul(x, weight.with_values(values))))

    def dense_loss(leaf, x):
        return jnp.sum(jnp.sin(x @ leaf))

    @functools.partial(quick_jit, static_argnums=0)
    def derivatives(loss, w, x):
        many = jax.vmap(loss, (0, None))(jnp.stack([w, 2 * w]), x)
        return *jax.grad(loss, (0, 1))(w, x), jax.jvp(loss, (w, x), (w, x))[1], many

    d_values, d_x, tangent, many = derivatives(loss, weight.values, x)
    d_leaf, dense_d_x, dense_tangent, dense_many = map(np.asarray, derivatives(dense_loss, leaf, x))
    np.testing.assert_allclose(d_x, dense_d_x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_values, d_leaf[np.asarray(cols), np.asarray(rows)], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tangent, dense_tangent, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(many, dense_many, rtol=1e-4, atol=1e-3)


def test_the_portable_product_is_plain_jax():
    """Batched over the values and differentiated without the primitive's rules."""
    leaf, x = block_leaf(32, 32, (8, 8), 0.5), make_x((32, 3))
    weight = compress_one(leaf, "block")
    tall, wide = weight.block
    sizes = {"n_out": 32, "tall": tall, "wide": wide, "slots": weight.slots}

    @jax.jit
    def product(values, x):
        return blocks.block_product(values, weight.index, weight.bounds, x, **sizes)

    values, want = np.asarray(weight.values), np.asarray(leaf).T @ np.asarray(x)
    many = jax.vmap(product, (0, None))(jnp.asarray(np.stack([values, -values])), x)
    np.testing.assert_allclose(many, np.stack([want, -want]), rtol=1e-4, atol=1e-5)
    check_grads(product, (weight.values, x), order=1, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("at_a_time", [1, 2**22])
@pytest.mark.parametrize("runs", RUNS)
def test_sums_over_runs_and_columns_in_parts(monkeypatch, runs, at_a_time):
    """A NaN in inputs stays in the outputs that meet it, whatever lies beside their runs."""
    monkeypatch.setattr(blocks, "_AT_A_TIME", at_a_time)  # 16 columns at a time, or all
    whole = np.kron(RUNS[runs], np.ones((16, 16)))
    leaf, x = np.where(whole, make_leaf(whole.shape, 1.0, "float32"), 0), np.asarray(make_x((37, len(whole))))
    weight = compress_one(jnp.asarray(leaf), "block")
    assert weight.block == (16, 16)
    transposed = sparse.apply(lambda x, w: x @ w.T)
    for product, matrix in ((lambda x, w: sparse.matmul(x, w), leaf), (transposed, leaf.T)):  # traced each time
        lowered = jax.jit(product).lower(x, weight)
        assert ("stablehlo.while" in lowered.as_text()) == (at_a_time == 1)
        compiled = lowered.compile()
        np.testing.assert_allclose(compiled(x, weight), x @ matrix, rtol=1e-4, atol=1e-4)
        spoilt = x.copy()
        spoilt[:, :16] = np.nan
        met = np.any(matrix[:16], axis=0)
        np.testing.assert_array_equal(np.isnan(compiled(spoilt, weight)), np.broadcast_to(met, (37, len(met))))


@pytest.mark.parametrize(("runs", "slots"), [([3, 3], 3), ([1, 0], 1), ([13, 7], 14), ([17, 2], 20), ([23, 1], 24)])
def test_runs_that_are_not_all_as_long_have_room_to_grow(runs, slots):
    assert blocks._slots(np.array(runs)) == slots
    keep = np.arange(max(runs))[:, None] < np.array(runs)[None]
    leaf = jnp.asarray(np.kron(keep, np.ones((16, 16))), jnp.float32)
    weight, x = compress_one(leaf, "block"), make_x((3, len(leaf)))
    np.testing.assert_allclose(sparse.matmul(x, weight), x @ leaf, rtol=1e-4, atol=1e-4)


def test_columns_that_are_sharded_stay_where_they_are(monkeypatch):
    monkeypatch.setattr(blocks, "_AT_A_TIME", 1)
    weight = compress_one(block_leaf(48, 48, (16, 16), 0.5), "block")
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis)) for axis in ("i", None))
    x, weight = jax.device_put(make_x((128, 48)), rows), jax.device_put(weight, whole)
    compiled = jax.jit(sparse.matmul, out_shardings=rows).lower(x, weight).compile()
    assert " while(" in compiled.as_text()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "all-reduce", "permute"))
    np.testing.assert_allclose(compiled(x, weight), x @ weight.decompress(), rtol=1e-4, atol=1e-4)


def test_a_model_runs_unchanged():
    sizes = [(64, 96), (96, 64), (64, 10)]
    params = [block_leaf(n_in, n_out, (16, 16), 0.4, seed=n_in) for n_in, n_out in sizes]

    def model(params, x):
        *hidden, last = params
        for kernel in hidden:
            x = jax.nn.relu(x @ kernel)
        return x @ last

    x, compressed = make_x((9, 64)), sparse.compress(params, "block", layout=FLAX)
    assert [weight.block for weight in compressed[:2]] == [(16, 16), (16, 16)]
    np.testing.assert_allclose(
        quick_jit(sparse.apply(model))(compressed, x), quick_jit(model)(params, x), rtol=1e-4, atol=1e-3
    )
    assert all(map(np.array_equal, sparse.decompress(compressed), params))


def test_float64_and_odd_values():
    with jax.enable_x64(True):
        leaf, x = block_leaf(32, 32, (16, 16), 0.5, "float64"), make_x((3, 32), "float64")
        y = sparse.matmul(x, compress_one(leaf, "block"))
        np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(leaf), rtol=1e-13, atol=1e-13)
    leaf = np.full((16, 16), np.float32(1e-45))
    leaf[0, 0], leaf[1, 1], leaf[2, 2] = np.inf, -0.0, 0.0
    weight = compress_one(jnp.asarray(leaf), "block")
    assert weight.block == (16, 16)
    assert np.asarray(weight.decompress()).tobytes() == np.where(leaf == 0, 0, leaf).tobytes()


GOOD = {"values": np.ones(64, np.float32), "index": np.array([0, 2, 1, 2], np.int32), "block": (4, 4)}
GOOD |= {"bounds": np.array([0, 2, 4], np.int32), "slots": 2}
BAD = {
    "block that does not divide": ({"block": (8, 2)}, "blocks of 8 x 2, which do not divide 12 x 8"),
    "block of nothing": ({"block": (0, 4)}, "do not divide"),
    "too few blocks": ({"index": np.array([0, 2, 1], np.int32)}, "5|3 blocks, which do not fit"),
    "values left over": ({"values": np.ones(63, np.float32)}, "do not fit"),
    "too few bounds": ({"bounds": np.array([0, 4], np.int32)}, "2 bounds and 4 blocks"),
    "bounds fall": ({"bounds": np.array([0, 5, 4], np.int32)}, "climb from 0 to its 4 blocks"),
    "bounds start late": ({"bounds": np.array([1, 2, 4], np.int32)}, "climb"),
    "too few slots": ({"slots": 1}, "run of 2 blocks, but 1 slots"),
    "bounds end early": ({"bounds": np.array([0, 2, 3], np.int32)}, "climb"),
    "input too large": ({"index": np.array([0, 3, 1, 2], np.int32)}, "outside its 3 blocks"),
    "input that wraps around": ({"index": np.array([0, 2**30, 1, 2], np.int32)}, "outside"),
    "negative": ({"index": np.array([-1, 2, 1, 2], np.int32)}, "outside"),
    "unsorted": ({"index": np.array([2, 0, 1, 2], np.int32)}, "sorted"),
    "twice": ({"index": np.array([1, 1, 1, 2], np.int32)}, "each once"),
    "float index": ({"index": np.array([0, 2, 1, 2], np.float32)}, "int32, not float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_parts_that_do_not_fit_are_refused(case, unchecked):
    change, says = BAD[case]
    assert sparse.BlockWeight(**GOOD, leaf_shape=(12, 8), name="w").decompress().shape == (12, 8)
    with pytest.raises((ValueError, TypeError), match=rf"'w'.*({says})"):
        sparse.BlockWeight(**{**GOOD, **change}, leaf_shape=(12, 8), name="w")


def test_other_uses_are_refused():
    weight = compress_one(block_leaf(32, 32, (16, 16), 0.5), "block")
    with pytest.raises(sparse.SparseUseError, match=r"'kernel'.*BlockWeight.*`add`"):
        jax.jit(sparse.apply(lambda w: w + 1))(weight)
    dense = jax.jit(sparse.apply(lambda w: w + 1, unsupported="dense"))(weight)
    assert np.array_equal(dense, np.asarray(weight.decompress()) + 1)
