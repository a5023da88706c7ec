"""Sparsities from sensitivities: the same drop for all, the total that was asked for, and what cannot be reached."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.distributions import BySensitivity
from jaxprune.search.sensitivity import Sensitivity

pytestmark = pytest.mark.usefixtures("quick")

SHAPES = {"conv": (4, 8, 6), "stack": (3, 1, 8, 4), "wide": (1, 8, 2)}
SIZES = np.array([192, 96, 16])
GRID = np.linspace(0, 1, 20_001)


def make(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 9, shape).astype(np.float32) for name, shape in SHAPES.items()}


def put(groups):
    return {name: jax.device_put(leaf) for name, leaf in groups.items()}


def wanted(curves, sparsity):
    """By trying drops on a grid of sparsities: leaves go to where one is reached, if flat there a part of the way."""
    points = [np.array(sorted([(0, 0), *curve])).T for curve in curves]
    drops = [np.interp(GRID, s, np.maximum.accumulate(d)) for s, d in points]
    last = np.array([s[-1] for s, _ in points])

    def reached(d, compare):
        return np.minimum([GRID[compare(drop, d)].max(initial=0) for drop in drops], last)

    low, high = -1e-3, max(drop.max() for drop in drops)
    for _ in range(60):
        middle = (low + high) / 2
        enough = reached(middle, np.less_equal) @ SIZES >= sparsity * SIZES.sum()
        low, high = (low, middle) if enough else (middle, high)
    corner = np.concatenate([d for _, d in points])
    corner = np.maximum.accumulate(np.sort(corner))
    near = corner[np.argmin(abs(corner - high))]
    d = near if abs(near - high) < 1e-6 else high
    least, most = reached(d, lambda a, b: a < b - 1e-7), reached(d, lambda a, b: a <= b + 1e-7)
    part = (sparsity * SIZES.sum() - least @ SIZES) / max((most - least) @ SIZES, 1e-9)
    return least + np.clip(part, 0, 1) * (most - least)


STEPS = st.lists(st.integers(0, 8), min_size=4, max_size=4)  # drops in hundredths, flat places and falls among them
CURVES = st.tuples(*[STEPS.map(lambda d: tuple(zip((0.25, 0.5, 0.75, 0.95), (i / 100 for i in d), strict=True)))] * 3)


@given(curves=CURVES, sparsity=st.floats(0, 0.95))
def test_one_drop_for_all(curves, sparsity):
    rule = BySensitivity(dict(zip(SHAPES, curves, strict=True)))
    groups = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    shares = rule.sparsities(groups, float(sparsity))
    found = np.array(list(shares.values()))
    assert found @ SIZES == pytest.approx(sparsity * SIZES.sum(), abs=1e-6)
    np.testing.assert_allclose(found, wanted(curves, sparsity), atol=2e-3)


CURVE = {"conv": ((0.5, 0.0), (0.9, 0.2)), "stack": ((0.9, 0.1),), "wide": ((0.4, 0.3), (0.8, 0.2), (0.9, 0.5))}


@pytest.mark.parametrize(
    ("sparsity", "want"),
    [
        (96 / 304, {"conv": 0.5, "stack": 0, "wide": 0}),
        (48 / 304, {"conv": 0.25, "stack": 0, "wide": 0}),
        ((0.7 * 192 + 0.9 * 96 + 16 * 0.4 / 3) / 304, {"conv": 0.7, "stack": 0.9, "wide": 0.4 / 3}),  # a drop of 0.1
        ((0.9 * 288 + 16 * 0.8) / 304, {"conv": 0.9, "stack": 0.9, "wide": 0.8}),  # the largest drop so far counts
        (0.9, {"conv": 0.9, "stack": 0.9, "wide": 0.9}),
    ],
)
def test_by_hand(sparsity, want):
    shares = BySensitivity(CURVE).sparsities(put(make()), sparsity)
    assert shares == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.6, 0.9])
def test_leaf_by_leaf_the_best_stay(sparsity):
    groups = make(1)
    rule = BySensitivity(CURVE)
    shares, kept = rule.sparsities(put(groups), sparsity), rule(put(groups), sparsity, dims={})
    for name, scores in groups.items():
        n = int(np.prod(scores.shape[-3:]))
        want = oracle.contests(scores, (-3, -2, -1), n - oracle.rounded(n, shares[name]))
        np.testing.assert_array_equal(kept[name], want)
    gone = sum(int((~np.asarray(one)).sum()) for one in kept.values())
    assert abs(gone - 304 * sparsity) <= 5 / 2


def test_a_traced_sparsity_is_traced_once_and_stops_at_the_end():
    groups, traces = put(make(2)), []

    @jax.jit
    def run(sparsity):
        traces.append(sparsity)
        return BySensitivity(CURVE)(groups, sparsity, dims={})

    for sparsity in (0.0, 0.3, 0.62, 0.9, 0.99):
        known = BySensitivity(CURVE)(groups, min(sparsity, 0.9), dims={})
        for name, kept in run(jnp.float32(sparsity)).items():
            np.testing.assert_array_equal(kept, known[name])
    assert len(traces) == 1
    many = jax.vmap(lambda s: BySensitivity(CURVE).sparsities(groups, s)["conv"])(jnp.float32([0.0, 48 / 304, 0.95]))
    np.testing.assert_allclose(many, [0, 0.25, 0.9], atol=1e-6)


def test_many_points_have_no_say_in_order():
    """Sparsities may come in any order, (0, 0) among them; every leaf flat at 0 goes alike."""
    flat = BySensitivity({"*": ((0.9, 0.0), (0.0, 0.0), (0.5, 0.0))})
    assert flat.curves == (("*", ((0.0, 0.0), (0.5, 0.0), (0.9, 0.0))),)
    assert flat.sparsities(put(make()), 0.45) == pytest.approx(dict.fromkeys(SHAPES, 0.45))


def test_from_a_scan():
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(50, 6)), jnp.float32)

    def labels(params):
        return jnp.argmax(jnp.tanh(x @ params["a"]) @ params["b"], axis=1)

    known = labels(params)
    scan = jp.sensitivity(jp.Method(), params, lambda p: jnp.mean(labels(p) == known), (0.25, 0.5, 0.75))
    rule = scan.distribution()
    assert [name for name, _ in rule.curves] == ["a", "b"]
    drops = np.maximum.accumulate([max(scan.dense - accuracy, 0) for accuracy in scan.accuracies[1]])
    assert rule.curves[1][1][1:] == tuple(zip((0.25, 0.5, 0.75), drops, strict=True))
    masks = jp.compute_masks(jp.Method(distribution=rule), params, 0.6)
    assert abs(sum(int(mask.sum()) for mask in masks.values()) - 0.4 * 80) <= 1


def test_an_accuracy_that_rises_is_no_drop():
    found = Sensitivity(("a",), (0.5, 0.5, 0.0, 0.9), ((0.97, 0.97, 0.95, 0.85),), 0.95).distribution()
    assert found.curves == (("a", ((0.0, 0.0), (0.5, 0.0), (0.9, pytest.approx(0.1)))),)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: BySensitivity(CURVE)(put(make()), 0.95, dims={}),
            r"sparsity 0.95 is more than the 0.9 that the curves of \['conv', 'stack', 'wide'\] reach. Scan further",
        ),
        (lambda: BySensitivity(CURVE)(put(make()), None, dims={}), "`BySensitivity` needs a sparsity"),
        (lambda: BySensitivity(CURVE)(put(make()), 90, dims={}), "Did you mean 0.9"),
        (
            lambda: BySensitivity({"conv": ((0.5, 0.1),)})(put(make()), 0.5, dims={}),
            "No rule of `BySensitivity` matches 'stack'",
        ),
        (
            lambda: BySensitivity({"*": ((0.5, 0.1),), "x": ((0.5, 0.1),)})(put(make()), 0.5, dims={}),
            "The rule 'x' of `BySensitivity` matches no pruned leaf",
        ),
        (lambda: BySensitivity({"a": ()}), "the curve of 'a' needs one point or more above sparsity 0"),
        (lambda: BySensitivity({"a": ((0.0, 0.0),)}), "the curve of 'a' needs one point or more"),
        (lambda: BySensitivity({"a": ((0.5, 0.0), (0.5, 0.1))}), "each at a sparsity of its own"),
        (lambda: BySensitivity({"a": ((50, 0.0),)}), r"'a' has the point \(50, 0\); expected \(sparsity in \[0, 1\)"),
        (lambda: BySensitivity({"a": ((0.5, -0.1),)}), r"the point \(0.5, -0.1\)"),
        (lambda: BySensitivity({"a": ((0.5, float("nan")),)}), r"the point \(0.5, nan\)"),
        (lambda: BySensitivity({"a": ((0.0, 0.1), (0.5, 0.2))}), r"the point \(0, 0.1\).*no drop at sparsity 0"),
        (lambda: Sensitivity(("a",), (0.5,), ((float("nan"),),), 0.9).distribution(), r"the point \(0.5, nan\)"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
