"""Blocks: the shape is found, nothing is lost, the product is the dense one whatever the blocks are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from sparse_helpers import compress_one, least, make_leaf, make_x

import jaxprune as jp
from jaxprune import sparse
from jaxprune.sparse import blocks

pytestmark = pytest.mark.filterwarnings("error")
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3}  # the latter: x, values and the result are rounded
SHAPES = sparse.BlockWeight.shapes


def block_leaf(n_in, n_out, block, density, dtype="float32", seed=0):
    """A leaf (in, out) of full blocks and empty ones; at the edges of sizes that do not divide, parts of blocks."""
    tall, wide = block
    keep = np.random.default_rng(seed).random((-(-n_in // tall), -(-n_out // wide))) < density
    whole = np.kron(keep, np.ones(block))[:n_in, :n_out]
    return jnp.where(whole > 0, make_leaf((n_in, n_out), 1.0, dtype, seed), jnp.zeros((), dtype))


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
    leaf = block_leaf(n_in, n_out, block, density, dtype, seed)
    leaf = leaf if layout == "in_out" else leaf.T
    weight = compress_one(leaf, "block", layout)
    assert np.asarray(weight.decompress()).tobytes() == np.asarray(leaf).tobytes()
    assert weight.nbytes == sum(part.nbytes for part in jax.tree.leaves(weight))
    w = np.asarray(leaf if layout == "in_out" else leaf.T).astype(np.float64)
    for matrix, fn in ((w, sparse.matmul), (w.T, sparse.apply(lambda x, leaf: x @ turned(leaf, layout)))):
        x = make_x((*batch, len(matrix)), dtype, seed)
        y, x64 = fn(x, weight), np.asarray(x).astype(np.float64)
        assert (y.shape, y.dtype) == ((*batch, matrix.shape[1]), x.dtype)
        error = np.abs(np.asarray(y).astype(np.float64) - x64 @ matrix)
        assert np.all(error <= TOLERANCE[dtype] * (np.abs(x64) @ np.abs(matrix)) + least(dtype))


def turned(leaf, layout):
    """The leaf as (out, in): x @ it sums over the outputs."""
    return leaf.T if layout == "in_out" else leaf


@pytest.mark.parametrize("block", SHAPES)
def test_the_shape_of_the_blocks_is_found(block):
    n_in, n_out = 3 * block[0], 5 * block[1]
    keep = np.zeros((3, 5))
    keep[[0, 1, 1, 2], [0, 0, 2, 4]] = 1  # blocks that do not pair up to a larger one
    leaf = make_leaf((n_in, n_out), 1.0, "float32") * jnp.asarray(np.kron(keep, np.ones(block)), jnp.float32)
    for layout, one in (("in_out", leaf), ("out_in", leaf.T)):
        weight = compress_one(one, "block", layout)
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
    np.testing.assert_allclose(sparse.matmul(x, weight), x @ leaf, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("block", "density"), [((32, 32), 0.5), ((16, 1), 0.5), ((16, 1), 0.0)])
def test_gradients_jvp_and_vmap_equal_dense(block, density):
    leaf, x = block_leaf(96, 64, block, density), make_x((5, 96))
    weight = compress_one(leaf, "block")
    rows, cols = weight.coordinates()

    def loss(values, x):
        return jnp.sum(jnp.sin(sparse.matmul(x, weight.with_values(values))))

    def dense_loss(leaf, x):
        return jnp.sum(jnp.sin(x @ leaf))

    d_values, d_x = jax.jit(jax.grad(loss, (0, 1)))(weight.values, x)
    d_leaf, dense_d_x = jax.grad(dense_loss, (0, 1))(leaf, x)
    np.testing.assert_allclose(d_x, dense_d_x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_values, d_leaf[cols, rows], rtol=1e-4, atol=1e-4)
    tangent = jax.jvp(loss, (weight.values, x), (weight.values, x))[1]
    np.testing.assert_allclose(tangent, jax.jvp(dense_loss, (leaf, x), (leaf, x))[1], rtol=1e-3, atol=1e-3)
    many = jax.vmap(loss, (0, None))(jnp.stack([weight.values, 2 * weight.values]), x)
    np.testing.assert_allclose(many, [dense_loss(leaf, x), dense_loss(2 * leaf, x)], rtol=1e-4, atol=1e-3)


def test_the_portable_product_is_plain_jax():
    """Batched over the values and differentiated without the primitive's rules."""
    leaf, x = block_leaf(32, 32, (8, 8), 0.5), make_x((32, 3))
    weight = compress_one(leaf, "block")
    tall, wide = weight.block

    def product(values, x):
        values, x = jnp.asarray(values), jnp.asarray(x)
        return blocks.block_product(values, weight.index, weight.bounds, x, n_out=32, tall=tall, wide=wide)

    many = jax.vmap(product, (0, None))(jnp.stack([weight.values, -weight.values]), x)
    np.testing.assert_allclose(many, jnp.stack([leaf.T @ x, -leaf.T @ x]), rtol=1e-4, atol=1e-5)
    check_grads(product, (weight.values, x), order=1, atol=0.05, rtol=0.05)


def test_a_model_runs_unchanged():
    sizes = [(64, 96), (96, 64), (64, 10)]
    params = [block_leaf(n_in, n_out, (16, 16), 0.4, seed=n_in) for n_in, n_out in sizes]

    def model(params, x):
        *hidden, last = params
        for kernel in hidden:
            x = jax.nn.relu(x @ kernel)
        return x @ last

    x, compressed = make_x((9, 64)), sparse.compress(params, "block")
    assert [weight.block for weight in compressed[:2]] == [(16, 16), (16, 16)]
    np.testing.assert_allclose(jax.jit(sparse.apply(model))(compressed, x), model(params, x), rtol=1e-4, atol=1e-3)
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
GOOD["bounds"] = np.array([0, 2, 4], np.int32)
BAD = {
    "block that does not divide": ({"block": (8, 2)}, "blocks of 8 x 2, which do not divide 12 x 8"),
    "block of nothing": ({"block": (0, 4)}, "do not divide"),
    "too few blocks": ({"index": np.array([0, 2, 1], np.int32)}, "5|3 blocks, which do not fit"),
    "values left over": ({"values": np.ones(63, np.float32)}, "do not fit"),
    "too few bounds": ({"bounds": np.array([0, 4], np.int32)}, "2 bounds and 4 blocks"),
    "bounds fall": ({"bounds": np.array([0, 5, 4], np.int32)}, "climb from 0 to its 4 blocks"),
    "bounds start late": ({"bounds": np.array([1, 2, 4], np.int32)}, "climb"),
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
    assert np.array_equal(dense, weight.decompress() + 1)
