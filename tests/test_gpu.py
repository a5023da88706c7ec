"""The GPU's products: the kernel interpreted on CPU, programs lowered for CUDA, and what only a GPU can tell."""

import dataclasses
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import triton
from sparse_helpers import compress_one, least, make_leaf, make_x

from jaxprune import sparse
from jaxprune.sparse import blocks, gpu

pytestmark = pytest.mark.filterwarnings("error")
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU: not yet measured")
TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 5e-4}
TRITON, CUSPARSE = "__gpu$xla.gpu.triton", "cusparse_csr_matmat_ffi"


def random_blocks(tall, wide, runs, in_blocks, dtype, seed):
    """(values, index, bounds) of blocks, `runs` of them in each output block, and the dense W (out, in)."""
    rng = np.random.default_rng(seed)
    index = [np.sort(rng.choice(in_blocks, min(run, in_blocks), replace=False)) for run in runs]
    bounds = np.concatenate([[0], np.cumsum([len(run) for run in index])]).astype(np.int32)
    values = np.asarray(rng.normal(size=(bounds[-1], wide, tall)), jnp.dtype(dtype))
    dense = np.zeros((len(runs), wide, in_blocks, tall))
    for out_block, run in enumerate(index):
        for k, in_block in enumerate(run):
            dense[out_block, :, in_block] = values[bounds[out_block] + k].astype(np.float64)
    parts = values.ravel(), np.concatenate(index).astype(np.int32), bounds
    return jax.device_put(parts), dense.reshape(len(runs) * wide, in_blocks * tall)


@settings(max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # each example compiles
@given(
    tall=st.sampled_from(gpu.TILES),
    wide=st.sampled_from(gpu.TILES),
    runs=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    in_blocks=st.integers(1, 4),
    n=st.sampled_from([1, 7, 16, 33, 64, 65, 130]),
    dtype=st.sampled_from(sorted(TOLERANCE)),
    seed=st.integers(0, 2**16),
)
def test_the_kernel_equals_numpy_and_the_portable_product(tall, wide, runs, in_blocks, n, dtype, seed):
    parts, dense = random_blocks(tall, wide, [*runs, 1], in_blocks, dtype, seed)
    x = make_x((in_blocks * tall, n), dtype, seed)

    @jax.jit
    def both(*args):
        got = gpu.block_times(*args, n_out=len(dense), block=(tall, wide), interpret=True)
        return got, blocks.block_product(*args, n_out=len(dense), tall=tall, wide=wide)

    x64 = np.asarray(x).astype(np.float64)
    scale = np.abs(dense) @ np.abs(x64)
    for y in both(*parts, x):
        assert (y.dtype, y.shape) == (x.dtype, (len(dense), n))
        assert np.all(np.abs(np.asarray(y).astype(np.float64) - dense @ x64) <= TOLERANCE[dtype] * scale + least(dtype))


@dataclasses.dataclass
class Memory:
    """An array as the kernel sees it. To touch what lies outside is an error here; the interpreter pads instead."""

    array: np.ndarray
    place: tuple = ()

    dtype = property(lambda self: self.array.dtype)
    at = property(lambda self: self)

    def __getitem__(self, place):
        if isinstance(place, tuple):
            return Memory(self.array, place)
        assert 0 <= int(place) < len(self.array)
        return jnp.asarray(self.array[int(place)])

    def touched(self, mask):
        first, second = (int(axis.start) + np.arange(axis.size) for axis in self.place)
        places = np.ix_(first, second)
        rows, columns = ((at >= 0) & (at < n) for at, n in zip(places, self.array.shape, strict=True))
        inside = rows & columns
        used = np.ones_like(inside) if mask is None else np.asarray(mask)
        assert not np.any(used & ~inside)
        return tuple(np.broadcast_to(at, inside.shape)[used] for at in places), used

    def load(self, mask=None, other=None):
        places, used = self.touched(mask)
        loaded = np.full(used.shape, other, self.dtype)
        loaded[used] = self.array[places]
        return jnp.asarray(loaded)

    def store(self, values, mask=None):
        places, used = self.touched(mask)
        self.array[places] = np.asarray(values)[used]


@pytest.mark.parametrize("n", [1, 16, 20, 65])
def test_the_kernel_stays_inside_its_arrays(monkeypatch, unchecked, n):
    (values, index, bounds), dense = random_blocks(16, 32, [2, 0, 1], 3, "float32", 0)
    panel = 16 if n <= 16 else 32
    arrays = [np.asarray(part) for part in (values.reshape(-1, 32, 16), index, bounds, make_x((48, n)))]
    memory = [Memory(array) for array in (*arrays, np.full((96, n), np.nan, np.float32))]
    monkeypatch.setattr(triton, "load", Memory.load)
    monkeypatch.setattr(triton, "store", Memory.store)
    for program in itertools.product(range(3), range(-(-n // panel))):
        monkeypatch.setattr(gpu.pl, "program_id", lambda axis, program=program: jnp.int32(program[axis]))
        with jax.disable_jit():  # the loop over blocks is Python's then
            gpu._kernel(*memory, tall=16, wide=32, n=n, panel=panel)
    np.testing.assert_allclose(memory[-1].array, dense @ arrays[-1], rtol=1e-4, atol=1e-5)


def test_what_is_not_stored_is_not_read():
    """A NaN in inputs that meet no block, and beside the last column, goes nowhere; empty outputs are zero."""
    parts, dense = random_blocks(16, 16, [0, 1, 0], 1, "float32", 0)
    x = np.concatenate([make_x((16, 20)), np.full((16, 20), np.nan, np.float32)])
    y = np.asarray(gpu.block_times(*parts, jnp.asarray(x), n_out=48, block=(16, 16), interpret=True))
    np.testing.assert_allclose(y, dense @ x[:16].astype(np.float64), rtol=1e-5, atol=1e-5)
    assert not np.any(y[:16])
    assert not np.any(y[32:])


@pytest.mark.parametrize(
    ("block", "dtype"), [((8, 16), "float32"), ((16, 8), "float32"), ((256, 16), "float32"), ((16, 16), "float64")]
)
def test_the_kernel_refuses_what_it_cannot_do(block, dtype):
    with jax.enable_x64(True):
        x = make_x((256, 4), dtype)
        values = jnp.zeros(block[0] * block[1], dtype)
        index, bounds = jnp.zeros(1, jnp.int32), jnp.array([0, 1], jnp.int32)
        with pytest.raises(ValueError, match=rf"sides of.*{re.escape(str(block))} of {dtype}.*portable"):
            gpu.block_times(values, index, bounds, x, n_out=block[1], block=block, interpret=True)


def test_too_many_elements_for_32_bits_do_not_suit():
    assert gpu.block_suits((16, 16), (1024, 1024, 2**20), "float32")
    for sizes in ((2048, 1024, 2**20), (1024, 2048, 2**20), (16, 16, 2**22)):
        assert not gpu.block_suits((16, 16), sizes, "float32")


# Lowered for CUDA, on whatever machine: the custom calls that the program would make.


def calls(fn, *args, platforms=("cuda",)):
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=platforms).as_text()
    return sorted(re.findall(r"custom_call @([\w$.]+)", text)), text


def block_weight(side=32, dtype="float32"):
    keep = np.random.default_rng(0).random((3, 4)) < 0.5
    leaf = make_leaf((3 * side, 4 * side), 1.0, dtype) * jnp.asarray(np.kron(keep, np.ones((side, side))), dtype)
    return compress_one(leaf, "block")


@pytest.fixture
def cusparse(monkeypatch):
    """As if cuSPARSE were here: it is asked for nothing but the size of its buffer."""
    if jax.default_backend() == "gpu":
        return
    module = types.SimpleNamespace(build_csr_matmat_descriptor=lambda *_: (64, b"descriptor"))
    monkeypatch.setattr("jax._src.lib.gpu_sparse._cusparse", module)
    monkeypatch.setattr(gpu, "cusparse_is_here", lambda: True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_block_weights_are_lowered_to_the_kernel(dtype):
    weight, x = block_weight(dtype=dtype), make_x((5, 96), dtype)
    assert calls(sparse.matmul, x, weight)[0] == [TRITON]
    assert calls(jax.vmap(sparse.matmul, (0, None)), x[None], weight)[0] == [TRITON]  # more columns, not a loop
    assert calls(sparse.apply(jnp.matmul), x, weight)[0] == [TRITON]
    assert calls(sparse.matmul, x, weight, platforms=("cpu",))[0] == []
    assert calls(sparse.matmul, x, weight, platforms=("cpu", "cuda"))[0] == [TRITON]


def test_blocks_without_a_kernel_are_lowered_to_plain_xla():
    assert calls(sparse.matmul, make_x((5, 24)), block_weight(8))[0] == []
    assert calls(sparse.matmul, make_x((5, 96)), block_weight(), platforms=("rocm",))[0] == []


@pytest.mark.parametrize("fn", [sparse.matmul, jax.vmap(sparse.matmul, (0, None)), sparse.apply(jnp.matmul)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", ["bcoo", "bcsr"])
def test_portable_formats_are_lowered_to_cusparse_and_no_flag_is_touched(cusparse, format, dtype, fn):
    assert not jax.config.jax_bcoo_cusparse_lowering  # pyright: ignore[reportAttributeAccessIssue]
    weight, x = compress_one(make_leaf((64, 32), 0.1, dtype), format), make_x((3, 5, 64), dtype)
    found, text = calls(fn, x, weight)
    assert found == [CUSPARSE]
    assert "scatter" not in text
    eigen = ["cpu_csr_sparse_dense_ffi"] if format == "bcsr" else []
    assert calls(fn, x, weight, platforms=("cpu",))[0] == eigen
    assert not jax.config.jax_bcoo_cusparse_lowering  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("format", ["bcoo", "bcsr"])
def test_gradients_are_lowered_to_cusparse_too(cusparse, format):
    weight, x = compress_one(make_leaf((64, 32), 0.1, "float32"), format), make_x((5, 64))

    def loss(values, x):
        return jnp.sum(jnp.sin(sparse.matmul(x, weight.with_values(values))))

    assert calls(jax.grad(loss, (0, 1)), weight.values, x)[0] == [CUSPARSE]  # forward; the rest is dense


def test_float64_is_cusparse_too(cusparse):
    with jax.enable_x64(True):
        weight = compress_one(make_leaf((64, 32), 0.1, "float64"), "bcsr")
        assert calls(sparse.matmul, make_x((5, 64), "float64"), weight)[0] == [CUSPARSE]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuSPARSE is here")
@pytest.mark.parametrize("format", ["bcoo", "bcsr"])
def test_where_cusparse_is_missing_it_is_said(format):
    weight, x = compress_one(make_leaf((64, 32), 0.1, "float32"), format), make_x((5, 64))
    with pytest.warns(UserWarning, match="no GPU.*cuSPARSE.*Lower it on"):
        assert calls(sparse.matmul, x, weight)[0] == []


@pytest.mark.parametrize("rows", [[], [0, 0, 3], [4, 4, 4], [0, 1, 2, 3, 4]])
def test_runs_are_counted_for_cusparse(rows):
    got = gpu._run_bounds(jnp.array(rows, jnp.int32), 5)
    assert got.dtype == jnp.int32
    assert np.array_equal(got, np.concatenate([[0], np.cumsum(np.bincount(np.array(rows, int), minlength=5))]))


# What only a GPU can tell.


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 7, 64, 200])
@pytest.mark.parametrize("format", ["bcoo", "bcsr", "block"])
def test_on_a_gpu_every_format_equals_numpy(format, batch, dtype):
    leaf = block_weight(dtype=dtype).decompress()
    x = make_x((batch, leaf.shape[0]), dtype)
    with jax.default_matmul_precision("highest"):
        y = jax.jit(sparse.matmul)(x, compress_one(leaf, format))
    w, x64 = np.asarray(leaf).astype(np.float64), np.asarray(x).astype(np.float64)
    error = np.abs(np.asarray(y).astype(np.float64) - x64 @ w)
    assert np.all(error <= TOLERANCE[dtype] * 2 * (np.abs(x64) @ np.abs(w)) + least(dtype))


@needs_gpu
@pytest.mark.parametrize("format", ["bcoo", "bcsr", "block"])
def test_on_a_gpu_gradients_equal_the_dense_ones(format):
    leaf, x = block_weight().decompress(), make_x((9, 96))
    weight = compress_one(leaf, format)
    with jax.default_matmul_precision("highest"):
        got = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(sparse.matmul(x, weight)))))(x)
        want = jax.grad(lambda x: jnp.sum(jnp.sin(x @ leaf)))(x)
    np.testing.assert_allclose(got, want, atol=1e-4)
