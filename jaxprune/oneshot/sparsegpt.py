"""SparseGPT: one pass over the inputs, in which what goes is made up for by what comes after."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from jaxprune.distributions import NM, Distribution, PerOutput, Uniform
from jaxprune.exact.numerics import rounded_share
from jaxprune.exact.ranking import top_k_mask
from jaxprune.oneshot.layerwise import Mask, Moments, Solved, Weight, best, damped
from jaxprune.oneshot.least_squares import refit
from jaxprune.quantize import grids
from jaxprune.types import Sparsity


@dataclasses.dataclass(frozen=True)
class SparseGPT:
    r"""Inputs are gone through in blocks; an input's dead weights are made up for by the inputs after it.

    With U the upper Cholesky factor of $(H + \lambda I)^{-1}$, a weight is worth $w_{ij}^2 / U_{ii}^2$, and taking it
    away moves the weights of the inputs k > i by $-w_{ij} U_{ik} / U_{ii}$. The mask of a block is chosen when the
    weights have been moved by all blocks before it: a contest over all outputs of the block, or over each run of N:M
    when its turn comes.

    With `quantize`, the weights that stay are rounded to a grid Q in the same pass, and later inputs make up for that
    too: input i leaves $e_j = (w_{ij} - m_{ij} Q(w_{ij})) / U_{ii}$ and moves the inputs k > i by $-e_j U_{ik}$. The
    grid is fixed before: that with the least $\sum m_{ij} (w_{ij} - Q(w_{ij}))^2 / U_{ii}^2$ over the weights w and the
    mask m that a pass without it gives. See `jaxprune.quantize.grids`. Saving changes no bit of such weights:

        integers     jp.storage.to_integers(params, masks, bits=4, exact=True)
        codebooks    jp.storage.to_codebooks(params, masks, bits=4)     of a stack of layers, each a leaf of its own

    Attributes:
        block: inputs whose mask is chosen together.
        damping: see `Solver`.
        refit: exact least squares on the mask afterwards; not on a grid.
        quantize: "int8" or "int4", symmetric with a scale for each output; "codebook1" to "codebook8", 2 to 256 values
            for each matrix; None: weights are not rounded. A weight that stays may be 0 then.

    References:
        Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1, with quantization section 3.4. Theirs removes one
        weight too many in a block and all that tie with it; here counts are exact over the whole matrix. Its script's
        grids are asymmetric, from the smallest to the largest weight of an output.
    """

    block: int = 128
    damping: float = 0.01
    refit: bool = False
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"`SparseGPT(block=...)` is a number of inputs, at least 1; got {self.block}.")
        if self.quantize is not None:
            grids.bits_of(self.quantize)
            if self.refit:
                raise ValueError("`SparseGPT(refit=True)` would leave the grid of `quantize`: take one of them.")

    def __call__(
        self, target: Weight, moments: Moments, sparsity: Sparsity | None, pattern: Distribution | None = None
    ) -> Solved:
        """See `Solver`.

        Raises:
            ValueError: the pattern is not `Uniform`, `PerOutput` or `NM` along the inputs; the runs of `NM` do not
                divide the block.
        """
        pattern = Uniform() if pattern is None else pattern
        self._check(pattern, target.shape[0])
        full = damped(moments, self.damping)
        upper = inverse_factor(full)
        weight, mask = self._pass(target, upper, sparsity, pattern, lambda rows: rows)
        if self.quantize is not None:
            worth = jnp.where(mask, 1 / jnp.square(jnp.diagonal(upper))[:, None], 0.0)
            rounded = grids.rounding(self.quantize, weight, worth)
            weight, mask = self._pass(target, upper, sparsity, pattern, rounded)
        return Solved(refit(target, full, mask, weight) if self.refit else weight, mask)

    def _pass(
        self, target: Weight, upper: Moments, sparsity: Any, pattern: Distribution, rounded: grids.Rounding
    ) -> tuple[Weight, Mask]:
        """Algorithm 1, with the weights that stay rounded."""
        inputs, outputs = target.shape
        size = min(self.block, inputs)
        count = -(-inputs // size)
        pad = count * size - inputs
        # Inputs that are not there have no weights, meet nobody, and win every contest.
        weights = jnp.pad(target, ((0, pad), (0, 0)))
        upper = jnp.pad(upper, ((0, pad), (0, pad))) + jnp.diag(jnp.where(jnp.arange(count * size) < inputs, 0.0, 1.0))

        def one(number: Any, carry: tuple[Weight, Mask]) -> tuple[Weight, Mask]:
            weights, mask = carry
            start = number * size
            here = lax.dynamic_slice(weights, (start, 0), (size, outputs))
            rows = lax.dynamic_slice(upper, (start, 0), (size, upper.shape[1]))
            square = lax.dynamic_slice(rows, (0, start), (size, size))
            real = start + jnp.arange(size) < inputs
            kept = self._choose(here, square, sparsity, pattern, start, real, inputs)
            here, kept, errors = self._block(here, square, kept, sparsity, pattern, rounded)
            later = jnp.where(jnp.arange(upper.shape[1])[None] >= start + size, rows, 0.0)
            weights = weights - later.T @ errors
            weights = lax.dynamic_update_slice(weights, here, (start, 0))
            return weights, lax.dynamic_update_slice(mask, kept, (start, 0))

        weights, mask = lax.fori_loop(0, count, one, (weights, jnp.ones(weights.shape, bool)))
        return weights[:inputs], mask[:inputs]

    def _check(self, pattern: Distribution, inputs: int) -> None:
        if not isinstance(pattern, Uniform | PerOutput | NM) or getattr(pattern, "along", "inputs") != "inputs":
            raise ValueError(f"`SparseGPT` goes with `Uniform()`, `PerOutput()` and `NM(n, m)`, not with {pattern}.")
        if isinstance(pattern, NM) and (self.block % pattern.m or inputs % pattern.m):
            raise ValueError(
                f"Runs of {pattern.m} must divide both the {inputs} inputs of the weight and the block of "
                f"`SparseGPT(block={self.block})`: leave the weight out with `select`, or choose another block."
            )

    def _choose(
        self, here: Weight, square: Moments, sparsity: Any, pattern: Distribution, start: Any, real: Any, inputs: int
    ) -> Mask:
        """The mask of a block at its beginning: exact counts up to here, for contests over whole blocks."""
        if isinstance(pattern, NM):
            return jnp.ones(here.shape, bool)
        scores = jnp.where(real[:, None], _scores(here, square), jnp.inf)
        each = here.shape[1] if isinstance(pattern, Uniform) else 1
        total = jnp.asarray(rounded_share(inputs * each, sparsity), jnp.uint32)

        def until(end: Any) -> Any:
            """How many weights are gone before this input."""
            share = jnp.round(jnp.float32(sparsity) * (end * each).astype(jnp.float32)).astype(jnp.uint32)
            return jnp.where(end >= inputs, total, jnp.minimum(share, total))

        removed = until(jnp.asarray(start + here.shape[0])) - until(jnp.asarray(start))
        axes = (-2, -1) if isinstance(pattern, Uniform) else (-2,)
        return top_k_mask(scores, here.shape[0] * each - removed, axes)

    def _block(
        self,
        here: Weight,
        square: Moments,
        kept: Mask,
        sparsity: Any,
        pattern: Distribution,
        rounded: grids.Rounding,
    ) -> tuple[Weight, Mask, Float[Array, "inputs outputs"]]:
        """A block input after input, and the errors that the inputs after the block make up for."""

        def one(i: Any, carry: tuple[Weight, Mask, Weight]) -> tuple[Weight, Mask, Weight]:
            here, kept, errors = carry
            if isinstance(pattern, NM):
                kept = lax.cond(
                    i % pattern.m == 0, lambda: self._run(here, square, kept, i, sparsity, pattern), lambda: kept
                )
            stays = jnp.where(kept[i], rounded(here[i][None])[0], 0.0)
            lost = ((here[i] - stays) / square[i, i])[None]
            row = jnp.where(jnp.arange(here.shape[0]) > i, square[i], 0.0)
            here = (here - row[:, None] * lost).at[i].set(stays)
            return here, kept, errors.at[i].set(lost[0])

        return lax.fori_loop(0, here.shape[0], one, (here, kept, jnp.zeros_like(here)))

    def _run(self, here: Weight, square: Moments, kept: Mask, i: Any, sparsity: Any, pattern: Any) -> Mask:
        scores = lax.dynamic_slice(_scores(here, square), (i, 0), (pattern.m, here.shape[1]))
        return lax.dynamic_update_slice(kept, best(scores, sparsity, pattern), (i, 0))


def inverse_factor(moments: Moments) -> Moments:
    """U, upper, with U^T U the inverse of the (damped) moments; NaN where these are not positive definite.

    With J the exchange of the order of inputs and J H J = L L^T: U = J L^-1 J, so that nothing is inverted but a
    triangle.
    """
    factor = jnp.linalg.cholesky(moments[::-1, ::-1])
    identity = jnp.eye(moments.shape[0], dtype=moments.dtype)
    return solve_triangular(factor, identity, lower=True)[::-1, ::-1]


def _scores(here: Weight, square: Moments) -> Weight:
    """The roots of the errors: in the same order, and within float32 where their squares may not be."""
    return jnp.abs(here / jnp.diagonal(square)[:, None])
