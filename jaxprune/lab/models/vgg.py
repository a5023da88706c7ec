"""VGG: 3x3 convolutions in five groups, 2x2 max pooling after each, three wide layers; no normalisation.

    VGG16, VGG19                            ImageNet: 224 x 224, wide layers of 4096, 1000 classes
    CIFAR_VGG16, CIFAR_VGG19                CIFAR: 32 x 32, so 512 activations are left; wide layers of 512, 10 classes

Layers have the names of the first reimplementations, "conv1_1" to "fc8"; images are NHWC, kernels HWIO.

References:
    Simonyan and Zisserman 2014, arXiv:1409.1556.
"""

import dataclasses
from collections.abc import Iterator

import jax
from jaxtyping import Array, Float

from jaxprune.lab.models.parts import Layers, OfImages, Shapes, affine, check_image, conv, layer, max_pool


@dataclasses.dataclass(frozen=True)
class VGG(OfImages):
    """One of the family.

    Attributes:
        convolutions: how many in each group.
        channels: of each group.
        hidden: width of fc6 and fc7.
        classes: number of logits.
        image: (h, w, c); fc6 has an input for every activation that is left after the last group.

    Raises:
        ValueError: the images are too small.
    """

    convolutions: tuple[int, ...]
    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    hidden: int = 4096
    classes: int = 1000
    image: tuple[int, int, int] = (224, 224, 3)

    def __post_init__(self) -> None:
        check_image("VGG", self.image, len(self.channels))

    def shapes(self) -> Shapes:
        """Of the params, layer -> {"kernel", "bias"}."""
        shapes: Shapes = {}
        inputs = self.image[-1]
        for names, channels in zip(self._groups(), self.channels, strict=True):
            for name in names:
                shapes[name] = layer(3, 3, inputs, channels)
                inputs = channels
        height, width = (side // 2 ** len(self.channels) for side in self.image[:2])
        return shapes | {
            "fc6": layer(height * width * inputs, self.hidden),
            "fc7": layer(self.hidden, self.hidden),
            "fc8": layer(self.hidden, self.classes),
        }

    def apply(self, params: Layers, images: Float[Array, "batch h w c"]) -> Float[Array, "batch classes"]:
        """Logits of images."""
        x = images
        for names in self._groups():
            for name in names:
                x = jax.nn.relu(conv(params[name], x))
            x = max_pool(x, 2)
        x = x.reshape(x.shape[0], -1)
        for name in ("fc6", "fc7"):
            x = jax.nn.relu(affine(params[name], x))
        return affine(params["fc8"], x)

    def _groups(self) -> Iterator[list[str]]:
        for group, count in enumerate(self.convolutions, 1):
            yield [f"conv{group}_{i}" for i in range(1, count + 1)]


VGG16 = VGG((2, 2, 3, 3, 3))
VGG19 = VGG((2, 2, 4, 4, 4))
CIFAR_VGG16, CIFAR_VGG19 = (
    dataclasses.replace(vgg, hidden=512, classes=10, image=(32, 32, 3)) for vgg in (VGG16, VGG19)
)
