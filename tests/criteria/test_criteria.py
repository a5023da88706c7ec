"""Scores: non-negative float32, larger = keep, by the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle_criteria
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import taylor
from jaxprune.criteria import random

pytestmark = pytest.mark.usefixtures("quick")

SHAPES = {"a": (1, 4, 3), "b": (2, 1, 2, 2), "c": (9, 5, 7)}
OUTPUTS = {"a": (3,), "b": (2, 2), "c": (7,)}
INPUTS = {"a": (4,), "b": (2, 2), "c": (5,)}
JOINT = jp.criteria.joint_taylor(jp.Output())


def drawn(seed, shapes=SHAPES, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def views(seed, dtype="float32"):
    return drawn(seed, dtype=dtype)


def fractions(seed):
    return {name: jnp.clip(jnp.abs(one), 0, 1) for name, one in drawn(seed, OUTPUTS).items()}


def double(tree):
    return {name: np.asarray(leaf).astype(np.float64) for name, leaf in tree.items()}


# criterion -> its oracle, and the evidence of a seed
TABLE = {
    jp.magnitude: (oracle_criteria.magnitude, lambda seed: {}),
    jp.criteria.squared_magnitude: (oracle_criteria.squared_magnitude, lambda seed: {}),
    jp.criteria.lamp: (oracle_criteria.lamp, lambda seed: {}),
    jp.criteria.geometric_median: (oracle_criteria.geometric_median, lambda seed: {}),
    jp.taylor: (oracle_criteria.taylor, lambda seed: {"grads": views(seed)}),
    jp.criteria.taylor_squared: (oracle_criteria.taylor_squared, lambda seed: {"grads": views(seed)}),
    JOINT: (oracle_criteria.joint_taylor_of_outputs, lambda seed: {"grads": views(seed)}),
    jp.snip: (oracle_criteria.snip, lambda seed: {"grads": views(seed)}),
    jp.criteria.grasp: (oracle_criteria.grasp, lambda seed: {"hessian_grads": views(seed)}),
    jp.synflow: (oracle_criteria.synflow, lambda seed: {"flow_grads": views(seed)}),
    jp.criteria.fisher: (
        oracle_criteria.fisher,
        lambda seed: {"squared_grads": {n: g**2 for n, g in views(seed).items()}},
    ),
    jp.criteria.norm_scale: (oracle_criteria.norm_scale, lambda seed: {"scales": drawn(seed, OUTPUTS)}),
    jp.criteria.activation_mean: (oracle_criteria.activation_mean, lambda seed: {"output_means": drawn(seed, OUTPUTS)}),
    jp.criteria.apoz: (oracle_criteria.apoz, lambda seed: {"zero_fractions": fractions(seed)}),
    jp.wanda: (
        oracle_criteria.wanda,
        lambda seed: {"input_norms": {n: jnp.abs(x) for n, x in drawn(seed, INPUTS).items()}},
    ),
}
EVIDENCE = {name: evidence for name, (_, evidence) in TABLE.items()} | {random: lambda seed: {"key": jax.random.key(3)}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("criterion", EVIDENCE, ids=lambda c: c.__name__)
def test_scores_are_non_negative_float32(criterion, dtype):
    evidence = {**EVIDENCE[criterion](1), "unused": "evidence is let pass"}
    scores = criterion(views(0, dtype), **evidence)
    assert {name: leaf.shape for name, leaf in scores.items()} == SHAPES
    for leaf in scores.values():
        assert leaf.dtype == jnp.float32
        assert (np.asarray(leaf) >= 0).all()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("criterion", TABLE, ids=lambda c: c.__name__)
def test_scores_are_those_of_the_paper(criterion, dtype, seed):
    """In float32, also for bfloat16 weights."""
    formula, evidence = TABLE[criterion]
    params, seen = views(seed, dtype), evidence(seed + 10)
    scores = criterion(params, **seen)
    expected = formula(double(params), *map(double, seen.values()))
    largest = max(one.max() for one in expected.values())
    for name, want in expected.items():
        np.testing.assert_allclose(
            scores[name], want, rtol=2e-6, atol=1e-6 * largest if criterion in (jp.criteria.grasp, JOINT) else 0
        )


@pytest.mark.parametrize("criterion", TABLE, ids=lambda c: c.__name__)
def test_zero_weights_give_finite_scores(criterion):
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    evidence = EVIDENCE[criterion](0)
    if "grads" in evidence:
        evidence["grads"] = params
    assert all(np.isfinite(one).all() for one in criterion(params, **evidence).values())


def test_lamp_ranks_ties_by_index_and_keeps_every_leaf():
    """Lee et al. 2021: within a leaf the order is that of magnitudes; across leaves each one's last weight stays."""
    params = {"a": jnp.asarray([[[1.0, -1.0, 2.0, 0.0]]]), "b": jnp.asarray([[[1e-6, 1e-6, 1e-7, 0.0]]])}
    scores = jp.criteria.lamp(params)
    np.testing.assert_allclose(scores["a"].ravel(), [1 / 5, 1 / 6, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(scores["b"].ravel(), [1, 1 / 2, 0.01 / 2.01, 0], rtol=1e-6)
    masks = jp.compute_masks(
        jp.Method(criterion=jp.criteria.lamp), {name: one[0] for name, one in params.items()}, 0.75
    )
    assert [int(mask.sum()) for mask in masks.values()] == [1, 1]


def test_snip_does_not_depend_on_the_losss_scale_and_sums_to_one():
    """Up to the rounding of the gradients."""
    params, grads = views(0), views(1)
    once = jp.snip(params, grads=grads)
    again = jp.snip(params, grads={name: 2.0**40 * g for name, g in grads.items()})
    assert sum(float(score.sum()) for score in once.values()) == pytest.approx(1, abs=1e-6)
    for name, score in once.items():
        np.testing.assert_array_equal(score, again[name])


def test_the_filter_in_the_middle_goes_first():
    """FPGM is not about norms: of the filters 1, 2, 3 the second is the one that the others can stand in for."""
    params = {"w": jnp.asarray([[1.0, 2.0, 3.0]]) * jnp.ones((4, 1))}
    method = jp.Method(criterion=jp.criteria.geometric_median, granularity=jp.Output(), distribution=jp.Uniform())
    assert jp.compute_masks(method, params, 0.3)["w"].all(0).tolist() == [True, False, True]


def test_changes_that_cancel_are_seen_together_alone():
    params, grads = {"w": jnp.ones((1, 2, 2))}, {"w": jnp.asarray([[[5.0, 1.0], [-5.0, 1.0]]])}
    assert JOINT(params, grads=grads)["w"][0, 0].tolist() == [0, 2]
    assert jp.taylor(params, grads=grads)["w"][0, 0].tolist() == [5, 1]


@pytest.mark.parametrize(
    ("criterion", "evidence", "words"),
    [
        (jp.criteria.norm_scale, {"scales": {"a": jnp.ones(3)}}, r"`scales`.*'b', \(2, 2\); None arrived"),
        (
            jp.criteria.apoz,
            {"zero_fractions": {n: jnp.ones(3) for n in SHAPES}},
            r"`zero_fractions`.*'b', \(2, 2\); \(3,\)",
        ),
        (jp.criteria.activation_mean, {"output_means": {}}, r"`output_means`.*'a', \(3,\); None"),
        (jp.wanda, {"input_norms": {"a": jnp.ones(3)}}, r"`input_norms`.*'a', \(4,\); \(3,\)"),
        (jp.wanda, {"input_norms": {}}, r"`input_norms`.*'a', \(4,\); None"),
    ],
)
def test_evidence_that_does_not_fit_is_refused_by_name(criterion, evidence, words):
    with pytest.raises(ValueError, match=words):
        criterion(views(0), **evidence)


def test_wanda_takes_a_number_for_every_tap_of_a_window():
    params, norms = views(0), {name: jnp.abs(one) for name, one in drawn(1, INPUTS).items()}
    taps = norms | {"c": jnp.abs(drawn(2, {"c": (9, 5)})["c"])}
    scores = jp.wanda(params, input_norms=taps)["c"]
    np.testing.assert_allclose(scores, np.abs(params["c"]) * np.asarray(taps["c"])[:, :, None], rtol=1e-6)


def test_taylor_is_the_change_of_a_linear_loss():
    """For a loss linear in every weight the first order is all there is."""
    w, x = views(0)["a"], views(1)["a"]

    def loss(w):
        return jnp.sum(w * x)

    score = np.asarray(taylor({"a": w}, grads={"a": jax.grad(loss)(w)})["a"])
    for at in ((0, 0, 0), (0, 3, 2)):
        change = loss(w) - loss(w.at[at].set(0))
        np.testing.assert_allclose(score[at], abs(change), rtol=1e-4)


def test_random_depends_on_the_key_and_the_place_not_on_the_values():
    key = jax.random.key(0)
    first, same = random(views(0), key=key), random(views(1), key=key)
    other = random(views(0), key=jax.random.key(1))
    for name in SHAPES:
        np.testing.assert_array_equal(first[name], same[name])
        assert not np.array_equal(first[name], other[name])
        assert (np.asarray(first[name]) < 1).all()
    twins = random({"a": views(0)["a"], "c": views(0)["a"]}, key=key)
    assert not np.array_equal(twins["a"], twins["c"])


MISSING = [
    (taylor, "grads"), (random, "key"), (jp.criteria.grasp, "hessian_grads"), (jp.synflow, "flow_grads"),
    (jp.criteria.fisher, "squared_grads"), (jp.wanda, "input_norms"),
    (jp.criteria.apoz, "zero_fractions"), (jp.criteria.norm_scale, "scales"),
]  # fmt: skip


@pytest.mark.parametrize(("criterion", "missing"), MISSING)
def test_missing_evidence_is_pythons_own_error(criterion, missing, unchecked):
    message = rf"{criterion.__name__}\(\) missing 1 required keyword-only argument: '{missing}'"
    with pytest.raises(TypeError, match=message):
        criterion(views(0))


# ---------------------------------------------------------------- evidence


def network(params, x):
    """Two convolutions and two matrices, ReLU between: (n, 6, 6, 1) -> (n, 3)."""
    for name in ("conv1", "conv2"):
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, params[name], (1, 1), "VALID", dimension_numbers=dims))
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["fc1"])
    return x @ params["fc2"]


NETWORK = {"conv1": (3, 3, 1, 4), "conv2": (3, 3, 4, 5), "fc1": (20, 8), "fc2": (8, 3)}


@settings(max_examples=20)
@given(seed=st.integers(0, 100))
def test_synflow_is_conserved(seed):
    """Tanaka et al. 2020, theorem 1: what flows into a hidden unit flows out; every layer's scores sum to R."""
    params = drawn(seed, NETWORK)
    grads = jp.evidence.flow_grads(network, params, jax.ShapeDtypeStruct((1, 6, 6, 1), "float32"))
    scores = jp.synflow({n: p[None] if p.ndim == 2 else p for n, p in params.items()}, flow_grads={
        n: p[None] if p.ndim == 2 else p for n, p in grads.items()
    })  # fmt: skip
    flow = float(network(jax.tree.map(jnp.abs, params), jnp.ones((1, 6, 6, 1))).sum())
    for score in scores.values():
        assert float(score.sum()) == pytest.approx(flow, rel=1e-4)
    into, out = scores["fc1"].sum((0, 1)), scores["fc2"].sum((0, 2))
    np.testing.assert_allclose(into, out, rtol=1e-4)
    np.testing.assert_allclose(scores["conv1"].sum((0, 1, 2)), scores["conv2"].sum((0, 1, 3)), rtol=1e-4)


def test_synflow_in_rounds_empties_no_layer_where_one_shot_does():
    params = drawn(0, {"a": (784, 300), "b": (300, 100), "c": (100, 10)})

    def apply(params, x):
        for name in "abc":
            x = jax.nn.relu(x @ params[name])
        return x

    def evidence(params):
        return {"flow_grads": jp.evidence.flow_grads(apply, params, jnp.zeros((1, 784)))}

    method = jp.Method(criterion=jp.synflow)
    once = jp.compute_masks(method, params, 0.9995, **evidence(params))
    masks = jax.jit(lambda p: jp.iterative_masks(method, p, 0.9995, count=100, evidence=evidence))(params)
    assert jp.sparsity_of(masks) == pytest.approx(0.9995, abs=1e-5)
    assert min(int(mask.sum()) for mask in once.values()) == 0
    assert min(int(mask.sum()) for mask in masks.values()) > 0


def test_iterate_ends_where_compute_masks_would_for_weights_alone():
    params = drawn(0, NETWORK)
    method = jp.Method()
    masks = jp.iterative_masks(method, params, 0.9, count=7, evidence=lambda params: {})
    jax.tree.map(np.testing.assert_array_equal, masks, jp.compute_masks(method, params, 0.9))
    with pytest.raises(ValueError, match="count >= 1, got 0"):
        jp.iterative_masks(method, params, 0.9, count=0, evidence=lambda params: {})
    with pytest.raises(ValueError, match=r"0\.9"):
        jp.iterative_masks(method, params, 90, count=1, evidence=lambda params: {})


def test_hessian_grads_are_the_hessian_times_the_gradient():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(6, 6))
    a, b = jnp.asarray(a @ a.T, jnp.float32), jnp.asarray(rng.normal(size=6), jnp.float32)

    def loss(params):
        w = params["w"]
        return w @ a @ w / 2 + b @ w

    w = jnp.asarray(rng.normal(size=6), jnp.float32)
    found = jp.evidence.hessian_grads(loss, {"w": w})["w"]
    np.testing.assert_allclose(found, a @ (a @ w + b), rtol=1e-4)


def test_squared_grads_are_means_over_single_samples():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 5)), rng.normal(size=7)
    w = rng.normal(size=5)

    def loss(params, sample):
        return (sample["x"] @ params["w"] - sample["y"]) ** 2

    samples = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    found = jp.evidence.squared_grads(loss, {"w": jnp.asarray(w, jnp.float32)}, samples)["w"]
    np.testing.assert_allclose(found, ((2 * (x @ w - y)[:, None] * x) ** 2).mean(0), rtol=1e-4)
    for wrong in ({"x": jnp.ones((2, 5)), "y": jnp.ones(3)}, {"x": jnp.ones((0, 5)), "y": jnp.ones(0)}):
        with pytest.raises(ValueError, match="equally many samples"):
            jp.evidence.squared_grads(loss, {"w": jnp.ones(5)}, wrong)


def test_activations_of_batches_add_up():
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(6, 4, 3)), 0)
    parts = [jp.evidence.activations(jnp.asarray(x[i : i + 2], jnp.float32)) for i in (0, 2, 4)]
    found = jax.tree.map(lambda *sums: sum(sums[1:], sums[0]), *parts)
    flat = x.reshape(-1, 3)
    np.testing.assert_allclose(found.norms, np.linalg.norm(flat, axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.means, np.abs(flat).mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.zero_fractions, (flat == 0).mean(0), rtol=1e-6)


# ---------------------------------------------------------------- what remembers


def by_hand(criterion, params, steps):
    """The statistic after a few SGD steps in NumPy; `steps` are gradients."""
    w, statistic = double(params)["w"], np.zeros_like(params["w"], np.float64)
    for g in steps:
        statistic = statistic - w * g if criterion is jp.movement else 0.9 * statistic + 0.1 * g
        w = w - 0.1 * g
    return statistic


@pytest.mark.parametrize("criterion", [jp.movement, jp.criteria.momentum(0.9)], ids=["movement", "momentum"])
def test_prune_carries_the_statistics(criterion, relaxed):
    rng = np.random.default_rng(0)
    params = start = {"w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), "b": jnp.zeros(5)}
    steps = rng.normal(size=(4, 6, 5))
    tx = jp.prune(
        optax.sgd(0.1),
        jp.Method(criterion=criterion),
        sparsity=jp.schedules.one_shot(0.5, 3),
        update_when=jp.schedules.at(3),
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for g in steps:
        grads = {"w": jnp.asarray(g, jnp.float32), "b": jnp.zeros(5)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    statistic = by_hand(criterion, start, steps)
    np.testing.assert_allclose(state.statistics["w"], statistic, rtol=1e-4, atol=1e-5)
    order = statistic if criterion is jp.movement else np.abs(statistic)
    assert state.masks["w"].sum() == 15
    assert order[np.asarray(state.masks["w"])].min() > order[~np.asarray(state.masks["w"])].max()
    assert state.masks["b"].all()


def test_one_shot_movement_takes_statistics_as_evidence():
    params, statistics = {"w": jnp.ones((2, 2))}, {"w": jnp.asarray([[-3.0, 1.0], [2.0, -1.0]])}
    masks = jp.compute_masks(jp.Method(criterion=jp.movement), params, 0.5, statistics=statistics)
    assert masks["w"].tolist() == [[False, True], [True, False]]
    with pytest.raises(ValueError, match="decay"):
        jp.criteria.momentum(1.0)
