"""SparseGPT jointly with quantization: against a float64 oracle, on its grid to the bit, better than later."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_solvers import damped64, loss, problem

import jaxprune as jp
from jaxprune.distributions import NM, PerOutput, Uniform
from jaxprune.oneshot.sparsegpt import SparseGPT
from jaxprune.quantize import grids
from jaxprune.quantize.codebooks import k_means
from jaxprune.quantize.scales import scale_of

WAYS = [
    ("int8", 0.5, Uniform()), ("int4", 0.5, Uniform()), ("int4", None, NM(2, 4)), ("codebook2", 0.6, PerOutput()),
]  # fmt: skip
each_way = pytest.mark.parametrize(("grid", "sparsity", "pattern"), WAYS, ids=str)


def joint64(target, moments, sparsity, pattern, block, rounded):
    """Section 3.4: column after column, pruned and rounded, later ones make up for both; (in, out), exact counts."""
    w = np.float64(target).copy()
    inputs = w.shape[0]
    u = np.linalg.cholesky(np.linalg.inv(damped64(moments))).T
    mask, share = np.ones(w.shape, bool), sparsity or 0.0
    for i in range(inputs):
        if isinstance(pattern, NM):
            if i % pattern.m == 0:
                scores = (w[i : i + pattern.m] / np.diag(u)[i : i + pattern.m, None]) ** 2
                lowest = np.argsort(scores, axis=0, kind="stable")[: pattern.m - pattern.n]
                np.put_along_axis(mask[i : i + pattern.m], lowest, False, axis=0)
        elif i % block == 0:
            stop = min(i + block, inputs)
            scores = (w[i:stop] / np.diag(u)[i:stop, None]) ** 2
            contests = scores.T if isinstance(pattern, PerOutput) else scores.reshape(1, -1)
            each = contests.shape[1] // (stop - i)
            gone = round(share * stop * each) - round(share * i * each)
            kept = np.ones(contests.shape, bool)
            np.put_along_axis(kept, np.argsort(contests, axis=1, kind="stable")[:, :gone], False, axis=1)
            mask[i:stop] = kept.T if isinstance(pattern, PerOutput) else kept.reshape(scores.shape)
        final = np.where(mask[i], rounded(w[i]), 0)
        w[i + 1 :] -= u[i, i + 1 :, None] * ((w[i] - final) / u[i, i])
        w[i] = final
    return w, mask, np.diag(u)[:, None]


def short64(numbers):
    mantissa, exponent = np.frexp(numbers)
    return np.ldexp(np.round(mantissa * 128) / 128, exponent)


def grid64(grid, weights, mask, diagonal):
    """The rounding to the grid with the least error, by trying all of them; codebooks by the library's own k-means."""
    bits = int(grid[-1])
    worth = np.where(mask, diagonal**-2.0, 0)
    if grid.startswith("codebook"):
        values = np.float64(grids.shared_values(jnp.float32(weights), jnp.float32(worth), bits))
        return lambda row: values[np.abs(row[..., None] - values).argmin(-1)]
    limit = 2 ** (bits - 1) - 1
    peak = np.abs(np.where(mask, weights, 0)).max(0)
    scales = np.array([short64(peak * np.float64(shrink) / limit) for shrink in grids.SHRINKS])

    def rounded(row, scale):
        return np.clip(np.round(row / scale), -limit, limit) * scale

    errors = [np.sum(worth * (rounded(weights, scale) - weights) ** 2, 0) for scale in scales]
    scale = np.take_along_axis(scales, np.argmin(errors, 0)[None], 0)[0]
    return lambda row: rounded(row, scale)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _solve(grid, target, moments, sparsity, pattern):
    return SparseGPT(block=16, quantize=grid)(target, moments, sparsity, pattern)


def solved(grid, target, moments, sparsity=0.5, pattern=Uniform()):  # noqa: B008
    return tuple(map(np.asarray, _solve(grid, target, moments, sparsity, pattern)))


def coded(grid, weight, mask, **kind):
    params, masks = {"kernel": weight}, {"kernel": mask}
    to = jp.storage.to_codebooks if grid.startswith("codebook") else jp.storage.to_integers
    return to(params, masks, bits=int(grid[-1]), **kind)


def same_bits(one, other):
    return (np.asarray(one).dtype, np.asarray(one).tobytes()) == (other.dtype, other.tobytes())


def exactly(grid):
    return {"exact": True} if grid.startswith("int") else {}


@each_way
def test_it_is_the_papers_joint_pass(grid, sparsity, pattern):
    target, moments = problem(40, 12, seed=4)
    found, kept = solved(grid, target, moments, sparsity, pattern)
    plain, mask, diagonal = joint64(target, moments, sparsity, pattern, 16, lambda row: row)
    wanted, mask, _ = joint64(target, moments, sparsity, pattern, 16, grid64(grid, plain, mask, diagonal))
    np.testing.assert_array_equal(kept, mask)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@each_way
def test_saving_changes_no_bit(grid, sparsity, pattern, tmp_path):
    weights, mask = solved(grid, *problem(40, 12, seed=4), sparsity, pattern)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        weight = weights.astype(dtype)
        small = coded(grid, weight, mask, **exactly(grid))
        assert same_bits(jp.storage.dequantize(small)["kernel"], weight)
        jp.save(tmp_path / "small.jaxprune", small, masks={"kernel": mask})
        assert same_bits(jp.load(tmp_path / "small.jaxprune")["kernel"], weight)
        np.testing.assert_array_equal(jp.load(tmp_path / "small.jaxprune", to="masks")["kernel"], mask)
    assert not np.signbit(weights[~mask]).any()


@pytest.mark.parametrize(("grid", "sparsity", "pattern"), WAYS[1:], ids=str)
def test_errors_are_below_those_of_rounding_later(grid, sparsity, pattern):
    target, moments = problem(40, 12, seed=4)
    joint, _ = solved(grid, target, moments, sparsity, pattern)
    pruned, mask = solved(None, target, moments, sparsity, pattern)
    later = jp.storage.dequantize(coded(grid, pruned, mask))["kernel"]
    assert loss(joint, target, moments) < loss(later, target, moments)


def test_without_pruning_it_is_the_rounding_of_gptq():
    target, moments = problem(40, 12, tokens=60)
    joint, mask = solved("int4", target, moments, 0.0)
    rounded = jp.storage.dequantize(coded("int4", np.asarray(target), mask))["kernel"]
    assert loss(joint, target, moments) < 0.6 * loss(rounded, target, moments)


@given(
    st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]), st.sampled_from([4, 8]), st.integers(64, 127),
    st.integers(-20, 6), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_scale_of_a_grid_is_found_again(dtype, bits, digits, exponent, seed):
    exponent = max(exponent, -12) if dtype == np.float16 else exponent  # below, its numbers are further apart
    limit, scale = 2 ** (bits - 1) - 1, np.float32(np.ldexp(digits, exponent - 6))
    codes = np.random.default_rng(seed).integers(-limit, limit + 1, (9, 3))
    codes[:, 2] = 0
    weights = (codes.astype(np.float32) * scale).astype(dtype)
    found, off = scale_of(weights, bits)
    assert not off.size
    np.testing.assert_array_equal((np.rint(weights.astype(np.float32) / found) * found).astype(dtype), weights)


def test_the_traced_k_means_is_the_one_of_the_files():
    weights = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
    alive = np.random.default_rng(1).random((40, 30)) < 0.5
    found = grids.shared_values(jnp.asarray(weights), jnp.asarray(alive, jnp.float32), 3, iterations=300)
    np.testing.assert_allclose(found, k_means(np.float64(weights[alive]), 8, 300), rtol=1e-4, atol=1e-5)
    assert not np.any(grids.shared_values(jnp.asarray(weights), jnp.zeros((40, 30)), 3))


def test_a_model_is_pruned_onto_grids_that_its_file_has(tmp_path):
    rng = np.random.default_rng(0)
    params = {name: {"kernel": jnp.float32(rng.standard_normal((24, 24)))} for name in ("a", "b")}
    params["stack"] = {"kernel": jnp.float32(rng.standard_normal((3, 24, 24)))}

    def apply(params, x):
        x = jnp.tanh(x @ params["a"]["kernel"])
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"]["kernel"])
        return x @ params["b"]["kernel"]

    batches = [jnp.float32(rng.standard_normal((50, 24))) for _ in range(2)]
    pruned, masks = jp.oneshot.prune(apply, params, batches, SparseGPT(quantize="int4"), 0.5)
    layout = jp.layout_of(jp.trace(apply, params, batches[0]))
    small = jp.storage.to_integers(pruned, masks, bits=4, exact=True, layout=layout)
    jp.save(tmp_path / "small.jaxprune", small, masks=masks)
    jax.tree.map(np.testing.assert_array_equal, jp.load(tmp_path / "small.jaxprune"), pruned)
    assert all(int((~mask).sum()) == mask.size // 2 for mask in jax.tree.leaves(masks))


def test_what_has_no_grid_is_refused():
    for grid in ("int5", "codebook9", "codebook0", "float8", "int16"):
        with pytest.raises(ValueError, match=re.escape(f"There is no grid {grid!r}: take 'int8'")):
            SparseGPT(quantize=grid)
    with pytest.raises(ValueError, match="would leave the grid of `quantize`"):
        SparseGPT(quantize="int4", refit=True)
    weight = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    with pytest.raises(ValueError, match="Weights of 3 of the 3 outputs of 'kernel' are no multiples, up to 7"):
        coded("int4", weight, weight != 0, exact=True)
    with pytest.raises(ValueError, match="`exact` finds symmetric grids"):
        coded("int4", weight, weight != 0, exact=True, symmetric=False)
