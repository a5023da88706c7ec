"""Schedule: how sparse at which step, and at which steps masks are computed anew.

A schedule maps a step to a sparsity, `update_when` maps a step to yes or no. Steps are counted by `prune`, from 0,
one an update; both are plain functions of a traced integer, so that moving through them never recompiles.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxprune.checks import check_sparsity
from jaxprune.types import Schedule, UpdateWhen

Step = Integer[Array, ""] | int


def _progress(step: Step, begin: int, end: int) -> Float[Array, ""]:
    """0 until `begin`, 1 from `end` on, straight between."""
    done = (jnp.asarray(step, jnp.float32) - begin) / max(end - begin, 1)
    return jnp.where(jnp.asarray(step) >= end, jnp.float32(1.0), jnp.clip(done, 0.0, 1.0))


def constant(sparsity: float) -> Schedule:
    """The same sparsity at every step.

    Raises:
        ValueError: `sparsity` is not in [0, 1).
    """
    check_sparsity(sparsity)
    return lambda step: jnp.float32(sparsity)


def one_shot(sparsity: float, step: int = 0) -> Schedule:
    """0 before `step`, `sparsity` from it on.

    Raises:
        ValueError: `sparsity` is not in [0, 1).
    """
    check_sparsity(sparsity)
    return lambda now: jnp.where(jnp.asarray(now) >= step, jnp.float32(sparsity), jnp.float32(0.0))


def cubic(final: float, *, begin: int, end: int, initial: float = 0.0) -> Schedule:
    r"""Fast at first, slow at the end.

    $s_t = s_f + (s_i - s_f) (1 - \frac{t - t_0}{t_1 - t_0})^3$ for $t_0 \le t \le t_1$; 0 before, $s_f$ after.

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
    check_sparsity(final, "final")
    check_sparsity(initial, "initial")
    if not 0 <= begin <= end:
        raise ValueError(f"`cubic` needs 0 <= begin <= end, got begin={begin}, end={end}.")

    def schedule(step: Step) -> Float[Array, ""]:
        left = 1.0 - _progress(step, begin, end)
        ramp = final + (initial - final) * left**3
        # The end is given, not computed: final + 0 * x need not round to the same float.
        ramp = jnp.where(left == 0, jnp.float32(final), ramp)
        return jnp.where(jnp.asarray(step) >= begin, ramp, jnp.float32(0.0))

    return schedule


def rounds(final: float, *, count: int, length: int, begin: int = 0) -> Schedule:
    r"""Iterative pruning: every round keeps the same share of what is left.

    $s_t = 1 - (1 - s_f)^{r / n}$ in round $r = 1, ..., n$; round r starts at step begin + (r - 1) * length. 0 before.

    Args:
        final: sparsity of the last round, which lasts for ever.
        count: number of rounds n.
        length: steps of a round.
        begin: first step of the first round.

    Raises:
        ValueError: `final` is not in [0, 1), or a count or length is below 1.

    References:
        Frankle and Carbin 2019, arXiv:1803.03635 (there the share kept is given, 0.8 a round).
    """
    check_sparsity(final, "final")
    if count < 1 or length < 1 or begin < 0:
        raise ValueError(f"`rounds` needs count >= 1, length >= 1, begin >= 0; got {count}, {length}, {begin}.")
    # Computed here in float64, looked up there: the last round then is `final` to the bit.
    steps = [0.0] + [1 - math.pow(1 - final, r / count) for r in range(1, count)] + [final]
    table = jnp.asarray(steps, jnp.float32)

    def schedule(step: Step) -> Float[Array, ""]:
        done = jnp.floor_divide(jnp.asarray(step, jnp.int32) - begin, length) + 1
        return table[jnp.clip(done, 0, count)]

    return schedule


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
