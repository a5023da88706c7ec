"""Scores: non-negative float32, larger = keep, by the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import magnitude, random, taylor

SHAPES = {"a": (1, 4, 3), "b": (2, 1, 2, 2)}


def views(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def double(tree):
    return {name: np.asarray(leaf).astype(np.float64) for name, leaf in tree.items()}


EVIDENCE = {magnitude: lambda: {}, random: lambda: {"key": jax.random.key(3)}, taylor: lambda: {"grads": views(1)}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("criterion", EVIDENCE, ids=lambda c: c.__name__)
def test_scores_are_non_negative_float32(criterion, dtype):
    evidence = {**EVIDENCE[criterion](), "unused": "evidence is let pass"}
    scores = criterion(views(0, dtype), **evidence)
    assert {name: leaf.shape for name, leaf in scores.items()} == SHAPES
    for leaf in scores.values():
        assert leaf.dtype == jnp.float32
        assert (np.asarray(leaf) >= 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_magnitude_is_the_absolute_value(dtype):
    params = views(0, dtype)
    scores = magnitude(params)
    for name, want in double(params).items():
        np.testing.assert_array_equal(scores[name], np.abs(want))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_taylor_is_weight_times_gradient(dtype):
    """In float32, also for bfloat16 weights: their products would tie."""
    params, grads = views(0, dtype), views(1, dtype)
    scores = taylor(params, grads=grads)
    for name in SHAPES:
        want = np.abs(double(params)[name] * double(grads)[name])
        np.testing.assert_allclose(scores[name], want, rtol=1e-6)
        assert len(np.unique(scores[name])) == want.size


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


@pytest.mark.parametrize(("criterion", "missing"), [(taylor, "grads"), (random, "key")])
def test_missing_evidence_is_pythons_own_error(criterion, missing, unchecked):
    message = rf"{criterion.__name__}\(\) missing 1 required keyword-only argument: '{missing}'"
    with pytest.raises(TypeError, match=message):
        criterion(views(0))
