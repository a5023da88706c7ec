"""Solvers that are short and surely right."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxprune.oneshot.layerwise import Solved, best, damped


@dataclasses.dataclass(frozen=True)
class Wanda:
    """Mask by |w| and the norms of inputs; weights stay."""

    damping: ClassVar[float] = 0.01

    def __call__(self, target, moments, sparsity, pattern):
        norms = jnp.sqrt(jnp.diagonal(moments))
        mask = best(jnp.abs(target) * norms[:, None], sparsity, pattern)
        return Solved(jnp.where(mask, target, 0), mask)


@dataclasses.dataclass(frozen=True)
class Exact:
    """Wanda's mask; exact least squares on it."""

    damping: float = 0.01

    def __call__(self, target, moments, sparsity, pattern):
        mask = Wanda()(target, moments, sparsity, pattern).mask
        full = damped(moments, self.damping)
        identity = jnp.eye(full.shape[0])

        def one(alive, wanted):
            both = alive[:, None] & alive[None]
            factor = jnp.linalg.cholesky(jnp.where(both, full, identity))
            return jax.scipy.linalg.cho_solve((factor, True), jnp.where(alive, wanted, 0.0))

        weight = jax.vmap(one, in_axes=(1, 1), out_axes=1)(mask, full @ target)
        return Solved(jnp.where(mask, weight, 0), mask)
