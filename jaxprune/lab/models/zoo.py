"""The zoo: every model by its name, with random weights or with shapes alone.

network = build("resnet50", key)                        # weights by their fan-in: nothing is downloaded or trained
logits = network.apply(network.params, images)          # (batch, *network.sample.shape)
network = shapes("decoder_7b")                          # `jax.ShapeDtypeStruct` for every array: nothing is made
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxprune.lab import config as cfg
from jaxprune.lab.models import small
from jaxprune.lab.models.decoder import Decoder
from jaxprune.lab.models.mobilenet import MobileNetV1
from jaxprune.lab.models.parts import Shapes, random_params
from jaxprune.lab.models.resnet import CifarResNet, ResNet50
from jaxprune.lab.models.vgg import CIFAR_VGG16, CIFAR_VGG19, VGG16, VGG19
from jaxprune.lab.models.vit import ViT


@runtime_checkable
class Model(Protocol):
    """What a frozen configuration can do."""

    @property
    def sample(self) -> jax.ShapeDtypeStruct:
        """One input, without the axis of the batch."""
        ...

    def shapes(self) -> Shapes:
        """Params with a `jax.ShapeDtypeStruct` for every array."""
        ...

    def apply(self, params: Any, x: Any, /) -> Array:
        """Logits."""
        ...


class Network(NamedTuple):
    """A model with its params.

    Attributes:
        name: one of `NAMES`, or what a run calls itself.
        params: pytree of arrays, or of `jax.ShapeDtypeStruct`.
        apply: (params, inputs (batch, *sample.shape)) -> logits.
        sample: shape and dtype of one input.
    """

    name: str
    params: Any
    apply: Callable[..., Float[Array, "batch *logits"]]
    sample: jax.ShapeDtypeStruct


MODELS: dict[str, Model] = {
    "vgg16": VGG16,
    "vgg19": VGG19,
    "cifar_vgg16": CIFAR_VGG16,
    "cifar_vgg19": CIFAR_VGG19,
    "resnet20": CifarResNet(3),
    "resnet32": CifarResNet(5),
    "resnet56": CifarResNet(9),
    "resnet50": ResNet50(),
    "mobilenet_v1": MobileNetV1(),
    "vit": ViT(),
    "decoder": Decoder(vocabulary=32_000, dim=288, layers=6, heads=6, kv_heads=2, hidden=768, tied=True),
    "decoder_7b": Decoder(vocabulary=32_000, dim=4096, layers=32, heads=32, kv_heads=32, hidden=11_008),
}
MNIST = ("tf_tutorial_cnn", "lenet_300_100", "lenet_5", "mlp")
NAMES = (*MODELS, *MNIST)


def build(name: str, key: Key[Array, ""], side: int | None = None) -> Network:
    """A model with random weights.

    Args:
        name: one of `NAMES`.
        key: draws the weights.
        side: height and width of the images; without it the model's own.

    Raises:
        ValueError: an unknown name, or images that the model cannot take.
    """
    if name in MNIST:
        image = (side or 28, side or 28, 1)
        return of_config(name, cfg.Model(name=name), image, classes=10, key=key)  # pyright: ignore[reportArgumentType]
    chosen = model(name, side)
    return Network(name, random_params(chosen.shapes(), key), chosen.apply, chosen.sample)


def shapes(name: str, side: int | None = None) -> Network:
    """A model with the shapes of its params: enough to trace it, at no cost.

    Args:
        name: see `build`.
        side: see `build`.

    Raises:
        ValueError: see `build`.
    """
    if name in MNIST:
        image = (side or 28, side or 28, 1)
        return _named(name, small.shapes(cfg.Model(name=name), image, classes=10), image)  # pyright: ignore[reportArgumentType]
    chosen = model(name, side)
    return Network(name, chosen.shapes(), chosen.apply, chosen.sample)


def model(name: str, side: int | None = None) -> Model:
    """The configuration of one of `MODELS`.

    Args:
        name: see `build`.
        side: see `build`.

    Raises:
        ValueError: see `build`; the model takes no images.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no model {name!r}. There are: {', '.join(NAMES)}.{hint}")
    chosen: Any = MODELS[name]
    if side is None:
        return chosen
    if len(chosen.sample.shape) != 3:
        raise ValueError(f"{name} takes no images: leave their size out.")
    return dataclasses.replace(chosen, image=(side, side, chosen.image[-1]))


def of_config(name: str, model: cfg.Model, image: tuple[int, int, int], classes: int, key: Key[Array, ""]) -> Network:
    """A network of the experiments, without what only training needs.

    Args:
        name: what it is called.
        model: the [model] section.
        image: (h, w, c).
        classes: number of logits.
        key: draws the weights.
    """
    return _named(name, small.build(model, image, classes, key), image)


def _named(name: str, network: small.Network, image: tuple[int, int, int]) -> Network:
    sample = jax.ShapeDtypeStruct(image, jnp.float32)
    return Network(name, network.params, lambda params, images: network.apply(params, images), sample)
