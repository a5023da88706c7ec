"""The same sparsity for every leaf."""

import dataclasses

from jaxprune.distributions.contest import Dims, Groups, Kept, contest, required
from jaxprune.types import Sparsity


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Every leaf loses the same fraction of its groups.

    References:
        Zhu and Gupta 2017, arXiv:1710.01878.
    """

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """One contest a leaf (a stacked leaf: one a layer)."""
        share = required(sparsity, self)
        return {name: contest(scores, share) for name, scores in groups.items()}
