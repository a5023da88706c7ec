"""Budgets: never above, never a group too few, in whole numbers; against sorting and accumulating."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxprune as jp
from jaxprune.distributions import Budget
from jaxprune.distributions import budget as budgets

pytestmark = pytest.mark.usefixtures("quick")

# Leaf name -> groups (*layers, spatial, in, out), and the sizes (*spatial, in, out) of its leaf: a group has 1, 4 and
# (tiles at the far edges) 15 / 6 weights.
SHAPES = {"conv": (4, 5, 6), "stack": (3, 1, 4, 2), "edge": (1, 3, 2)}
DIMS = {"conv": (2, 2, 5, 6), "stack": (8, 4), "edge": (5, 3)}
SIZES = {"conv": Fraction(1), "stack": Fraction(4), "edge": Fraction(5, 2)}
COUNT = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}


def make(seed=0, ties=True):
    rng = np.random.default_rng(seed)
    draw = (lambda shape: rng.integers(0, 4, shape)) if ties else rng.random
    return {name: draw(shape).astype(np.float32) for name, shape in SHAPES.items()}


def put(groups):
    return {name: jax.device_put(leaf) for name, leaf in groups.items()}


def prices(costs):
    """Of one group, exactly."""
    return {name: Fraction(costs[name]) * SIZES[name] for name in SHAPES}


def whole(costs):
    return sum(price * COUNT[name] for name, price in prices(costs).items())


def accumulated(groups, costs, budget):
    """Sorted, the costs added up one after the other until they are too much; what costs nothing is alive."""
    flat = np.concatenate([scores.ravel() for scores in groups.values()]).astype(np.float64)
    price = np.repeat([float(p) for p in prices(costs).values()], list(COUNT.values()))
    order = np.argsort(-flat, kind="stable")
    order = order[price[order] > 0]
    kept = price == 0
    kept[order[np.cumsum(price[order]) <= float(budget)]] = True
    return kept


def flat(kept):
    return np.concatenate([np.asarray(kept[name]).ravel() for name in SHAPES])


def spent(kept, costs):
    return sum(price * int(np.asarray(kept[name]).sum()) for name, price in prices(costs).items())


def missing(groups, kept, costs):
    """What the best of the dead costs, of those that cost something."""
    dead = [
        (-float(score), i, name)
        for name, scores in groups.items()
        for i, (score, alive) in enumerate(zip(scores.ravel(), np.asarray(kept[name]).ravel(), strict=True))
        if not alive
    ]
    first = list(groups)
    return prices(costs)[min(dead, key=lambda one: (one[0], first.index(one[2]), one[1]))[2]] if dead else None


WHOLE = st.fixed_dictionaries({name: st.integers(0, 20).map(lambda i: 2 * i) for name in SHAPES})
WHOLE = WHOLE.filter(lambda costs: any(costs.values()))
ANY = st.fixed_dictionaries({name: st.one_of(st.floats(1e-3, 1e3), st.floats(1e-6, 1e12)) for name in SHAPES})
SPARSITIES = st.one_of(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 0.999]), st.floats(0, 0.999))


@settings(max_examples=30)
@given(seed=st.integers(0, 3), costs=WHOLE, sparsity=SPARSITIES)
@example(seed=0, costs={"conv": 2, "stack": 2, "edge": 2}, sparsity=1 - 0.7)  # 0.30000000000000004
def test_the_best_within_the_budget(seed, costs, sparsity):
    groups = make(seed)
    kept = Budget(costs)(put(groups), sparsity, dims=DIMS)
    budget = (1 - Fraction(sparsity) + Fraction(1, 2**50)) * whole(costs)
    np.testing.assert_array_equal(flat(kept), accumulated(groups, costs, budget))


@settings(max_examples=30)
@given(seed=st.integers(0, 3), costs=ANY, part=st.floats(0.2, 1))
def test_never_above_a_limit_and_the_next_does_not_fit(seed, costs, part):
    """For costs that no unit divides the room left is known to 2**-30 of the whole."""
    groups = make(seed)
    limit = min(float(part * float(whole(costs))), float(whole(costs)) * (1 - 1e-15))
    if Fraction(limit) < min(prices(costs).values()):
        return
    kept = Budget(costs, limit=limit)(put(groups), None, dims=DIMS)
    assert spent(kept, costs) <= Fraction(limit)
    following = missing(groups, kept, costs)
    assert following is None or spent(kept, costs) + following > Fraction(limit) - whole(costs) / 2**30


@settings(max_examples=20)
@given(seed=st.integers(0, 3), costs=ANY, sparsity=SPARSITIES)
def test_never_above_a_share(seed, costs, sparsity):
    kept = Budget(costs)(put(make(seed)), sparsity, dims=DIMS)
    assert spent(kept, costs) <= (1 - Fraction(sparsity) + Fraction(1, 2**50)) * whole(costs)


def test_what_a_unit_does_not_divide_is_rounded_up(monkeypatch):
    """Units so coarse that it would be seen."""
    monkeypatch.setattr(budgets, "FINEST", 1 << 10)
    costs = {"conv": 0.1, "stack": 1 / 3, "edge": 7 / 9}
    for limit in np.linspace(2, 0.99 * float(whole(costs)), 12):
        kept = Budget(costs, limit=float(limit))(put(make()), None, dims=DIMS)
        following = missing(make(), kept, costs)
        assert 0 <= Fraction(float(limit)) - spent(kept, costs) <= following + whole(costs) * 150 / 2**10


@pytest.mark.parametrize("scale", [1.0, 1e6, 3.0e11])
def test_totals_beyond_a_word_are_exact(scale):
    """The last group fits to the unit, and by a unit it does not."""
    groups, costs = make(1, ties=False), {"conv": 2 * scale, "stack": 4 * scale, "edge": 6 * scale}
    kept = flat(Budget(costs, limit=float(whole(costs)) / 2)(put(groups), None, dims=DIMS))
    exact = spent(Budget(costs, limit=float(whole(costs)) / 2)(put(groups), None, dims=DIMS), costs)
    assert float(exact) == exact
    again = Budget(costs, limit=float(exact))(put(groups), None, dims=DIMS)
    np.testing.assert_array_equal(flat(again), kept)
    below = Budget(costs, limit=np.nextafter(float(exact), 0))(put(groups), None, dims=DIMS)
    assert flat(below).sum() == kept.sum() - 1


def test_everything_and_nothing():
    groups, costs = make(), {"conv": 0.1, "stack": 1 / 3, "edge": 7.0}
    for budget in (Budget(costs), Budget(costs, limit=float(whole(costs)))):
        assert flat(budget(put(groups), 0.0, dims=DIMS)).all()
    zeros = {name: np.zeros_like(leaf) for name, leaf in groups.items()}
    assert flat(Budget(costs)(put(zeros), 0.0, dims=DIMS)).all()
    assert not flat(Budget(costs)(put(groups), 0.9999, dims=DIMS)).any()  # less than the cheapest


def test_ties_go_by_index_as_far_as_they_fit():
    ones = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    kept = flat(Budget({"conv": 1, "*": 2}, limit=120 + 5 * 8 + 7)(put(ones), None, dims=DIMS))
    assert kept[:125].all()
    assert not kept[125:].any()  # the sixth would cost 8; those of "edge", after it, 5


def test_the_first_that_does_not_fit_ends_it():
    groups = {"dear": jnp.asarray([[[3.0, 1.0]]]), "cheap": jnp.asarray([[[2.0, 0.5]]])}
    dims = {"dear": (1, 2), "cheap": (1, 2)}
    kept = Budget({"dear": 10, "cheap": 1}, limit=12)(groups, None, dims=dims)
    assert kept["dear"].ravel().tolist() == [True, False]
    assert kept["cheap"].ravel().tolist() == [True, False]


def test_of_groups_that_cost_alike_it_is_a_contest_by_number():
    """1 - 0.7 is a little less than 0.3 in floats, and float32(0.3) a little more: both mean three tenths."""
    groups, alike = make(1), {"conv": 20, "stack": 5, "edge": 8}
    for sparsity in (0.1, 0.3, 0.9, 1 - 0.7, np.float32(0.1), np.float32(0.3), jnp.float32(0.9), 0):
        kept = Budget(alike)(put(groups), sparsity, dims=DIMS)
        scores = np.concatenate([leaf.ravel() for leaf in groups.values()])
        np.testing.assert_array_equal(flat(kept), oracle.top_k(scores, round(150 * (1 - float(sparsity)))))


def test_without_costs_weights_are_counted():
    kept = Budget()(put(make()), 0.5, dims=DIMS)
    np.testing.assert_array_equal(flat(kept), accumulated(make(), dict.fromkeys(SHAPES, 1), 231 / 2))


def test_worth_by_cost():
    groups, costs = make(2, ties=False), {"conv": 1, "stack": 2, "edge": 8}
    scaled = {name: leaf / np.float32(costs[name]) for name, leaf in groups.items()}
    kept = Budget(costs, per_cost=True)(put(groups), 0.6, dims=DIMS)
    np.testing.assert_array_equal(flat(kept), accumulated(scaled, costs, 0.4 * float(whole(costs))))
    assert (flat(kept) != flat(Budget(costs)(put(groups), 0.6, dims=DIMS))).any()


def test_a_limit_with_a_sparsity_is_where_it_ends():
    groups, costs = put(make(ties=False)), {"conv": 3, "stack": 1, "edge": 2}
    limit = float(whole(costs)) / 4
    end = flat(Budget(costs, limit=limit)(groups, None, dims=DIMS))
    for sparsity, want in ((0.5, flat(Budget(costs)(groups, 0.5, dims=DIMS))), (0.75, end), (0.9, end)):
        for given_as in (sparsity, jnp.float32(sparsity)):
            np.testing.assert_array_equal(flat(Budget(costs, limit=limit)(groups, given_as, dims=DIMS)), want)


def test_one_trace_and_vmap_agree_with_what_is_known():
    budget, groups, traces = Budget({"conv": 3, "*": 1.7}, limit=100, per_cost=True), put(make(1)), []

    @jax.jit
    @jax.vmap
    def run(sparsity):
        traces.append(sparsity)
        return budget(groups, sparsity, dims=DIMS)

    for sparsities in (np.float32([0.0, 0.3]), np.float32([0.55, 0.9])):
        many = jax.device_get(run(sparsities))
        for i, sparsity in enumerate(sparsities):
            known = budget(groups, sparsity, dims=DIMS)
            np.testing.assert_array_equal(flat({name: many[name][i] for name in SHAPES}), flat(known))
    assert len(traces) == 1


def test_eight_devices_make_the_masks_of_one():
    """Leaves cut along two axes; shapes, and so the compiled search, are those of the other tests."""
    groups, costs = make(2), {"conv": 0.1, "stack": 7 / 3, "edge": 1}
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    specs = {"conv": ("x", None, "y"), "stack": (None, None, "x", "y"), "edge": (None, None, "y")}
    placed = {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in specs.items()}
    sharded = {name: jax.device_put(leaf, placed[name]) for name, leaf in groups.items()}
    found = Budget(costs)(sharded, np.float32(0.4), dims=DIMS)
    want = Budget(costs)(put(groups), np.float32(0.4), dims=DIMS)
    np.testing.assert_array_equal(flat(found), flat(want))
    assert 0 < flat(want).mean() < 1


# ---------------------------------------------------------------- multiply-adds and bytes of a model


def model(params, x):
    y = jax.lax.conv_general_dilated(x, params["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = jnp.mean(jax.nn.relu(y), (1, 2)) @ params["tied"]
    y, _ = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y, params["stack"])
    return y @ params["tied"].T + params["bias"][None]


PARAMS = {
    name: jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.float32)
    for i, (name, shape) in enumerate({"conv": (3, 3, 2, 8), "tied": (8, 6), "stack": (3, 6, 6)}.items())
} | {"bias": jnp.zeros(8)}
X = jnp.ones((2, 8, 8, 2))
LAYOUT = jp.FLAX.with_rules({"stack": jp.layout.Axes(layers=(0,), inputs=(1,), outputs=(2,))})


@pytest.fixture(scope="module")
def sites():
    return jp.trace(model, PARAMS, X)


def test_what_a_weight_costs(sites):
    macs = jp.tracing.mac_costs(sites, PARAMS)
    assert macs == {"conv": 2 * 16, "stack": 2, "tied": 2 * 2}  # positions, steps of one layer, two uses
    assert jp.tracing.mac_costs(sites, PARAMS, ("bias", "conv")) == {"bias": 0, "conv": 32}
    half = {**PARAMS, "tied": PARAMS["tied"].astype(jnp.bfloat16)}
    assert jp.tracing.byte_costs(half) == {"conv": 4, "stack": 4, "tied": 2}
    with pytest.raises(ValueError, match="`costs` was given no sites"):
        jp.tracing.mac_costs((), PARAMS)


@pytest.mark.parametrize("granularity", [jp.Block(2, 2), jp.Output()], ids=str)
@pytest.mark.parametrize("share", [0.25, 0.6])
def test_the_costs_of_the_model_are_within_and_a_group_more_is_not(sites, granularity, share):
    macs = jp.tracing.mac_costs(sites, PARAMS)
    dense = jp.costs(sites).total.macs
    method = jp.Method(granularity=granularity, distribution=Budget(macs, limit=share * dense), layout=LAYOUT)
    masks = jp.compute_masks(method, PARAMS)
    left = jp.costs(sites, masks).total.macs_left
    group = 9 * 2 * 32 if granularity == jp.Output() else 4 * 32
    assert share * dense - group < left <= share * dense
    method = jp.Method(granularity=granularity, distribution=Budget(macs), layout=LAYOUT)
    for name, mask in jp.compute_masks(method, PARAMS, 1 - share).items():
        np.testing.assert_array_equal(mask, masks[name])


def test_bytes_of_the_survivors():
    half = {**PARAMS, "stack": PARAMS["stack"].astype(jnp.bfloat16)}
    masks = jp.compute_masks(
        jp.Method(distribution=Budget(jp.tracing.byte_costs(half), limit=500), layout=LAYOUT), half
    )
    left = sum(int(masks[name].sum()) * half[name].dtype.itemsize for name in ("conv", "tied", "stack"))
    assert 500 - 4 < left <= 500


def test_training_ends_at_the_limit_and_the_dead_stay_dead(relaxed):
    costs, limit = {"conv": 32, "stack": 2, "tied": 4}, 1200
    method = jp.Method(distribution=Budget(costs, limit=limit), layout=LAYOUT)
    tx = jp.prune(optax.adam(0.05), method, sparsity=jp.cubic(0.9, begin=0, end=6), update_when=jp.every(1))
    grads = jax.tree.map(lambda leaf: jnp.sin(100 * leaf), PARAMS)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state, alive = PARAMS, tx.init(PARAMS), []
    for _ in range(9):
        params, state = step(params, state)
        alive.append(sum(cost * int(state.masks[name].sum()) for name, cost in costs.items()))
        assert all(not np.asarray(params[name])[~np.asarray(mask)].any() for name, mask in state.masks.items())
    assert alive == sorted(alive, reverse=True)
    assert alive[0] > limit >= alive[-1] > limit - 32


# ---------------------------------------------------------------- refusals

REFUSED = [
    (Budget({"conv": 1}), None, "`Budget` needs a sparsity"),
    (Budget({"conv": 1}), 0.5, r"No rule of `Budget` matches 'stack'. There are: \['conv'\]. Add one"),
    (Budget({"cnov": 1, "*": 1}), 0.5, "The rule 'cnov' of `Budget` matches no pruned leaf. There are: .*'edge'"),
    (Budget({"*": 0}), 0.5, r"`Budget` finds nothing to save: the weights of \['conv', .*\] cost 0 each"),
    (Budget(), 90, "Did you mean 0.9"),
    (Budget(limit=100), 90, "Did you mean 0.9"),
    (
        Budget({"*": 2}, limit=463),
        None,
        r"`Budget\(limit=463\)` asks for nothing: the pruned leaves \['conv', 'stack', 'edge'\] cost 462 together. Low",
    ),
    (
        Budget({"conv": 16, "*": 2}, limit=4),
        None,
        r"`Budget\(limit=4\)` leaves nothing alive: the cheapest group of \['conv', .*\] costs 5, in 'edge', and all "
        r"together 2142\. Raise it, or take smaller groups",
    ),
]


@pytest.mark.parametrize(("budget", "sparsity", "message"), REFUSED)
def test_what_cannot_be_meant_is_refused(budget, sparsity, message):
    with pytest.raises(ValueError, match=message):
        budget(put(make()), sparsity, dims=DIMS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget({"a/*": -1}), r"a weight of 'a/\*' costs -1; costs are finite and at least 0"),
        (lambda: Budget({"a": float("nan")}), "'a' costs nan"),
        (lambda: Budget({"a": float("inf")}), "'a' costs inf"),
        (lambda: Budget(limit=-3), r"`Budget\(limit=...\)` is what the pruned leaves may cost together, .*; got -3"),
        (lambda: Budget(limit=0), "got 0"),
        (lambda: Budget(limit=float("inf")), "got inf"),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_channels_have_no_cost_of_their_own():
    params, x = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 3))}, jnp.ones((2, 4))
    channels = jp.Channels(jp.couplings(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, x))
    for distribution in (Budget(), jp.distributions.ByRule({"*": Budget()})):
        with pytest.raises(ValueError, match=r"what a channel costs depends on which others are left.*`masks_within`"):
            jp.compute_masks(jp.Method(granularity=channels, distribution=distribution), params, 0.5)
