"""The small networks of the experiments, in Flax NNX, each as a pure function of its parameters.

    network = build(config.model, (28, 28, 1), classes=10, key=key)
    logits = network.apply(network.params, images)          # images (batch, h, w, c) in [0, 1]

Convolutions are NHWC with HWIO kernels, matrices (in, out).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxprune.lab.config import ConfigError, Model
from jaxprune.types import Params


class Network(NamedTuple):
    """A model taken apart: what is trained, and what is done with it.

    Attributes:
        params: pytree of arrays, or of `jax.ShapeDtypeStruct`, leaf names such as "layers/0/kernel".
        apply: (params, images (batch, h, w, c), key=None) -> logits (batch, classes); a key switches dropout on.
    """

    params: Any
    apply: Callable[..., Float[Array, "batch classes"]]


class MLP(nnx.Module):
    """Fully connected layers with ReLU between them, on flattened images."""

    def __init__(self, sizes: Sequence[int], dropout: float, rngs: nnx.Rngs):
        self.layers = nnx.List(nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes))
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """Images (batch, h, w, c) to logits (batch, classes)."""
        x = x.reshape(x.shape[0], -1)
        for i, layer in enumerate(self.layers[:-1]):
            layer_key = None if key is None else jax.random.fold_in(key, i)
            x = self.dropout(nnx.relu(layer(x)), deterministic=key is None, rngs=layer_key)
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
        self.dropout = nnx.Dropout(dropout)
        self.relu_convs = relu_convs

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """Images (batch, h, w, c) to logits (batch, classes)."""
        for conv in (self.conv1, self.conv2):
            x = nnx.relu(conv(x)) if self.relu_convs else conv(x)
            x = nnx.max_pool(x, (2, 2), (2, 2))
        x = nnx.relu(self.fc1(x.reshape(x.shape[0], -1)))
        return self.fc2(self.dropout(x, deterministic=key is None, rngs=key))


def build(model: Model, image: tuple[int, int, int], classes: int, key: Key[Array, ""]) -> Network:
    """The configured network for images of one shape, initialised with `key`.

    Args:
        model: the [model] section.
        image: (h, w, c).
        classes: number of logits.
        key: draws the initial weights; equal keys give equal weights.

    Raises:
        ConfigError: the images are too small for the network.
    """
    return _network(_module(model, image, classes, key))


def shapes(model: Model, image: tuple[int, int, int], classes: int) -> Network:
    """The configured network with the shapes of its params: nothing is computed.

    Args:
        model: see `build`.
        image: see `build`.
        classes: see `build`.

    Raises:
        ConfigError: see `build`.
    """
    return _network(nnx.eval_shape(lambda: _module(model, image, classes, jax.random.key(0))))


def _module(model: Model, image: tuple[int, int, int], classes: int, key: Key[Array, ""]) -> nnx.Module:
    rngs = nnx.Rngs(params=key)
    if model.name in ("mlp", "lenet_300_100"):
        widths = model.widths if model.name == "mlp" else (300, 100)
        return MLP((image[0] * image[1] * image[2], *widths, classes), model.dropout, rngs)
    if model.name == "lenet_5":
        return ConvNet(image, (20, 50), 500, classes, "VALID", relu_convs=False, dropout=model.dropout, rngs=rngs)
    return ConvNet(image, (32, 64), 1024, classes, "SAME", relu_convs=True, dropout=model.dropout, rngs=rngs)


def _network(module: nnx.Module) -> Network:
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    params = nnx.as_pure(state)

    def apply(params: Params, images: Array, key: Array | None = None) -> Array:
        return nnx.merge(graph, params, rest)(images, key)

    return Network(params, apply)


def parameter_count(params: Params) -> int:
    """How many numbers the parameters are."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))
