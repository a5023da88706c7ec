"""From the words of a config to the objects they stand for: method, schedule, optimizer."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxprune as jp
from jaxprune import layout, tree
from jaxprune.criteria import seen
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.recipe import words
from jaxprune.lab.recipe.answers import STAND_INS
from jaxprune.lab.recipe.prune_section import THRESHOLDS
from jaxprune.methods import init_statistics
from jaxprune.types import Params

DERIVATIVES, ACTIVATIONS = ("grads", "hessian_grads", "flow_grads", "squared_grads"), tuple(seen.EVIDENCE)
EVIDENCE = (*DERIVATIVES, *ACTIVATIONS)
"""What a run computes of its training samples for criteria that look at it, see `jaxprune.lab.runs.evidence`."""
AT_EVERY_STEP = {"grads", "key", "statistics"}
NOTHING: Mapping[str, Any] = MappingProxyType({})


def preset(prune: cfg.Prune, found: Mapping[str, Any] = NOTHING) -> jp.training.Preset:
    """The method that [prune] describes, and when and how it runs."""
    made = method(prune, found)
    return jp.training.Preset(
        made,
        how=prune.how,
        schedule=words.known("schedule", prune.schedule),
        grow=words.criterion(prune.grow, made.granularity),
        iterations=prune.iterations,
        margin=prune.margin,
        decay=prune.decay,
    )


def method(prune: cfg.Prune, found: Mapping[str, Any] = NOTHING) -> jp.Method:
    """The method that [prune] describes.

    Args:
        prune: the [prune] section.
        found: what the run found out for it, see `jaxprune.lab.recipe.answers.FOUND`.
    """
    groups = prune.granularity.made(found)
    return jp.Method(
        criterion=words.criterion(prune.criterion, groups),
        granularity=groups,
        distribution=prune.distribution.made(found),
        select=prune.select or jp.weights,
    )


def selected(prune: cfg.Prune, params: Params) -> set[str]:
    """Names of the leaves that [prune] selects, in all of its groups."""
    whole = jp.Method(select=prune.select or jp.weights)
    chosen = [of_group(whole, patterns, params).select for patterns in prune.groups] or [whole.select]
    return {name for select in chosen for name in tree.selected_leaves(select, params)}


def check(prune: cfg.Prune, params: Params, found: Mapping[str, Any] = NOTHING) -> None:
    """Refuse a method that does not fit the params, before anything is trained.

    Args:
        prune: the [prune] section.
        params: of the network.
        found: what the run found out before, see `method`; for what it measures later something stands in.

    Raises:
        ConfigError: the criterion looks at what a run does not have.
        ValueError: a pattern that matches no leaf, an N:M that does not divide the inputs, ...: see `compute_masks`.
    """
    made = method(prune, {**STAND_INS, **found})
    _check_evidence(prune, made.criterion)

    def masks(params: Params, key: Any) -> Any:
        statistics = init_statistics(made, params)
        known: dict[str, Any] = dict.fromkeys(DERIVATIVES, params) | _activations(made, params)
        known |= {"key": key} | ({"statistics": statistics} if statistics else {})
        sparsity = prune.levels[-1] if prune.levels else prune.sparsity
        return jp.compute_masks(made, params, sparsity, **known)

    jax.eval_shape(masks, params, jax.random.key(0))
    for patterns in prune.groups:
        of_group(made, patterns, params)


def _activations(made: jp.Method, params: Params) -> dict[str, Any]:
    """What stands in for statistics of activations: a number for every input or output of a leaf."""
    leaves = {name: jnp.shape(leaf) for name, leaf in tree.selected_leaves(made.select, params).items()}
    views = {name: layout.view_shape(shape, made.layout.axes(name, shape)) for name, shape in leaves.items()}
    axes = {word: -2 if word.startswith("input") else -1 for word in ACTIVATIONS}
    return {
        word: {name: jnp.zeros((*view[:-3], view[axis])) for name, view in views.items()} for word, axis in axes.items()
    }


def _check_evidence(prune: cfg.Prune, criterion: Any) -> None:
    at_once = {*EVIDENCE, "key"}
    there = at_once if prune.how in ("one-shot", "iterative") else AT_EVERY_STEP
    there = there & at_once if "curves" in prune.distribution.left_to_the_run else there
    if missing := sorted(words.looks_at(criterion) - there):
        raise cfg.ConfigError(
            f"prune.criterion: {prune.criterion!r} looks at {', '.join(missing)}, which a run that prunes "
            f"{prune.how!r} does not have. It has {', '.join(sorted(there))}."
        )


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


def pruning_phase(config: cfg.Config) -> cfg.Phase:
    """How the prune stage trains: as [train] does, at a learning rate of its own if it has one."""
    rate = config.prune.learning_rate
    return config.train if rate is None else config.train.model_copy(update={"learning_rate": rate})


def pruning_optimizer(
    inner: optax.GradientTransformation,
    prune: cfg.Prune,
    steps_per_epoch: int,
    key: Any,
    found: Mapping[str, Any] = NOTHING,
) -> optax.GradientTransformation:
    """The optimizer of the prune stage, in all ways but one shot; the last masks fall within its steps."""
    return preset(prune, found).optimizer(
        inner,
        sparsity=prune.sparsity,
        steps=prune_steps(prune, steps_per_epoch),
        every=None if prune.update_every is None else max(prune.update_every.steps(steps_per_epoch), 1),
        rounds=prune.rounds,
        key=key,
    )


def prune_steps(prune: cfg.Prune, steps_per_epoch: int) -> int:
    """Training steps of the prune stage: none in one shot, `duration`, or all rounds of it if iterative.

    Raises:
        ConfigError: `duration` comes to no step, so that nothing would be pruned.
    """
    length = prune.duration.steps(steps_per_epoch)
    if prune.how != "one-shot" and not length:
        raise cfg.ConfigError(
            f'prune.duration: "{prune.duration}" comes to 0 steps, at least 1 is needed to prune {prune.how}.'
        )
    return {"one-shot": 0, "iterative": len(levels(prune)) * length}.get(prune.how, length)


def too_few_updates(prune: cfg.Prune, steps_per_epoch: int) -> str:
    """What to tell of a stage that computes masks fewer than three times though it prunes step by step, else ""."""
    steps = prune_steps(prune, steps_per_epoch)
    every = 1 if prune.update_every is None else max(prune.update_every.steps(steps_per_epoch), 1)
    count = (steps - 1) // every + 1
    if prune.how not in ("gradual", "regrow", "splice") or count >= 3:
        return ""
    way = "Choose a longer prune.duration." if every == 1 else "Leave it out, or choose fewer steps."
    key, value = ("duration", prune.duration) if every == 1 else ("update_every", prune.update_every)
    return (
        f'prune.{key}: with "{value}" masks are computed {count} time(s) in the {steps} steps of the stage, which is '
        f"hardly {prune.how}. {way}"
    )


def levels(prune: cfg.Prune) -> list[Any]:
    """Of each round of an iterative config the sparsity, every round keeping the same share; or its distribution."""
    if prune.levels:
        return list(prune.levels)
    if prune.sparsity is None:
        made, grows = prune.distribution.made(), THRESHOLDS.get(prune.distribution.name)
        if grows is None:
            return [made] * prune.rounds
        first = prune.distribution.options[grows]
        return [dataclasses.replace(made, **{grows: first * prune.growth**number}) for number in range(prune.rounds)]
    kept = 1 - prune.sparsity
    return [1 - kept ** (number / prune.rounds) for number in range(1, prune.rounds)] + [prune.sparsity]


def in_rounds(prune: cfg.Prune, made: jp.Method) -> bool:
    """Whether the rounds of an iterative config are trainings of their own, not one with a schedule of masks."""
    apart = prune.rewind != "none" or prune.tolerance is not None or prune.levels or prune.groups or prune.growth != 1
    return prune.how == "iterative" and bool(apart or not words.looks_at(made.criterion) <= AT_EVERY_STEP)


def of_group(made: jp.Method, patterns: Sequence[str], params: Params) -> jp.Method:
    """The method for the weights of one group of leaves alone.

    Raises:
        ValueError: a pattern that matches no leaf, or a group without a weight to prune.
    """
    names = tree.selected_leaves(patterns, params)
    weights = [name for name, leaf in names.items() if tree.weights(name, leaf)]
    if not weights:
        raise cfg.ConfigError(f"prune.groups: no matrix or kernel matches {', '.join(patterns)}.")
    return dataclasses.replace(made, select=lambda name, leaf: name in weights)


def alone(tx: optax.GradientTransformation, patterns: Sequence[str], params: Params) -> optax.GradientTransformation:
    """An optimizer for one group of leaves; the others stay as they are."""
    names = tree.selected_leaves(patterns, params)
    labels = tree.map_named(lambda name, _: "trained" if name in names else "still", params)
    return optax.partition({"trained": tx, "still": optax.set_to_zero()}, labels)
