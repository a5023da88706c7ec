"""Residual networks: blocks that add what they compute to what they were given.

    ResNet50      relu(conv3(relu(conv2(relu(conv1(x))))) + shortcut(x)),      1x1, 3x3, 1x1: a bottleneck
    CifarResNet   relu(conv2(relu(conv1(x))) + shortcut(x)),                   3x3, 3x3

Batch norm follows every convolution, as a layer of its own or folded into it (`parts.fold_batch_norms`); one `apply`
takes both. Layers have torchvision's names. Images are NHWC, kernels HWIO.

References:
    He et al. 2015, arXiv:1512.03385.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxprune.lab.models.parts import (
    Layers,
    OfImages,
    Shapes,
    affine,
    check_image,
    conv_norm,
    conv_norm_layers,
    layer,
    max_pool,
)


class _Block(NamedTuple):
    name: str
    width: int
    stride: int


def _blocks(counts: tuple[int, ...], width: int) -> Iterator[_Block]:
    """Each stage but the first halves the image with its first block, and is twice as wide."""
    for stage, count in enumerate(counts):
        for i in range(count):
            yield _Block(f"layer{stage + 1}.{i}", width * 2**stage, 2 if stage and not i else 1)


@dataclasses.dataclass(frozen=True)
class ResNet50(OfImages):
    """ResNet-50 for ImageNet, and its relatives.

    Attributes:
        blocks: in each stage.
        width: inside the blocks of the first stage; blocks put out four times their width.
        classes: number of logits.
        stride_first: whether the first 1x1 convolution of a block takes the stride, as in the paper ("v1"), or the 3x3
            after it, as in torchvision ("v1.5").
        epsilon: of the batch norms.
        image: (h, w, c) of a sample; the model takes any size from 32 x 32 on.

    Raises:
        ValueError: the images are too small.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000
    stride_first: bool = False
    epsilon: float = 1e-5
    image: tuple[int, int, int] = (224, 224, 3)

    def __post_init__(self) -> None:
        check_image("ResNet-50", self.image, len(self.blocks) + 1)

    def shapes(self) -> Shapes:
        """Of the params: layer -> {"kernel"}, {"scale", "bias", "mean", "var"} or, for "fc", {"kernel", "bias"}."""
        shapes = conv_norm_layers("conv1", 7, 7, self.image[-1], self.width)
        inputs = self.width
        for name, width, _ in _blocks(self.blocks, self.width):
            shapes |= conv_norm_layers(f"{name}.conv1", 1, 1, inputs, width)
            shapes |= conv_norm_layers(f"{name}.conv2", 3, 3, width, width)
            shapes |= conv_norm_layers(f"{name}.conv3", 1, 1, width, 4 * width)
            if inputs != 4 * width:
                shapes |= conv_norm_layers(f"{name}.downsample.0", 1, 1, inputs, 4 * width)
            inputs = 4 * width
        return shapes | {"fc": layer(inputs, self.classes)}

    def apply(self, params: Layers, images: Float[Array, "batch h w c"]) -> Float[Array, "batch classes"]:
        """Logits of images."""
        x = jax.nn.relu(conv_norm(params, "conv1", images, self.epsilon, 2))
        x = max_pool(x, 3, padding=1)
        for block in _blocks(self.blocks, self.width):
            x = self.bottleneck(params, block.name, x, block.stride)
        return affine(params["fc"], jnp.mean(x, axis=(1, 2)))

    def bottleneck(self, params: Layers, name: str, x: Array, stride: int) -> Array:
        """One block."""
        first, second = (stride, 1) if self.stride_first else (1, stride)
        y = jax.nn.relu(conv_norm(params, f"{name}.conv1", x, self.epsilon, first))
        y = jax.nn.relu(conv_norm(params, f"{name}.conv2", y, self.epsilon, second))
        y = conv_norm(params, f"{name}.conv3", y, self.epsilon)
        shortcut = f"{name}.downsample.0"
        y = y + (conv_norm(params, shortcut, x, self.epsilon, stride) if shortcut in params else x)
        return jax.nn.relu(y)


@dataclasses.dataclass(frozen=True)
class CifarResNet(OfImages):
    """The paper's networks for CIFAR: 6 x blocks + 2 layers, so 3, 5 and 9 blocks make ResNet-20, -32 and -56.

    Shortcuts have no weights ("option A"): where the image is halved they take every second pixel, and new channels
    are zeros, half of them before and half after the old ones.

    Attributes:
        blocks: in each of the three stages.
        width: channels of the first stage.
        classes: number of logits.
        epsilon: of the batch norms.
        image: (h, w, c) of a sample; the model takes any size.
    """

    blocks: int
    width: int = 16
    classes: int = 10
    epsilon: float = 1e-5
    image: tuple[int, int, int] = (32, 32, 3)

    def shapes(self) -> Shapes:
        """Of the params: layer -> {"kernel"}, {"scale", "bias", "mean", "var"} or, for "fc", {"kernel", "bias"}."""
        shapes = conv_norm_layers("conv1", 3, 3, self.image[-1], self.width)
        inputs = self.width
        for name, width, _ in self._blocks():
            shapes |= conv_norm_layers(f"{name}.conv1", 3, 3, inputs, width)
            shapes |= conv_norm_layers(f"{name}.conv2", 3, 3, width, width)
            inputs = width
        return shapes | {"fc": layer(inputs, self.classes)}

    def apply(self, params: Layers, images: Float[Array, "batch h w c"]) -> Float[Array, "batch classes"]:
        """Logits of images."""
        x = jax.nn.relu(conv_norm(params, "conv1", images, self.epsilon))
        for name, _, stride in self._blocks():
            y = jax.nn.relu(conv_norm(params, f"{name}.conv1", x, self.epsilon, stride))
            y = conv_norm(params, f"{name}.conv2", y, self.epsilon)
            x = jax.nn.relu(y + _shortcut(x, y.shape[-1], stride))
        return affine(params["fc"], jnp.mean(x, axis=(1, 2)))

    def _blocks(self) -> Iterator[_Block]:
        return _blocks((self.blocks,) * 3, self.width)


def _shortcut(x: Array, channels: int, stride: int) -> Array:
    """Every so many pixels, and zeros for the channels that are new."""
    if stride == 1:
        return x
    new = channels - x.shape[-1]
    ends = ((0, 0, 0), (0, 0, 0), (0, 0, 0), (new // 2, new - new // 2, 0))
    return lax.pad(x[:, ::stride, ::stride], jnp.zeros((), x.dtype), ends)
