"""The zoo: every model by its name, with random weights or with shapes alone.

network = build("resnet50", key)                        # weights by their fan-in: nothing is downloaded or trained
logits = network.apply(network.params, images)          # (batch, *network.sample.shape)
network = shapes("decoder_7b")                          # `jax.ShapeDtypeStruct` for every array: nothing is made
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxprune.lab.models import small, trainable
from jaxprune.lab.models.parts import random_params
from jaxprune.lab.models.registry import MNIST, MODELS, NAMES, Model, model
from jaxprune.lab.recipe import config as cfg

__all__ = ["MNIST", "MODELS", "NAMES", "Model", "Network", "build", "model", "of_config", "shapes"]


class Network(NamedTuple):
    """A model with its params.

    Attributes:
        name: one of `NAMES`, or what a run calls itself.
        params: pytree of arrays, or of `jax.ShapeDtypeStruct`.
        apply: (params, inputs (batch, *sample.shape)) -> logits.
        sample: shape and dtype of one input.
    """

    name: str
    params: Any
    apply: Callable[..., Float[Array, "batch *logits"]]
    sample: jax.ShapeDtypeStruct


def build(name: str, key: Key[Array, ""], side: int | None = None) -> Network:
    """A model with random weights.

    Args:
        name: one of `NAMES`.
        key: draws the weights.
        side: height and width of the images; without it the model's own.

    Raises:
        ValueError: an unknown name, or images that the model cannot take.
    """
    if name in MNIST:
        image = (side or 28, side or 28, 1)
        return of_config(name, cfg.Model(name=name), image, classes=10, key=key)
    chosen = model(name, side)
    return Network(name, random_params(chosen.shapes(), key), chosen.apply, chosen.sample)


def shapes(name: str, side: int | None = None) -> Network:
    """A model with the shapes of its params: enough to trace it, at no cost.

    Args:
        name: see `build`.
        side: see `build`.

    Raises:
        ValueError: see `build`.
    """
    if name in MNIST:
        image = (side or 28, side or 28, 1)
        return _named(name, trainable.shapes(cfg.Model(name=name), image, classes=10), image)
    chosen = model(name, side)
    return Network(name, chosen.shapes(), chosen.apply, chosen.sample)


def of_config(name: str, model: cfg.Model, image: tuple[int, ...], classes: int, key: Key[Array, ""]) -> Network:
    """A network of the experiments, without what only training needs.

    Args:
        name: what it is called.
        model: the [model] section.
        image: shape of one input.
        classes: number of logits.
        key: draws the weights.
    """
    return _named(name, trainable.build(model, image, classes, key), image)


def _named(name: str, network: small.Network, image: tuple[int, ...]) -> Network:
    sample = jax.ShapeDtypeStruct(image, jnp.float32)
    return Network(name, network.params, lambda params, images: network.apply(params, images), sample)
