"""A leaf with many outlying scores loses less."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.distributions.contest import LAYER, Dims, Groups, Kept, check_several, contest, count, required
from jaxprune.exact.numerics import ordered_sum
from jaxprune.types import Sparsity


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

    spans_axes = looks_at_axes

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """One contest a leaf or an output, each leaf at its own sparsity."""
        axes = (-3, -2) if self.per_output else LAYER
        if self.per_output:
            check_several("OWL(per_output=True)", groups)
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
