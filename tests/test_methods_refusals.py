"""What `compute_masks` refuses, and the words it does it with; what it lets pass under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

STACK = jp.layout.Axes(layers=(0,), inputs=(1,), outputs=(2,))

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
    "threshold": (
        jp.Method(distribution=jp.distributions.Threshold(0.1)),
        GOOD,
        0.5,
        {},
        "`Threshold` decides by itself how many",
    ),
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
    "slope inf": (jp.Method(jp.taylor), GOOD, 0.5, {"grads": INF}, r"'a/kernel' has 2 infinite score\(s\) of 40"),
    "zeros": (
        jp.Method(),
        {**GOOD, "head": jnp.zeros((2, 3))},
        0.5,
        {},
        "All scores of 'head' are zero, and no weight of it would be left.*`select`.*`masks=nonzero_masks",
    ),
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
    "rule": (
        jp.Method(distribution=jp.distributions.ByRule({"b*": 0.5})),
        GOOD,
        None,
        {},
        "No rule of `ByRule` matches 'a/kernel'",
    ),
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
        (jp.Method(jp.criteria.random), GOOD, r"random\(\) missing 1 required keyword-only argument: 'key'"),
        (jp.Method(), {**GOOD, "f": "relu"}, "'f' is a str, an array was expected.*eqx.filter"),
        (jp.Method(), {**GOOD, "f": 0.5}, "'f' is a float, an array was expected"),
        (jp.Method(select="*"), {"n": jnp.ones((4, 4), int)}, "'n' is int32, only floating leaves are pruned"),
        (jp.Method(select="*"), {"n": jnp.ones((4, 4), bool)}, "'n' is bool, only floating leaves are pruned"),
    ],
)
def test_wrong_types_are_refused_with_the_reason(method, params, message, unchecked):
    with pytest.raises(TypeError, match=message):
        jp.compute_masks(method, params, 0.5)


LARGE = {"a": {"kernel": jnp.full((10, 4), 1e30), "bias": jnp.ones(4)}}
SQUARING = [
    jp.taylor, jp.criteria.taylor_squared, jp.criteria.squared_magnitude, jp.snip, jp.criteria.grasp,
    jp.criteria.fisher, jp.criteria.lamp, jp.synflow, jp.criteria.joint_taylor(jp.Output()),
]  # fmt: skip


@pytest.mark.parametrize("criterion", SQUARING)
def test_scores_that_overflow_are_refused_and_not_clipped(criterion):
    evidence = dict.fromkeys(("grads", "hessian_grads", "flow_grads", "squared_grads"), LARGE)
    with pytest.raises(ValueError, match=r"'a/kernel' has 40 (infinite|NaN) score\(s\) of 40"):
        jp.compute_masks(jp.Method(criterion), LARGE, 0.5, **evidence)


def test_under_jit_infinity_counts_as_the_largest_number():
    masks = jax.jit(lambda g: jp.compute_masks(jp.Method(jp.taylor), GOOD, 0.9, grads=g))(INF)
    assert int(masks["a"]["kernel"].sum()) == 4
    assert bool(masks["a"]["kernel"][:2, 1].all())


def test_shares_of_a_sum_that_would_overflow_rank_all_the_same():
    grads = {"a": {"kernel": jnp.arange(1.0, 41).reshape(10, 4) * 5e36, "bias": jnp.ones(4)}}
    masks = [jp.compute_masks(jp.Method(one), GOOD, 0.5, grads=grads) for one in (jp.snip, jp.taylor)]
    np.testing.assert_array_equal(masks[0]["a"]["kernel"], masks[1]["a"]["kernel"])
    assert int(masks[0]["a"]["kernel"].sum()) == 20


def test_scores_that_are_no_floats_are_refused(unchecked):
    method = jp.Method(lambda p, /: {name: jnp.ones(leaf.shape, int) for name, leaf in p.items()})
    with pytest.raises(TypeError, match="must give floating scores, it gave int32 at 'a/kernel'"):
        jp.compute_masks(method, GOOD, 0.5)


ANSWERS = [
    (
        {"criterion": jp.criteria.joint_taylor},
        r"`joint_taylor` makes criteria and is none: call it, as in `joint_taylor\(Out",
    ),
    ({"criterion": jp.criteria.momentum}, "`momentum` makes criteria and is none: call it"),
    (
        {"criterion": jp.criteria.Running},
        "`criterion` must be an object such as `magnitude`; the class `Running` arrived",
    ),
    ({"criterion": "magnitude"}, "`criterion` must be an object such as `magnitude`; 'magnitude' arrived"),
    *(({"granularity": one}, rf"as `Element\(\)`; the class `{one.__name__}`") for one in (jp.Block, jp.Channels)),
    ({"granularity": 4}, r"`granularity` must be an object such as `Element\(\)`; 4 arrived"),
    *(({"distribution": one}, rf"as `Global\(\)`; the class `{one.__name__}`") for one in (jp.Global, jp.NM, jp.ERK)),
    ({"distribution": jp.distributions.ByRule({"*": jp.Uniform})}, "the class `Uniform` arrived: call it"),
    ({"layout": jp.Layout}, "`layout` must be an object such as `FLAX`; the class `Layout` arrived"),
]


@pytest.mark.parametrize(("answers", "message"), ANSWERS)
def test_answers_that_are_none_are_refused_where_they_are_given(answers, message, unchecked):
    with pytest.raises(TypeError, match=message):
        jp.Method(**answers)


@pytest.mark.parametrize(
    ("select", "kept"),
    [
        ({"a/bias": False, "*": True}, (("a/bias", False), ("*", True))),
        (["a/kernel"], ("a/kernel",)),
        ((name for name in ["a/kernel"]), ("a/kernel",)),
        ("a/kernel", "a/kernel"),
    ],
)
def test_a_method_can_be_hashed_whatever_selects(select, kept):
    method = jp.Method(select=select)
    assert hash(method) == hash(jp.Method(select=kept))
    assert method == jp.Method(select=kept)
    for _ in range(2):  # an iterator would be used up
        assert int(jax.jit(jp.compute_masks, static_argnums=0)(method, GOOD, 0.5)["a"]["kernel"].sum()) == 20
    with pytest.raises(ValueError, match=r"names 'b/\*', which matches no leaf"):
        jp.compute_masks(jp.Method(select={"b/*": False, "*": True}), GOOD, 0.5)


ZERO_HEAD = {"body": jnp.ones((4, 4)), "head": jnp.zeros((2, 3))}
LEGITIMATE = {
    "equal shares": lambda: jp.compute_masks(jp.Method(distribution=jp.Uniform()), ZERO_HEAD, 0.5),
    "dead before": lambda: jp.compute_masks(jp.Method(), ZERO_HEAD, 0.5, masks=jp.nonzero_masks(ZERO_HEAD)),
    "nothing but zeros": lambda: jp.compute_masks(jp.Method(), {"w": jnp.zeros((4, 4))}, 0.5),
    "drawn": lambda: jp.compute_masks(jp.Method(jp.criteria.random), ZERO_HEAD, 0.5, key=jax.random.key(0)),
    "later": lambda: prune(jp.cubic(0.5, begin=0, end=9)).init(ZERO_HEAD),
    "not at step 0": lambda: prune(0.5, update_when=jp.every(2, begin=2)).init(ZERO_HEAD),
    "not known": lambda: jax.jit(prune(0.5).init)(ZERO_HEAD),
}


def prune(sparsity, criterion=jp.magnitude, **options):
    return jp.prune(optax.sgd(0.1), jp.Method(criterion), sparsity=sparsity, **options)


@pytest.mark.parametrize("case", LEGITIMATE)
def test_a_leaf_of_zeros_is_let_pass(case):
    LEGITIMATE[case]()


@pytest.mark.parametrize("criterion", [jp.magnitude, jp.taylor, jp.snip])
def test_an_optimizer_that_would_kill_a_leaf_of_zeros_says_so_when_it_begins(criterion):
    with pytest.raises(ValueError, match="All scores of 'head' are zero"):
        prune(0.5, criterion).init(ZERO_HEAD)


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
