"""MobileNet v1: convolutions parted in two, one kernel for each channel, then a 1x1 convolution across channels.

    block(x) = relu(conv_pw(relu(conv_dw(x)))),     batch norm after both, folded or not

Images are NHWC; a depthwise kernel is (3, 3, 1, channels).

References:
    Howard et al. 2017, arXiv:1704.04861. Strides pad one pixel on all sides, not TensorFlow's more on one side.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.lab.models.parts import Layers, OfImages, Shapes, affine, check_image, conv_norm, conv_norm_layers, layer

BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
"""Channels that a block puts out, and stride of its depthwise convolution."""


@dataclasses.dataclass(frozen=True)
class MobileNetV1(OfImages):
    """The network of the paper's table 1, and narrower ones.

    Attributes:
        blocks: (channels, stride) of each.
        stem: channels of the first convolution, which has stride 2.
        classes: number of logits.
        epsilon: of the batch norms.
        image: (h, w, c) of a sample; the model takes any size from 32 x 32 on.

    Raises:
        ValueError: the images are too small.
    """

    blocks: tuple[tuple[int, int], ...] = BLOCKS
    stem: int = 32
    classes: int = 1000
    epsilon: float = 1e-3
    image: tuple[int, int, int] = (224, 224, 3)

    def __post_init__(self) -> None:
        check_image("MobileNet", self.image, 1 + sum(stride == 2 for _, stride in self.blocks))

    def shapes(self) -> Shapes:
        """Of the params: layer -> {"kernel"}, {"scale", "bias", "mean", "var"} or, for "fc", {"kernel", "bias"}."""
        shapes = conv_norm_layers("conv1", 3, 3, self.image[-1], self.stem)
        inputs = self.stem
        for i, (channels, _) in enumerate(self.blocks):
            shapes |= conv_norm_layers(f"block{i}.conv_dw", 3, 3, 1, inputs)
            shapes |= conv_norm_layers(f"block{i}.conv_pw", 1, 1, inputs, channels)
            inputs = channels
        return shapes | {"fc": layer(inputs, self.classes)}

    def apply(self, params: Layers, images: Float[Array, "batch h w c"]) -> Float[Array, "batch classes"]:
        """Logits of images."""
        x = jax.nn.relu(conv_norm(params, "conv1", images, self.epsilon, 2))
        for i, (_, stride) in enumerate(self.blocks):
            x = jax.nn.relu(conv_norm(params, f"block{i}.conv_dw", x, self.epsilon, stride, depthwise=True))
            x = jax.nn.relu(conv_norm(params, f"block{i}.conv_pw", x, self.epsilon))
        return affine(params["fc"], jnp.mean(x, axis=(1, 2)))
