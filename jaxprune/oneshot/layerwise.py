r"""The layer-wise problem that every solver here is about, and what their answers share.

    minimise  tr (W - T)^T H (W - T)  over W with at most so many non-zeros in each contest

T, (in, out), is the weight that the product would have without zeros; H = X^T X, (in, in), the second moments of its
inputs X, (tokens, in). The error is $\lVert XW - XT \rVert_F^2$, so nothing but H of all the data is needed. With G,
(out, out), the second moments of a loss's derivatives by the outputs, it is tr (W - T)^T H (W - T) G, about twice what
the loss rises by if its derivatives do not depend on the inputs.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Bool, Float, Shaped

from jaxprune.distributions import Distribution
from jaxprune.layout import Axes, to_view
from jaxprune.types import Sparsity

Weight = Float[Array, "inputs outputs"]
Moments = Float[Array, "inputs inputs"]
OutputMoments = Float[Array, "outputs *outputs"]
"""G, (outputs, outputs), or its diagonal alone, where the rest of it does not count."""
Mask = Bool[Array, "inputs outputs"]


class Solved(NamedTuple):
    """A sparse weight.

    Attributes:
        weight: exactly zero where it is dead.
        mask: True = alive.
    """

    weight: Weight
    mask: Mask


@runtime_checkable
class Solver(Protocol):
    """Chooses which weights stay, and what they are then."""

    @property
    def damping(self) -> float:
        """What is added to the diagonal of the moments, as a fraction of its mean."""
        ...

    def __call__(
        self, target: Weight, moments: Moments, sparsity: Sparsity | None, pattern: Distribution | None
    ) -> Solved:
        """The sparse weight; pure, under jit. A solver that can weigh outputs takes G as `outputs` too, one
        that fits a mask handed in takes that as `mask`.

        Args:
            target: T, float32.
            moments: H, float32, symmetric, not damped.
            sparsity: fraction removed; None for patterns that decide themselves.
            pattern: who competes with whom: `Uniform()`, all weights of the matrix; `PerOutput()`; `NM(2, 4)`. None:
                the solver's own way.
        """
        ...


def matrices(view: Shaped[Array, "*layers window inputs outputs"]) -> Shaped[Array, "matrices window*inputs outputs"]:
    """Every layer of a leaf's view as a matrix: of a convolution (window x inputs, outputs)."""
    return view.reshape(-1, view.shape[-3] * view.shape[-2], view.shape[-1])


def matrix(axes: Axes, leaf: Shaped[Array, "..."], layer: Any) -> Shaped[Array, "inputs outputs"]:
    """One layer of a leaf as a matrix."""
    return matrices(to_view(leaf, axes))[layer]


def damped(moments: Moments, damping: float) -> Moments:
    r"""$H + \lambda I$ with $\lambda$ = `damping` times the mean of the diagonal; the identity if all inputs are dead.

    A dead input, whose row of H is zero, gets a millionth of that: its weights are worth least, and change nothing.
    """
    diagonal = jnp.diagonal(moments)
    mean = jnp.mean(diagonal)
    added = jnp.where(mean > 0, damping * mean, 1.0)
    return moments + jnp.diag(jnp.where((diagonal > 0) | (mean == 0), added, 1e-6 * added))


def power_of_two(size: Float[Array, "..."]) -> Float[Array, "..."]:
    """The one nearest to a size, 1 for 0: dividing by it changes no digit, and squares of quotients are in float32."""
    return jnp.where(size > 0, jnp.minimum(lax.reduce_precision(size, exponent_bits=8, mantissa_bits=0), 2.0**127), 1.0)


def error(weight: Weight, target: Weight, moments: Moments, outputs: OutputMoments | None = None) -> Float[Array, ""]:
    """tr (W - T)^T H (W - T) G; without G, of the identity."""
    difference = weight - target
    return jnp.sum(difference * applied(difference, moments, outputs))


def applied(weight: Weight, moments: Moments, outputs: OutputMoments | None) -> Weight:
    """H W G, half of the derivative of the error."""
    if outputs is None:
        return moments @ weight
    return moments @ weight * outputs[None] if outputs.ndim == 1 else moments @ weight @ outputs


def best(scores: Weight, sparsity: Sparsity | None, pattern: Distribution) -> Mask:
    """The mask of a pattern's contests over one matrix."""
    return pattern({"": scores[None]}, sparsity, dims={"": scores.shape})[""][0]


def fitted(outputs: Float[Array, "inputs outputs"], weight: Weight, moments: Moments, damping: float) -> Weight:
    r"""The target for outputs other than the product's own: $T = (H + \lambda I)^{-1} (C + \lambda W)$.

    The least-squares weight for outputs Y, held to W where the data say nothing; without the damping on the right-hand
    side it would be held to zero.

    Args:
        outputs: C = X^T Y, of the inputs X that H is made of and the outputs Y that are wanted.
        weight: W.
        moments: H, not damped.
        damping: see `damped`.
    """
    full = damped(moments, damping)
    factor = jnp.linalg.cholesky(full)
    return cho_solve((factor, True), outputs + (full - moments) @ weight)
