"""Compaction: what is left computes what the masked model computed, and nothing is left that need not be."""

import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compact_helpers import all_alive, all_equal_the_masked_model, count_dead, halved, weights
from compact_models import MODELS, Draw, dense, make_input
from quick import quick_jit
from random_nets import STEPS, random_net

import jaxprune as jp
from jaxprune import tree

pytestmark = pytest.mark.usefixtures("quick")

REFUSED = {"padded_shortcut", "grouped", "group_norm", "attention_by_reshape"}


def kernels_alone(masks):
    """The same masks, biases and normalisations kept."""
    return tree.map_named(lambda name, mask: mask if mask.ndim > 1 else all_alive(mask), masks)


def at_random(params, sparsity=0.9, seed=3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape) >= sparsity), params)


@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_channels(name):
    params, fn, shape = MODELS[name]()
    x = make_input(shape)
    masks = halved(fn, params, x)
    small = jp.compact(fn, params, masks, x)
    assert weights(small.params) == weights(params) - count_dead(masks)  # all of them, and nothing else
    assert bool(small.refusal) == (name in REFUSED), small.refusal
    calls = [(small.apply, small.params), (fn, jp.uncompact(small.params, small.removed)), (fn, small.params)]
    all_equal_the_masked_model(fn, params, masks, x, *(calls[:2] if name in REFUSED else calls))


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
    masks = all_alive(params)
    for name, dead in (("a", [0, 5]), ("b", [1, 2, 9])):  # sigmoid(bias) goes on to a mean, sigmoid(norm) to a bias
        masks[name]["kernel"] = masks[name]["kernel"].at[:, jnp.asarray(dead)].set(False)
    small = jp.compact(fn, params, masks, x)
    assert small.params["b"]["kernel"].shape == (10, 7)
    assert small.params["c"]["kernel"].shape == (7, 4)
    assert small.refusal == ""
    assert not np.array_equal(small.params["c"]["bias"], params["c"]["bias"])
    expanded = jp.uncompact(small.params, small.removed)
    all_equal_the_masked_model(fn, params, masks, x, (fn, small.params), (fn, expanded))


def test_what_nobody_reads_goes_to_a_fixed_point():
    params, fn, shape = MODELS["mlp"]()
    x = make_input(shape)
    masks = all_alive(params)
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
    got = quick_jit(jax.grad(lambda p: jnp.sum(jnp.sin(small.apply(p, more)))))(small.params)
    want = quick_jit(jax.grad(lambda p: jnp.sum(jnp.sin(fn(p, more)))))(jp.apply_masks(params, masks))
    expanded = jp.uncompact(got, small.removed)
    kept = jp.uncompact(jax.tree.map(jnp.ones_like, got), small.removed)
    jax.tree.map(lambda a, b, k: np.testing.assert_allclose(a, b * k, rtol=1e-3, atol=1e-4), expanded, want, kept)


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
    small = jp.compact(fn, params, masks, x)
    all_equal_the_masked_model(fn, params, masks, x, (small.apply, small.params))
    assert sum(site.macs for site in jp.trace(fn, params, x)) == ops.macs
    if small.refusal == "":  # then the function counts the smaller model's, too
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
    masks = all_alive(params)
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
    again = jp.channels.apply_compacted(fn, removed, jp.uncompact(small.params, removed))
    all_equal_the_masked_model(fn, params, masks, x, (again, small.params))


def test_weights_that_are_no_arguments():
    params, fn, shape = MODELS["mlp"]()
    x, masks = make_input(shape), all_alive(params)
    with pytest.raises(ValueError, match="holds arrays of its own"):
        jp.compact(lambda _, x: fn(params, x), params, masks, x)
    with pytest.raises(ValueError, match="consumes no leaf of the params"):
        jp.couplings(lambda _, x: x, params, x)


@pytest.mark.parametrize("name", ["residual", "folded_constants"])
def test_a_layer_that_is_pruned_whole_keeps_a_channel(name):
    params, fn, shape = MODELS[name]()
    x = make_input(shape)
    emptied = [
        tree.map_named(lambda leaf, array, layer=layer: jnp.full(array.shape, leaf.split("/")[0] != layer), params)
        for layer in params
    ]
    smalls = [jp.compact(fn, params, masks, x, round_to=1 + i % 2) for i, masks in enumerate(emptied)]
    for layer, small in zip(params, smalls, strict=True):
        assert all(leaf.size for leaf in jax.tree.leaves(small.params))
        assert weights(small.params) < weights(params), layer
    got, want = quick_jit(lambda smaller, masked: (
        [small.apply(p, x) for small, p in zip(smalls, smaller, strict=True)], [fn(p, x) for p in masked]
    ))([small.params for small in smalls], [jp.apply_masks(params, masks) for masks in emptied])  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_constants_that_rounding_brings_back_keep_what_they_are_made_of():
    draw = Draw()
    params = {"a": draw.layer(6, 5), "b": draw(5, 4), "c": draw.layer(4, 3)}

    def fn(p, x):  # no bias behind b: its constants are where they are made
        return dense(p["c"], jax.nn.sigmoid(jax.nn.sigmoid(dense(p["a"], x)) @ p["b"]))

    x, masks = make_input((5, 6)), all_alive(params)
    masks["a"]["kernel"] = masks["a"]["kernel"].at[:, 0].set(False)
    masks["b"] = masks["b"].at[0, 1:].set(False).at[1:, 0].set(False)  # one constant of another
    assert jp.compact(fn, params, masks, x).params["b"].shape == (4, 3)
    small = jp.compact(fn, params, masks, x, round_to=4)
    assert small.params["b"].shape == (5, 4)
    all_equal_the_masked_model(fn, params, masks, x, (small.apply, small.params))


def test_masks_of_another_shape():
    params, fn, shape = MODELS["mlp"]()
    with pytest.raises(ValueError, match="masks"):
        jp.compact(fn, params, jax.tree.map(lambda leaf: jnp.ones(3, bool), params), make_input(shape))


def test_a_function_with_a_size_in_it_says_where():
    params, fn, shape = MODELS["group_norm"]()
    x = make_input(shape)
    small = jp.compact(fn, params, halved(fn, params, x), x)
    assert "compact_models.py" in small.refusal
    assert "cannot reshape" in small.refusal
