r"""The alternating direction method of multipliers for the layer-wise problem, after ALPS.

minimise  tr (W - T)^T H (W - T)  so that W = D and D has few non-zeros
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxprune.distributions import Distribution, Uniform
from jaxprune.oneshot.layerwise import Mask, Moments, OutputMoments, Solved, Weight, best, damped, error, power_of_two
from jaxprune.oneshot.least_squares import refit
from jaxprune.types import Sparsity


class _State(NamedTuple):
    step: Int[Array, ""]
    sparse: Weight
    multipliers: Weight
    penalty: Float[Array, ""]
    mask: Mask
    settled: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class AlternatingDirections:
    r"""A dense weight W and a sparse one D are drawn to each other by a penalty that grows, until the mask settles.

    $W = (H + \rho I)^{-1} (H T - V + \rho D)$, $D = P(W + V / \rho)$, $V \leftarrow V + \rho (W - D)$, with P keeping
    the largest of each contest, on inputs scaled to $H_{ii} = 1$. One eigendecomposition of H serves all $\rho$. The
    weights on the mask are then fitted exactly. With the moments G of the outputs it is all the same on $H \otimes G$,
    whose eigenvectors are those of both.

    Attributes:
        damping: see `Solver`.
        penalty: the first $\rho$.
        every: steps between two changes of $\rho$, which grows by 1.3, 1.2 or 1.1: the faster, the more of the mask
            still changes.
        iterations: most steps.
        outputs_damping: what is added to the diagonal of G, as a fraction of its mean.
        diagonal: of G only the diagonal counts: each output has a weight. G then takes no memory, and a step is as dear
            as without it.

    References:
        Meng et al. 2024, arXiv:2406.07831, algorithm 1.
    """

    damping: float = 0.01
    penalty: float = 0.1
    every: int = 3
    iterations: int = 300
    outputs_damping: float = 0.01
    diagonal: bool = False

    def __call__(
        self,
        target: Weight,
        moments: Moments,
        sparsity: Sparsity | None,
        pattern: Distribution | None = None,
        outputs: OutputMoments | None = None,
    ) -> Solved:
        """See `Solver`; `outputs` are G, not damped."""
        pattern = Uniform() if pattern is None else pattern
        full = damped(moments, self.damping)
        scale = jnp.sqrt(jnp.diagonal(full))[:, None]
        full = full / scale / scale.T
        if outputs is not None:
            outputs = damped(jnp.diag(outputs) if outputs.ndim == 1 else outputs, self.outputs_damping)
            across = jnp.sqrt(jnp.diagonal(outputs))[None]
            outputs, scale = None if self.diagonal else outputs / across / across.T, scale * across
        goal = target * scale
        unit = power_of_two(jnp.max(jnp.abs(goal)))
        goal = goal / unit

        def fit(mask: Mask) -> tuple[Weight, Float[Array, ""]]:
            weight = refit(goal, full, mask, None, outputs)
            return weight, error(weight, goal, full, outputs)

        mask = self._settle(goal, full, outputs, sparsity, pattern)
        first = best(jnp.abs(goal), sparsity, pattern)  # never worse than this
        (weight, off), (plain, plain_off) = fit(mask), fit(first)
        mask, weight = (jnp.where(off <= plain_off, *pair) for pair in ((mask, first), (weight, plain)))
        return Solved(weight / scale * unit, mask)

    def _settle(
        self,
        goal: Weight,
        full: Moments,
        outputs: OutputMoments | None,
        sparsity: Sparsity | None,
        pattern: Distribution,
    ) -> Mask:
        """The mask that the alternation ends with; inputs and outputs are scaled."""
        values, vectors = jnp.linalg.eigh(full)
        values, across = values[:, None], None
        if outputs is not None:
            more, across = jnp.linalg.eigh(outputs)
            values = values * more[None]

        def turned(weight: Weight, vectors: Moments, across: OutputMoments | None) -> Weight:
            return vectors.T @ weight if across is None else vectors.T @ weight @ across

        right = values * turned(goal, vectors, across)

        def step(state: _State) -> _State:
            rho = state.penalty
            pulled = turned(rho * state.sparse - state.multipliers, vectors, across)
            dense = turned((right + pulled) / (values + rho), vectors.T, None if across is None else across.T)
            raised = dense + state.multipliers / rho
            kept = best(jnp.abs(raised), sparsity, pattern)
            sparse = jnp.where(kept, raised, 0.0)
            due = state.step % self.every == self.every - 1
            changed = jnp.sum(kept != state.mask) / jnp.maximum(jnp.sum(kept), 1)
            growth = jnp.where(changed > 0.1, 1.3, jnp.where(changed > 0.005, 1.2, 1.1))
            return _State(
                step=state.step + 1,
                sparse=sparse,
                multipliers=state.multipliers + rho * (dense - sparse),
                penalty=jnp.where(due, growth * rho, rho),
                mask=jnp.where(due, kept, state.mask),
                settled=due & (changed == 0),
            )

        first = _State(
            step=jnp.int32(0),
            sparse=goal,
            multipliers=jnp.zeros_like(goal),
            penalty=jnp.float32(self.penalty),
            mask=jnp.zeros(goal.shape, bool),
            settled=jnp.bool_(False),
        )
        last = lax.while_loop(lambda state: ~state.settled & (state.step < self.iterations), step, first)
        return best(jnp.abs(last.sparse), sparsity, pattern)
