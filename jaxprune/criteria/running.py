"""Criteria that remember: a statistic that every training step adds to, and scores made of it.

    statistics = criterion.init(params)
    statistics = criterion.update(statistics, params, **evidence)        # every step
    scores = criterion(params, statistics=statistics, **evidence)        # where masks are computed

`prune` carries the statistics in its state; `compute_masks` takes them as evidence.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxprune.checks import check_number
from jaxprune.criteria.gradients import changes, from_least
from jaxprune.criteria.weights import Views
from jaxprune.types import Scores


@dataclasses.dataclass(frozen=True)
class Running:
    """A criterion with a statistic.

    Attributes:
        init: params -> statistics before the first step, shaped like the params.
        update: (statistics, params, **evidence) -> statistics after a step.
        score: (params, statistics=, **evidence) -> scores.
    """

    init: Callable[[Views], Views]
    update: Callable[..., Views]
    score: Callable[..., Scores]

    def __call__(self, params: Views, /, *, statistics: Views, **evidence: Any) -> Scores:
        """Scores from the statistics."""
        return self.score(params, statistics=statistics, **evidence)


def _zeros(params: Views) -> Views:
    return {name: jnp.zeros(param.shape, jnp.float32) for name, param in params.items()}


def _moved(statistics: Views, params: Views, /, *, grads: Views, **_: Any) -> Views:
    return {name: statistics[name] - change for name, change in changes(params, grads).items()}


def _movement(params: Views, /, *, statistics: Views, **_: Any) -> Scores:
    return from_least(statistics)


movement = Running(_zeros, _moved, _movement)
r"""How far a weight has moved away from zero, $S = -\sum_t w_t \, \partial L / \partial w_t$, from the least on.

Weights that shrink as they train score low, however large they are still. For fine-tuning of pretrained models.

References:
    Sanh, Wolf and Rush 2020, arXiv:2005.07683, eq. 2.
"""


def momentum(decay: float = 0.9) -> Running:
    r"""Size of the gradient's running mean, $S = |m|$, $m \leftarrow \beta m + (1 - \beta) g$.

    For growing: a dead weight has one too. Inside `prune` gradients of dead weights count as they come in.

    Args:
        decay: $\beta$, in [0, 1).

    Raises:
        ValueError: the decay is out of range.

    References:
        Dettmers and Zettlemoyer 2019, arXiv:1907.04840.
    """
    check_number(decay, "`momentum` needs a decay in [0, 1),", high=1)

    def update(statistics: Views, params: Views, /, *, grads: Views, **_: Any) -> Views:
        return {name: decay * statistics[name] + (1 - decay) * grads[name].astype(jnp.float32) for name in params}

    def score(params: Views, /, *, statistics: Views, **_: Any) -> Scores:
        return {name: jnp.abs(statistics[name]) for name in params}

    return Running(_zeros, update, score)
