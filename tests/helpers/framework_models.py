"""The models of `linen_models` and `equinox_models`, small and at their own size, with random weights and an input.

MODELS["Linen vgg16"].tiny()      a `Case` that compiles in a second;      .full()      the same at its own size
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import equinox_models
import jax
import jax.numpy as jnp
import linen_models
import numpy as np

from jaxprune import tree
from jaxprune.lab.models import mobilenet


class Case(NamedTuple):
    """A model: its params (statistics of batches among them), a function of them, an input."""

    params: Any
    fn: Any
    x: Any


def drawn(shapes, outputs):
    """Random params: matrices by their fan-in, and vectors of which no two numbers are alike.

    Args:
        shapes: pytree; a pair under it is an Equinox batch norm's mean and variance.
        outputs: axis of a kernel.
    """
    rng = np.random.default_rng(0)

    def draw(name, leaf):
        last, noise = name.rsplit("/", 1)[-1], rng.standard_normal(leaf.shape, np.float32)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.full(leaf.shape, 1000, leaf.dtype)  # batches seen
        if leaf.ndim > 1 and last != "bias":
            return jnp.asarray(noise * np.float32(np.sqrt(2 * leaf.shape[outputs] / leaf.size)))
        return jnp.asarray(np.float32(last in ("scale", "var", "weight", "1")) + np.float32(0.1) * noise)

    return tree.map_named(draw, shapes)


def image(side):
    return np.random.default_rng(1).standard_normal((2, side, side, 3), np.float32)


def tokens(vocabulary, length):
    return np.random.default_rng(1).integers(0, vocabulary, (2, length))


def linen_case(module, x):
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return Case(drawn(shapes, -1), module.apply, jnp.asarray(x))


def equinox_case(make, images):
    """Of a model (x, state) -> (logits, state) for one sample; its params are (weights, state)."""
    model, state = eqx.filter_eval_shape(eqx.nn.make_with_state(lambda key: make(key=key)), jax.random.key(0))
    weights, rest = eqx.partition(eqx.nn.inference_mode(model), tree.is_array)

    def fn(params, x):
        weights, state = params
        batched = jax.vmap(eqx.combine(weights, rest), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return batched(x, state)[0]

    return Case(drawn((weights, state), 0), fn, jnp.asarray(images.transpose(0, 3, 1, 2)))


class Sizes(NamedTuple):
    """A model small enough for every run of the tests, and at its own size."""

    tiny: Any
    full: Any


VGG16 = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
MOBILENET = {"blocks": mobilenet.BLOCKS, "stem": 32, "classes": 1000}
DECODER = {"vocabulary": 32_000, "dim": 288, "layers": 6, "heads": 6, "kv_heads": 2, "hidden": 768}
VIT = {"dim": 192, "layers": 12, "heads": 3, "hidden": 768, "patch": 16, "side": 224, "classes": 1000}
TINY_VGG = ((1, 4), (1, 6))
TINY_MOBILENET = {"blocks": ((6, 1), (8, 2)), "stem": 4, "classes": 5}
TINY_DECODER = {"vocabulary": 11, "dim": 16, "layers": 1, "heads": 4, "kv_heads": 2, "hidden": 12}
TINY_VIT = {"dim": 12, "layers": 1, "heads": 4, "hidden": 10, "patch": 4, "side": 8, "classes": 5}

MODELS = {
    "Linen vgg16": Sizes(
        lambda: linen_case(linen_models.VGG(TINY_VGG, hidden=8), image(8)),
        lambda: linen_case(linen_models.VGG(VGG16, hidden=512), image(32)),
    ),
    "Linen resnet50": Sizes(
        lambda: linen_case(linen_models.ResNet((2,), width=4, classes=5), image(8)),
        lambda: linen_case(linen_models.ResNet((3, 4, 6, 3), width=64, classes=1000), image(224)),
    ),
    "Linen mobilenet_v1": Sizes(
        lambda: linen_case(linen_models.MobileNet(**TINY_MOBILENET), image(8)),
        lambda: linen_case(linen_models.MobileNet(**MOBILENET), image(224)),
    ),
    "Linen decoder": Sizes(
        lambda: linen_case(linen_models.Decoder(**TINY_DECODER), tokens(11, 5)),
        lambda: linen_case(linen_models.Decoder(**DECODER), tokens(32_000, 64)),
    ),
    "Equinox vgg16": Sizes(
        lambda: equinox_case(functools.partial(equinox_models.VGG, TINY_VGG, 8, side=8), image(8)),
        lambda: equinox_case(functools.partial(equinox_models.VGG, VGG16, 512, side=32), image(32)),
    ),
    "Equinox resnet20": Sizes(
        lambda: equinox_case(functools.partial(equinox_models.ResNet, (1, 1), width=4), image(8)),
        lambda: equinox_case(functools.partial(equinox_models.ResNet, (3, 3, 3), width=16), image(32)),
    ),
    "Equinox mobilenet_v1": Sizes(
        lambda: equinox_case(functools.partial(equinox_models.MobileNet, **TINY_MOBILENET), image(8)),
        lambda: equinox_case(functools.partial(equinox_models.MobileNet, **MOBILENET), image(224)),
    ),
    "Equinox vit": Sizes(
        lambda: equinox_case(functools.partial(equinox_models.ViT, **TINY_VIT), image(8)),
        lambda: equinox_case(functools.partial(equinox_models.ViT, **VIT), image(224)),
    ),
}
