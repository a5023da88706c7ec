"""Couplings: which channels belong together, which must stay and why; and masks of whole channels."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compact_models import MODELS, couplings_of, make_input
from jax import lax
from quick import quick_jit
from trace_helpers import normal

import jaxprune as jp
from jaxprune.channels.union_find import Units

pytestmark = pytest.mark.usefixtures("quick")


# model -> channels of each layer, and the axes (leaf:axis, sorted) that the first layer's channels have.
LAYERS = {
    "mlp": ([12, 10], "0/bias:0 0/kernel:1 1/kernel:0"),
    "flattened": ([8, 6], "a/bias:0 a/kernel:3 b/kernel:0 n/bias:0 n/mean:0 n/scale:0 n/var:0"),
    "residual": ([6, 8], "a/bias:0 a/kernel:3 b/kernel:2"),
    "padded_shortcut": ([8, 4, 4], "a/bias:0 a/kernel:3 b/kernel:2"),
    "concatenated": ([6, 4, 6], "a/bias:0 a/kernel:3 b/kernel:2 c/kernel:2"),
    "gated": ([8], "down/kernel:0 up/bias:0 up/kernel:1"),
    "depthwise": (
        [6, 8],
        "a/bias:0 a/kernel:3 b/kernel:2 d/bias:0 d/kernel:3 n/bias:0 n/mean:0 n/scale:0 n/var:0",
    ),
    "grouped": ([4], "a/bias:0 a/kernel:3 fc/kernel:0 g/bias:0 g/kernel:3"),
    "group_norm": ([4], "a/bias:0 a/kernel:3 fc/kernel:0 n/bias:0 n/scale:0"),
    "channels_first": ([8, 6], "a:0 b:1"),
    "transposed_convolution": ([8, 6], "down/bias:0 down/kernel:3 up:2"),
    "attention_by_reshape": ([10, 4], "down/kernel:0 up/bias:0 up/kernel:1"),
    "grouped_query_attention": ([8, 2, 2], "down:0 gate:1 up:1"),
    "stacked_layers": ([10], "down:1 up:2 up_bias:1"),
    "branches_and_loops": ([7], "a/bias:0 a/kernel:1 b/bias:0 b/kernel:0 b/kernel:1 c/kernel:0"),
    "folded_constants": ([12, 10], "a/bias:0 a/kernel:1 b/kernel:0"),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_and_what_belongs_to_them(name):
    found = couplings_of(name)
    sizes, members = LAYERS[name]
    assert [len(layer) for layer in found.layers] == sizes
    assert " ".join(sorted(f"{leaf}:{axis}" for leaf, axis in found.members[found.layers[0][0]])) == members
    assert found.barriers == ()
    assert found.count == sum(sizes)


def test_heads_that_share_keys_go_together():
    found = couplings_of("grouped_query_attention")
    q, k, o = (found.channels[name] for name in ("q", "k", "o"))
    assert q[1].tolist() == o[0].tolist() == np.repeat(k[1], 2).tolist()
    assert (q[2] == -1).all()  # scores are scaled by the size of a head
    assert found.reasons["q", 2].startswith("two activations are multiplied along it")


def test_a_channel_becomes_a_run_of_inputs():
    found = couplings_of("flattened")
    assert found.channels["b/kernel"][0].tolist() == np.tile(found.channels["a/kernel"][3], 9).tolist()


def test_fused_projections_are_told_apart():
    qkv = couplings_of("attention_by_reshape").channels["qkv/kernel"][1].reshape(3, 4, 3)
    assert (qkv == qkv[:1, :, :1]).all()  # a head's queries, keys and values, three each
    assert len(np.unique(qkv)) == 4


STAYS = {
    "an output": (lambda w, x: x @ w, "w", 1, "it is an output of the function"),
    "an input": (lambda w, x: x @ w, "w", 0, "it is an input of the function"),
    "a mean": (lambda w, x: jnp.mean(x @ w, -1), "w", 1, "reduce_sum over channels"),
    "a softmax": (lambda w, x: jnp.mean(jax.nn.softmax(x @ w), (0, 1)), "w", 1, "reduce_max over channels"),
    "sorted": (lambda w, x: jnp.sum(jnp.sort(x @ w)[:, :1]), "w", 1, "sort along channels"),
    "a row looked up": (lambda w, x: w[jnp.argmax(x, -1)] @ jnp.ones((4, 1)), "w", 0, "gather takes some"),
    "unknown": (lambda w, x: jnp.sum(lax.top_k(x @ w, 1)[0]), "w", 1, "top_k cannot be followed"),
    "one channel": (lambda w, x: (x @ w[:, :1]) @ w[:1], "w", 1, "it is"),
    "random numbers": (
        lambda w, x: jnp.sum((x @ w * jax.random.normal(jax.random.key(0), (5, 4))) @ jnp.ones((4, 1))),
        "w",
        1,
        "mul with an array whose channels must stay",
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_must_stay_says_why(case):
    fn, leaf, axis, why = STAYS[case]
    found = jp.couplings(lambda params, x: fn(params["w"], x), {"w": normal(6, 4)}, normal(5, 6))
    assert (found.channels[leaf][axis] == -1).any()
    assert found.reasons[leaf, axis].startswith(why)


def test_unknown_operations_are_barriers_with_their_place():
    def fn(params, x):
        y = lax.top_k(x @ params["w"], 3)[0]
        return y @ params["v"]

    found = jp.couplings(fn, {"w": normal(6, 4), "v": normal(3, 2)}, normal(5, 6))
    assert len(found.barriers) == 1
    assert found.barriers[0].startswith("top_k at")
    assert "test_couplings.py" in found.barriers[0]


def test_shapes_are_enough(unchecked):
    params, fn, shape = MODELS["residual"]()
    shapes = jax.eval_shape(lambda: (params, make_input(shape)))
    found, want = jp.couplings(fn, *shapes), couplings_of("residual")
    assert found.members == want.members


@hypothesis.given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1), max_size=8), st.data()
)
def test_units_are_united_as_one_by_one(batches, data):
    fixed = data.draw(st.lists(st.integers(0, 9), max_size=2))
    units = Units()
    ids = units.fresh(10)
    sets = [{i} for i in range(10)]  # the oracle
    units.fix(ids[fixed], "first")
    for batch in batches:
        a, b = (np.asarray(part) for part in zip(*batch, strict=True))
        units.unite(ids[a], ids[b], "then")
        for i, j in batch:
            whole = sets[i] | sets[j]
            for k in whole:
                sets[k] = whole
    roots = units.roots(ids)
    assert [[bool(roots[i] == roots[j]) for j in range(10)] for i in range(10)] == [
        [j in sets[i] for j in range(10)] for i in range(10)
    ]
    assert units.fixed(ids).tolist() == [bool(sets[i] & set(fixed)) for i in range(10)]


# Alike: what may change places.


def unlike(p, x):
    """Two halves of one layer whose channels have the same axes."""
    left, right = jnp.split(x @ p["a"], 2, -1)
    return jnp.concatenate([jax.nn.relu(left), jnp.tanh(right)], -1) @ p["b"]


# name -> (function of a (6, 8) and b (8 or 16, 2), rows of b, channels that are alike)
ALIKE = {
    "all of a layer": (lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], 8, [range(8)]),
    "halves": (unlike, 8, [range(4), range(4, 8)]),
    "counted": (lambda p, x: (x @ p["a"] * jnp.arange(8.0)[None]) @ p["b"], 8, [[i] for i in range(8)]),
    "a constant": (
        lambda p, x: (x @ p["a"] * np.float32([[1, 2, 1, 2, 1, 2, 3, 3]])) @ p["b"],
        8,
        [(0, 2, 4), (1, 3, 5), (6, 7)],
    ),
    "an array": (lambda p, x: (x @ p["a"] + jnp.float32([[0] * 4 + [1] * 4])) @ p["b"], 8, [range(4), range(4, 8)]),
    "ones": (lambda p, x: (x @ p["a"] + jnp.ones((1, 8))) @ p["b"], 8, [range(8)]),
    "there and back": (
        lambda p, x: jnp.concatenate([x @ p["a"], (x @ p["a"])[:, ::-1]], -1) @ p["b"],
        16,
        [range(8)],
    ),
    "once and twice": (
        lambda p, x: jnp.concatenate([x @ p["a"], (x @ p["a"])[:, :4], (x @ p["a"])[:, :4]], -1) @ p["b"],
        16,
        [range(4), range(4, 8)],
    ),
    "mirrored": (lambda p, x: (x @ p["a"] + (x @ p["a"])[:, ::-1]) @ p["b"], 8, [range(4)]),
    "each beside itself": (
        lambda p, x: jnp.stack([x @ p["a"], x @ p["a"]], -1).reshape(5, 16) @ p["b"],
        16,
        [range(8)],
    ),
    "some the other way round": (
        lambda p, x: (
            jnp.concatenate([(h := x @ p["a"])[:, :4], jnp.tanh(h[:, :4]), jnp.tanh(h[:, 4:]), h[:, 4:]], -1) @ p["b"]
        ),
        16,
        [range(4), range(4, 8)],
    ),
    "padded": (
        lambda p, x: jnp.pad(x @ p["a"], ((0, 0), (4, 4))) @ p["b"],
        16,
        [range(8), range(8, 12), range(12, 16)],
    ),
}


@pytest.mark.parametrize("case", ALIKE)
def test_channels_alike_may_change_places(case):
    fn, rows, want = ALIKE[case]
    params = {"a": normal(6, 8), "b": normal(rows, 2)}
    found = jp.couplings(fn, params, normal(5, 6))
    kinds = [np.flatnonzero(found.alike == kind).tolist() for kind in np.unique(found.alike)]
    assert sorted(kinds) == sorted(map(list, want))
    shuffled_computes_the_same(fn, params, normal(5, 6))


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same_with_channels_alike_shuffled(name):
    params, fn, shape = MODELS[name]()
    shuffled_computes_the_same(fn, params, make_input(shape))


def shuffled_computes_the_same(fn, params, x, seed=0):
    """Whatever the order within each kind of channels alike, the function is the same."""
    found, rng = jp.couplings(fn, params, x), np.random.default_rng(seed)
    source = np.arange(found.count)
    for kind in np.unique(found.alike):
        of_kind = np.flatnonzero(found.alike == kind)
        source[of_kind] = rng.permutation(of_kind)
    layers = jp.Channels(found).layers
    orders = {name: np.searchsorted(layer, source[list(layer)]) for name, layer in layers.items()}
    got, want = quick_jit(lambda *both: [fn(params, x) for params in both])(
        params, jp.channels.reorder(params, found, orders)
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# Masks.


@pytest.mark.parametrize("distribution", [jp.Uniform(), jp.Global()])
def test_channels_of_the_least_mean_magnitude_go(distribution):
    params, fn, shape = MODELS["mlp"]()
    found = jp.couplings(fn, params, make_input(shape))
    method = jp.Method(granularity=jp.Channels(found), distribution=distribution)
    masks = jax.jit(lambda params: jp.compute_masks(method, params, 0.5))(params)
    scores = []
    for layer, after in ((0, 1), (1, 2)):  # columns of one matrix, and rows of the next: biases are not selected
        columns, rows = (np.abs(np.asarray(params[i]["kernel"], np.float64)) for i in (layer, after))
        scores.append((columns.sum(0) + rows.sum(1)) / (len(columns) + rows.shape[1]))
    everything = np.sort(np.concatenate(scores))
    for layer in (0, 1):
        threshold = np.sort(scores[layer])[len(scores[layer]) // 2] if distribution == jp.Uniform() else everything[11]
        want = scores[layer] >= threshold
        np.testing.assert_array_equal(masks[layer]["bias"], want)
        before = masks[layer - 1]["bias"] if layer else jnp.ones(6, bool)
        np.testing.assert_array_equal(masks[layer]["kernel"], np.outer(before, want))


def test_layers_along_one_axis_are_told_apart():
    def fn(p, x):
        left, right = jnp.split(x @ p["a"], 2, -1)
        return jax.nn.relu(left) @ p["b"] + jnp.tanh(right) @ p["c"]

    params = {"a": normal(6, 8), "b": normal(4, 2), "c": normal(4, 2)}
    channels = jp.Channels(jp.couplings(fn, params, normal(5, 6)))
    assert channels.layers == {"a:1": (0, 1, 2, 3), "a:1.1": (4, 5, 6, 7)}
    masks = jp.compute_masks(jp.Method(granularity=channels, distribution=jp.Uniform()), params, 0.5)
    alive = np.asarray(masks["a"])[0]
    assert alive[:4].sum() == alive[4:].sum() == 2


@pytest.mark.parametrize(("granularity", "wide"), [("channels", False), ("channels", True), (jp.Output(), True)])
def test_masks_with_float64_switched_on_are_those_without(granularity, wide, relaxed):
    """Scores are float32 in either case, of float64 weights too."""
    params, fn, shape = MODELS["mlp"]()
    found = granularity if granularity != "channels" else jp.Channels(jp.couplings(fn, params, make_input(shape)))
    method = jp.Method(granularity=found)
    want = jp.compute_masks(method, params, 0.5)
    with jax.enable_x64(True):
        numbers = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params) if wide else params
        got = jp.compute_masks(method, numbers, 0.5)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_channels_of_another_model_are_refused():
    params, _, _ = MODELS["mlp"]()
    method = jp.Method(granularity=jp.Channels(couplings_of("gated")))
    with pytest.raises(ValueError, match="those of another model: leaf 'down/bias'"):
        jp.compute_masks(method, params, 0.5)


def test_channels_prune_while_training(relaxed):
    import optax

    params, fn, shape = MODELS["residual"]()
    x = make_input(shape)
    method = jp.Method(granularity=jp.Channels(jp.couplings(fn, params, x)), distribution=jp.Uniform())
    optimizer = jp.prune(optax.adam(1e-2), method, sparsity=jp.schedules.constant(0.5), update_when=jp.schedules.at(1))

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: jnp.sum(fn(params, x) ** 2))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(4):
        params, state = step(params, state)
    small = jp.compact(fn, params, jp.nonzero_masks(params), x)
    assert small.params["a"]["kernel"].shape == (3, 3, 4, 3)
    got, want = quick_jit(lambda smaller, params: (small.apply(smaller, x), fn(params, x)))(small.params, params)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
