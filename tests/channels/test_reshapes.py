"""Channels found through reshapes, whichever of the axes they lie along: drawn axes, drawn places, drawn weights."""

import math
import operator

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compact_helpers import all_alive, all_equal_the_masked_model, halved
from trace_helpers import normal

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick")

TIMES = 2  # the batch


def by_a_product(shape, channel):
    """Channels along one axis, all others are seen by whoever looks at the result."""
    params = {"a": normal(5, math.prod(shape)), "b": normal(shape[channel], 3)}

    def fn(p, x):
        x = jax.nn.relu(x @ p["a"]).reshape(-1, *shape)
        return jnp.moveaxis(x, channel + 1, -1) @ p["b"]

    return params, fn, (TIMES, 5)


def by_depth_to_space(shape, channel):
    """As `by_a_product`, and the other axes are merged with the pixels before."""
    params = {"a": normal(5, math.prod(shape)), "b": normal(shape[channel], 3)}

    def fn(p, x):
        x = jnp.moveaxis(jax.nn.relu(x @ p["a"]).reshape(TIMES, 3, *shape), channel + 2, -1)
        return x.reshape(TIMES, -1, shape[channel]) @ p["b"]

    return params, fn, (TIMES, 3, 5)


def by_a_leaf(shape, channel):
    """The leaf has all axes, and they are merged first."""
    params = {"a": normal(5, *shape), "b": normal(shape[channel], 3), "bias": normal(math.prod(shape))}

    def fn(p, x):
        x = jax.nn.relu(x @ p["a"].reshape(5, -1) + p["bias"][None])
        return jnp.moveaxis(x.reshape(-1, *shape), channel + 1, -1) @ p["b"]

    return params, fn, (TIMES, 5)


def by_patches(shape, channel):
    """What reads them is a leaf whose other axes are those of a window."""
    params = {"a": normal(5, shape[channel]), "b": normal(*shape, 3)}

    def fn(p, x):
        x = jnp.moveaxis(jax.nn.relu(x @ p["a"]), -1, channel + 1)
        return x.reshape(TIMES, -1) @ p["b"].reshape(-1, 3)

    return params, fn, (TIMES, *(size for axis, size in enumerate(shape) if axis != channel), 5)


def by_a_constant(shape, channel):
    """As `by_a_product`, beside numbers of the function's own that come the same way."""
    params, _, size = by_a_product(shape, channel)
    given = np.float32(np.arange(math.prod(shape)) % 3)

    def scaled(p, x):
        x = (jax.nn.relu(x @ p["a"])).reshape(-1, *shape) * (given[None] + x[:, :1]).reshape(-1, *shape)
        return jnp.moveaxis(x, channel + 1, -1) @ p["b"]

    return params, scaled, size


def flat_again(shape, channel):
    """Any axis would do."""
    params = {"a": normal(5, math.prod(shape)), "b": normal(math.prod(shape), 3)}
    return params, lambda p, x: jnp.tanh(x @ p["a"]).reshape(-1, *shape).reshape(TIMES, -1) @ p["b"], (TIMES, 5)


WAYS = (by_a_product, by_depth_to_space, by_a_leaf, by_patches, by_a_constant, flat_again)
places = st.lists(st.integers(2, 4), min_size=2, max_size=4).flatmap(
    lambda shape: st.tuples(st.just(shape), st.integers(0, len(shape) - 1))
)


@hypothesis.settings(max_examples=12)
@hypothesis.given(st.sampled_from(WAYS), places)
def test_every_axis_is_found(way, place):
    shape, channel = place
    params, fn, size = way(shape, channel)
    assert jp.couplings(fn, params, normal(*size)).count == (max(shape) if way is flat_again else shape[channel])


def check_smaller(way, place, seed):
    params, fn, size = way(*place)
    x = normal(*size, seed=seed)
    masks = halved(fn, params, x)
    if seed % 2:  # the readers alone, so that what is removed follows from them
        masks = {**all_alive(params), "b": masks["b"]}
    small = jp.compact(fn, params, masks, x)
    assert any(small.removed["a"])
    assert any(small.removed["b"])
    all_equal_the_masked_model(fn, params, masks, x, (small.apply, small.params))


drawn = hypothesis.given(st.sampled_from(WAYS), places, st.integers(0, 99))
test_smaller_models_compute_the_same = hypothesis.settings(max_examples=4)(drawn(check_smaller))


@pytest.mark.slow
@hypothesis.settings(max_examples=150)
@drawn
def test_many_smaller_models_compute_the_same(way, place, seed):
    check_smaller(way, place, seed)


# Heads.

WORDS = ("which", "head", "dim")


def attention(order, heads, dim, how):
    """Queries, keys and values of one matrix, whose outputs are (which, head, dimension) in any order."""
    sizes = [{"which": 3, "head": heads, "dim": dim}[word] for word in order]
    params = {"qkv": normal(6, math.prod(sizes)), "bias": normal(math.prod(sizes)), "out": normal(heads * dim, 6)}

    def fn(p, x):
        b, t, _ = x.shape
        x = x @ p["qkv"] + p["bias"][None, None]
        if how == "reshape":
            q, k, v = jnp.moveaxis(x.reshape(b, t, *sizes), [2 + order.index(w) for w in WORDS], [0, 3, 4])
        else:
            each = [size for word, size in zip(order, sizes, strict=True) if word != "which"]
            q, k, v = (part.reshape(b, t, *each) for part in jnp.split(x, 3, -1))
            if order.index("dim") < order.index("head"):
                q, k, v = (jnp.swapaxes(part, 2, 3) for part in (q, k, v))
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(np.sqrt(dim)))
        return jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(b, t, heads * dim) @ p["out"]

    return params, fn, (2, 5, 6)


orders = st.permutations(WORDS)


@hypothesis.settings(max_examples=6)
@hypothesis.given(orders, st.integers(2, 5), st.integers(2, 7))
def test_heads_are_found_in_any_order(order, heads, dim):
    params, fn, size = attention(order, heads, dim, "reshape")
    found = jp.couplings(fn, params, normal(*size))
    assert found.count == heads
    sizes = [{"which": 3, "head": heads, "dim": dim}[word] for word in order]
    by_head = np.moveaxis(found.channels["qkv"][1].reshape(sizes), order.index("head"), 0).reshape(heads, -1)
    assert (by_head == by_head[:, :1]).all()
    if order[0] == "which":  # no fewer than where they are split first
        params, fn, size = attention(order, heads, dim, "split")
        assert jp.couplings(fn, params, normal(*size)).count == heads


def test_heads_go():
    params, fn, size = attention(WORDS, 4, 3, "reshape")
    x = normal(*size)
    masks = halved(fn, params, x)
    small = jp.compact(fn, params, masks, x)
    assert jax.tree.map(jnp.shape, small.params) == {"qkv": (6, 18), "bias": (18,), "out": (6, 6)}
    all_equal_the_masked_model(fn, params, masks, x, (small.apply, small.params))


def test_layers_of_a_loop_are_one_choice_and_others_are_their_own():
    """Heads that are first here, channels that are last there, and both again in further layers."""
    _, heads, _ = attention(["which", "head", "dim"], 3, 4, "reshape")
    params = [attention(["which", "head", "dim"], 3, 4, "reshape")[0] for _ in range(3)]
    params = {"layers": params, "wide": normal(6, 2 * 3 * 5), "narrow": normal(5, 6)}

    def fn(p, x):
        for layer in p["layers"]:
            x = x + heads(layer, x)
        y = jax.nn.relu(x @ p["wide"]).reshape(2, 5, 2, 3, 5)
        return heads(p["layers"][0], x) + jnp.max(y @ p["narrow"], (2, 3))

    sizes = sorted(map(len, jp.couplings(fn, params, normal(2, 5, 6)).layers))
    assert sizes == [3, 3, 3, 5]


def test_what_does_not_go_together_is_refused():
    params, fn, size = attention(["which", "head", "dim"], 3, 4, "reshape")
    removed = {"qkv": ((), (0, 1)), "out": ((0,), ()), "bias": ((0, 1),)}
    small = jax.tree.map(operator.itemgetter(...), params)
    with pytest.raises(ValueError, match="removed of leaf 'bias' along axis 0 does not go together"):
        jp.channels.apply_compacted(fn, removed, params)(small, normal(*size))
