"""What an optimizer inside one that prunes sees: masked params and functions; what it keeps of weights is masked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms_helpers import (
    METHOD,
    assert_exact_zeros,
    bits,
    gradients,
    make_model,
    make_step,
    make_tree,
    removed,
    same_bits,
    take,
    train,
)

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick", "relaxed")

RNG = np.random.default_rng(1)
DATA = {"x": jnp.float32(RNG.normal(size=(9, 8))), "y": jnp.float32(RNG.normal(size=(9, 5)))}
WEIGHT = {"w": jnp.float32(RNG.normal(size=(8, 5)))}
HALF = {"w": jnp.asarray(RNG.permutation(40).reshape(8, 5) < 20)}


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 2)


value_and_grad = jax.jit(jax.value_and_grad(loss))


def fixed_masks():
    """A third of the kernels' weights, without a program to compile."""

    def some(leaf):
        return jnp.asarray((np.arange(leaf.size).reshape(leaf.shape) % 14 > 4) | (leaf.ndim < 2))

    return jax.tree.map(some, make_model(0))


def everywhere(params, value):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params)


# ---- line searches

SEARCHES = {
    "lbfgs": lambda: optax.lbfgs(memory_size=2, linesearch=optax.scale_by_zoom_linesearch(6)),
    "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(8, store_grad=True)),
}
AROUND = {
    "prune": lambda inner: jp.prune(inner, METHOD, sparsity=jp.cubic(0.8, begin=0, end=6), update_when=jp.every(3)),
    "splice": lambda inner: jp.splice(inner, METHOD, sparsity=0.5, update_when=jp.every(3)),
    "regrow": lambda inner: jp.regrow(
        inner, METHOD, sparsity=0.5, key=jax.random.key(0), update_when=jp.every(3, begin=3)
    ),
    "fixed": lambda inner: jp.prune(inner, METHOD, masks=HALF, update_when=False),
}


@pytest.mark.parametrize(
    ("around", "search"),
    [("prune", "lbfgs"), ("fixed", "backtracking"), ("regrow", "backtracking"), ("splice", "backtracking")],
)
def test_value_and_gradient_of_a_line_search_are_those_of_the_params(around, search):
    tx = AROUND[around](SEARCHES[search]())
    stored = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(params, state):
        value, grad = stored(params, state=state, **DATA)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss, **DATA)
        return optax.apply_updates(params, updates), state

    params = WEIGHT
    state, before = tx.init(params), np.inf
    for i in range(8):
        old = params, optax.tree.get(state, "masks")
        params, state = step(params, state)
        alive = optax.tree.get(state, "masks")["w"]
        value, grad = value_and_grad(params, **DATA)
        np.testing.assert_allclose(optax.tree.get(state, "value"), value, rtol=1e-5)
        true = grad["w"] if around == "splice" else jnp.where(alive, grad["w"], 0)
        np.testing.assert_allclose(optax.tree.get(state, "grad")["w"], true, atol=1e-5)
        assert not np.any(bits(params["w"])[~np.asarray(alive)])
        if around != "splice" and i % 3:  # between masks the loss of the pruned model falls
            assert value <= before
        if around == "regrow" and i == 6:  # the best gradients grow, though the search has forgotten them
            grads = value_and_grad(old[0], **DATA)[1]
            assert same_bits(alive, jp.training.regrow_masks(METHOD, jp.criteria.gradient, *old, 0.3, grads=grads)["w"])
        before = value
    assert np.sum(~np.asarray(alive)) == (32 if around == "prune" else 20)


def test_fixed_masks_after_a_line_search_are_refused():
    tx = optax.chain(optax.sgd(0.1), jp.keep_params_sparse(HALF))
    with pytest.raises(ValueError, match=r"`prune\(inner, method, masks=masks, update_when=False\)`"):
        tx.update(WEIGHT, tx.init(WEIGHT), WEIGHT, value=1.0, grad=WEIGHT, value_fn=loss, **DATA)


def test_functions_of_params_see_the_pruned_model():
    """Sophia's `obj_fn`, and the `grad_fn` of sharpness-aware minimization, wherever they are called."""
    seen = {}

    def update(updates, state, params=None, *, obj_fn, grad_fn):
        seen["params"] = params
        seen["slopes"] = jax.grad(obj_fn)(everywhere(params, 2.0))
        seen["grads"] = grad_fn(everywhere(params, 2.0), 0)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx, params = jp.prune(inner, METHOD, masks=fixed_masks(), update_when=False), make_model(0)

    def objective(params):
        seen["point"] = params
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))

    def gradient(params, i):
        return everywhere(params, 1.0)

    state = tx.update(make_tree(1), tx.init(params), params, obj_fn=objective, grad_fn=gradient)[1]
    assert same_bits(seen["params"], jp.apply_masks(params, state.masks))
    ones = jp.apply_masks(everywhere(params, 1.0), state.masks)
    assert same_bits(seen["slopes"], ones)
    assert same_bits(seen["grads"], ones)


# ---- averages of weights


@pytest.mark.parametrize(("dtype", "state_dtype"), [("float32", None), ("bfloat16", "float32"), ("bfloat16", None)])
def test_schedule_free_evaluates_the_pruned_model(dtype, state_dtype):
    """optax's own evaluation has the zeros of the masks, though its optimizer moves all weights (by noise)."""
    noisy = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1))
    inner, masks = optax.contrib.schedule_free(noisy, 0.1, state_dtype=state_dtype), fixed_masks()
    tx, params = jp.prune(inner, METHOD, masks=masks, update_when=False), make_model(0, dtype)
    state, step = tx.init(params), jax.jit(make_step(tx))
    for i in range(3):
        params, state = step(params, state, make_tree(i, dtype))
    averages = optax.contrib.schedule_free_eval_params(state.inner_state, params)
    assert_exact_zeros(averages, masks)
    assert not np.array_equal(averages["first"]["bias"], params["first"]["bias"])


def test_averages_have_the_zeros_of_masks_that_are_new():
    tx = jp.prune(
        optax.contrib.schedule_free_sgd(0.1), METHOD, sparsity=jp.cubic(0.9, begin=0, end=2), update_when=True
    )
    run = jax.jit(functools.partial(train, tx))
    history, states = run(make_model(0), gradients(3))
    averages = optax.contrib.schedule_free_eval_params(take(states, -1).inner_state, take(history, -1))
    assert removed(take(states, -1).masks) == 50
    assert_exact_zeros(averages, take(states, -1).masks)


@pytest.mark.parametrize("name", ["prune", "regrow", "splice"])
def test_both_copies_of_lookahead_have_the_zeros(name):
    options = {"sparsity": 0.5, "update_when": jp.every(2), "key": jax.random.key(0)}
    inner = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5, reset_state=True)
    tx, params = getattr(jp, name)(inner, METHOD, **options), optax.LookaheadParams.init_synced(WEIGHT)
    state, step = tx.init(params), jax.jit(make_step(tx))
    for i in range(3):
        params, state = step(params, state, {"w": WEIGHT["w"] * i})
        alive = np.asarray(state.masks["w"])
        assert np.sum(~alive) == 20
        for copy in params:
            assert not np.any(bits(copy["w"])[~alive])
    assert not np.array_equal(params.slow["w"], jnp.where(alive, WEIGHT["w"], 0))


def test_fixed_masks_are_for_both_copies_too():
    tx = optax.chain(optax.lookahead(optax.sgd(0.1), 2, 0.5), jp.keep_params_sparse(HALF))
    params = optax.LookaheadParams.init_synced(WEIGHT)
    params, _ = make_step(tx)(params, tx.init(params), WEIGHT)
    for copy in params:
        assert not np.any(bits(copy["w"])[~np.asarray(HALF["w"])])


def test_distances_are_those_of_the_pruned_model():
    """DoG's rate grows with the way from the start: what was cut has gone none."""
    tx = jp.prune(optax.contrib.dog(), METHOD, sparsity=0.9, update_when=jp.every(2))
    params, state, step = WEIGHT, tx.init(WEIGHT), jax.jit(make_step(tx))
    for _ in range(4):
        params, state = step(params, state, {"w": 1e-3 * WEIGHT["w"]})
    assert optax.tree.get(state, "max_dist") < 0.1 < optax.tree.norm(optax.tree.sub(params, WEIGHT))


def test_weights_in_a_state_are_zero_where_dead_and_the_rest_is_left_alone():
    """A point that is kept (Mechanic's start) loses its dead weights; step sizes, which begin at 0.1, do not."""
    inner = optax.chain(optax.scale_by_rprop(0.1), optax.contrib.mechanize(optax.sgd(0.1)))
    tx, alive = jp.prune(inner, METHOD, masks=HALF, update_when=False), np.asarray(HALF["w"])
    params, state = make_step(tx)(WEIGHT, tx.init(WEIGHT), WEIGHT)
    start, sizes = (np.asarray(optax.tree.get(state.inner_state, key)["w"]) for key in ("x0", "step_sizes"))
    assert np.array_equal(bits(start), bits(jnp.where(alive, WEIGHT["w"], 0)))
    assert np.all(sizes[~alive] > 0)
    assert not np.any(bits(params["w"])[~alive])


# ---- optax's wrappers around


@pytest.mark.parametrize("name", ["prune", "regrow", "splice"])
def test_hyperparameters_may_be_injected_into_any_argument(name):
    """Numbers and schedules arrive as arrays, also `update_when`; functions that are no schedules are static."""
    options = {
        "prune": {"sparsity": jp.cubic(0.8, begin=0, end=2), "key": jax.random.key(0)},
        "regrow": {"sparsity": 0.5, "key": jax.random.key(0), "drop_fraction": optax.linear_schedule(0.5, 0.0, 4)},
        "splice": {"sparsity": jp.cubic(0.8, begin=0, end=2), "margin": 0.1, "decay": 0.01},
    }[name] | {"update_when": jp.every(2)}
    make, found = getattr(jp, name), []
    injected = optax.inject_hyperparams(make, static_args=("grow",) if name == "regrow" else ())
    for factory in (make, injected):
        tx = factory(optax.sgd(0.1), METHOD, **options)
        params, state, step = WEIGHT, tx.init(WEIGHT), jax.jit(make_step(tx))
        for i in range(3):
            params, state = step(params, state, {"w": WEIGHT["w"] * i})
        found.append(np.asarray(optax.tree.get(state, "masks")["w"]))
        assert not np.any(bits(params["w"])[~found[-1]])
    assert np.array_equal(*found)


def test_narrow_gradients_inside_apply_if_finite_are_widened_first():
    """Its two branches must agree on a dtype, and no bfloat16 takes a float32 weight to zero."""
    grads = {"w": WEIGHT["w"].astype("bfloat16")}
    tx = optax.apply_if_finite(jp.prune(optax.sgd(0.1), METHOD, masks=HALF, update_when=False), 3)
    params, _ = make_step(tx)(WEIGHT, tx.init(WEIGHT), optax.tree.cast_like(grads, WEIGHT))
    assert not np.any(bits(params["w"])[~np.asarray(HALF["w"])])


# ---- models that are sparse already


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("method", "schedule"),
    [
        (METHOD, jp.cubic(0.9, begin=1, end=3)),
        (jp.Method(distribution=jp.Uniform()), jp.schedules.alternating(0.7, dense=1, sparse=1, begin=1, end=3)),
        (jp.Method(granularity=jp.Block(2, 1)), jp.schedules.one_shot(0.6, 1)),
        (jp.Method(distribution=jp.PerOutput()), 0.75),
    ],
)
def test_what_is_dead_at_the_beginning_stays_dead(packed, method, schedule):
    """Whatever the schedule begins with, and whichever weights the method would take."""
    params = jp.apply_masks(WEIGHT, HALF)
    tx = jp.prune(
        optax.adam(0.1), method, sparsity=schedule, update_when=True, masks=jp.nonzero_masks(params), packed=packed
    )
    state, step, counts = tx.init(params), jax.jit(make_step(tx), donate_argnums=(0, 1)), []
    for i in range(4):
        params, state = step(params, state, {"w": jnp.full((8, 5), 1.0 + i)})
        alive = np.asarray(jp.unpack_masks(state.masks, params)["w"] if packed else state.masks["w"])
        assert not np.any(alive & ~np.asarray(HALF["w"]))
        assert not np.any(bits(params["w"])[~alive])
        counts.append(np.sum(~alive))
    assert counts[-1] >= round(40 * float(schedule(3) if callable(schedule) else schedule))
    assert counts[0] == 20 or not callable(schedule)


@pytest.mark.parametrize(
    "schedule",
    [0.3, jp.cubic(0.45, begin=2, end=9), jp.schedules.one_shot(0.2, 4), jp.schedules.rounds(0.4, count=2, length=1)],
)
def test_a_schedule_below_the_sparsity_that_is_there_says_so(schedule):
    tx = jp.prune(optax.sgd(0.1), METHOD, sparsity=schedule, masks=HALF)
    with pytest.raises(ValueError, match=r"have 0\.5 of .* removed already, `sparsity` ends at 0\.[234]"):
        tx.init(WEIGHT)


@pytest.mark.parametrize("distribution", [jp.Global(), jp.PerOutput(), jp.NM(1, 2)])
def test_the_sparsity_that_is_there_is_not_below_itself(distribution):
    """Where runs are short, 40 % of them come to another share: the method's own masks are never refused."""
    method = jp.Method(distribution=distribution)
    sparsity = None if isinstance(distribution, jp.NM) else 0.4
    masks = jp.compute_masks(method, WEIGHT, sparsity)
    assert same_bits(jp.prune(optax.sgd(0.1), method, sparsity=sparsity, masks=masks).init(WEIGHT).masks, masks)
    with pytest.raises(ValueError, match=r"have shape \(8, 5\) at 'w', the params \(5, 8\)"):
        jp.prune(optax.sgd(0.1), method, sparsity=sparsity, masks=masks).init({"w": WEIGHT["w"].T})
