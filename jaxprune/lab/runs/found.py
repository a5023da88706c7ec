"""What a method is made of and no file can say: found by the run, from its model and its held-out samples.

granularity = "channels"            the couplings of the channels, by a trace of the model
distribution = "by_sensitivity"     what each leaf can bear, each pruned alone once the dense model is trained
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxprune as jp
from jaxprune.lab import models
from jaxprune.lab.recipe import build, words
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.runs import evidence
from jaxprune.methods import group_scores
from jaxprune.types import Params

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def of_model(prune: cfg.Prune, network: models.Network, image: tuple[int, ...]) -> dict[str, Any]:
    """What the network's function says before it is trained.

    Args:
        prune: the [prune] section.
        network: the model.
        image: shape of one input.
    """
    if "couplings" not in prune.granularity.left_to_the_run:
        return {}
    inputs = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    return {"couplings": jp.couplings(lambda params, x: network.apply(params, x), network.params, inputs)}


def of_dense(
    prune: cfg.Prune,
    known: dict[str, Any],
    dense: Params,
    evaluate: Callable[[Params], float | None],
    evidence_of: Callable[[jp.Method, Params], dict[str, Any]],
) -> dict[str, Any]:
    """The same, and what only the trained model says.

    Args:
        prune: the [prune] section.
        known: of `of_model`.
        dense: trained params.
        evaluate: params -> accuracy on held-out samples; None where there are none.
        evidence_of: (method, params) -> what its criterion looks at.
    """
    if "curves" not in prune.distribution.left_to_the_run:
        return known
    method = build.method(prune, {**build.STAND_INS, **known})
    scanned = sorted({*SPARSITIES, *prune.levels, prune.sparsity or 0.0} - {0.0})
    found = jp.sensitivity(
        evaluate=evaluate, params=dense, method=method, sparsities=scanned, **evidence_of(method, dense)
    )
    return {**known, "curves": found.distribution().curves}


def check(prune: cfg.Prune, held_out: int) -> None:
    """Refuse what cannot be measured, before anything is trained.

    Raises:
        ConfigError: no held-out samples, or groups that are not those of single leaves.
    """
    if "curves" not in prune.distribution.left_to_the_run:
        return
    if not held_out:
        raise cfg.ConfigError(
            "prune.distribution: by_sensitivity is measured on held-out samples: give it curves, or data.validation "
            "above 0."
        )
    if prune.granularity.name == "channels":
        raise cfg.ConfigError(
            "prune.distribution: by_sensitivity is measured leaf by leaf, and channels reach across leaves: give it "
            'curves by the layers of channels, such as "conv1/kernel:3".'
        )


def check_activations(prune: cfg.Prune, network: models.Network, image: tuple[int, ...], known: dict[str, Any]) -> None:
    """Refuse a model whose activations do not say what the criterion looks at, before anything is trained.

    Args:
        prune: the [prune] section.
        network: the model.
        image: shape of one input.
        known: of `of_model`.

    Raises:
        ValueError: a leaf cannot be followed, or nothing scales its outputs where scales are looked at.
    """
    method = build.method(prune, {**build.STAND_INS, **known})
    if not words.looks_at(method.criterion) & {*build.ACTIVATIONS}:
        return

    def scores(params: Params, images: jax.Array) -> Any:
        met = evidence.of_activations(method, network.apply, params, [images])
        return group_scores(method, params, **met)[2]

    jax.eval_shape(scores, network.params, jax.ShapeDtypeStruct((1, *image), jnp.float32))
