"""Compaction: what is left computes what the masked model computed, and nothing is left that need not be."""

import json

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compact_models import MODELS, Draw, dense, make_input
from flax import linen, nnx
from random_nets import STEPS, random_net

import jaxprune as jp
from jaxprune import tree

INSISTS = {"padded_shortcut", "grouped", "group_norm", "attention_by_reshape"}


def halved(fn, params, *args, sparsity=0.5):
    """Masks without the first half of the channels of every layer, in an order drawn at random."""
    found, rng = jp.couplings(fn, params, *args), np.random.default_rng(0)
    dead = [channel for layer in found.layers for channel in rng.permutation(layer)[: round(sparsity * len(layer))]]

    def mask(name, leaf):
        alive = np.ones(leaf.shape, bool)
        for axis, ids in enumerate(found.channels[name]):
            np.moveaxis(alive, axis, 0)[np.isin(ids, dead)] = False
        return jnp.asarray(alive)

    return tree.map_named(mask, params)


def kernels_alone(masks):
    """The same masks, biases and normalisations kept."""
    return tree.map_named(lambda name, mask: mask if mask.ndim > 1 else jnp.ones_like(mask), masks)


def at_random(params, sparsity=0.9, seed=3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape) >= sparsity), params)


def all_equal_the_masked_model(fn, params, masks, x, *calls):
    """(function, params) pairs give what the masked model gives; one program for all, which compiles faster."""

    @jax.jit
    def run(params, masks, others):
        return fn(jp.apply_masks(params, masks), x), [call(p, x) for (call, _), p in zip(calls, others, strict=True)]

    want, got = run(params, masks, [other for _, other in calls])
    for each in got:
        close(each, want)


def weights(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_channels(name):
    params, fn, shape = MODELS[name]()
    x = make_input(shape)
    masks = halved(fn, params, x)
    small = jp.compact(fn, params, masks, x)
    dead = sum(int((~mask).sum()) for mask in jax.tree.leaves(masks))
    assert weights(small.params) == weights(params) - dead  # all of them, and nothing else
    assert bool(small.insists) == (name in INSISTS), small.insists
    calls = [(small.apply, small.params), (fn, jp.expand(small.params, small.removed)), (fn, small.params)]
    all_equal_the_masked_model(fn, params, masks, x, *(calls[:2] if name in INSISTS else calls))


@pytest.mark.parametrize(
    ("name", "of"),
    [(name, "kernels alone") for name in MODELS]
    + [pytest.param(name, "at random", marks=pytest.mark.slow) for name in MODELS],
)
def test_masks_from_anywhere(name, of):
    params, fn, shape = MODELS[name]()
    x = make_input(shape)
    masks = kernels_alone(halved(fn, params, x)) if of == "kernels alone" else at_random(params, 0.6)
    small = jp.compact(fn, params, masks, x)
    all_equal_the_masked_model(fn, params, masks, x, (small.apply, small.params))


def test_constants_go_into_the_next_bias():
    params, fn, shape = MODELS["folded_constants"]()
    x = make_input(shape)
    masks = jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), params)
    for name, dead in (("a", [0, 5]), ("b", [1, 2, 9])):  # sigmoid(bias) goes on to a mean, sigmoid(norm) to a bias
        masks[name]["kernel"] = masks[name]["kernel"].at[:, jnp.asarray(dead)].set(False)
    small = jp.compact(fn, params, masks, x)
    assert small.params["b"]["kernel"].shape == (10, 7)
    assert small.params["c"]["kernel"].shape == (7, 4)
    assert small.insists == ""
    assert not np.array_equal(small.params["c"]["bias"], params["c"]["bias"])
    expanded = jp.expand(small.params, small.removed)
    all_equal_the_masked_model(fn, params, masks, x, (fn, small.params), (fn, expanded))


def test_what_nobody_reads_goes_to_a_fixed_point():
    params, fn, shape = MODELS["mlp"]()
    x = make_input(shape)
    masks = jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), params)
    masks[2]["kernel"] = masks[2]["kernel"].at[3:].set(False)  # seven units of the second layer are not read,
    masks[1]["kernel"] = masks[1]["kernel"].at[:4, :3].set(False)  # so four of the first are not either
    small = jp.compact(fn, params, masks, x)
    assert [layer["kernel"].shape for layer in small.params] == [(6, 8), (8, 3), (3, 4)]
    assert small.removed["0/kernel"] == ((), (0, 1, 2, 3))
    all_equal_the_masked_model(fn, params, masks, x, (fn, small.params))


def test_units_are_rounded_up():
    params, fn, shape = MODELS["mlp"]()
    x = make_input(shape)
    masks = halved(fn, params, x, sparsity=0.6)
    small = jp.compact(fn, params, masks, x, round_to=8)
    assert [layer["kernel"].shape for layer in small.params] == [(6, 8), (8, 8), (8, 4)]
    all_equal_the_masked_model(fn, params, masks, x, (fn, small.params))


def test_smaller_params_have_gradients_and_other_batches():
    params, fn, shape = MODELS["attention_by_reshape"]()
    x = make_input(shape)
    masks = halved(fn, params, x)
    small = jp.compact(fn, params, masks, x)
    more = jnp.concatenate([x, x[:, ::-1], x])
    all_equal_the_masked_model(fn, params, masks, more, (small.apply, small.params))
    got = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(small.apply(p, more)))))(small.params)
    want = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(fn(p, more)))))(jp.apply_masks(params, masks))
    expanded = jp.expand(got, small.removed)
    kept = jp.expand(jax.tree.map(jnp.ones_like, got), small.removed)
    jax.tree.map(lambda a, b, k: np.testing.assert_allclose(a, b * k, rtol=1e-3, atol=1e-4), expanded, want, kept)


# Frameworks.


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.BatchNorm(use_running_average=True)(linen.Conv(8, (3, 3))(x)))
        x = x + linen.Conv(8, (3, 3))(linen.relu(linen.Conv(12, (1, 1))(x)))
        x = linen.max_pool(linen.relu(x), (2, 2), (2, 2))
        return linen.Dense(3)(linen.relu(linen.Dense(10)(x.reshape(x.shape[0], -1))))


class LinenAttention(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = x + linen.MultiHeadDotProductAttention(4, qkv_features=16)(linen.LayerNorm()(x))
        return linen.Dense(4)(linen.gelu(linen.Dense(12)(linen.LayerNorm()(x))))


class EquinoxNet(eqx.Module):
    convs: list
    norm: eqx.nn.GroupNorm
    dense: list

    def __init__(self, key):
        a, b, c, d = jax.random.split(key, 4)
        self.convs = [eqx.nn.Conv2d(2, 6, 3, padding=1, key=a), eqx.nn.Conv2d(6, 8, 3, padding=1, key=b)]
        self.norm = eqx.nn.GroupNorm(4, 8)
        self.dense = [eqx.nn.Linear(8 * 16, 10, key=c), eqx.nn.Linear(10, 3, key=d)]

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.convs[1](jax.nn.relu(self.convs[0](x)))))
        return self.dense[1](jax.nn.relu(self.dense[0](x.reshape(-1))))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(2, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.fc = nnx.List([nnx.Linear(8, 10, rngs=rngs), nnx.Linear(10, 3, rngs=rngs)])

    def __call__(self, x):
        x = jnp.mean(nnx.relu(self.norm(self.conv(x))), (1, 2))
        return self.fc[1](nnx.relu(self.fc[0](x)))


def linen_model(module, shape):
    x = make_input(shape)
    return jax.jit(module.init)(jax.random.key(0), x), module.apply, x


def equinox_model():
    arrays, rest = eqx.partition(eqx.filter_jit(EquinoxNet)(jax.random.key(0)), eqx.is_array)
    return arrays, lambda params, x: jax.vmap(eqx.combine(params, rest))(x), make_input((3, 2, 4, 4))


def nnx_model():
    graph, params = nnx.split(NnxNet(nnx.Rngs(0)))
    return nnx.as_pure(params), lambda params, x: nnx.merge(graph, params)(x), make_input((3, 4, 4, 2))


FRAMEWORKS = {
    "Linen": lambda: linen_model(LinenNet(), (3, 4, 4, 2)),
    "Linen attention": lambda: linen_model(LinenAttention(), (3, 5, 6)),
    "Equinox": equinox_model,
    "NNX": nnx_model,
}


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("sparsity", [pytest.param(0.3, marks=pytest.mark.slow), 0.5])
def test_frameworks(name, sparsity, relaxed):
    params, fn, x = FRAMEWORKS[name]()
    masks = halved(fn, params, x, sparsity=sparsity)
    small = jp.compact(fn, params, masks, x)
    all_equal_the_masked_model(fn, params, masks, x, (small.apply, small.params))
    dead = sum(int((~mask).sum()) for mask in jax.tree.leaves(masks))
    assert weights(small.params) == weights(params) - dead < weights(params)
    if name.startswith("Linen"):
        assert "ScopeParamShapeError" in small.insists


# Random architectures.


nets = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(1, 6)), min_size=2, max_size=7)


def counted(fn, params, x, ops):
    jax.eval_shape(fn, params, x)
    return ops.macs


def check_random_architecture(steps, seed, of):
    params, fn, ops = random_net(steps, seed)
    x = make_input((2, 8, 8, 2), seed)
    masks = at_random(params, 0.7, seed) if of == "at random" else halved(fn, params, x)
    masks = kernels_alone(masks) if of == "kernels alone" else masks
    try:
        small = jp.compact(fn, params, masks, x)
    except ValueError as error:
        hypothesis.assume(of != "at random" or "no channel" not in str(error))
        raise
    all_equal_the_masked_model(fn, params, masks, x, (small.apply, small.params))
    assert sum(site.macs for site in jp.trace(fn, params, x)) == ops.macs
    if small.insists == "":  # then the function counts the smaller model's, too
        assert sum(site.macs for site in jp.trace(small.apply, small.params, x)) == counted(fn, small.params, x, ops)


drawn = hypothesis.given(nets, st.integers(0, 99), st.sampled_from(["channels", "kernels alone", "at random"]))
test_random_architectures = hypothesis.settings(max_examples=8)(drawn(check_random_architecture))


@pytest.mark.slow
@hypothesis.settings(max_examples=200)
@drawn
def test_many_random_architectures(steps, seed, of):
    check_random_architecture(steps, seed, of)


# What is refused.


def test_a_leaf_that_is_not_used_stays():
    params, fn, shape = MODELS["mlp"]()
    x = make_input(shape)
    params, whole = {"net": params, "key": jax.random.key(0), "spare": jnp.ones(3)}, lambda p, x: fn(p["net"], x)
    small = jp.compact(whole, params, halved(whole, params, x), x)
    assert small.params["key"] == params["key"]
    assert small.params["spare"].shape == (3,)
    assert small.params["net"][0]["kernel"].shape == (6, 6)


def test_a_vector_along_another_axis_is_no_bias():
    draw = Draw()
    params = {"a": draw.layer(6, 5), "b": draw(5, 5), "shift": draw(5), "c": draw(5, 3)}

    def fn(p, x):  # five rows, and five channels: `shift` belongs to the rows
        x = jax.nn.sigmoid(dense(p["a"], x))
        return jnp.tanh(x @ p["b"] + jnp.expand_dims(p["shift"], 1)) @ p["c"]

    x = make_input((5, 6))
    masks = jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), params)
    masks["a"]["kernel"] = masks["a"]["kernel"].at[:, jnp.asarray([1, 2])].set(False)
    small = jp.compact(fn, params, masks, x)
    assert small.params["b"].shape == (5, 5)
    all_equal_the_masked_model(fn, params, masks, x, (small.apply, small.params))


def test_what_is_removed_is_plain_data_that_a_model_is_made_of_again():
    params, fn, shape = MODELS["attention_by_reshape"]()
    x = make_input(shape)
    masks = halved(fn, params, x)
    small = jp.compact(fn, params, masks, x)
    removed = json.loads(json.dumps(small.removed))
    again = jp.smaller(fn, removed, jp.expand(small.params, removed))
    all_equal_the_masked_model(fn, params, masks, x, (again, small.params))


def test_weights_that_are_no_arguments():
    params, fn, shape = MODELS["mlp"]()
    x, masks = make_input(shape), jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), params)
    with pytest.raises(ValueError, match="holds arrays of its own"):
        jp.compact(lambda _, x: fn(params, x), params, masks, x)
    with pytest.raises(ValueError, match="consumes no leaf of the params"):
        jp.couplings(lambda _, x: x, params, x)


def test_masks_that_leave_no_channel():
    params, fn, shape = MODELS["mlp"]()
    masks = jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), params)
    masks[1] = jax.tree.map(jnp.zeros_like, masks[1])
    with pytest.raises(ValueError, match="leave no channel of axis 0 of leaf '0/bias'"):
        jp.compact(fn, params, masks, make_input(shape))


def test_masks_of_another_shape():
    params, fn, shape = MODELS["mlp"]()
    with pytest.raises(ValueError, match="masks"):
        jp.compact(fn, params, jax.tree.map(lambda leaf: jnp.ones(3, bool), params), make_input(shape))


def test_a_function_with_a_size_in_it_says_where():
    params, fn, shape = MODELS["group_norm"]()
    x = make_input(shape)
    small = jp.compact(fn, params, halved(fn, params, x), x)
    assert "compact_models.py" in small.insists
    assert "cannot reshape" in small.insists
