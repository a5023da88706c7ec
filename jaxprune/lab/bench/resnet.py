"""ResNet-50 for inference: a pure function of its kernels and biases, batch norm folded into both.

    block(x) = relu(conv3(relu(conv2(relu(conv1(x))))) + shortcut(x)),   conv(x) = kernel * x + bias

Layers have torchvision's names, and its strides: the 3x3 convolution of a stage's first block takes the stride, not the
1x1 before it ("v1.5"). Images are NHWC, kernels HWIO.

References:
    He et al. 2015, arXiv:1512.03385.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""Width inside the blocks, number of blocks, stride of the first block; blocks put out four times their width."""

CLASSES = 1000
Layers = dict[str, dict[str, Array]]


def kernel_shapes() -> dict[str, tuple[int, ...]]:
    """Layer -> shape of its kernel, HWIO or (in, out), in the order they run."""
    shapes: dict[str, tuple[int, ...]] = {"conv1": (7, 7, 3, 64)}
    inputs = 64
    for stage, (width, blocks, _) in enumerate(STAGES, 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1"] = (1, 1, inputs, width)
            shapes[f"{name}.conv2"] = (3, 3, width, width)
            shapes[f"{name}.conv3"] = (1, 1, width, 4 * width)
            if block == 0:
                shapes[f"{name}.downsample.0"] = (1, 1, inputs, 4 * width)
            inputs = 4 * width
    return shapes | {"fc": (inputs, CLASSES)}


def apply(params: Layers, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch 1000"]:
    """Logits of images, of any size from 32 x 32 on."""
    x = jax.nn.relu(_conv(params["conv1"], images, stride=2))
    ends = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ends)
    for stage, (_, blocks, stride) in enumerate(STAGES, 1):
        for block in range(blocks):
            x = _bottleneck(params, f"layer{stage}.{block}", x, stride if block == 0 else 1)
    return affine(params["fc"], jnp.mean(x, axis=(1, 2)))


def _bottleneck(params: Layers, name: str, x: Array, stride: int) -> Array:
    y = jax.nn.relu(_conv(params[f"{name}.conv1"], x))
    y = jax.nn.relu(_conv(params[f"{name}.conv2"], y, stride))
    y = _conv(params[f"{name}.conv3"], y)
    shortcut = params.get(f"{name}.downsample.0")
    y = y + (x if shortcut is None else _conv(shortcut, x, stride))
    return jax.nn.relu(y)


def _conv(layer: dict[str, Array], x: Array, stride: int = 1) -> Array:
    around = layer["kernel"].shape[0] // 2
    return conv(layer, x, stride, ((around, around), (around, around)))


def conv(
    layer: dict[str, Array], x: Float[Array, "batch h w c"], stride: int, padding: tuple[tuple[int, int], ...]
) -> Float[Array, "batch h2 w2 c2"]:
    """Convolution and bias."""
    y = lax.conv_general_dilated(
        x, layer["kernel"], (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # What `y + bias` is, said so that `jax_numpy_rank_promotion="raise"` lets it pass.
    return y + jnp.expand_dims(layer["bias"], (0, 1, 2))


def affine(layer: dict[str, Array], x: Float[Array, "batch n_in"]) -> Float[Array, "batch n_out"]:
    """Product and bias."""
    return x @ layer["kernel"] + jnp.expand_dims(layer["bias"], 0)
