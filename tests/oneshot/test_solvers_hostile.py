"""Solvers on what a hostile caller hands in: sizes at both ends of float32, one input, one output, no data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_solvers import damped64, exact, loss, problem

import jaxprune as jp
from jaxprune.distributions import NM, Uniform
from jaxprune.oneshot.alternating import AlternatingDirections
from jaxprune.oneshot.least_squares import Magnitude, Wanda
from jaxprune.oneshot.sparsegpt import SparseGPT

SOLVERS = [
    Magnitude(refit=True), Wanda(refit=True), SparseGPT(block=8, refit=True), SparseGPT(block=8, quantize="int4"),
    AlternatingDirections(),
]  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _solve(solver, target, moments, sparsity):
    return solver(target, moments, sparsity, Uniform())


def solve(solver, target, moments, sparsity=0.5):
    return map(np.asarray, _solve(solver, jnp.float32(target), jnp.float32(moments), sparsity))


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_units_of_weights_and_inputs_do_not_matter(solver):
    target, moments = problem(16, 6, seed=7)
    wanted, mask = solve(solver, target, moments)
    for of_weights, of_moments in [(-66, 0), (66, 0), (0, -80), (0, 90), (66, -80), (-66, 90)]:
        of_weights, of_moments = np.float32(2.0**of_weights), np.float32(2.0**of_moments)
        weight, kept = solve(solver, target * of_weights, moments * of_moments)
        np.testing.assert_array_equal(kept, mask)
        np.testing.assert_allclose(weight / of_weights, wanted, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_inputs_of_very_different_sizes(solver):
    target, moments = problem(16, 6, seed=7)
    sizes = jnp.float32(np.logspace(-6, 6, 16))[:, None]
    moments = moments * sizes * sizes.T
    weight, mask = solve(solver, target, moments)
    assert np.isfinite(weight).all()
    assert (~mask).sum() == 48
    if getattr(solver, "refit", True) and getattr(solver, "quantize", None) is None:
        full = damped64(moments)
        best = exact(target, full, mask)
        assert loss(weight, target, full) <= (1 + 1e-3) * loss(best, target, full) + 1e-9 * loss(0 * best, target, full)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("shape", [(1, 6), (16, 1), (1, 1)], ids=str)
def test_one_input_or_one_output(solver, shape):
    target, moments = problem(*shape)
    for sparsity in (0.0, 0.4, 0.99):
        weight, mask = solve(solver, target, moments, sparsity)
        assert (~mask).sum() == round(sparsity * target.size)
        assert np.isfinite(weight).all()
        assert not weight[~mask].any()
    free, _ = solve(solver, target, moments, 0.0)
    # Half a step of 4 bits is a fourteenth of the largest weight, to which moves of other weights and clipping add.
    np.testing.assert_allclose(free, target, rtol=1e-4, atol=0.5 if getattr(solver, "quantize", None) else 1e-6)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_equal_weights_and_no_weights(solver):
    for target in (jnp.ones((16, 6)), jnp.zeros((16, 6))):
        weight, mask = solve(solver, target, jnp.eye(16))
        assert (~mask).sum() == 48
        digits = 2.0**-7 if getattr(solver, "quantize", None) else 1e-5  # of the scale
        np.testing.assert_allclose(weight, np.where(mask, target, 0), rtol=digits)


@pytest.mark.parametrize("solver", [SparseGPT(), AlternatingDirections()], ids=str)
def test_what_cannot_be_solved_names_the_leaf(solver):
    rng = np.random.default_rng(0)
    good = {"first": {"kernel": jnp.float32(rng.standard_normal((8, 5)))}}
    x = jnp.float32(rng.standard_normal((20, 8)))

    def prune(params, x, **kind):
        return jp.oneshot.prune(lambda p, x: x @ p["first"]["kernel"], params, [x], solver, **kind)

    for bad in (jnp.nan, jnp.inf, 1e30):
        with pytest.raises(ValueError, match="Inputs of 'first/kernel' are not finite, or too large"):
            prune(good, x.at[3, 2].set(bad), sparsity=0.5)
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match="'first/kernel'"):
            prune({"first": {"kernel": good["first"]["kernel"].at[3, 2].set(bad)}}, x, sparsity=0.5)
    with pytest.raises(ValueError, match=r"runs of 3 .* 'first/kernel' has 8 inputs"):
        prune(good, x, pattern=NM(2, 3))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_leaves_of_few_digits_stay_on_their_grid(dtype):
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.standard_normal((16, 8)), dtype)}
    x = jnp.asarray(rng.standard_normal((50, 16)), dtype)
    pruned, masks = jp.oneshot.prune(lambda p, x: x @ p["kernel"], params, [x], SparseGPT(quantize="int8"), 0.5)
    assert pruned["kernel"].dtype == dtype
    assert int((~masks["kernel"]).sum()) == 64
    small = jp.storage.dequantize(jp.storage.to_integers(pruned, masks, bits=8, exact=True))
    assert np.asarray(small["kernel"]).tobytes() == np.asarray(pruned["kernel"]).tobytes()
