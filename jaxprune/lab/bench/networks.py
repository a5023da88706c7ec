"""The models that are measured, by name: what a model zoo would hand over, with random weights.

    network = build("resnet50", key)
    logits = network.apply(network.params, images)      # images (batch, *network.image)

Speed depends on shapes and on where the zeros are, not on the values, so nothing is downloaded and nothing trained.
Weights are scaled by their fan-in (He et al. 2015, arXiv:1502.01852), so activations stay finite.
"""

import difflib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxprune.lab import config as cfg
from jaxprune.lab import models
from jaxprune.lab.bench import resnet, vgg
from jaxprune.types import Params

IMAGENET, MNIST = ("resnet50", "vgg19"), ("tf_tutorial_cnn", "lenet_300_100", "lenet_5", "mlp")
NAMES = (*IMAGENET, *MNIST)


class Network(NamedTuple):
    """A model to measure.

    Attributes:
        name: one of `NAMES`, or what a run calls itself.
        params: pytree of arrays.
        apply: (params, images (batch, h, w, c)) -> logits.
        image: (h, w, c).
    """

    name: str
    params: Params
    apply: Callable[..., Float[Array, "batch classes"]]
    image: tuple[int, int, int]


def build(name: str, key: Key[Array, ""], side: int | None = None) -> Network:
    """A model of the list, with random weights.

    Args:
        name: one of `NAMES`.
        key: draws the weights.
        side: height and width of the images; without it 224 for ImageNet's models, 28 for MNIST's.

    Raises:
        ValueError: an unknown name, or images too small for the model.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no model {name!r} to measure. There are: {', '.join(NAMES)}.{hint}")
    if name in MNIST:
        image = (side or 28, side or 28, 1)
        return of_config(name, cfg.Model(name=name), image, classes=10, key=key)  # pyright: ignore[reportArgumentType]
    image = (side or 224, side or 224, 3)
    if image[0] < 32:
        raise ValueError(f"{name} halves its images five times: it needs 32 x 32 pixels or more, {side} arrived.")
    shapes = resnet.kernel_shapes() if name == "resnet50" else vgg.kernel_shapes(image)
    return Network(name, random_layers(shapes, key), resnet.apply if name == "resnet50" else vgg.apply, image)


def of_config(name: str, model: cfg.Model, image: tuple[int, int, int], classes: int, key: Key[Array, ""]) -> Network:
    """A network of the experiments, without what only training needs."""
    network = models.build(model, image, classes, key)
    return Network(name, network.params, lambda params, images: network.apply(params, images), image)


def random_layers(shapes: dict[str, tuple[int, ...]], key: Key[Array, ""]) -> resnet.Layers:
    """Kernels and biases of these shapes, kernels with the variance 2 / fan-in."""
    rng = host_generator(key)

    def layer(shape: tuple[int, ...]) -> dict[str, Array]:
        kernel = rng.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / math.prod(shape[:-1])))
        bias = rng.standard_normal(shape[-1], np.float32) * np.float32(0.1)
        return {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}

    return {name: layer(shape) for name, shape in shapes.items()}


def host_generator(key: Key[Array, ""]) -> np.random.Generator:
    """NumPy's generator, seeded by a key: fifty shapes drawn in JAX would be fifty programs to compile."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
