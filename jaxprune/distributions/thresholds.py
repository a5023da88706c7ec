"""No contest: every group for itself, against a number."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from jaxprune.checks import check_number
from jaxprune.distributions.contest import LAYER, Dims, Groups, Kept, count, refuse
from jaxprune.exact.numerics import ordered_sum, settled
from jaxprune.types import Sparsity


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Dead where the score is below `t`, an absolute number in the scores' unit. Takes no sparsity.

    Attributes:
        t: threshold, >= 0.
    """

    t: float

    def __post_init__(self) -> None:
        check_number(self.t, "`Threshold(t)` needs t >= 0,", ends="[]")

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """No contest: every group for itself."""
        refuse(sparsity, self)
        return {name: scores >= jnp.float32(self.t) for name, scores in groups.items()}


@dataclasses.dataclass(frozen=True)
class SigmaThreshold:
    r"""Dead where the score is below `k` standard deviations of its leaf. Takes no sparsity.

    $S < k \sigma$ with $\sigma = \sqrt{\mathrm{mean}(S^2)}$ over the leaf (a stacked leaf: over the layer), dead
    weights counted. For `magnitude` this is the standard deviation of the weights about zero; it differs from the one
    about their mean by the mean's square, which trained layers keep small, and is defined for every criterion.

    Attributes:
        k: number of standard deviations, >= 0.
        pooled: of all leaves together, one threshold for all: a small layer of large weights keeps most of them.

    References:
        Han et al. 2015, arXiv:1506.02626, section 3: "a quality parameter multiplied by the standard deviation".
    """

    k: float
    pooled: bool = False

    def __post_init__(self) -> None:
        check_number(self.k, "`SigmaThreshold(k)` needs k >= 0,", ends="[]")

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """No contest: every group for itself."""
        refuse(sparsity, self)
        axes = {name: tuple(range(-scores.ndim, 0)) if self.pooled else LAYER for name, scores in groups.items()}
        sums = {name: ordered_sum(settled(scores * scores), axes[name]) for name, scores in groups.items()}
        sizes = {name: count(scores, axes[name]) for name, scores in groups.items()}
        if self.pooled:
            sums = dict.fromkeys(sums, sum(one.reshape(()) for one in sums.values()))
            sizes = dict.fromkeys(sizes, sum(sizes.values()))

        def keep(name: str) -> Array:
            return groups[name] >= jnp.float32(self.k) * jnp.sqrt(sums[name] * (1 / max(sizes[name], 1)))

        return {name: keep(name) for name in groups}
