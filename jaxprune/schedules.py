"""Schedule: how sparse at which step, and at which steps masks are computed anew.

A schedule maps a step to a sparsity, `update_when` maps a step to yes or no. Steps are counted by `prune`, from 0,
one an update; both are functions of a traced integer, so that moving through them never recompiles. Schedules made here
know when they change, so that `update_when` follows from them unless it is said.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxprune.checks import check_number, check_sparsity
from jaxprune.types import Schedule, UpdateWhen

__all__ = ["alternating", "at", "constant", "cosine", "cubic", "every", "exponential", "linear", "one_shot", "rounds"]

Step = Integer[Array, ""] | int


@dataclasses.dataclass(frozen=True)
class Timed:
    """A schedule that knows when it changes.

    Attributes:
        sparsity_at: step -> sparsity.
        update_when: step -> whether masks should be computed for it; the last time where the schedule ends.
    """

    sparsity_at: Callable[[Any], Any]
    update_when: UpdateWhen

    def __call__(self, step: Any) -> Any:
        """The sparsity at a step."""
        return self.sparsity_at(step)


def constant(sparsity: Float[Array, ""] | float) -> Schedule:
    """The same sparsity at every step.

    Raises:
        ValueError: `sparsity` is not in [0, 1).
    """
    check_sparsity(sparsity)
    return lambda step: jnp.float32(sparsity)


def as_schedule(sparsity: Schedule | Float[Array, ""] | float | None) -> Schedule:
    """A schedule as it is; a number as that sparsity at every step; None, for distributions that decide, as None.

    Raises:
        ValueError: a number that is no fraction.
    """
    if sparsity is None or callable(sparsity):
        return sparsity or (lambda step: None)
    return constant(sparsity)


def as_update_when(
    update_when: UpdateWhen | Bool[Array, ""] | bool | None, schedule: Schedule | None = None
) -> UpdateWhen:
    """A function of the step as it is; a bool, known or traced, as that at every step; None follows from the schedule.

    Of a schedule that does not know when it changes, masks are computed every 100 steps.
    """
    if update_when is None:
        return getattr(schedule, "update_when", None) or every(100)
    return update_when if callable(update_when) else lambda step: update_when


def one_shot(sparsity: float, step: int = 0) -> Schedule:
    """0 before `step`, `sparsity` from it on.

    Raises:
        ValueError: `sparsity` is not in [0, 1).
    """
    check_sparsity(sparsity)

    def schedule(now: Step) -> Float[Array, ""]:
        return jnp.where(jnp.asarray(now) >= step, jnp.float32(sparsity), jnp.float32(0.0))

    return Timed(schedule, at(step))


def cubic(final: float, *, begin: int, end: int, initial: float = 0.0) -> Schedule:
    r"""Fast at first, slow at the end.

    $s_t = s_f + (s_i - s_f) (1 - p)^3$ with $p = \frac{t - t_0}{t_1 - t_0}$ from $t_0$ to $t_1$; 0 before, $s_f$ after.
    Unless said otherwise masks follow every 100 steps, in a ramp below 1000 steps every tenth of it, and at its end.

    Args:
        final: sparsity from `end` on.
        begin: first step of the ramp.
        end: last step of the ramp.
        initial: sparsity at `begin`.

    Raises:
        ValueError: a sparsity is not in [0, 1), or `end` is before `begin`.

    References:
        Zhu and Gupta 2017, arXiv:1710.01878, eq. 1.
    """
    return _ramp("cubic", final, begin, end, initial, lambda p: final + (initial - final) * (1.0 - p) ** 3)


def linear(final: float, *, begin: int, end: int, initial: float = 0.0) -> Schedule:
    r"""As much in every step, $s_t = s_f + (s_i - s_f) (1 - p)$. Arguments and errors are those of `cubic`."""
    return _ramp("linear", final, begin, end, initial, lambda p: final + (initial - final) * (1.0 - p))


def cosine(final: float, *, begin: int, end: int, initial: float = 0.0) -> Schedule:
    r"""Slow at both ends, $s_t = s_f + (s_i - s_f) \frac{1 + \cos \pi p}{2}$.

    Arguments and errors are those of `cubic`.
    """
    return _ramp(
        "cosine", final, begin, end, initial, lambda p: final + (initial - final) * (0.5 + 0.5 * jnp.cos(jnp.pi * p))
    )


def exponential(final: float, *, begin: int, end: int, initial: float = 0.0) -> Schedule:
    r"""The same share of what is left in every step, $1 - s_t = (1 - s_i)^{1 - p} (1 - s_f)^p$.

    Arguments and errors are those of `cubic`.
    """
    return _ramp(
        "exponential", final, begin, end, initial,
        lambda p: 1.0 - (1.0 - initial) * jnp.exp(p * math.log((1 - final) / (1 - initial))),
    )  # fmt: skip


RAMPS = (cubic, linear, cosine, exponential)
"""What goes from one sparsity to another as training goes on; all have the arguments of `cubic`."""


def _ramp(
    name: str, final: float, begin: int, end: int, initial: float, of: Callable[[Array], Float[Array, ""]]
) -> Schedule:
    """0 before `begin`, `final` from `end` on, and of(progress) in between."""
    check_sparsity(final, "final")
    check_sparsity(initial, "initial")
    if not 0 <= begin <= end:
        raise ValueError(f"`{name}` needs 0 <= begin <= end, got begin={begin}, end={end}.")

    def schedule(step: Step) -> Float[Array, ""]:
        done = jnp.clip((jnp.asarray(step, jnp.float32) - begin) / max(end - begin, 1), 0.0, 1.0)
        # The end is given, not computed: final + 0 * x need not round to the same float.
        ramp = jnp.where((done == 1) | (jnp.asarray(step) >= end), jnp.float32(final), of(done))
        return jnp.where(jnp.asarray(step) >= begin, ramp, jnp.float32(0.0))

    follows = every(max(1, min(100, (end - begin) // 10)), begin=begin, end=end)
    return Timed(schedule, lambda step: follows(step) | (jnp.asarray(step) == end))


def alternating(sparsity: float, *, dense: int, sparse: int, begin: int, end: int) -> Schedule:
    """Dense for `begin` steps; then sparse and dense phases in turn until `end`; sparse for ever after.

    Masks must be computed where phases begin, as they are unless said otherwise; they open for a dense phase, and
    weights that were dead start again from zero.

    Args:
        sparsity: of the sparse phases.
        dense: steps of a dense phase.
        sparse: steps of a sparse phase.
        begin: first step of the first sparse phase.
        end: from here on no dense phase begins or goes on.

    Raises:
        ValueError: `sparsity` is not in [0, 1), a length is below 1, or `end` is before `begin`.

    References:
        Peste et al. 2021 (AC/DC), arXiv:2106.12379, algorithm 1.
    """
    check_sparsity(sparsity)
    if dense < 1 or sparse < 1 or not 0 <= begin <= end:
        raise ValueError(
            f"`alternating` needs dense >= 1, sparse >= 1 and 0 <= begin <= end; got {dense}, {sparse}, {begin}, {end}."
        )

    def schedule(step: Step) -> Float[Array, ""]:
        now = jnp.asarray(step, jnp.int32)
        pruned = (now >= begin) & (((now - begin) % (sparse + dense) < sparse) | (now >= end))
        return jnp.where(pruned, jnp.float32(sparsity), jnp.float32(0.0))

    starts = [every(sparse + dense, begin=first, end=end) for first in (begin, begin + sparse)]
    return Timed(schedule, lambda step: starts[0](step) | starts[1](step) | (jnp.asarray(step) == end))


def rounds(
    final: float | None = None, *, count: int, length: int, begin: int = 0, keep: float | None = None
) -> Schedule:
    r"""Iterative pruning: every round keeps the same share of what is left.

    $s_t = 1 - (1 - s_f)^{r / n}$ in round $r = 1, ..., n$; round r starts at step begin + (r - 1) * length. 0 before.

    Args:
        final: sparsity of the last round, which lasts for ever; or None and
        keep: the share that a round keeps of what is left, in (0, 1]; the last sparsity is then $1 - k^n$.
        count: number of rounds n.
        length: steps of a round.
        begin: first step of the first round.

    Raises:
        ValueError: both or none of `final` and `keep`, one out of range, or a count or length below 1.

    References:
        Frankle and Carbin 2019, arXiv:1803.03635, keep 0.8 a round.
    """
    if (final is None) == (keep is None):
        raise ValueError("`rounds` needs either the final sparsity or `keep`, the share that a round keeps.")
    if keep is not None:
        check_number(keep, "`rounds(keep=...)` is a share in (0, 1],", high=1, ends="(]")
    final = 1 - keep**count if final is None else final  # pyright: ignore[reportOptionalOperand]
    check_sparsity(final, "final")
    if count < 1 or length < 1 or begin < 0:
        raise ValueError(f"`rounds` needs count >= 1, length >= 1, begin >= 0; got {count}, {length}, {begin}.")
    # Computed here in float64, looked up there: the last round then is `final` to the bit.
    steps = [0.0] + [1 - math.pow(1 - final, r / count) for r in range(1, count)] + [final]
    table = jnp.asarray(steps, jnp.float32)

    def schedule(step: Step) -> Float[Array, ""]:
        done = jnp.floor_divide(jnp.asarray(step, jnp.int32) - begin, length) + 1
        return table[jnp.clip(done, 0, count)]

    return Timed(schedule, every(length, begin=begin, end=begin + (count - 1) * length))


def every(steps: int, *, begin: int = 0, end: int | None = None) -> UpdateWhen:
    """True at begin, begin + steps, begin + 2 steps, ... up to and including `end` (for ever if None).

    Raises:
        ValueError: `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"`every` needs at least 1 step, got {steps}.")

    def update_when(step: Step) -> Bool[Array, ""]:
        now = jnp.asarray(step)
        due = (now >= begin) & ((now - begin) % steps == 0)
        return due if end is None else due & (now <= end)

    return update_when


def at(*steps: int) -> UpdateWhen:
    """True at these steps."""
    return lambda step: jnp.any(jnp.asarray(steps, jnp.int32) == jnp.asarray(step))
