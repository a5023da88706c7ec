"""Evidence for criteria, computed from a run's training samples: what a criterion names, as far as runs have it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

import jaxprune as jp
from jaxprune.lab.data.samples import Samples
from jaxprune.lab.recipe import words
from jaxprune.lab.runs import train
from jaxprune.types import Params

SAMPLES = 2048  # of the training data


def of(
    found: Any, apply: Callable[..., Array], params: Params, samples: Samples, key: Key[Array, ""]
) -> dict[str, Any]:
    """The evidence that a criterion looks at, by keyword; pure.

    Args:
        found: the criterion.
        apply: the network's function.
        params: where.
        samples: training samples, of which the first are looked at.
        key: for criteria that draw.
    """
    rows = jnp.arange(min(SAMPLES, samples.labels.shape[0]))

    def loss(params: Params, rows: Any = rows) -> Array:
        return train.mean_loss(apply, params, samples, rows, None)[0]

    makers = {**_MAKERS, "key": lambda *_: key}
    return {name: makers[name](loss, apply, params, samples, rows) for name in words.looks_at(found)}


def _flow(loss: Any, apply: Any, params: Params, samples: Samples, rows: Any) -> Params:
    image = jax.ShapeDtypeStruct((1, *samples.images.shape[1:]), "float32")
    return jp.evidence.flow_grads(apply, params, image)


_MAKERS: dict[str, Callable[..., Any]] = {
    "grads": lambda loss, apply, params, samples, rows: jax.grad(loss)(params),
    "hessian_grads": lambda loss, apply, params, samples, rows: jp.evidence.hessian_grads(loss, params),
    "flow_grads": _flow,
    "squared_grads": lambda loss, apply, params, samples, rows: jp.evidence.squared_grads(
        lambda p, row: loss(p, row[None]), params, rows
    ),
}
