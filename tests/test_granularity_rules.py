"""A granularity of its own for every leaf: kernels, tiles and heads in one method, with every distribution."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxprune as jp
from jaxprune import Block, Element, Global, Head, Kernel, Output, granularity
from jaxprune.distributions import Budget, ByRule

pytestmark = pytest.mark.usefixtures("quick")

SHAPES = {"attention": (8, 16), "conv": (3, 3, 4, 8), "dense": (16, 24), "stack": (2, 8, 8)}
PARAMS = {
    name: jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.float32)
    for i, (name, shape) in enumerate(SHAPES.items())
} | {"bias": jnp.zeros(24)}
LAYOUT = jp.FLAX.with_rules({"stack": jp.layout.Axes(layers=(0,), inputs=(1,), outputs=(2,))})
RULES = granularity.ByRule({"conv*": Kernel(), "attention": Head(4), "*": Block(4, 4)})
ALONE = {"conv": Kernel(), "attention": Head(4), "dense": Block(4, 4), "stack": Block(4, 4)}
TWO = ("attention", "conv")
VIEWS = {"attention": (1, 8, 16), "conv": (9, 4, 8), "dense": (1, 16, 24), "stack": (2, 1, 8, 8)}


def method(distribution, granularity=RULES):
    return jp.Method(granularity=granularity, distribution=distribution, layout=LAYOUT)


compute = jax.jit(jp.compute_masks, static_argnums=0)


def pooled():
    """Leaf name -> (scores of its groups by the formulas, weights of a group)."""
    views = {name: np.abs(np.asarray(PARAMS[name], np.float64)).reshape(VIEWS[name]) for name in SHAPES}
    heads = views["attention"].reshape(1, 8, 4, 4).mean((1, 3)).reshape(1, 1, 4)
    return {
        "attention": (heads, 32),
        "conv": (oracle.pool(views["conv"], 1, 1, True), 9),
        "dense": (oracle.pool(views["dense"], 4, 4), 16),
        "stack": (oracle.pool(views["stack"], 4, 4), 16),
    }


def grown(kept):
    """The verdicts for every weight, in the leaves' own shapes."""
    return {
        "attention": np.broadcast_to(np.repeat(kept["attention"], 4, -1), (1, 8, 16)).reshape(8, 16),
        "conv": np.broadcast_to(kept["conv"], (9, 4, 8)).reshape(3, 3, 4, 8),
        "dense": oracle.expand(kept["dense"], 4, 4, (1, 16, 24)).reshape(16, 24),
        "stack": oracle.expand(kept["stack"], 4, 4, (2, 1, 8, 8)).reshape(2, 8, 8),
    }


def survivors(sparsity, by_weights):
    """The best of all groups by number, or as many as weigh what is left together."""
    groups = pooled()
    scores = np.concatenate([one.ravel() for one, _ in groups.values()])
    price = np.concatenate([np.full(one.size, n if by_weights else 1) for one, n in groups.values()])
    room = (1 - Fraction(sparsity)) * int(price.sum()) if by_weights else scores.size - round(scores.size * sparsity)
    order = np.argsort(-scores, kind="stable")
    kept = np.zeros(scores.size, bool)
    kept[order[np.cumsum(price[order]) <= float(room)]] = True
    ends = np.cumsum([one.size for one, _ in groups.values()])[:-1]
    parts = zip(groups.items(), np.split(kept, ends), strict=True)
    return grown({name: part.reshape(one.shape) for (name, (one, _)), part in parts})


def same(masks, want):
    assert np.asarray(masks["bias"]).all()
    for name, mask in want.items():
        np.testing.assert_array_equal(masks[name], mask, err_msg=name)


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.8])
@pytest.mark.parametrize("by_weights", [False, True])
def test_one_contest_of_all_kinds_of_groups(sparsity, by_weights):
    masks = compute(method(Budget() if by_weights else Global()), PARAMS, np.float32(sparsity))
    same(masks, survivors(sparsity, by_weights))
    if by_weights:
        alive = sum(int(masks[name].sum()) for name in SHAPES)
        total = sum(leaf.size for leaf in PARAMS.values()) - 24
        assert (1 - sparsity) * total - 32 < alive <= (1 - sparsity) * total


def test_a_sparsity_of_its_own_for_every_leaf():
    rules = ByRule({"conv": 0.25, "attention": 0.5, "dense": 0.75, "stack": 0.5})
    masks = compute(method(rules), PARAMS)
    want = {name: oracle.top_k(one, round(one.size * keep)) for (name, (one, _)), keep in
            zip(pooled().items(), (0.5, 0.75, 0.25, 0.5), strict=True)}  # fmt: skip
    stack = pooled()["stack"][0]
    same(masks, grown(want | {"stack": oracle.contests(stack, (-3, -2, -1), 2)}))
    assert np.asarray(masks["stack"]).sum((1, 2)).tolist() == [32, 32]  # each layer for itself


def test_each_leaf_is_pruned_as_if_alone():
    masks = jp.compute_masks(method(jp.Uniform()), PARAMS, 0.5)
    for name, one in ALONE.items():
        alone = jp.compute_masks(method(jp.Uniform(), one), {name: PARAMS[name]}, 0.5)
        np.testing.assert_array_equal(masks[name], alone[name])


def test_the_first_match_wins_and_pairs_are_rules_too():
    first = granularity.ByRule((("dense", Element()), ("*", Output())))
    masks = jp.compute_masks(method(jp.Uniform(), first), {"dense": PARAMS["dense"], "x": PARAMS["dense"]}, 0.5)
    assert set(np.asarray(masks["x"]).sum(0).tolist()) == {0, 16}
    assert len(set(np.asarray(masks["dense"]).sum(0).tolist())) > 2


def test_jit_traces_once_and_vmap_agrees():
    traces = []

    def run(params, sparsity):
        traces.append(sparsity)
        return jp.compute_masks(method(Budget()), params, sparsity)

    jitted, models = jax.jit(jax.vmap(run)), jax.tree.map(lambda leaf: jnp.stack([leaf, -2 * leaf]), PARAMS)
    for sparsities in ([0.3, 0.6], [0.9, 0.0]):
        found = jitted(models, jnp.float32(sparsities))
        for i, sparsity in enumerate(sparsities):
            same({name: mask[i] for name, mask in found.items()}, survivors(sparsity, True))
    assert len(traces) == 1


def test_eight_devices_make_the_masks_of_one():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    specs = {
        name: PartitionSpec(*(None,) * (leaf.ndim - 2), "x", "y") for name, leaf in PARAMS.items() if leaf.ndim > 1
    }
    specs["bias"] = PartitionSpec("x")
    sharded = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in PARAMS.items()}
    masks = compute(method(Budget()), sharded, np.float32(0.37))
    same(masks, survivors(0.37, True))


def test_groups_move_whole():
    both = dataclasses.replace(method(jp.Uniform(), granularity.ByRule({"conv": Kernel(), "*": Head(4)})), select=TWO)
    masks = jp.compute_masks(both, PARAMS, 0.5)
    grads = {name: jnp.cos(leaf) for name, leaf in PARAMS.items()}
    found = jax.jit(
        lambda masks: jp.training.regrow_masks(both, jp.criteria.gradient, PARAMS, masks, 0.5, grads=grads)
    )(masks)
    for name in TWO:
        shares = ALONE[name].pool(found[name].reshape(VIEWS[name]).astype(jnp.float32))
        assert set(np.unique(shares)) == {0.0, 1.0}
        assert found[name].sum() == masks[name].sum()
        assert (found[name] != masks[name]).any()


def test_scores_of_groups_are_pooled_by_the_same_rules():
    views = {name: PARAMS[name].reshape(VIEWS[name]) for name in TWO}
    grads = {name: jnp.cos(view) for name, view in views.items()}
    scores = jp.criteria.joint_taylor(granularity.ByRule({"conv": Kernel(), "*": Head(4)}))(views, grads=grads)
    for name in TWO:
        np.testing.assert_array_equal(scores[name], jp.criteria.joint_taylor(ALONE[name])(views, grads=grads)[name])


def test_sensitivity_prunes_each_leaf_by_its_rule():
    def alive(p):
        return jnp.sum(jnp.stack([jnp.sum(w != 0) for w in jax.tree.leaves(p)]))

    found = jp.sensitivity(method(jp.Uniform()), PARAMS, alive, (0.5,))
    dense = sum(leaf.size for leaf in PARAMS.values()) - 24
    assert found.dense == dense
    assert {n: dense - row[0] for n, row in zip(found.names, found.accuracies, strict=True)} == {
        name: PARAMS[name].size / 2 for name in SHAPES
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"conv": Kernel(), "*": Block(4, 4), "head*": Head(2)},
            r"The rule 'head\*' of `granularity.ByRule` matches no",
        ),
        ({"conv": Kernel()}, r"No rule of `granularity.ByRule` matches 'attention'. There are: \['conv'\]. Add one"),
        (
            {"attention": Head(3), "*": Element()},
            "Leaf 'attention': 16 outputs do not divide into 3 heads. Leave it",
        ),
        ({"*": Element(), "bias": Output()}, "The rule 'bias' of `granularity.ByRule` matches no pruned leaf"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        jp.compute_masks(method(Global(), granularity.ByRule(rules)), PARAMS, 0.5)


@pytest.mark.parametrize("rule", [0.5, "block", Block, granularity.ByRule({"*": Element()})], ids=str)
def test_what_is_no_granularity_is_refused(unchecked, rule):
    with pytest.raises(ValueError, match=r"`granularity.ByRule` has .* for 'a\*'; what is expected pools and expands"):
        granularity.ByRule({"a*": rule})
