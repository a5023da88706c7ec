"""The zoo: every network, by its name or by the [model] of a config, with weights or with shapes alone.

network = build("resnet50", key)                        # to be measured: nothing is downloaded or trained
network = build(config.model, key, (32, 32, 3), 10)     # to be trained: weights to begin with
logits = network.apply(network.params, images)          # (batch, *network.sample.shape)
network = shapes("decoder_7b")                          # `jax.ShapeDtypeStruct` for every array: nothing is made
"""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxprune.lab.models import own, small
from jaxprune.lab.models.decoder import Decoder
from jaxprune.lab.models.mobilenet import MobileNetV1
from jaxprune.lab.models.parts import Network, Shapes, fold_batch_norms, initial_params, observed, random_params
from jaxprune.lab.models.resnet import CifarResNet, ResNet50
from jaxprune.lab.models.vgg import CIFAR_VGG16, CIFAR_VGG19, VGG16, VGG19
from jaxprune.lab.models.vit import ViT
from jaxprune.lab.recipe import config as cfg


class Model(Protocol):
    """What the frozen configuration of a larger network can do."""

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
MEASURED = ("resnet50", "vgg19", *MNIST)
"""What `jaxprune bench model` takes."""


def build(
    model: str | cfg.Model,
    key: Key[Array, ""] | None,
    image: tuple[int, ...] | int | None = None,
    classes: int | None = None,
) -> Network:
    """A network with weights.

    Args:
        model: one of `NAMES`, to be measured: with random weights, no two channels alike; or the [model] of a config,
            to be trained: biases begin at zero, batch norms as the identity.
        key: draws the weights, equal keys give equal weights; None: see `shapes`.
        image: shape of one input, or the side of square images; None: as in the network's paper, else MNIST's.
        classes: number of logits; None: as in the paper, else 10.

    Raises:
        ValueError: an unknown name, or images that the network cannot take; a `ConfigError` where a config says so.
    """
    if isinstance(model, str) and model in MNIST:
        model = cfg.Model(name=model)
    if isinstance(model, str) or model.name in MODELS:
        name, draw = (model, random_params) if isinstance(model, str) else (model.name, initial_params)
        network = _larger(name, image, classes)
        return network if key is None else network._replace(params=draw(network.params, key))
    image, classes = _shape(image, (28, 28, 1)), 10 if classes is None else classes
    network = (own if own.is_own(model) else small).build(model, image, classes, key)
    return network._replace(sample=jax.ShapeDtypeStruct(image, jnp.float32))


def shapes(model: str | cfg.Model, image: tuple[int, ...] | int | None = None, classes: int | None = None) -> Network:
    """The same with a `jax.ShapeDtypeStruct` for every array: nothing is computed, but for a model of the user's own.

    Args:
        model: see `build`.
        image: see `build`.
        classes: see `build`.

    Raises:
        ValueError: see `build`.
    """
    return build(model, None, image, classes)


def deployed(name: str, key: Key[Array, ""], side: int | None = None) -> Network:
    """A network as it is measured: random weights, batch norms folded into the convolutions before them.

    Speed depends on shapes and on where the zeros are, not on the values, so nothing is downloaded and nothing trained.

    Args:
        name: one of `MEASURED`.
        key: draws the weights.
        side: of square images; None: 224 for ImageNet's networks, 28 for MNIST's.

    Raises:
        ValueError: an unknown name, or images too small for the network.
    """
    _check_name(name, MEASURED, " to measure")
    network = build(name, key, side)
    if name != "resnet50":
        return network
    return network._replace(params=fold_batch_norms(network.params, ResNet50.epsilon))


def _larger(name: str, image: Any, classes: int | None) -> Network:
    _check_name(name, NAMES)
    model: Any = MODELS[name]
    if image is not None:
        if len(model.sample.shape) != 3:
            raise ValueError(f"{name} takes no images: leave their size out.")
        model = dataclasses.replace(model, image=small.as_image(name, _shape(image, model.image)))
    if classes is not None:
        model = dataclasses.replace(model, classes=classes)
    params = model.shapes()
    normed = any("var" in layer for layer in params.values())

    def apply(params: Any, inputs: Any, key: Any = None, rates: Any = None) -> Array:
        return model.apply(params, inputs)

    return Network(params, apply, observed(model.apply) if normed else None, model.sample)


def _shape(image: tuple[int, ...] | int | None, like: tuple[int, ...]) -> tuple[int, ...]:
    return like if image is None else (image, image, like[-1]) if isinstance(image, int) else image


def _check_name(name: str, names: Sequence[str], use: str = "") -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no model {name!r}{use}. There are: {', '.join(names)}.{hint}")
