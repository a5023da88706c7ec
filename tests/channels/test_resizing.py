"""Modules made smaller: of the same class, with numbers that are right, and computing what the masked model does."""

import itertools

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compact_helpers import halved
from flax import linen, nnx
from quick import quick_jit
from trace_helpers import normal

import jaxprune as jp
from jaxprune import tree

pytestmark = pytest.mark.usefixtures("relaxed", "quick")


def call(model, x):
    return model(x)


def filled(kind, *args):
    """A module with arrays drawn, without a program to compile for each."""
    if issubclass(kind, eqx.Module):
        shapes = eqx.filter_eval_shape(lambda: kind(*args, jax.random.key(0)))
    else:
        shapes = nnx.eval_shape(lambda: kind(*args, nnx.Rngs(0)))
    draw = np.random.default_rng(0).standard_normal

    def array(name, leaf):
        spread = np.abs if name.endswith("var") else lambda noise: noise
        return jnp.asarray(spread(draw(leaf.shape, np.float32))) if tree.is_array(leaf) else leaf

    return tree.map_named(array, shapes)


def made_smaller(model, x, ignore=(), sparsity=0.5):
    """The masked model as a function of x, and the compacted one."""
    params, rest = eqx.partition(model, tree.is_array) if isinstance(model, eqx.Module) else (model, None)
    fn = (lambda params, x: eqx.combine(params, rest)(x)) if isinstance(model, eqx.Module) else call
    channels = jp.Channels(jp.couplings(fn, params, x), ignore)
    dead = [channel for layer in channels.layers.values() for channel in layer[: round(sparsity * len(layer))]]

    def mask(name, leaf):
        alive = np.ones(leaf.shape, bool)
        for axis, ids in enumerate(channels.couplings.channels[name]):
            np.moveaxis(alive, axis, 0)[np.isin(ids, dead)] = False
        return jnp.asarray(alive)

    masks = tree.map_named(mask, params)
    return lambda x: fn(jp.apply_masks(params, masks), x), jp.compact(fn, params, masks, x)


def compute_the_same(masked, found, x):
    """Both are functions of x."""
    want, got = quick_jit(lambda x: (masked(x), found(x)))(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def numbers(node, place=""):
    """Every number that the modules of a model have: "fc/0.in_features"."""
    for path, child in jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda one: one is not node):
        if path:
            yield from numbers(child, f"{place}/{jax.tree_util.keystr(path, simple=True)}".lstrip("/"))
    if isinstance(node, nnx.Module | eqx.Module):
        for word, value in vars(node).items():
            if word[0] != "_" and type(value) in (int, tuple):
                yield f"{place}.{word}".lstrip("."), value


# NNX


class NnxConvs(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.groups = nnx.Conv(8, 16, (1, 1), feature_group_count=4, rngs=rngs)
        self.group_norm = nnx.GroupNorm(16, num_groups=4, rngs=rngs)
        self.up = nnx.ConvTranspose(16, 8, (3, 3), rngs=rngs)
        self.fc = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.relu(self.up(nnx.relu(self.group_norm(self.groups(x)))))
        return self.fc[1](nnx.relu(self.fc[0](jnp.mean(x, (1, 2)))))


class NnxAttention(nnx.Module):
    """Heads as many as their features, a module's and this one's own; and a width that is what the hidden one is."""

    def __init__(self, rngs):
        self.heads, self.width = 4, 16
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, use_bias=True, decode=False, rngs=rngs)
        self.qkv, self.proj = nnx.Linear(16, 48, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)
        self.up, self.down = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        qkv = (part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(self.qkv(x), 3, -1))
        x = x + self.proj(nnx.dot_product_attention(*qkv).reshape(*x.shape[:2], -1))
        return x + self.down(nnx.gelu(self.up(x)) * self.width**-0.5)


# Equinox


class EquinoxConvs(eqx.Module):
    conv: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv2d
    groups: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    fc: eqx.nn.Linear
    mlp: eqx.nn.MLP

    def __init__(self, key):
        a, b, c, d, e = jax.random.split(key, 5)
        self.conv = eqx.nn.Conv2d(3, 8, 3, padding=1, key=a)
        self.depthwise = eqx.nn.Conv2d(8, 8, 3, padding=1, groups=8, key=b)
        self.groups, self.norm = eqx.nn.Conv2d(8, 16, 1, groups=4, key=c), eqx.nn.GroupNorm(4, 16)
        self.fc, self.mlp = eqx.nn.Linear(16 * 4, 6, key=d), eqx.nn.MLP(6, 3, 6, 2, key=e)

    def __call__(self, x):
        x = jax.nn.relu(self.depthwise(jax.nn.relu(self.conv(x))))
        x = jax.nn.relu(self.norm(self.groups(x)))
        return self.mlp(jax.nn.relu(self.fc(x.reshape(-1))))


class EquinoxAttention(eqx.Module):
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(16)
        self.attention = eqx.nn.MultiheadAttention(4, 16, use_value_bias=True, key=a)
        self.up, self.down = eqx.nn.Linear(16, 16, key=b), eqx.nn.Linear(16, 16, key=c)

    def __call__(self, x):
        y = jax.vmap(self.norm)(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(x)))


# name -> (model, input, what is ignored, the numbers that change)
NNX_CONVS = """conv.kernel_shape=(3, 3, 3, 4) conv.out_features=4 norm.num_features=4 groups.in_features=4
groups.out_features=8 groups.feature_group_count=2 groups.kernel_shape=(1, 1, 2, 8)
group_norm.num_groups=2 up.in_features=8 up.out_features=4 up.kernel_shape=(3, 3, 8, 4) fc/0.in_features=4
fc/0.out_features=4 fc/1.in_features=4"""
NNX_ATTENTION = """attention/query.out_features=(2, 4) attention/key.out_features=(2, 4)
attention/value.out_features=(2, 4) attention/out.in_features=(2, 4) attention.num_heads=2 attention.num_kv_heads=2
attention.qkv_features=8 qkv.out_features=24 proj.in_features=8 up.out_features=8 down.in_features=8 heads=2"""
EQUINOX_CONVS = """conv.out_channels=4 depthwise.in_channels=4 depthwise.out_channels=4 depthwise.groups=4
groups.in_channels=4 groups.out_channels=8 groups.groups=2 norm.groups=2 norm.channels=8 fc.in_features=32
fc.out_features=3 mlp.in_size=3 mlp.width_size=3 mlp/layers/0.in_features=3 mlp/layers/0.out_features=3
mlp/layers/1.in_features=3 mlp/layers/1.out_features=3 mlp/layers/2.in_features=3"""
EQUINOX_ATTENTION = """attention/query_proj.out_features=8 attention/key_proj.out_features=8
attention/value_proj.out_features=8 attention/output_proj.in_features=8 attention.num_heads=2 up.out_features=8
down.in_features=8"""
MODULES = {
    "NNX convolutions": (NnxConvs, (2, 4, 4, 3), (), NNX_CONVS),
    "NNX attention": (NnxAttention, (2, 5, 16), "attention/value/kernel:2", NNX_ATTENTION),
    "Equinox convolutions": (EquinoxConvs, (3, 2, 2), (), EQUINOX_CONVS),
    "Equinox attention": (EquinoxAttention, (5, 16), (), EQUINOX_ATTENTION),
}


def known(words):
    """{"conv.kernel_shape": (3, 3, 3, 4), ...} of a table above."""
    pairs = [word.split("=") for word in words.replace(", ", ",").split()]
    return {word: eval(value) for word, value in pairs}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_with_its_numbers(name):
    kind, shape, ignore, changed = MODULES[name]
    model, x = filled(kind), normal(*shape)
    before = dict(numbers(model))
    masked, small = made_smaller(model, x, ignore)
    found = jp.resized(call, model, small, x)
    assert type(found) is type(model)
    assert {k: v for k, v in numbers(found) if type(v) is not tuple or type(v[0]) is int} == {
        k: v for k, v in (before | known(changed)).items() if type(v) is not tuple or type(v[0]) is int
    }
    assert dict(numbers(model)) == before  # nothing of the model itself is changed
    compute_the_same(masked, nnx.merge(*nnx.split(found)) if isinstance(found, nnx.Module) else found, x)


# Sizes drawn, many of them equal.


class Chain(nnx.Module):
    def __init__(self, sizes, rngs):
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


class EquinoxChain(eqx.Module):
    layers: list[eqx.nn.Linear]

    def __init__(self, sizes, key):
        self.layers = [eqx.nn.Linear(a, b, key=key) for a, b in itertools.pairwise(sizes)]

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


@hypothesis.settings(max_examples=4)
@hypothesis.given(
    st.lists(st.sampled_from([3, 4, 6]), min_size=3, max_size=5), st.sampled_from([0.3, 0.5]), st.booleans()
)
def test_numbers_of_layers_are_the_sizes_of_their_arrays(sizes, sparsity, equinox):
    if equinox:
        model, x = filled(EquinoxChain, sizes), normal(sizes[0])
    else:
        model, x = filled(Chain, sizes), normal(2, sizes[0])
    masked, small = made_smaller(model, x, sparsity=sparsity)
    found = jp.resized(call, model, small, x)
    for layer in found.layers:
        shape = layer.weight.shape[::-1] if equinox else layer.kernel.shape
        assert (layer.in_features, layer.out_features) == shape
    compute_the_same(masked, found, x)


def test_params_apart_from_their_module():
    model, x = filled(NnxConvs), normal(2, 4, 4, 3)
    graph, state = nnx.split(model)

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    masks = halved(fn, nnx.as_pure(state), x)
    small = jp.compact(fn, nnx.as_pure(state), masks, x)
    found = jp.resized(call, model, small, x)
    assert found.fc[0].out_features == found.fc[0].kernel.shape[1] == 4
    want = quick_jit(fn)(jp.apply_masks(nnx.as_pure(state), masks), x)
    np.testing.assert_allclose(eqx.filter_jit(call)(found, x), want, rtol=1e-4, atol=1e-5)


# What is refused.


class Heads(nnx.MultiHeadAttention):
    def __init__(self, rngs):
        super().__init__(2, 8, decode=False, rngs=rngs)


def test_values_of_another_size_than_queries_are_no_attention_module():
    model, x = filled(Heads), normal(2, 5, 8)
    masked, small = made_smaller(model, x, ignore="query/kernel:1")
    told = r"value shape .* value \(LinearGeneral\): out_features \(2, 4\) -> \(2, 2\).*`Channels\(ignore="
    with pytest.raises(ValueError, match=told):
        jp.resized(call, model, small, x)
    compute_the_same(masked, lambda x: small.apply(small.params, x), x)


def test_a_linen_module_says_the_sizes():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Dense(8)(x))
            return linen.Dense(3)(x)

    net, x = Net(), normal(2, 5)
    params = jax.jit(net.init)(jax.random.key(0), x)
    small = jp.compact(net.apply, params, halved(net.apply, params, x), x)
    told = r"A Net holds no arrays.*'?params/Dense_0/kernel \(5, 4\).*Dense_1/kernel \(4, 3\).*`features`"
    with pytest.raises(TypeError, match=told):
        jp.resized(call, net, small, x)
    lines = [line.split() for line in str(small).splitlines()]
    assert ["params/Dense_0/kernel", "(5,", "8)", "(5,", "4)"] in lines
    assert lines[-1][:6] == ["The", "function", "itself", "does", "not", "take"]


def test_another_model_is_refused():
    model, x = filled(Chain, [3, 4, 3]), normal(2, 3)
    _, small = made_smaller(model, x)
    found = jp.resized(call, model, small, x)
    with pytest.raises(ValueError, match=r"leaf 'layers/0/bias' of shape \(4,\) was expected, it has shape \(2,\)"):
        jp.resized(call, found, small, x)
    with pytest.raises(ValueError, match=r"of shape .* was expected, it has leaves 'bias', 'kernel'"):
        jp.resized(call, nnx.Linear(3, 4, rngs=nnx.Rngs(0)), small, x)


def test_statistics_that_were_left_out_are_refused():
    model, x = filled(NnxConvs), normal(2, 4, 4, 3)
    graph, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, statistics = nnx.as_pure(params), nnx.as_pure(statistics)

    def fn(params, x):
        return nnx.merge(graph, params, statistics)(x)

    small = jp.compact(fn, params, halved(fn, params, x), x)
    with pytest.raises(ValueError, match=r"had no leaf 'norm/(mean|var)': hand it all arrays of the model"):
        jp.resized(call, model, small, x)
