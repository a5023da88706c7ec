"""A sparsity for each leaf, from one for all: the same, by one contest of all, by sizes, by scores, or by output."""

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.distributions.contest import LAYER, Dims, Groups, Kept, contest, count, required
from jaxprune.numerics import ordered_sum, rounded_share, settled
from jaxprune.ranking import top_k_mask, top_k_masks
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
        if not 0 <= self.floor <= 1:
            raise ValueError(f"`Global(floor=...)` is a density in [0, 1], got {self.floor}.")

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


@dataclasses.dataclass(frozen=True)
class PerOutput:
    """The groups of every output compete among themselves.

    References:
        Sun et al. 2023 (Wanda), arXiv:2306.11695.
    """

    looks_at_axes: ClassVar[bool] = True

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """One contest an output."""
        share = required(sparsity, self)
        _check_several("PerOutput", groups)
        return {name: contest(scores, share, (-3, -2)) for name, scores in groups.items()}


@dataclasses.dataclass(frozen=True)
class OWL:
    r"""A leaf with many outlying scores loses less: its density is above the mean by as much as its outliers are.

    $D_l$ is the fraction of a leaf's scores (a stacked leaf: of a layer's) above `m` times their mean, brought to
    $[0, 1]$ over all leaves; the density is $d_l = 1 - s + 2 \lambda (D_l - \bar D)$, $\bar D$ being the mean over all
    weights, so that the whole keeps 1 - s up to a rounding a leaf and to densities cut at 0 and 1.

    Attributes:
        m: how many times the mean is an outlier, > 0.
        lam: $\lambda$, most that a leaf's sparsity differs from s by, >= 0.
        per_output: whether weights compete within each output, as `PerOutput`, or within the leaf.

    References:
        Yin et al. 2023, arXiv:2310.05175, section 3.2 (there with `wanda`, for blocks of one size).
    """

    m: float = 5.0
    lam: float = 0.08
    per_output: bool = False

    def __post_init__(self) -> None:
        if not (self.m > 0 and self.lam >= 0):
            raise ValueError(f"`OWL` needs m > 0 and lam >= 0, got {self.m} and {self.lam}.")

    @property
    def looks_at_axes(self) -> bool:
        """Whether weights compete within each output."""
        return self.per_output

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """One contest a leaf or an output, each leaf at its own sparsity."""
        axes = (-3, -2) if self.per_output else LAYER
        if self.per_output:
            _check_several("OWL(per_output=True)", groups)
        shares = self.sparsities(groups, required(sparsity, self))
        return {name: contest(scores, shares[name], axes) for name, scores in groups.items()}

    def sparsities(self, groups: Groups, sparsity: Sparsity) -> dict[str, Float[Array, "*layers 1 1 1"]]:
        """Leaf name -> sparsity, of each of its layers."""
        outliers, sizes = {}, {}
        for name, scores in groups.items():
            n = max(count(scores), 1)
            mean = ordered_sum(scores, LAYER) * (1 / n)
            above = jnp.sum(scores > self.m * mean, axis=LAYER, keepdims=True, dtype=jnp.uint32)
            outliers[name], sizes[name] = above.astype(jnp.float32) * (1 / n), n
        least = jnp.min(jnp.stack([jnp.min(one) for one in outliers.values()]))
        most = jnp.max(jnp.stack([jnp.max(one) for one in outliers.values()]))
        scale = 1 / jnp.maximum(most - least, jnp.finfo(jnp.float32).tiny)
        relative = {name: (one - least) * scale for name, one in outliers.items()}
        total = sum(scores.size for scores in groups.values())
        weighted = [jnp.sum(one) * (sizes[name] / total) for name, one in relative.items()]
        mean = jnp.sum(jnp.stack(weighted))
        # Sparsities end just below 1, as `rounded_share` has them.
        return {
            name: jnp.clip(sparsity - 2 * self.lam * (one - mean), 0.0, 1 - 2.0**-24) for name, one in relative.items()
        }


def _check_several(name: str, groups: Groups) -> None:
    for leaf, scores in groups.items():
        if count(scores, (-3, -2)) == 1:
            raise ValueError(
                f"`{name}` needs several groups for every output, {leaf!r} has one: it would remove all or none. "
                "Use `Uniform` or `Global` with this granularity."
            )
