"""The GPU's products: programs lowered for it, and what only a GPU can tell."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_helpers import RUNS, compress_one, least, make_leaf, make_x

from jaxprune import sparse
from jaxprune.sparse import gpu

pytestmark = pytest.mark.filterwarnings("error")
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU: not yet measured")
TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 5e-4}
CUSPARSE = "cusparse_csr_matmat_ffi"


# Lowered for CUDA, on whatever machine: the custom calls that the program would make.


def calls(fn, *args, platforms=("cuda",)):
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=platforms).as_text()
    return sorted(re.findall(r"custom_call @([\w$.]+)", text)), text


def block_weight(side=32, dtype="float32", keep=None):
    keep = np.random.default_rng(0).random((3, 4)) < 0.5 if keep is None else keep
    whole = jnp.asarray(np.kron(keep, np.ones((side, side))), dtype)
    return compress_one(make_leaf(whole.shape, 1.0, dtype) * whole, "block")


@pytest.fixture
def cusparse(monkeypatch):
    """As if cuSPARSE were here: it is asked for nothing but the size of its buffer."""
    if jax.default_backend() == "gpu":
        return
    module = types.SimpleNamespace(build_csr_matmat_descriptor=lambda *_: (64, b"descriptor"))
    monkeypatch.setattr("jaxlib.gpu_sparse._cusparse", module)
    monkeypatch.setattr(gpu, "cusparse_is_here", lambda: True)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_are_lowered_to_plain_xla(dtype, platform):
    weight, x = block_weight(dtype=dtype), make_x((5, 96), dtype)
    grad = jax.grad(lambda x: jnp.sum(sparse.matmul(x, weight)))
    for fn, args in (
        (sparse.matmul, (x, weight)),
        (jax.vmap(sparse.matmul, (0, None)), (x[None], weight)),
        (sparse.apply(jnp.matmul), (x, weight)),
        (grad, (x,)),
    ):
        assert calls(fn, *args, platforms=(platform,))[0] == []
        assert calls(fn, *args, platforms=("cpu", platform))[0] == []


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("runs", RUNS)
def test_only_runs_of_very_different_lengths_are_summed_by_a_scatter(runs, platform):
    weight = block_weight(16, keep=RUNS[runs])
    _, text = calls(sparse.matmul, make_x((7, weight.leaf_shape[0])), weight, platforms=(platform,))
    assert ("stablehlo.scatter" in text) == (runs == "very different")


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
