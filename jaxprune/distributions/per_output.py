"""A contest for every output."""

import dataclasses
from typing import ClassVar

from jaxprune.distributions.contest import Dims, Groups, Kept, check_several, contest, required
from jaxprune.types import Sparsity


@dataclasses.dataclass(frozen=True)
class PerOutput:
    """The groups of every output compete among themselves.

    References:
        Sun et al. 2023 (Wanda), arXiv:2306.11695.
    """

    looks_at_axes: ClassVar[bool] = True
    spans_axes: ClassVar[bool] = True

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """One contest an output."""
        share = required(sparsity, self)
        check_several("PerOutput", groups)
        return {name: contest(scores, share, (-3, -2)) for name, scores in groups.items()}
