"""A density that grows with the sum of a leaf's sizes over their product."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.distributions.contest import Dims, Groups, Kept, contest, required
from jaxprune.types import Sparsity


@dataclasses.dataclass(frozen=True)
class ERK:
    r"""Erdos-Renyi-Kernel: a leaf's density grows with the sum of its sizes over their product.

    $d_l = \min(1, \epsilon \, \frac{\sum_i n_{l,i}}{\prod_i n_{l,i}})$ for sizes $n_l$ = (*spatial, in, out), with
    $\epsilon$ such that the groups kept are the fraction 1 - sparsity of all. Leaf by leaf $\mathrm{round}(n_l s_l)$
    groups go, so the total may be off by half a group a leaf.

    References:
        Evci et al. 2020, arXiv:1911.11134; Mocanu et al. 2018, arXiv:1707.04780.
    """

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """One contest a leaf, each at its own sparsity."""
        shares = self.sparsities(groups, required(sparsity, self), dims)
        return {name: contest(scores, shares[name]) for name, scores in groups.items()}

    def sparsities(self, groups: Groups, sparsity: Sparsity, dims: Dims) -> dict[str, Sparsity]:
        """Leaf name -> sparsity."""
        # A sparsity that is known gets float64 NumPy, a traced one float32: the same lines serve both.
        xp: Any = np if isinstance(sparsity, float) else jnp
        real = np.float64 if isinstance(sparsity, float) else np.float32
        raw = xp.asarray([sum(dims[name]) / max(math.prod(dims[name]), 1) for name in groups], real)
        sizes = xp.asarray([scores.size for scores in groups.values()], real)
        budget = (1 - sparsity) * xp.sum(sizes)
        dense = xp.zeros(len(raw), bool)
        density = xp.ones(len(raw), real)
        for _ in range(len(raw)):  # a round may fill further leaves; none is emptied again
            left = xp.where(dense, real(0), sizes)
            scale = (budget - xp.sum(sizes - left)) / xp.maximum(xp.sum(left * raw), real(1e-30))
            density = xp.where(dense, real(1), xp.clip(scale * raw, real(0), real(1)))
            dense = dense | (density >= 1)
        return {name: float(1 - d) if xp is np else 1 - d for name, d in zip(groups, density, strict=True)}
