"""Evidence for criteria, computed from a run's training samples: what a criterion names, as far as runs have it."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

import jaxprune as jp
from jaxprune.lab.data.samples import Samples, scaled
from jaxprune.lab.recipe import build, words
from jaxprune.lab.runs import train
from jaxprune.types import Params

SAMPLES = 2048  # of the training data


def of(
    method: jp.Method, apply: Callable[..., Array], params: Params, samples: Samples, key: Key[Array, ""]
) -> dict[str, Any]:
    """The evidence that a method's criterion looks at, by keyword; pure.

    Args:
        method: the composition.
        apply: the network's function.
        params: where.
        samples: training samples, of which the first are looked at.
        key: for criteria that draw.
    """
    count = min(SAMPLES, samples.labels.shape[0])
    rows = jnp.arange(count)

    def loss(params: Params, rows: Any = rows) -> Array:
        return train.mean_loss(apply, params, samples, rows, None)[0]

    image = jax.ShapeDtypeStruct((1, *samples.images.shape[1:]), "float32")
    makers: dict[str, Callable[[], Any]] = {  # those of `jaxprune.lab.recipe.build.EVIDENCE`, and the key
        "grads": lambda: jax.grad(loss)(params),
        "hessian_grads": lambda: jp.evidence.hessian_grads(loss, params),
        "flow_grads": lambda: jp.evidence.flow_grads(apply, params, image),
        "squared_grads": lambda: jp.evidence.squared_grads(lambda p, row: loss(p, row[None]), params, rows),
        "key": lambda: key,
    }
    size = train.chunk_size(samples)
    batches = (scaled(samples, samples.images[i : min(i + size, count)]) for i in range(0, count, size))
    asked = words.looks_at(method.criterion)
    seen = of_activations(method, apply, params, batches) if asked & {*build.ACTIVATIONS} else {}
    return {name: seen[name] if name in seen else makers[name]() for name in asked}


def of_activations(
    method: jp.Method, apply: Callable[..., Array], params: Params, batches: Iterable[Array]
) -> dict[str, Any]:
    """What a method's criterion looks at of the activations that its leaves meet or make, by keyword; pure.

    Args:
        method: the composition.
        apply: the network's function.
        params: where.
        batches: images as networks take them.

    Raises:
        ValueError: a leaf cannot be followed through the model, see `jaxprune.evidence.of_activations`.
    """
    seen = jp.evidence.of_activations(lambda params, x: apply(params, x), params, batches, select=method.select)
    return seen.for_(method)
