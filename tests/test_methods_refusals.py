"""What `compute_masks` refuses, and the words it does it with; what it lets pass under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

STACK = jp.Axes(layers=(0,), inputs=(1,), outputs=(2,))

GOOD = {"a": {"kernel": jnp.ones((10, 4)), "bias": jnp.ones(4)}}
NAN = {"a": {"kernel": jnp.ones((10, 4)).at[2, 1].set(jnp.nan), "bias": jnp.ones(4)}}
INF = {"a": {"kernel": jnp.ones((10, 4)).at[:2, 1].set(-jnp.inf), "bias": jnp.ones(4)}}


def scored(value):
    return lambda params, /, **_: {name: jnp.full_like(param, value) for name, param in params.items()}


REFUSED = {
    "percent": (
        jp.Method(),
        GOOD,
        90,
        {},
        r"`sparsity` is the fraction removed, in \[0, 1\); got 90. Did you mean 0.9\?",
    ),
    "one": (jp.Method(), GOOD, 1, {}, r"in \[0, 1\); got 1\.$"),
    "none": (jp.Method(), GOOD, None, {}, "`Global` needs a sparsity"),
    "threshold": (jp.Method(distribution=jp.Threshold(0.1)), GOOD, 0.5, {}, "`Threshold` decides by itself how many"),
    "nm": (
        jp.Method(distribution=jp.NM(2, 4)),
        GOOD,
        None,
        {},
        "runs of 4 along the input axis, but 'a/kernel' has 10 inp",
    ),
    "nan": (jp.Method(), NAN, 0.5, {}, r"'a/kernel' has 1 NaN weight\(s\) of 40. Nothing can be ranked"),
    "inf": (jp.Method(), INF, 0.5, {}, r"'a/kernel' has 2 infinite weight\(s\) of 40"),
    "score": (jp.Method(scored(jnp.nan)), GOOD, 0.5, {}, r"'a/kernel' has 40 NaN score\(s\) of 40"),
    "negative": (jp.Method(scored(-1.0)), GOOD, 0.5, {}, "'a/kernel' has a negative score; scores are >= 0"),
    "slope": (jp.Method(jp.taylor), GOOD, 0.5, {"grads": NAN}, r"'a/kernel' has 1 NaN score\(s\) of 40"),
    "no score": (
        jp.Method(lambda p, /: {}),
        GOOD,
        0.5,
        {},
        r"must score every weight: \(1, 10, 4\) at 'a/kernel', it gave leaves \[\]",
    ),
    "other score": (
        jp.Method(lambda p, /: {"a/kernel": jnp.ones(3)}),
        GOOD,
        0.5,
        {},
        r"at 'a/kernel', it gave shape \(3,\)",
    ),
    "pattern": (
        jp.Method(select="b/*"),
        GOOD,
        0.5,
        {},
        r"`select` names 'b/\*', which matches no leaf. There are: 'a/bias', ",
    ),
    "nothing": (jp.Method(), {"bias": jnp.ones(4)}, 0.5, {}, "`select` chooses no leaf to prune. There are: 'bias'"),
    "grads": (
        jp.Method(jp.taylor),
        GOOD,
        0.5,
        {"grads": GOOD["a"]},
        "The `grads` have no leaf 'a/bias', the params do",
    ),
    "grads shape": (
        jp.Method(jp.taylor),
        GOOD,
        0.5,
        {"grads": {"a": {"kernel": jnp.ones((4, 10)), "bias": jnp.ones(4)}}},
        r"The `grads` have shape \(4, 10\) at 'a/kernel', the params \(10, 4\)",
    ),
    "grads bare": (jp.Method(jp.taylor), GOOD, 0.5, {"grads": jnp.ones(3)}, "The `grads` have no leaf 'a/bias'"),
    "masks": (
        jp.Method(),
        GOOD,
        0.5,
        {"masks": {"a": {"kernel": jnp.ones((10, 4), bool)}}},
        "The masks have no leaf 'a/bias'",
    ),
    "masks shape": (
        jp.Method(),
        GOOD,
        0.5,
        {"masks": {"a": {"kernel": jnp.ones((4, 10), bool), "bias": jnp.ones(4, bool)}}},
        r"The masks have shape \(4, 10\) at 'a/kernel'",
    ),
    "rule": (jp.Method(distribution=jp.ByRule({"b*": 0.5})), GOOD, None, {}, "No rule of `ByRule` matches 'a/kernel'"),
    "floor": (
        jp.Method(distribution=jp.Global(floor=0.5)),
        GOOD,
        0.9,
        {},
        "keeps 20 groups of 40, but sparsity 0.9 leaves 4",
    ),
    "layout": (
        jp.Method(layout=jp.FLAX.with_rules({"a/*": STACK})),
        GOOD,
        0.5,
        {},
        "rule for 'a/kernel' must name each of its 2",
    ),
    "output": (
        jp.Method(granularity=jp.Output(), distribution=jp.PerOutput()),
        GOOD,
        0.5,
        {},
        "'a/kernel' has one: it would remove all",
    ),
    "output nm": (
        jp.Method(granularity=jp.Output(), distribution=jp.NM(2, 4)),
        GOOD,
        None,
        {},
        "'a/kernel' has 1 inputs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_the_reason(case):
    method, params, sparsity, evidence, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        jp.compute_masks(method, params, sparsity, **evidence)


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        (jp.Method(jp.taylor), GOOD, r"taylor\(\) missing 1 required keyword-only argument: 'grads'"),
        (jp.Method(jp.random), GOOD, r"random\(\) missing 1 required keyword-only argument: 'key'"),
        (jp.Method(), {**GOOD, "f": "relu"}, "'f' is a str, an array was expected.*eqx.filter"),
        (jp.Method(), {**GOOD, "f": 0.5}, "'f' is a float, an array was expected"),
        (jp.Method(select="*"), {"n": jnp.ones((4, 4), int)}, "'n' is int32, only floating leaves are pruned"),
        (jp.Method(select="*"), {"n": jnp.ones((4, 4), bool)}, "'n' is bool, only floating leaves are pruned"),
    ],
)
def test_wrong_types_are_refused_with_the_reason(method, params, message, unchecked):
    with pytest.raises(TypeError, match=message):
        jp.compute_masks(method, params, 0.5)


def test_an_integer_leaf_is_left_alone():
    params = {"w": jnp.ones((4, 4)), "ids": jnp.arange(8).reshape(2, 4)}
    masks = jp.compute_masks(jp.Method(), params, 0.5)
    assert np.asarray(masks["ids"]).all()
    assert int(masks["w"].sum()) == 8


def test_nan_in_a_leaf_that_is_not_pruned_is_none_of_our_business():
    params = {"w": jnp.ones((4, 4)), "bias": jnp.full(4, jnp.nan)}
    assert int(jp.compute_masks(jp.Method(), params, 0.5)["w"].sum()) == 8


def test_under_jit_nan_is_kept_and_counts_stay():
    """Nobody can be told there, so it must not be hidden either."""
    masks = jax.jit(lambda p: jp.compute_masks(jp.Method(), p, 0.9))(NAN)
    assert int(masks["a"]["kernel"].sum()) == 4
    assert bool(masks["a"]["kernel"][2, 1])
