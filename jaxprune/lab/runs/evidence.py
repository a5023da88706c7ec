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

    image = jax.ShapeDtypeStruct((1, *samples.images.shape[1:]), "float32")
    makers: dict[str, Callable[[], Any]] = {  # those of `jaxprune.lab.recipe.build.EVIDENCE`, and the key
        "grads": lambda: jax.grad(loss)(params),
        "hessian_grads": lambda: jp.evidence.hessian_grads(loss, params),
        "flow_grads": lambda: jp.evidence.flow_grads(apply, params, image),
        "squared_grads": lambda: jp.evidence.squared_grads(lambda p, row: loss(p, row[None]), params, rows),
        "key": lambda: key,
    }
    return {name: makers[name]() for name in words.looks_at(found)}
