"""Penalties: the derivative of what they say, for the leaves they say, and training that gets near zero by them.

The oracle is the penalty itself in float64, derived by differences: no derivative is written down twice.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import Block, Element, Head, Input, Kernel, Output

pytestmark = pytest.mark.usefixtures("quick")

SHAPES = {"bias": (6,), "conv": (2, 2, 3, 4), "kernel": (4, 6), "stack": (2, 4, 2)}
AXES = {
    "conv": jp.layout.Axes(spatial=(0, 1), inputs=(2,), outputs=(3,)),
    "kernel": jp.layout.Axes(inputs=(0,), outputs=(1,)),
    "stack": jp.layout.Axes(layers=(0,), inputs=(1,), outputs=(2,)),
}
LAYOUT = jp.FLAX.with_rules({"stack": AXES["stack"]})
SMALL = {"bias": SHAPES["bias"], "kernel": SHAPES["kernel"]}
# (tap, input, output) -> group, within one layer; sizes are those of the view's last two axes
GROUPS = {
    Element(): lambda t, i, o, sizes: (t, i, o),
    Block(3, 2): lambda t, i, o, sizes: (t, i // 3, o // 2),
    Input(): lambda t, i, o, sizes: i,
    Output(): lambda t, i, o, sizes: o,
    Kernel(): lambda t, i, o, sizes: (i, o),
    Head(2): lambda t, i, o, sizes: o // (sizes[1] // 2),
    Head(1, "inputs"): lambda t, i, o, sizes: 0,
}


def draw(seed, dtype="float32", lead=(), shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=(*lead, *shape)), dtype) for name, shape in shapes.items()}


def members(granularity, name):
    """Flat indices of the weights of every group of a leaf."""
    places = oracle.view(np.arange(math.prod(SHAPES[name])).reshape(SHAPES[name]), *AXES[name])
    found = {}
    for place in np.ndindex(places.shape):
        group = (place[:-3], GROUPS[granularity](*place[-3:], places.shape[-2:]))
        found.setdefault(group, []).append(places[place])
    return [np.array(group) for group in found.values()]


def derived(penalty, w, h=1e-6):
    """Central differences in float64."""
    flat, out = np.asarray(w, np.float64).ravel(), np.zeros(w.size)
    for k in range(w.size):
        step = np.where(np.arange(w.size) == k, h, 0)
        out[k] = (penalty(flat + step) - penalty(flat - step)) / (2 * h)
    return out.reshape(w.shape)


def updated(tx, updates, params, state=None):
    return jax.jit(tx.update)(updates, tx.init(params) if state is None else state, params)


def same_bits(first, second):
    pairs = zip(*map(jax.tree.leaves, jax.device_get((first, second))), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


# ---- the derivative


@pytest.mark.parametrize("granularity", GROUPS, ids=str)
def test_group_lasso_adds_the_derivative_of_its_penalty(granularity):
    params, updates = draw(0), draw(1)
    found, state = updated(jp.training.group_lasso(0.3, granularity, layout=LAYOUT), updates, params)
    assert state == optax.EmptyState()
    assert same_bits(found["bias"], updates["bias"])
    for name in AXES:
        groups = members(granularity, name)

        def penalty(w, groups=groups):
            return 0.3 * sum(math.sqrt(len(g)) * math.sqrt((w[g] ** 2).sum()) for g in groups)

        want = np.asarray(updates[name], np.float64) + derived(penalty, params[name])
        np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-6)


def test_l1_adds_the_sign():
    params, updates = draw(0), draw(1)
    params["kernel"] = params["kernel"].at[0, :2].set(jnp.asarray([0.0, -0.0]))
    found, _ = updated(jp.training.l1(0.3), updates, params)
    assert same_bits(found["bias"], updates["bias"])
    assert same_bits(found["kernel"][0, :2], updates["kernel"][0, :2])
    for name in AXES:
        want = derived(lambda w: 0.3 * np.abs(w).sum(), params[name])
        want = np.where(np.asarray(params[name]) == 0, 0, want)
        np.testing.assert_allclose(found[name], np.asarray(updates[name]) + want, rtol=1e-5, atol=1e-6)


def test_select_is_that_of_methods():
    params, updates = draw(0), draw(1)
    for select, chosen in (("bias", {"bias"}), ({"conv": False, "*": True}, {"bias", "kernel", "stack"})):
        found, _ = updated(jp.training.l1(0.3, select), updates, params)
        assert {name for name in SHAPES if not same_bits(found[name], updates[name])} == chosen


@pytest.mark.parametrize("small", [0.0, 1e-45, 1e-30, 1e-18])
def test_groups_near_zero_do_no_harm(small):
    """Their squares are no numbers any more: the derivative is then short of a unit's root mean square, never NaN."""
    w = jnp.asarray(small * np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    found, _ = updated(jp.training.group_lasso(1.0), {"w": jnp.zeros((4, 6))}, {"w": w})
    size = np.sqrt(np.square(np.asarray(found["w"], np.float64)).mean(0))
    assert np.all(np.isfinite(found["w"]))
    assert np.all(size < 1.01)
    assert np.all(size == 0) if small == 0 else np.all(size > 0.9) or small < 1e-18


def test_bfloat16_is_rounded_once():
    """Updates keep their dtype, whatever that of the params is."""
    penalties = (
        jp.training.l1(0.3),
        jp.training.group_lasso(0.3),
        growing(jp.Method(distribution=jp.NM(1, 2)), None, rise=0.3),
    )
    every_update = jax.jit(lambda updates, params: [tx.update(updates, tx.init(params), params)[0] for tx in penalties])
    full = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float32))
    for dtype, grads in (("bfloat16", "bfloat16"), ("float32", "bfloat16")):
        params, updates = draw(0, dtype, shapes=SMALL), draw(1, grads, shapes=SMALL)
        for found, exact in zip(every_update(updates, params), every_update(full(updates), full(params)), strict=True):
            assert same_bits(found, jax.tree.map(lambda leaf, u: leaf.astype(u.dtype), exact, updates))
            assert not same_bits(found, updates)


@pytest.mark.parametrize("make", [jp.training.l1, functools.partial(jp.training.group_lasso, layout=LAYOUT)])
def test_a_strength_may_be_a_schedule(make):
    params, updates, strengths = draw(0), draw(1), [0.0, 0.25, 0.5]
    tx = make(optax.linear_schedule(0.0, 0.5, 2))
    state = tx.init(params)
    update, slope = jax.jit(tx.update), updated(make(1.0), jax.tree.map(jnp.zeros_like, updates), params)[0]["kernel"]
    for i, strength in enumerate(strengths):
        assert int(state.penalty_step) == i
        found, state = update(updates, state, params)
        np.testing.assert_allclose(found["kernel"], updates["kernel"] + strength * slope, rtol=1e-5, atol=1e-6)


# ---- the growing penalty


def growing(method=jp.Method(layout=LAYOUT), sparsity=0.4, rise=0.1, every=2, ceiling=0.25, **rest):  # noqa: B008
    return jp.training.growing_penalty(method, sparsity, rise=rise, every=every, ceiling=ceiling, **rest)


def test_the_penalty_grows_on_what_is_to_go_and_on_nothing_else():
    params, tx = draw(0), growing()
    state, updates, traces = tx.init(params), draw(1), []
    assert not any(np.any(leaf) for leaf in state.unwanted.values())
    masks = jax.jit(lambda params: jp.compute_masks(jp.Method(layout=LAYOUT), params, 0.4))(params)
    assert int(sum(np.sum(~np.asarray(mask)) for mask in masks.values())) == round(0.4 * (48 + 24 + 16))

    @jax.jit
    def step(updates, state, params):
        traces.append(1)
        return tx.update(updates, state, params)

    for t in range(6):
        found, state = step(updates, state, params)
        strength = min(0.25, 0.1 * (t // 2 + 1))
        for name in SHAPES:
            gone, w, u = ~np.asarray(masks[name]), np.asarray(params[name], np.float64), np.asarray(updates[name])
            np.testing.assert_array_equal(state.unwanted[name], gone)
            np.testing.assert_allclose(np.asarray(found[name])[gone], (u + strength * w)[gone], rtol=1e-6, atol=1e-6)
            assert np.asarray(found[name])[~gone].tobytes() == u[~gone].tobytes()
        params = draw(t + 2)  # other weights are the smallest now
    assert len(traces) == 1
    assert int(state.penalty_step) == 6


def by_value(params, /, *, value, **_):
    return {name: jnp.abs(leaf - value) for name, leaf in params.items()}


EVIDENCE = {
    "gradients": (jp.taylor, {}, {}),
    "random": (jp.criteria.random, {"key": jax.random.key(3)}, {}),
    "running": (jp.movement, {}, {}),
    "any": (by_value, {}, {"value": jnp.float32(0.5)}),
}


@pytest.mark.parametrize("kind", EVIDENCE)
def test_the_criterion_is_handed_what_prune_hands_it(kind):
    """What it chooses is what `prune` would remove at its first step."""
    criterion, key, extra = EVIDENCE[kind]
    method, params, updates = jp.Method(criterion), draw(0, shapes=SMALL), draw(1, shapes=SMALL)

    @jax.jit
    def run(updates, params, extra):
        pruner = jp.prune(optax.sgd(0.1), method, sparsity=0.5, update_when=jp.schedules.at(0), **key)
        tx = growing(method, 0.5, **key)
        masks = pruner.update(updates, pruner.init(params), params, **extra)[1].masks
        return masks, tx.update(updates, tx.init(params), params, **extra)[1].unwanted

    masks, unwanted = run(updates, params, extra)
    assert same_bits(unwanted, jax.tree.map(jnp.logical_not, masks))
    assert not same_bits(masks, draw_masks())


def test_a_distribution_that_decides_itself_needs_no_sparsity():
    state = updated(growing(jp.Method(distribution=jp.NM(1, 4), select="kernel"), None), draw(1), draw(0))[1]
    assert np.asarray(state.unwanted["kernel"]).sum(0).tolist() == [3] * 6


# ---- under JAX and inside optax


def chained(penalty, inner=optax.adam):
    return optax.chain(penalty, inner(0.05))


def trained(tx, params, grads):
    def step(carry, grad):
        updates, state = tx.update(grad, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), grads)[0]


PENALTIES = {
    "l1": lambda: jp.training.l1(0.1),
    "scheduled": lambda: jp.training.l1(optax.linear_schedule(0.0, 0.1, 3)),
    "group_lasso": lambda: jp.training.group_lasso(0.1, layout=LAYOUT),
    "growing": growing,
}


@pytest.mark.parametrize("name", PENALTIES)
def test_scan_donation_and_eager_steps_agree(name, relaxed):
    tx = chained(PENALTIES[name](), optax.sgd)
    start, grads = draw(0, shapes=SMALL), draw(1, lead=(3,), shapes=SMALL)
    whole = jax.jit(functools.partial(trained, tx))(start, grads)

    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    for one in (step, jax.jit(step, donate_argnums=(0, 1))):
        carry = jax.tree.map(jnp.copy, start), tx.init(start)
        for i in range(3):
            carry = one(*carry, jax.tree.map(lambda leaf, i=i: leaf[i], grads))
        for a, b in zip(*map(jax.tree.leaves, (carry, whole)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(start))


LABELS = {"kernel": "drawn", "bias": "free"}
NESTINGS = {
    "inside prune": lambda p: jp.prune(chained(p), jp.Method(), sparsity=0.5, update_when=jp.schedules.at(2)),
    "before keep": lambda p: optax.chain(chained(p), jp.keep_params_sparse(draw_masks())),
    "multi steps": lambda p: optax.MultiSteps(chained(p), every_k_schedule=3).gradient_transformation(),
    "partition": lambda p: optax.partition({"drawn": chained(p), "free": optax.sgd(0.1)}, LABELS),
    "masked": lambda p: optax.masked(chained(p), {"kernel": True, "bias": False}),
}


@functools.cache
def draw_masks():
    return jax.jit(lambda params: jp.compute_masks(jp.Method(), params, 0.5))(draw(0, shapes=SMALL))


@pytest.mark.parametrize("nesting", NESTINGS)
def test_the_choice_is_found_in_every_nesting(nesting, relaxed):
    """And what others have in their states is found as without it; optax knows it for what is placed like params."""
    tx, params = NESTINGS[nesting](growing()), draw(0, shapes=SMALL)
    params, state = jax.jit(functools.partial(trained, tx))(params, draw(1, lead=(4,), shapes=SMALL))
    assert int(np.sum(optax.tree.get(state, "unwanted")["kernel"])) == round(0.4 * 24)
    assert int(optax.tree.get(state, "penalty_step")) == (1 if nesting == "multi steps" else 4)
    if nesting in ("inside prune", "before keep"):
        dead = ~np.asarray(optax.tree.get(state, "masks")["kernel"])
        assert dead.sum() == 12
        assert not np.asarray(params["kernel"]).view(np.uint32)[dead].any()
    if nesting == "inside prune":
        assert int(optax.tree.get(state, "step")) == 4
    marked = optax.tree.map_params(tx, lambda leaf: "param", state, transform_non_params=lambda leaf: "other")
    assert set(jax.tree.leaves(optax.tree.get(marked, "unwanted"))) == {"param"}
    assert optax.tree.get(marked, "penalty_step") == "other"


@pytest.mark.parametrize("make", [jp.training.l1, jp.training.group_lasso])
def test_a_strength_may_be_injected(make, relaxed):
    tx = optax.inject_hyperparams(make, static_args="select")(strength=0.3)
    params, updates = draw(0, shapes=SMALL), draw(1, shapes=SMALL)
    found, state = updated(tx, updates, params)
    assert float(state.hyperparams["strength"]) == pytest.approx(0.3)
    state.hyperparams["strength"] = jnp.float32(0.6)  # moved from outside, nothing is compiled anew
    twice, _ = tx.update(updates, state, params)
    first, second = (np.asarray(tree["kernel"] - updates["kernel"]) for tree in (found, twice))
    np.testing.assert_allclose(second, 2 * first, rtol=1e-4)
    assert np.abs(first).max() > 0.29


@pytest.mark.parametrize("name", PENALTIES)
def test_eight_devices_train_what_one_does(name, relaxed):
    shapes = {"bias": (8,), "kernel": (16, 24)}
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    places = {"bias": NamedSharding(mesh, P("x")), "kernel": NamedSharding(mesh, P("x", "y"))}
    penalty = jp.training.group_lasso(0.1) if name == "group_lasso" else PENALTIES[name]()
    tx = optax.chain(penalty, optax.sgd(0.1, momentum=0.9))

    def after(place):
        params = place(draw(0, shapes=shapes))
        state = tx.init(params)
        if name == "growing":
            assert state[0].unwanted["kernel"].sharding.is_equivalent_to(params["kernel"].sharding, 2)
        step = jax.jit(lambda params, state, grad: (lambda u, s: (optax.apply_updates(params, u), s))(
            *tx.update(grad, state, params)))  # fmt: skip
        for i in range(3):
            params, state = step(params, state, place(draw(i + 1, shapes=shapes)))
        return params, state

    assert same_bits(after(lambda tree: tree), after(lambda tree: jax.device_put(tree, places)))


# ---- what they are for


def regression(tx, steps=200):
    """Two inputs of eight carry the signal, and all of the last two outputs is noise: weights after training, state."""
    rng = np.random.default_rng(0)
    truth = np.zeros((8, 6))
    truth[:2, :4] = rng.choice([-1, 1], (2, 4)) * rng.uniform(1, 2, (2, 4))
    x = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    y = jnp.asarray(np.asarray(x) @ truth + 0.2 * rng.normal(size=(64, 6)), jnp.float32)
    start = {"w": jnp.asarray(0.5 * rng.normal(size=(8, 6)), jnp.float32)}

    def loss(params):
        return 0.5 * jnp.mean(jnp.sum(jnp.square(x @ params["w"] - y), -1))

    def step(carry, _):
        updates, state = tx.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    (params, state), _ = jax.jit(lambda start: jax.lax.scan(step, (start, tx.init(start)), None, steps))(start)
    return params, state, loss


def test_group_lasso_brings_whole_groups_near_zero():
    """Inputs without a signal, all their weights, and no others; without the penalty, they keep fitting noise."""
    decay = optax.exponential_decay(0.2, 200, 1e-3)
    drawn = np.abs(regression(optax.chain(jp.training.group_lasso(0.1, Input()), optax.sgd(decay)))[0]["w"])
    free = np.abs(regression(optax.sgd(decay))[0]["w"])
    assert drawn[2:].max() < 1e-3
    assert free[2:].max(1).min() > 1e-2
    assert drawn[:2, :4].min() > 0.5
    method = jp.Method(jp.criteria.squared_magnitude, Input())
    masks = jp.compute_masks(method, {"w": jnp.asarray(drawn)}, 0.75)
    assert np.asarray(masks["w"]).all(1).tolist() == [True] * 2 + [False] * 6


def test_l1_brings_weights_near_zero_one_by_one():
    decay = optax.exponential_decay(0.2, 200, 1e-3)
    drawn = np.abs(regression(optax.chain(jp.training.l1(0.1), optax.sgd(decay)))[0]["w"])
    assert (drawn < 1e-3).sum() >= 36
    assert drawn[:2, :4].min() > 0.5


def test_what_grew_small_is_cut_without_a_loss():
    """Weights that the task wants: cut at once they are missed, drawn to zero the others have taken their place."""
    method = jp.Method(jp.criteria.random)  # a bad choice on purpose, the same for both
    tx = chained(
        jp.training.growing_penalty(method, 0.3, rise=0.5, every=10, ceiling=9.0, key=jax.random.key(1)), optax.sgd
    )
    params, state, loss = regression(tx)
    unwanted = np.asarray(optax.tree.get(state, "unwanted")["w"])
    free, _, _ = regression(optax.sgd(0.05))
    assert unwanted[:2, :4].any()
    small, large = (np.abs(np.asarray(tree["w"]))[unwanted].max() for tree in (params, free))
    assert small < large / 5
    masks = jax.tree.map(jnp.logical_not, optax.tree.get(state, "unwanted"))
    missed = float(loss(jp.apply_masks(params, masks)) - loss(params))
    missed_at_once = float(loss(jp.apply_masks(free, masks)) - loss(free))
    assert missed < missed_at_once / 5


# ---- refusals


@pytest.mark.parametrize("make", [jp.training.l1, jp.training.group_lasso])
@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_a_strength_is_a_number_from_zero_on(make, strength):
    with pytest.raises(ValueError, match=f"`{make.__name__}` needs a finite `strength` >= 0, got {strength:g}"):
        make(strength)


def test_a_schedule_s_strength_is_looked_at_where_it_is_known():
    tx = jp.training.l1(lambda step: -1.0)
    with pytest.raises(ValueError, match="`l1` needs a finite `strength` >= 0, got -1"):
        tx.update(draw(1), tx.init(draw(0)), draw(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rise": 0.0}, "`growing_penalty` needs a finite `rise` > 0, got 0"),
        ({"rise": float("nan")}, "needs a finite `rise` > 0, got nan"),
        ({"ceiling": -1.0}, "needs a finite `ceiling` > 0, got -1"),
        ({"every": 0}, "`growing_penalty` needs `every` >= 1 updates, got 0"),
        ({"sparsity": 90}, r"Did you mean 0\.9"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        growing(**change)


def test_one_number_is_asked_for(unchecked):
    with pytest.raises(ValueError, match=r"`l1` needs one number as its `strength`, got an array of shape \(2,\)"):
        jp.training.l1(jnp.ones(2))


def test_groups_across_leaves_are_refused(unchecked):
    params = draw(0, shapes={"kernel": (4, 6)})
    channels = jp.Channels(jp.couplings(lambda p, x: x @ p["kernel"], params, jnp.ones((1, 4))))
    with pytest.raises(
        TypeError, match=r"`group_lasso` needs groups within one leaf, such as `Output\(\)`; got Channels"
    ):
        jp.training.group_lasso(0.1, channels)


@pytest.mark.parametrize("name", PENALTIES)
def test_missing_params_are_asked_for(name):
    tx, called = PENALTIES[name](), {"scheduled": "l1", "growing": "growing_penalty"}.get(name, name)
    with pytest.raises(ValueError, match=rf"`{called}` needs the params: call `tx.update\(grads, opt_state, params\)`"):
        tx.update(draw(1), tx.init(draw(0)))


@pytest.mark.parametrize("select", ["third/*", lambda name, leaf: False])
def test_nothing_selected_is_refused_before_training(select):
    for tx in (
        jp.training.l1(0.1, select),
        jp.training.group_lasso(0.1, select=select),
        growing(jp.Method(select=select)),
    ):
        with pytest.raises(ValueError, match="There are: 'bias', 'conv'"):
            tx.init(draw(0))


def test_what_is_no_array_or_does_not_divide_is_refused_before_training(unchecked):
    with pytest.raises(ValueError, match="Leaf 'kernel': 6 outputs do not divide into 4 heads"):
        jp.training.group_lasso(0.1, Head(4), select="kernel").init(draw(0))
    with pytest.raises(TypeError, match="'name' is a str, an array was expected"):
        jp.training.l1(0.1).init({**draw(0), "name": "mine"})
