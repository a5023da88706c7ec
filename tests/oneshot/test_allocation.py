"""How sparse every matrix becomes: against a search over all shares, and errors against NumPy."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_helpers import normal

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick")

PARAMS = {"first": normal(12, 10), "second": normal(10, 6, seed=1) * 0.1}
BATCHES = [normal(40, 12, seed=seed) for seed in (2, 3)]


def apply(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


@pytest.mark.parametrize("order", ["blocks", "layers"])
def test_errors_are_those_of_the_outputs(order):
    curves = jp.oneshot.error_curves(apply, PARAMS, BATCHES, jp.oneshot.Magnitude(), [0.3, 0.6], order=order)
    x = np.float64(np.concatenate(BATCHES))
    inputs = {"first": x, "second": np.tanh(x @ np.float64(PARAMS["first"]))}
    for name, weight in PARAMS.items():
        weight = np.float64(weight)
        for share, found in zip([0.3, 0.6], curves[name][0], strict=True):
            order = np.sort(np.abs(weight), axis=None)
            zeroed = np.where(np.abs(weight) >= order[round(weight.size * share)], weight, 0)
            lost = np.square(inputs[name] @ (zeroed - weight)).sum() / np.square(inputs[name] @ weight).sum()
            np.testing.assert_allclose(found, lost, rtol=1e-3)


@pytest.mark.parametrize("diagonal", [False, True])
def test_errors_can_count_by_a_loss(diagonal):
    def loss(params, x):
        return jnp.sum(jnp.sin(apply(params, x)))

    found = jp.oneshot.error_curves(apply, PARAMS, BATCHES, jp.oneshot.Magnitude(), [0.5], loss=loss, diagonal=diagonal)
    outputs = jp.evidence.of_outputs(loss, PARAMS, BATCHES)
    moments = jp.evidence.of_activations(apply, PARAMS, BATCHES, moments=True).moments
    for name, weight in PARAMS.items():
        mask = jp.compute_masks(jp.Method(distribution=jp.Uniform()), {name: weight}, 0.5)[name]
        off = np.float64(np.where(mask, 0, weight))
        counted = np.float64(outputs[name][0]) * (np.eye(off.shape[1]) if diagonal else 1)
        wanted = np.trace(off.T @ np.float64(moments[name]) @ off @ counted)
        np.testing.assert_allclose(found[name][0, 0], wanted, rtol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.41, 0.79))
def test_nothing_costs_less(seed, sparsity):
    rng = np.random.default_rng(seed)
    points = [0.4, 0.5, 0.6, 0.7, 0.8]
    rates = np.sort(rng.uniform(0.1, 8, (3, 4)), axis=1)  # logarithms rise ever faster: the errors are convex
    logs = rng.normal(size=(3, 1)) + np.concatenate([np.zeros((3, 1)), np.cumsum(rates, 1)], 1)
    curves, sizes = {"a": np.exp(logs[:2]), "b": np.exp(logs[2:])}, {"a": 300, "b": 500}
    found = jp.oneshot.allocate(curves, points, sizes, sparsity)
    shares, weights = np.concatenate([found["a"], found["b"]]), np.array([300, 300, 500])
    np.testing.assert_allclose(shares @ weights, sparsity * weights.sum(), rtol=1e-9)
    assert shares.min() >= 0.4
    assert shares.max() <= 0.8

    def total(shares):
        return sum(np.exp(np.interp(share, points, row)) for share, row in zip(shares, logs, strict=True))

    for i, j in itertools.permutations(range(3), 2):
        moved = shares.copy()
        moved[i] += 3 / weights[i]
        moved[j] -= 3 / weights[j]
        if moved[i] <= 0.8 and moved[j] >= 0.4:
            assert total(moved) >= total(shares) * (1 - 1e-6)


def test_both_steps_at_once():
    found = jp.oneshot.allocation(apply, PARAMS, BATCHES, 0.5, solver=jp.oneshot.Magnitude(), spread=0.2)
    points = [0.3, 0.4, 0.5, 0.6, 0.7]
    curves = jp.oneshot.error_curves(apply, PARAMS, BATCHES, jp.oneshot.Magnitude(), points)
    wanted = jp.oneshot.allocate(curves, points, {"first": 120, "second": 60}, 0.5)
    for name in PARAMS:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6)
    assert len({float(one[0]) for one in found.values()}) == 2


def test_what_costs_nothing_goes_first():
    curves = {"a": np.array([[0.0, 0.0, 0.0]]), "b": np.array([[0.1, 0.2, 0.4]])}
    found = jp.oneshot.allocate(curves, [0.2, 0.4, 0.6], {"a": 10, "b": 10}, 0.4)
    np.testing.assert_allclose([found["a"][0], found["b"][0]], [0.6, 0.2], atol=1e-9)


def test_each_matrix_gets_its_share():
    stacked = {"w": jnp.stack([normal(8, 8, seed=s) for s in range(3)])}
    shares = {"w": np.array([0.25, 0.5, 0.75])}

    def scanned(params, x):
        for weight in params["w"]:
            x = jnp.tanh(x @ weight)
        return x

    for order in ("layers", "products"):
        _, masks = jp.oneshot.prune(
            scanned, stacked, [normal(30, 8)], jp.oneshot.SparseGPT(block=4), shares, order=order
        )
        assert [int(mask.sum()) for mask in masks["w"]] == [48, 32, 16]


def test_layers_of_a_stack_are_found_in_any_order():
    params = {"w": jnp.stack([normal(8, 8, seed=s) for s in range(5)]), "last": normal(8, 4)}

    def backwards(params, x):
        for i in (3, 0, 4, 1, 2):
            x = jnp.tanh(x @ params["w"][i])
        return x @ params["last"]

    found, wanted = (
        jp.oneshot.error_curves(backwards, params, [normal(30, 8)], jp.oneshot.SparseGPT(), [0.3, 0.5], order=order)
        for order in ("blocks", "layers")
    )
    assert list(found) == list(wanted)
    for name in params:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4)


def test_what_one_order_cannot_follow_another_can(unchecked):
    def twice(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    params, batches = {"w": normal(8, 8)}, [normal(30, 8)]
    with pytest.raises(ValueError, match="order='layers'"):
        jp.oneshot.allocation(twice, params, batches, 0.5)
    assert jp.oneshot.allocation(twice, params, batches, 0.5, order="layers")["w"].shape == (1,)
    with pytest.raises(ValueError, match="'products' arrived"):
        jp.oneshot.allocation(twice, params, batches, 0.5, order="products")


def test_what_cannot_be_is_refused():
    curves, sizes = {"a": np.array([[1.0, 2.0]])}, {"a": 10}
    with pytest.raises(ValueError, match=r"rising sparsities around 0\.9"):
        jp.oneshot.allocate(curves, [0.2, 0.5], sizes, 0.9)
    with pytest.raises(ValueError, match="Errors of 'a'"):
        jp.oneshot.allocate({"a": np.array([[np.nan, 2.0]])}, [0.2, 0.5], sizes, 0.3)
    with pytest.raises(ValueError, match=r"sparsity\['first'\]"):
        jp.oneshot.prune(apply, PARAMS, BATCHES, jp.oneshot.Magnitude(), {"first": [1.5], "second": [0.5]})
    with pytest.raises(ValueError, match="'second'"):
        jp.oneshot.prune(apply, PARAMS, BATCHES, jp.oneshot.Magnitude(), {"first": [0.5]})
