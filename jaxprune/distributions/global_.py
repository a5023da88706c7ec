"""All groups of all leaves in one contest."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.checks import check_number
from jaxprune.distributions.contest import LAYER, Dims, Groups, Kept, count, required
from jaxprune.exact.numerics import ordered_sum, rounded_share, settled
from jaxprune.exact.ranking import top_k_mask, top_k_masks
from jaxprune.types import Sparsity


@dataclasses.dataclass(frozen=True)
class Global:
    """All groups of all leaves compete in one contest.

    Attributes:
        floor: no leaf falls below this density: its best ceil(floor * n) groups survive whatever the others are worth.
            Where the floors together ask for more than the sparsity leaves, they win, and fewer groups are removed; a
            sparsity known beforehand is refused then.
        normalized: scores compete divided by the L2 norm of those of their leaf (a stacked leaf: of the layer), so that
            leaves of all scales do.

    References:
        Frankle and Carbin 2019, arXiv:1803.03635; floors against layer collapse: Tanaka et al. 2020, arXiv:2006.05467;
        norms: Molchanov et al. 2017, arXiv:1611.06440, section 2.2.
    """

    floor: float = 0.0
    normalized: bool = False

    def __post_init__(self) -> None:
        check_number(self.floor, "`Global(floor=...)` is a density in [0, 1],", high=1, ends="[]")

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """One contest over everything."""
        share = required(sparsity, self)
        groups = {name: _normalized(scores) for name, scores in groups.items()} if self.normalized else groups
        total = sum(scores.size for scores in groups.values())
        floors = {name: math.ceil(self.floor * count(scores)) for name, scores in groups.items()}
        least = sum(floors[name] * (scores.size // max(count(scores), 1)) for name, scores in groups.items())
        k = total - rounded_share(total, share)
        if isinstance(k, int) and k < least:
            raise ValueError(
                f"`Global(floor={self.floor})` keeps {least} groups of {total}, but sparsity {share:g} leaves {k}. "
                "Lower the floor or the sparsity."
            )
        k = max(k, least) if isinstance(k, int) else jnp.maximum(k, jnp.uint32(least))
        safe = {name: top_k_mask(scores, floors[name], LAYER) for name, scores in groups.items()} if least else {}
        return dict(zip(groups, top_k_masks(list(groups.values()), k, list(safe.values()) or None), strict=True))


def _normalized(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    norm = jnp.sqrt(ordered_sum(settled(scores * scores), LAYER))
    return scores * (1 / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
