"""From the words of a config to the objects they stand for: method, schedule, optimizer."""

from typing import Any

import jax
import optax

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab import config as cfg
from jaxprune.types import Params

CRITERIA = {"magnitude": jp.magnitude, "random": jp.random, "taylor": jp.taylor}
GRANULARITIES = {"element": jp.Element, "block": jp.Block, "input": jp.Input, "output": jp.Output}
DISTRIBUTIONS = {
    "uniform": jp.Uniform,
    "global": jp.Global,
    "erk": jp.ERK,
    "per_output": jp.PerOutput,
    "nm": jp.NM,
    "sigma_threshold": jp.SigmaThreshold,
    "threshold": jp.Threshold,
}


def method(prune: cfg.Prune) -> jp.Method:
    """The method that [prune] describes."""
    return jp.Method(
        criterion=CRITERIA[prune.criterion],
        granularity=GRANULARITIES[prune.granularity.name](**_options(prune.granularity)),
        distribution=distribution(prune.distribution),
        select=prune.select or jp.weights,
    )


def check(prune: cfg.Prune, params: Params) -> None:
    """Refuse a method that does not fit the params, before anything is trained.

    Raises:
        ValueError: a pattern that matches no leaf, an N:M that does not divide the inputs, ...: see `compute_masks`.
    """

    def masks(params: Params, key: Any) -> Any:
        return jp.compute_masks(method(prune), params, prune.sparsity, grads=params, key=key)

    jax.eval_shape(masks, params, jax.random.key(0))


def distribution(given: cfg.Distribution) -> Any:
    """The distribution that a table describes, with those of its rules."""
    if given.name != "by_rule":
        return DISTRIBUTIONS[given.name](**_options(given))
    rules = (given.rules or {}).items()
    return jp.ByRule(tuple((p, distribution(r) if isinstance(r, cfg.Distribution) else r) for p, r in rules))


def _options(table: cfg.Table) -> dict[str, Any]:
    return table.model_dump(exclude={"name"})


def optimizer(phase: cfg.Phase, steps: int) -> optax.GradientTransformation:
    """The optimizer of a phase of `steps` steps. Weight decay acts on matrices and kernels alone.

    For adamw it is decoupled from the gradient; for sgd and adam it is the gradient of (weight_decay / 2) |w|^2.
    """
    rate = _learning_rate(phase, max(steps, 1))
    if phase.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=phase.weight_decay, mask=_decayed)
    inner = optax.sgd(rate, momentum=phase.momentum) if phase.optimizer == "sgd" else optax.adam(rate)
    if not phase.weight_decay:
        return inner
    return optax.chain(optax.add_decayed_weights(phase.weight_decay, mask=_decayed), inner)


def _learning_rate(phase: cfg.Phase, steps: int) -> Any:
    if phase.decay == "cosine":
        return optax.cosine_decay_schedule(phase.learning_rate, steps)
    if phase.decay == "linear":
        return optax.linear_schedule(phase.learning_rate, 0.0, steps)
    return phase.learning_rate


def _decayed(params: Params) -> Any:
    return tree.map_named(tree.weights, params)


def pruning_optimizer(
    inner: optax.GradientTransformation, prune: cfg.Prune, steps_per_epoch: int, key: Any
) -> optax.GradientTransformation:
    """`jp.prune` for the stage of a gradual or an iterative config; the last masks fall within its steps."""
    length, stage = prune.duration.steps(steps_per_epoch), prune_steps(prune, steps_per_epoch)
    if prune.how == "iterative":
        every = length
        schedule = jp.rounds(prune.sparsity, count=prune.rounds, length=every) if prune.sparsity is not None else None
    else:
        every = max(prune.update_every.steps(steps_per_epoch), 1)
        # The ramp ends at the last update that the stage has.
        end = (stage - 1) // every * every
        schedule = jp.cubic(prune.sparsity, begin=0, end=end) if prune.sparsity is not None else None
    when = jp.every(every)
    return jp.prune(inner, method(prune), sparsity=schedule, update_when=when, key=key)


def prune_steps(prune: cfg.Prune, steps_per_epoch: int) -> int:
    """Training steps of the prune stage: none in one shot, the ramp if gradual, all rounds if iterative.

    Raises:
        ConfigError: `duration` comes to no step, so that nothing would be pruned.
    """
    length = prune.duration.steps(steps_per_epoch)
    if prune.how != "one-shot" and not length:
        raise cfg.ConfigError(
            f'prune.duration: "{prune.duration}" comes to 0 steps, at least 1 is needed to prune {prune.how}.'
        )
    return {"one-shot": 0, "gradual": length, "iterative": prune.rounds * length}[prune.how]
