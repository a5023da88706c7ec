"""VGG-19 for inference: sixteen 3x3 convolutions in five groups, 2x2 max pooling after each, three wide layers.

Layers have the names of the first reimplementations, "conv1_1" to "fc8"; images are NHWC, kernels HWIO.

References:
    Simonyan and Zisserman 2014, arXiv:1409.1556.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxprune.lab.bench.resnet import CLASSES, Layers, affine, conv

GROUPS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
"""Channels and convolutions of each group."""

HIDDEN = 4096


def kernel_shapes(image: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Layer -> shape of its kernel, HWIO or (in, out), in the order they run.

    Args:
        image: (h, w, c); the first wide layer has an input for every one of h/32 x w/32 x 512 activations.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    height, width, inputs = image
    for group, (channels, convolutions) in enumerate(GROUPS, 1):
        for i in range(convolutions):
            shapes[f"conv{group}_{i + 1}"] = (3, 3, inputs, channels)
            inputs = channels
    wide = (height // 32 * (width // 32) * inputs, HIDDEN)
    return shapes | {"fc6": wide, "fc7": (HIDDEN, HIDDEN), "fc8": (HIDDEN, CLASSES)}


def apply(params: Layers, images: Float[Array, "batch h w c"]) -> Float[Array, "batch 1000"]:
    """Logits of images."""
    x = images
    for group, (_, convolutions) in enumerate(GROUPS, 1):
        for i in range(convolutions):
            x = jax.nn.relu(conv(params[f"conv{group}_{i + 1}"], x, 1, ((1, 1), (1, 1))))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(x.shape[0], -1)
    for name in ("fc6", "fc7"):
        x = jax.nn.relu(affine(params[name], x))
    return affine(params["fc8"], x)
