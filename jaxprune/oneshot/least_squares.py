"""Exact least squares on a mask that is given, and the solvers that choose it by a score."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxprune.distributions import Distribution, PerOutput, Uniform
from jaxprune.oneshot.layerwise import Mask, Moments, OutputMoments, Solved, Weight, applied, best, damped, power_of_two
from jaxprune.types import Sparsity

TURN = 32
"""Steps between two residuals that are computed anew."""
PATIENCE = 4
"""Turns in a row that an output may get no better, until float32 is taken to hold no more digits of it."""


def refit(
    target: Weight,
    moments: Moments,
    mask: Mask,
    start: Weight | None = None,
    outputs: OutputMoments | None = None,
    *,
    tolerance: float = 1e-5,
    iterations: int | None = None,
) -> Weight:
    r"""The weight on this mask with the least error: for each output $H_{SS} w_S = (H t)_S$; with G, of all together.

    Conjugate gradients for all outputs at once, preconditioned by the diagonal: a step is one product with H, where a
    factorization for each output would be in / 3 of them. The best weight on the way is kept, since going on where
    rounding leaves no digits to be found leads away from it.

    Args:
        target: T.
        moments: H, positive definite (damped).
        mask: S, True = alive.
        start: where to begin; without, at T on the mask.
        outputs: G, positive definite (damped); None: outputs are fitted each for itself.
        tolerance: of the residual, relative to the right-hand side, of every output.
        iterations: most that are done; without, as many as there are inputs, after which the answer for single outputs
            is exact but for rounding.
    """
    unit = power_of_two(jnp.max(jnp.abs(target)))
    target, moments = target / unit, moments / power_of_two(jnp.max(jnp.diagonal(moments)))
    outputs = None if outputs is None else outputs / power_of_two(jnp.max(jnp.diagonal(outputs)))
    diagonal = jnp.diagonal(moments)[:, None]
    diagonal = diagonal if outputs is None else diagonal * jnp.diagonal(outputs)[None]
    together = (0,) if outputs is None else (0, 1)  # what is one system of equations
    wanted = jnp.where(mask, applied(target, moments, outputs), 0.0)
    weight = jnp.where(mask, target if start is None else start / unit, 0.0)
    most = target.shape[0] if iterations is None else iterations

    def inner(a: Weight, b: Weight) -> Any:
        return jnp.sum(a * b, together, keepdims=True)

    enough = tolerance**2 * inner(wanted, wanted / diagonal)

    def residual(weight: Weight) -> Weight:
        return wanted - jnp.where(mask, applied(weight, moments, outputs), 0.0)

    def step(state: _Descent) -> _Descent:
        eased = state.left / diagonal
        size = inner(state.left, eased)
        going = (size > enough) & (state.size > 0)
        way = eased + jnp.where(going, size / jnp.where(going, state.size, 1.0), 0.0) * state.way
        moved = jnp.where(mask, applied(way, moments, outputs), 0.0)
        length = jnp.where(going, size / jnp.where(going, inner(way, moved), 1.0), 0.0)
        return _Descent(
            state.steps + 1, state.weight + length * way, state.left - length * moved, way, jnp.where(going, size, 0.0)
        )

    def turn(carry: Any) -> Any:
        """Some steps, after which the residual is computed anew, since the recurrence loses digits."""
        state, best, least, age = carry
        end = jnp.minimum(state.steps + TURN, most)
        state = lax.while_loop(lambda state: (state.steps < end) & jnp.any(state.size > 0), step, state)
        left = residual(state.weight)
        size = inner(left, left / diagonal)
        better = size < least
        best, least = jnp.where(better, state.weight, best), jnp.where(better, size, least)
        age = jnp.where(better, 0, age + 1)
        state = state._replace(left=left, size=jnp.where(age < PATIENCE, state.size, 0.0))
        return state, best, least, age

    left = residual(weight)
    least = inner(left, left / diagonal)
    first = _Descent(jnp.int32(0), weight, left, jnp.zeros_like(left), jnp.full_like(least, jnp.inf))
    unfinished = lambda carry: (carry[0].steps < most) & jnp.any(carry[0].size > 0)  # noqa: E731
    return unit * lax.while_loop(unfinished, turn, (first, weight, least, jnp.zeros(least.shape, jnp.int32)))[1]


class _Descent(NamedTuple):
    """Conjugate gradients on their way: `size` is of the last residual, and 0 where an output has ended."""

    steps: Int[Array, ""]
    weight: Weight
    left: Weight
    way: Weight
    size: Float[Array, "one outputs_or_one"]


@dataclasses.dataclass(frozen=True)
class Wanda:
    r"""Weights by $|w_{ij}| \sqrt{H_{ii}}$, each output for itself unless the pattern says otherwise; moved by `refit`.

    Attributes:
        refit: exact least squares on the mask; without, the weights that stay stay as they are.
        damping: see `Solver`; of the least squares alone.

    References:
        Sun et al. 2023, arXiv:2306.11695.
    """

    refit: bool = False
    damping: float = 0.01

    def __call__(
        self, target: Weight, moments: Moments, sparsity: Sparsity | None, pattern: Distribution | None = None
    ) -> Solved:
        """See `Solver`; without a pattern, `PerOutput()`."""
        norms = jnp.sqrt(jnp.diagonal(moments))[:, None]
        mask = best(jnp.abs(target) * norms, sparsity, PerOutput() if pattern is None else pattern)
        return _solved(target, moments, mask, self.damping if self.refit else None)


@dataclasses.dataclass(frozen=True)
class Magnitude:
    r"""Weights by $|w_{ij}|$, what the others are measured by.

    Attributes:
        refit: see `Wanda`.
        damping: likewise.
    """

    refit: bool = False
    damping: float = 0.01

    def __call__(
        self, target: Weight, moments: Moments, sparsity: Sparsity | None, pattern: Distribution | None = None
    ) -> Solved:
        """See `Solver`."""
        mask = best(jnp.abs(target), sparsity, Uniform() if pattern is None else pattern)
        return _solved(target, moments, mask, self.damping if self.refit else None)


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """No choice: the weights of a mask that is given (`prune(..., masks=)`) are fitted by `refit`.

    Attributes:
        damping: see `Solver`.
    """

    damping: float = 0.01

    def __call__(
        self,
        target: Weight,
        moments: Moments,
        sparsity: Sparsity | None = None,
        pattern: Distribution | None = None,
        *,
        mask: Mask | None = None,
    ) -> Solved:
        """See `Solver`; without a mask, the target."""
        mask = jnp.ones(target.shape, bool) if mask is None else mask
        return _solved(target, moments, mask, self.damping)


def _solved(target: Weight, moments: Moments, mask: Mask, damping: float | None) -> Solved:
    """The target on a mask, fitted there where a damping is given."""
    fitted = target if damping is None else refit(target, damped(moments, damping), mask)
    return Solved(jnp.where(mask, fitted, 0.0), mask)
