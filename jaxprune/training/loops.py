"""Loops around `compute_masks`: masks in many small steps, and rounds of pruning and training until it no longer pays.

masks = iterative_masks(method, params, 0.999, count=100, evidence=evidence)                     # nothing is trained
done = iterative_pruning(method, params, [0.5, 0.8, 0.9], train)
done = iterative_pruning(method, params, levels, train, evaluate=accuracy, tolerance=0.002)      # stops by itself
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import tree
from jaxprune.checks import check_sparsity
from jaxprune.compat import present_forms
from jaxprune.distributions import Distribution
from jaxprune.masks import apply_masks, rewind, sparsity_of
from jaxprune.methods import Method, compute_masks
from jaxprune.training.transformation import filled
from jaxprune.types import Masks, Params

Train = Callable[[Params, Masks, int], Params]


def iterative_masks(
    method: Method, params: Params, sparsity: float, *, count: int, evidence: Callable[[Params], Mapping[str, Any]]
) -> Masks:
    r"""Masks in `count` rounds, each with evidence of the weights that are left: $s_k = 1 - (1 - s)^{k / n}$.

    One compiled loop under jit. With `synflow` and a hundred rounds no layer is emptied, however high the sparsity.

    Args:
        method: the composition.
        params: weights; none is trained in between.
        sparsity: of the last round, in [0, 1).
        count: rounds n, at least 1.
        evidence: params with dead weights at zero -> what the criterion looks at, by keyword.

    Returns:
        Masks of the last round.

    Raises:
        ValueError: `sparsity` or `count` is out of range; what `compute_masks` raises.

    References:
        Tanaka et al. 2020, arXiv:2006.05467, algorithm 1.
    """
    check_sparsity(sparsity)
    if count < 1:
        raise ValueError(f"`iterative_masks` needs count >= 1, got {count}.")
    shares = jnp.asarray([1 - (1 - sparsity) ** (k / count) for k in range(1, count)] + [sparsity], jnp.float32)

    def one(k: Any, masks: Masks) -> Masks:
        return compute_masks(method, params, shares[k], masks=masks, **evidence(apply_masks(params, masks)))

    with present_forms():
        return jax.lax.fori_loop(0, count, one, filled(True, params))


class Round(NamedTuple):
    """What a round came to.

    Attributes:
        number: from 1.
        sparsity: fraction removed of the selected leaves.
        score: what `evaluate` gave after training; None without it.
        needed: the least score that counts as recovered; None without a stop rule.
    """

    number: int
    sparsity: float
    score: float | None
    needed: float | None

    @property
    def shortfall(self) -> float:
        """By how much the score is below what was needed; 0 if it is not, or without a stop rule."""
        return 0.0 if self.score is None or self.needed is None else max(self.needed - self.score, 0.0)

    def __str__(self) -> str:
        score = "" if self.score is None else f", score {self.score:.6g}"
        missed = f": failed by {self.shortfall:.3g}, {self.needed:.6g} was needed" if self.shortfall else ""
        return f"round {self.number}: {100 * self.sparsity:.4g} % removed{score}{missed}"


class IterativeResult(NamedTuple):
    """The last good state, and how it was come to; `str` has a line a round.

    Attributes:
        params: trained weights of the last round that recovered, dead ones at zero; those handed in if none did.
        masks: of that round; those handed in if none did.
        rounds: all of them, the one that failed last.
    """

    params: Params
    masks: Masks
    rounds: tuple[Round, ...]

    @property
    def failed(self) -> Round | None:
        """The round that the stop rule ended, or None if all levels were reached."""
        return next((one for one in self.rounds if one.shortfall), None)

    def __str__(self) -> str:
        return "\n".join(map(str, self.rounds))


def iterative_pruning(
    method: Method,
    params: Params,
    levels: Iterable[float | Distribution],
    train: Train,
    *,
    early_params: Params | None = None,
    evaluate: Callable[[Params], Any] | None = None,
    tolerance: float | None = None,
    reference: float | None = None,
    masks: Masks | None = None,
    evidence: Callable[[Params], Mapping[str, Any]] = lambda params: {},
) -> IterativeResult:
    """Prune to one level after the other, training after each, and stop where training no longer recovers.

    Groups of leaves one after the other: call it for each with a method that selects them, hand on `params` and
    `masks` of the last call, and let `train` hold the others still (`optax.partition` with `optax.set_to_zero`).

    Args:
        method: the composition; what is dead stays dead from round to round.
        params: trained weights.
        levels: of each round the sparsity, rising; or a distribution that takes the place of the method's, such as
            `SigmaThreshold(k)` for rising k. They may be endless where there is a stop rule.
        train: (params with dead weights at zero, masks, number of the round) -> params trained, zeros kept. Its
            learning rate may begin anew in each round (learning rate rewinding) or go on.
        early_params: weights at which every round begins, under its masks: of the initialisation (lottery ticket), or
            of a step soon after. None: each round goes on with the weights of the last.
        evaluate: params -> score, higher is better: on held-out data, not on test data.
        tolerance: how far the score may lie below the reference after training; a round that falls below ends the loop,
            and the state before it is returned. None: no stop rule.
        reference: the score to recover to; None: that of `params` as they are handed in.
        masks: survivors so far, of leaves that other calls have pruned too.
        evidence: params -> what the criterion looks at, by keyword; called before each round.

    Returns:
        The last good state and the report of the rounds.

    Raises:
        ValueError: a tolerance below 0 or without `evaluate`, a level that is no sparsity, a level that falls,
            `train` that gives a dead weight a value; what `compute_masks` raises.

    References:
        Han et al. 2015, arXiv:1506.02626; rewinding: Frankle and Carbin 2019, arXiv:1803.03635, and Renda et al. 2020,
        arXiv:2003.02389.
    """
    if tolerance is not None and (evaluate is None or not tolerance >= 0):
        raise ValueError(f"A stop rule needs `evaluate`, and a tolerance of 0 or more; got {tolerance}.")
    needed = None
    if tolerance is not None and evaluate is not None:
        needed = (float(evaluate(params)) if reference is None else reference) - tolerance
    alive = masks if masks is not None else filled(True, params)
    good, rounds, last, chosen = IterativeResult(params, alive, ()), [], 0.0, _names(method, params)
    for number, level in enumerate(levels, 1):
        last = _risen(level, last)
        found = _masks(method, good.params, good.masks, level, evidence(good.params))
        start = apply_masks(good.params, found) if early_params is None else rewind(early_params, found)
        trained = train(start, found, number)
        _check_zeros(trained, found, number)
        score = None if evaluate is None else float(evaluate(trained))
        rounds.append(Round(number, float(sparsity_of(found, chosen)), score, needed))
        if rounds[-1].shortfall:
            break
        good = IterativeResult(trained, found, ())
    return good._replace(rounds=tuple(rounds))


def _risen(level: Any, last: float) -> float:
    if callable(level):
        return last
    check_sparsity(level, "levels")
    if level < last:
        raise ValueError(
            f"The levels of `iterative_pruning` must rise, got {level} after {last}: what is dead stays dead."
        )
    return level


def _masks(method: Method, params: Params, masks: Masks, level: Any, evidence: Mapping[str, Any]) -> Masks:
    if callable(level):
        method, level = dataclasses.replace(method, distribution=level), None
    found = compute_masks(method, params, level, masks=masks, **evidence)
    return jax.tree.map(jnp.logical_and, found, tree.match(masks, found))


def _names(method: Method, params: Params) -> Callable[[str, Any], bool]:
    names = tree.selected_leaves(method.select, params)
    return lambda name, leaf: name in names


def _check_zeros(params: Params, masks: Masks, number: int) -> None:
    held = tree.named_leaves(params)
    for name, mask in tree.named_leaves(masks).items():
        if bool(jnp.any(~mask & (held[name] != 0))):
            raise ValueError(
                f"`train` gave dead weights of {name!r} a value in round {number}. Let its optimizer end with "
                "`keep_params_sparse(masks)`."
            )
