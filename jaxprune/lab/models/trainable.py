"""Every network that an experiment can train, by the name in its [model]: the small ones, and larger ones for images.

network = build(config.model, (32, 32, 3), classes=10, key=key)
network.apply(network.params, images)                   # logits, batch norms by the statistics of training
network.observe(network.params, images)                 # logits and statistics of this batch: in training
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Key

from jaxprune.lab.models import own, small
from jaxprune.lab.models.parts import initial_params, observed
from jaxprune.lab.models.registry import MODELS
from jaxprune.lab.models.small import Network
from jaxprune.lab.recipe.config import Model


def build(model: Model, image: tuple[int, ...], classes: int, key: Key[Array, ""]) -> Network:
    """A network of `small`, a larger one with batch norms at their beginning, or the user's own; see `small.build`."""
    if own.is_own(model):
        return own.build(model, image, classes, key)
    if model.name not in MODELS:
        return small.build(model, image, classes, key)
    network = shapes(model, image, classes)
    return network._replace(params=initial_params(network.params, key))


def shapes(model: Model, image: tuple[int, ...], classes: int) -> Network:
    """The same with the shapes of its params: nothing is computed, but for a model of the user's own."""
    if own.is_own(model):
        network = own.build(model, image, classes, jax.random.key(0))
        return network._replace(params=jax.eval_shape(lambda: network.params))
    if model.name not in MODELS:
        return small.shapes(model, image, classes)
    image = small.as_image(model, image)
    chosen: Any = dataclasses.replace(MODELS[model.name], image=image, classes=classes)  # pyright: ignore
    params = chosen.shapes()

    def apply(params: Any, images: Array, key: Any = None, rates: Any = None) -> Array:
        return chosen.apply(params, images)

    normed = any("var" in layer for layer in params.values())
    return Network(params, apply, observed(chosen.apply) if normed else None)
