"""Distribution: who competes with whom, and how many win.

A distribution maps group scores to verdicts, at a sparsity:

    kept = distribution(groups, sparsity, dims=dims)     # leaf name -> bool, shaped like the groups

`groups` maps leaf names to scores (*layers, spatial, in, out) and `dims` the same names to the sizes
(*spatial, in, out) of the leaf, for rules that look at them. Stacked layers are leaves of their own here, so that a
scanned model is pruned like the same model unrolled.

A contest of n groups at sparsity s removes exactly round(n * s), half to even; of equal scores the lower index
survives.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune.checks import check_sparsity, is_concrete
from jaxprune.numerics import ordered_sum, rounded_share
from jaxprune.ranking import kth_largest, top_k_mask, top_k_masks
from jaxprune.tree import first_match
from jaxprune.types import Sparsity

__all__ = [
    "ERK", "NM", "ByRule", "Distribution", "Global", "PerOutput", "SigmaThreshold", "Threshold", "Uniform",
    "kth_largest", "top_k_mask",
]  # fmt: skip

Groups = Mapping[str, Float[Array, "*layers g_spatial g_in g_out"]]
Kept = dict[str, Bool[Array, "*layers g_spatial g_in g_out"]]
Dims = Mapping[str, tuple[int, ...]]
LAYER = (-3, -2, -1)


@runtime_checkable
class Distribution(Protocol):
    """Group scores -> verdicts."""

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """True where the group survives, shaped like `groups`."""
        ...


def _required(sparsity: Sparsity | None, distribution: Any) -> Sparsity:
    if sparsity is None:
        raise ValueError(f"`{type(distribution).__name__}` needs a sparsity: the fraction to remove, in [0, 1).")
    check_sparsity(sparsity)
    return float(sparsity) if is_concrete(sparsity) else sparsity


def _refused(sparsity: Sparsity | None, distribution: Any) -> None:
    if sparsity is not None:
        raise ValueError(
            f"`{type(distribution).__name__}` decides by itself how many weights go: leave `sparsity` out (None)."
        )


def _count(scores: Array, axes: tuple[int, ...] = LAYER) -> int:
    return math.prod(scores.shape[axis] for axis in axes)


def _contest(scores: Array, sparsity: Sparsity, axes: tuple[int, ...] = LAYER) -> Bool[Array, "..."]:
    n = _count(scores, axes)
    return top_k_mask(scores, n - rounded_share(n, sparsity), axes)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Every leaf loses the same fraction of its groups.

    References:
        Zhu and Gupta 2017, arXiv:1710.01878.
    """

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """One contest a leaf (a stacked leaf: one a layer)."""
        share = _required(sparsity, self)
        return {name: _contest(scores, share) for name, scores in groups.items()}


@dataclasses.dataclass(frozen=True)
class Global:
    """All groups of all leaves compete in one contest.

    Attributes:
        floor: no leaf falls below this density: its best ceil(floor * n) groups survive whatever the others are worth.
            Where the floors together ask for more than the sparsity leaves, they win, and fewer groups are removed; a
            sparsity known beforehand is refused then.

    References:
        Frankle and Carbin 2019, arXiv:1803.03635; floors against layer collapse: Tanaka et al. 2020, arXiv:2006.05467.
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"`Global(floor=...)` is a density in [0, 1], got {self.floor}.")

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """One contest over everything."""
        share = _required(sparsity, self)
        total = sum(scores.size for scores in groups.values())
        floors = {name: math.ceil(self.floor * _count(scores)) for name, scores in groups.items()}
        least = sum(floors[name] * (scores.size // max(_count(scores), 1)) for name, scores in groups.items())
        k = total - rounded_share(total, share)
        if isinstance(k, int) and k < least:
            raise ValueError(
                f"`Global(floor={self.floor})` keeps {least} groups of {total}, but sparsity {share:g} leaves {k}. "
                "Lower the floor or the sparsity."
            )
        k = max(k, least) if isinstance(k, int) else jnp.maximum(k, jnp.uint32(least))
        safe = {name: top_k_mask(scores, floors[name], LAYER) for name, scores in groups.items()} if least else {}
        return dict(zip(groups, top_k_masks(list(groups.values()), k, list(safe.values()) or None), strict=True))


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
        shares = self.sparsities(groups, _required(sparsity, self), dims)
        return {name: _contest(scores, shares[name]) for name, scores in groups.items()}

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

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """One contest an output."""
        share = _required(sparsity, self)
        for name, scores in groups.items():
            if _count(scores, (-3, -2)) == 1:
                raise ValueError(
                    f"`PerOutput` needs several groups for every output, {name!r} has one: it would remove all or "
                    "none. Use `Uniform` or `Global` with this granularity."
                )
        return {name: _contest(scores, share, (-3, -2)) for name, scores in groups.items()}


@dataclasses.dataclass(frozen=True)
class NM:
    """`n` survivors in every run of `m` groups along the input axis; each run is a contest of its own.

    Without a sparsity, n of m survive. With one (a gradual schedule) max(n, m - round(m * sparsity)) do.

    Attributes:
        n: survivors, 0 < n <= m.
        m: length of a run; it must divide the number of inputs.

    References:
        Mishra et al. 2021, arXiv:2104.08378 (2:4 on the input axis, as sparse tensor cores want it).
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise ValueError(f"`NM(n, m)` keeps n of m, with 0 < n <= m; got NM({self.n}, {self.m}).")

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """One contest a run."""
        k = self._survivors(sparsity)
        return {name: self._runs(name, scores, k) for name, scores in groups.items()}

    def _survivors(self, sparsity: Sparsity | None) -> Any:
        if sparsity is None:
            return self.n
        share = _required(sparsity, self)
        if isinstance(share, float):
            if round(self.m * share) > self.m - self.n:
                raise ValueError(
                    f"`NM({self.n}, {self.m})` removes at most {1 - self.n / self.m:g}; sparsity {share:g} is more."
                )
            return max(self.n, self.m - round(self.m * share))
        return jnp.maximum(jnp.uint32(self.n), self.m - rounded_share(self.m, share))

    def _runs(self, name: str, scores: Array, k: Any) -> Array:
        *lead, n_in, n_out = scores.shape
        if n_in % self.m:
            raise ValueError(
                f"`NM({self.n}, {self.m})` needs runs of {self.m} along the input axis, but {name!r} has {n_in} "
                "inputs. Leave it out with `select`, or check `layout`."
            )
        runs = scores.reshape(*lead, n_in // self.m, self.m, n_out)
        return top_k_mask(runs, k, (-2,)).reshape(scores.shape)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Dead where the score is below `t`, an absolute number in the scores' unit. Takes no sparsity.

    Attributes:
        t: threshold, >= 0.
    """

    t: float

    def __post_init__(self) -> None:
        if not self.t >= 0:
            raise ValueError(f"`Threshold(t)` needs t >= 0, got {self.t}.")

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """No contest: every group for itself."""
        _refused(sparsity, self)
        return {name: scores >= jnp.float32(self.t) for name, scores in groups.items()}


@dataclasses.dataclass(frozen=True)
class SigmaThreshold:
    r"""Dead where the score is below `k` standard deviations of its leaf. Takes no sparsity.

    $S < k \sigma$ with $\sigma = \sqrt{\mathrm{mean}(S^2)}$ over the leaf (a stacked leaf: over the layer), dead
    weights counted. For `magnitude` this is the standard deviation of the weights about zero; it differs from the one
    about their mean by the mean's square, which trained layers keep small, and is defined for every criterion.

    Attributes:
        k: number of standard deviations, >= 0.

    References:
        Han et al. 2015, arXiv:1506.02626, section 3: "a quality parameter multiplied by the standard deviation".
    """

    k: float

    def __post_init__(self) -> None:
        if not self.k >= 0:
            raise ValueError(f"`SigmaThreshold(k)` needs k >= 0, got {self.k}.")

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """No contest: every group for itself."""
        _refused(sparsity, self)

        def keep(scores: Array) -> Array:
            # Without `maximum` a compiler may round product and sum at once, here and not there.
            squares = jnp.maximum(scores * scores, 0.0)
            mean = ordered_sum(squares, LAYER) * (1 / max(_count(scores), 1))
            return scores >= jnp.float32(self.k) * jnp.sqrt(mean)

        return {name: keep(scores) for name, scores in groups.items()}


@dataclasses.dataclass(frozen=True, init=False)
class ByRule:
    """A sparsity or a distribution of its own for every leaf, by name.

    Leaves of one rule share its distribution: a `Global` there is a contest among them. A number is `Uniform` at that
    sparsity, and is where the leaf ends: a sparsity handed in moves all numbers in proportion, reaching them when it
    reaches the largest, so a schedule up to the largest number ramps every leaf to its own. Distributions are handed
    the sparsity as it is.

    Attributes:
        rules: (name pattern, sparsity or distribution) pairs; the first that matches wins. A mapping is taken too. A
            leaf without a rule is refused, and a rule whose pattern matches no leaf.
    """

    rules: tuple[tuple[str, Any], ...]

    def __init__(self, rules: Mapping[str, Any] | tuple[tuple[str, Any], ...]) -> None:
        pairs = tuple(rules.items() if isinstance(rules, Mapping) else rules)
        for pattern, rule in pairs:
            if not callable(rule):
                check_sparsity(rule, f"ByRule: {pattern}")
        object.__setattr__(self, "rules", pairs)

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """The rules' contests."""
        members: dict[int, list[str]] = {}
        for name in groups:
            rule = first_match(((pattern, i) for i, (pattern, _) in enumerate(self.rules)), name)
            if rule is None:
                raise ValueError(
                    f"No rule of `ByRule` matches {name!r}. There are: {[pattern for pattern, _ in self.rules]}. "
                    'Add one, such as "*", or leave the leaf out with `select`.'
                )
            members.setdefault(rule, []).append(name)
        for pattern, _ in self.rules:
            if all(first_match([(pattern, True)], name) is None for name in groups):
                raise ValueError(f"The rule {pattern!r} of `ByRule` matches no pruned leaf. There are: {list(groups)}.")
        kept: Kept = {}
        for i, names in members.items():
            distribution, share = self._rule(self.rules[i][1], sparsity)
            kept |= distribution({name: groups[name] for name in names}, share, dims=dims)
        return {name: kept[name] for name in groups}

    def _rule(self, rule: Any, sparsity: Sparsity | None) -> tuple[Any, Sparsity | None]:
        if callable(rule):
            return rule, sparsity
        largest = max(number for _, number in self.rules if not callable(number))
        if sparsity is None or largest == 0:
            return Uniform(), float(rule)
        return Uniform(), rule * (_required(sparsity, self) / largest)
