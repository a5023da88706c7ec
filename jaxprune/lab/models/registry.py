"""The configurations of the larger networks, by their names."""

import dataclasses
import difflib
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array

from jaxprune.lab.models.decoder import Decoder
from jaxprune.lab.models.mobilenet import MobileNetV1
from jaxprune.lab.models.parts import Shapes
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


def model(name: str, side: int | None = None) -> Model:
    """The configuration of one of `MODELS`.

    Args:
        name: of the model.
        side: of the square images it takes; None: those of its paper.

    Raises:
        ValueError: there is none of that name, it takes no images, or they are too small.
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
