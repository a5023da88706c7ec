"""Exact least squares on a mask that is given, and the solvers that choose it by a score."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxprune.distributions import Distribution, PerOutput, Uniform
from jaxprune.oneshot.layerwise import Mask, Moments, OutputMoments, Solved, Weight, applied, best, damped, power_of_two
from jaxprune.types import Sparsity


def refit(
    target: Weight,
    moments: Moments,
    mask: Mask,
    start: Weight | None = None,
    outputs: OutputMoments | None = None,
    *,
    tolerance: float = 1e-6,
    iterations: int | None = None,
) -> Weight:
    r"""The weight on this mask with the least error: for each output $H_{SS} w_S = (H t)_S$; with G, of all together.

    Conjugate gradients for all outputs at once, preconditioned by the diagonal: a step is one product with H, where a
    factorization for each output would be in / 3 of them.

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

    def unfinished(carry: Any) -> Any:
        return (carry[0] < most) & jnp.any(carry[4] > enough)

    def step(carry: Any) -> Any:
        i, weight, left, way, size = carry
        moved = jnp.where(mask, applied(way, moments, outputs), 0.0)
        going = size > enough
        length = jnp.where(going, size / jnp.where(going, inner(way, moved), 1.0), 0.0)
        weight = weight + length * way
        # The recurrence loses digits: now and then the residual is computed anew.
        left = lax.cond(i % 32 == 31, lambda: residual(weight), lambda: left - length * moved)
        eased = left / diagonal
        after = inner(left, eased)
        way = eased + jnp.where(going, after / jnp.where(going, size, 1.0), 0.0) * way
        return i + 1, weight, left, way, after

    left = residual(weight)
    eased = left / diagonal
    return unit * lax.while_loop(unfinished, step, (0, weight, left, eased, inner(left, eased)))[1]


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
