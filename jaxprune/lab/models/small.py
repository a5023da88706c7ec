"""The small networks of the experiments, in Flax NNX, each as a pure function of its parameters.

    network = build(config.model, (28, 28, 1), classes=10, key=key)
    logits = network.apply(network.params, images)          # images (batch, h, w, c) in [0, 1]

Convolutions are NHWC with HWIO kernels, matrices (in, out).
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxprune.lab.models.parts import Network
from jaxprune.lab.recipe.config import ConfigError, Model
from jaxprune.types import Params

Rates: TypeAlias = Mapping[str, float]


@jax.custom_jvp
def max_pool(x: Float[Array, "batch h w c"]) -> Float[Array, "batch h2 w2 c"]:
    """The largest value of each window of 2 x 2; odd last rows and columns are left out.

    Its derivative is that of four strided slices and their maxima: XLA's own, select-and-scatter, takes ten to thirty
    times as long on CPU, a third of a training step of the networks below.
    """
    return nnx.max_pool(x, (2, 2), (2, 2))


@max_pool.defjvp
def _max_pool_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return jax.jvp(_largest_of_four, primals, tangents)


def _largest_of_four(x: Array) -> Array:
    height, width = (side // 2 * 2 for side in x.shape[1:3])
    corners = [x[:, row:height:2, column:width:2] for row in (0, 1) for column in (0, 1)]
    return functools.reduce(jnp.maximum, corners)


class MLP(nnx.Module):
    """Fully connected layers with ReLU between them, on flattened images."""

    def __init__(self, sizes: Sequence[int], dropout: float, rngs: nnx.Rngs):
        self.layers = nnx.List(nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes))
        self.dropout = dropout

    def __call__(self, x: Array, key: Array | None = None, rates: Rates | None = None) -> Array:
        """Images (batch, h, w, c) to logits (batch, classes)."""
        x = x.reshape(x.shape[0], -1)
        for i, layer in enumerate(self.layers[:-1]):
            layer_key = None if key is None else jax.random.fold_in(key, i)
            x = _dropped(nnx.relu(layer(x)), (rates or {}).get(f"layers/{i}/kernel", self.dropout), layer_key)
        return self.layers[-1](x)


class NormedMLP(nnx.Module):
    """Fully connected layers with batch norm and ReLU between them; "jaxprune.lab.models.small:NormedMLP" names it."""

    def __init__(self, image: Sequence[int], classes: int, rngs: nnx.Rngs, widths: Sequence[int] = (300, 100)):
        sizes = (math.prod(image), *widths, classes)
        self.layers = nnx.List(nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes))
        self.norms = nnx.List(nnx.BatchNorm(width, rngs=rngs) for width in widths)

    def __call__(self, x: Array) -> Array:
        """Images (batch, h, w, c) to logits (batch, classes)."""
        x = x.reshape(x.shape[0], -1)
        for layer, norm in zip(self.layers[:-1], self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return self.layers[-1](x)


class ConvNet(nnx.Module):
    """Two 5x5 convolutions with 2x2 max pooling, then two fully connected layers.

    With padding "SAME", 32 and 64 filters and 1024 units it is the CNN of the TensorFlow MNIST tutorial; with "VALID",
    20, 50 and 500, and no ReLU after the convolutions, it is Caffe's LeNet-5.
    """

    def __init__(
        self, image: tuple[int, int, int], filters: tuple[int, int], hidden: int, classes: int, padding: str, *,
        relu_convs: bool, dropout: float, rngs: nnx.Rngs,
    ):  # fmt: skip
        first, second = filters
        self.conv1 = nnx.Conv(image[-1], first, (5, 5), padding=padding, rngs=rngs)
        self.conv2 = nnx.Conv(first, second, (5, 5), padding=padding, rngs=rngs)
        shrink = 4 if padding == "VALID" else 0
        height, width = (((side - shrink) // 2 - shrink) // 2 for side in image[:2])
        if min(height, width) < 1:
            least = 16 if padding == "VALID" else 4
            raise ConfigError(
                f"This network needs images of {least} x {least} pixels or more, got {image[0]} x {image[1]}."
            )
        self.fc1 = nnx.Linear(height * width * second, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, classes, rngs=rngs)
        self.dropout = dropout
        self.relu_convs = relu_convs

    def __call__(self, x: Array, key: Array | None = None, rates: Rates | None = None) -> Array:
        """Images (batch, h, w, c) to logits (batch, classes)."""
        for conv in (self.conv1, self.conv2):
            x = nnx.relu(conv(x)) if self.relu_convs else conv(x)
            x = max_pool(x)
        x = nnx.relu(self.fc1(x.reshape(x.shape[0], -1)))
        return self.fc2(_dropped(x, (rates or {}).get("fc1/kernel", self.dropout), key))


def _dropped(x: Array, rate: float, key: Array | None) -> Array:
    return nnx.Dropout(rate)(x, deterministic=key is None, rngs=key)


def build(model: Model, image: tuple[int, ...], classes: int, key: Key[Array, ""] | None) -> Network:
    """The configured network for images of one shape, initialised with `key`.

    Args:
        model: the [model] section.
        image: (h, w, c), or of any shape for an mlp.
        classes: number of logits.
        key: draws the initial weights; None: shapes of params, nothing is computed.

    Raises:
        ConfigError: the images are too small for the network, or no images.
    """
    make = functools.partial(_module, model, image, classes)
    module = nnx.eval_shape(make, jax.random.key(0)) if key is None else make(key)
    graph, state, rest = nnx.split(module, nnx.Param, ...)

    def apply(params: Params, images: Array, key: Array | None = None, rates: Rates | None = None) -> Array:
        return nnx.merge(graph, params, rest)(images, key, rates)

    return Network(nnx.as_pure(state), apply)


def _module(model: Model, image: tuple[int, ...], classes: int, key: Key[Array, ""]) -> nnx.Module:
    rngs = nnx.Rngs(params=key)
    if model.name in ("mlp", "lenet_300_100"):
        widths = model.widths if model.name == "mlp" else (300, 100)
        return MLP((math.prod(image), *widths, classes), model.dropout, rngs)
    image = as_image(model.name, image)
    if model.name == "lenet_5":
        return ConvNet(image, (20, 50), 500, classes, "VALID", relu_convs=False, dropout=model.dropout, rngs=rngs)
    return ConvNet(image, (32, 64), 1024, classes, "SAME", relu_convs=True, dropout=model.dropout, rngs=rngs)


def as_image(name: str, image: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape of an input as that of an image.

    Raises:
        ConfigError: it is none.
    """
    if len(image) != 3:
        raise ConfigError(f"model.name: {name} takes images (height, width, channels), the data has {image}.")
    return image[0], image[1], image[2]


def parameter_count(params: Params) -> int:
    """How many numbers the parameters are."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))
