"""Compaction of models written in Flax Linen, Flax NNX and Equinox: their layers, their params, their statistics."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from compact_helpers import by_magnitude, count_dead, error_of, weights
from flax import linen, nnx
from framework_models import MODELS, Case, drawn, equinox_case, image, linen_case

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("relaxed", "quick")


# Layers that the models have not.


class LinenAttention(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1, 6)
        x = x + linen.MultiHeadDotProductAttention(4, qkv_features=16)(linen.LayerNorm()(x))
        return linen.Dense(4)(linen.gelu(linen.Dense(12)(linen.LayerNorm()(x))))


class EquinoxGroups(eqx.Module):
    convs: list
    norm: eqx.nn.GroupNorm
    dense: list

    def __init__(self, key):
        a, b, c, d = jax.random.split(key, 4)
        self.convs = [eqx.nn.Conv2d(3, 6, 3, padding=1, key=a), eqx.nn.Conv2d(6, 8, 3, padding=1, key=b)]
        self.norm = eqx.nn.GroupNorm(4, 8)
        self.dense = [eqx.nn.Linear(8 * 16, 10, key=c), eqx.nn.Linear(10, 3, key=d)]

    def __call__(self, x, state):
        x = jax.nn.relu(self.norm(self.convs[1](jax.nn.relu(self.convs[0](x)))))
        return self.dense[1](jax.nn.relu(self.dense[0](x.reshape(-1)))), state


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.fc = nnx.List([nnx.Linear(8, 10, rngs=rngs), nnx.Linear(10, 3, rngs=rngs)])

    def __call__(self, x):
        x = jnp.mean(nnx.relu(self.norm(self.conv(x))), (1, 2))
        return self.fc[1](nnx.relu(self.fc[0](x)))


def nnx_case():
    graph, shapes = nnx.split(nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0))))
    params = drawn(nnx.as_pure(shapes), -1)
    return Case(params, lambda params, x: nnx.merge(graph, params)(x), jnp.asarray(image(4)))


TINY = {name: sizes.tiny for name, sizes in MODELS.items()} | {
    "Linen attention": lambda: linen_case(LinenAttention(), image(4)),
    "Equinox groups": lambda: equinox_case(EquinoxGroups, image(4)),
    "NNX": nnx_case,
}

# Where a library has sizes in its layers; "^$": nowhere. With Equinox's ResNet it depends on which channels go.
REFUSED = {
    **dict.fromkeys((name for name in TINY if name.startswith("Linen")), "ScopeParamShapeError"),
    **dict.fromkeys(("Equinox vgg16", "NNX"), "^$"),
    "Equinox mobilenet_v1": "feature_group_count must divide",
    "Equinox groups": "_normalisation.py",
    "Equinox vit": "_project",
}

# In every run of the tests: of each kind of layer one.
ALWAYS = (
    "Linen resnet50", "Linen mobilenet_v1", "Linen decoder", "Equinox vgg16", "Equinox resnet20", "Equinox vit", "NNX",
)  # fmt: skip


def check(name, case, sparsity):
    params, fn, x = case
    masks = by_magnitude(fn, params, x, sparsity)
    small = jp.compact(fn, params, masks, x)
    assert error_of(small, fn, params, masks, x) < 1e-4
    assert weights(small.params) == weights(params) - count_dead(masks) < weights(params)
    assert re.search(REFUSED.get(name, ""), small.refusal)


@pytest.mark.parametrize(
    ("name", "sparsity"),
    [
        pytest.param(name, sparsity, marks=() if sparsity == 0.5 and name in ALWAYS else pytest.mark.slow)
        for sparsity in (0.3, 0.5) for name in TINY
    ],
)  # fmt: skip
def test_tiny_models(name, sparsity):
    check(name, TINY[name](), sparsity)


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_models_at_their_own_size(name, sparsity):
    check(name, MODELS[name].full(), sparsity)
