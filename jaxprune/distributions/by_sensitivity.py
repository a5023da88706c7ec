r"""A sparsity for each leaf from what each can bear: the curves of a scan that prunes one leaf at a time.

drop_l(s_l) = d, the same for all leaves,     with d such that     sum of n_l s_l = s x sum of n_l
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxprune.distributions.contest import Dims, Groups, Kept, contest, required
from jaxprune.tree import Rules, each_by_rule, pairs
from jaxprune.types import Sparsity

Curve = tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class BySensitivity:
    r"""Leaves are pruned until each alone would cost the same accuracy; those that feel it late are pruned far.

    A curve is drawn in straight lines through (0, 0) and the points of the scan, where the drop never falls as the
    sparsity rises (the largest so far counts). $s_l(d)$ is the sparsity at which it reaches d, at most the largest that
    was scanned, and d is such that $\sum_l n_l s_l(d) = s \sum_l n_l$ for the $n_l$ groups of the leaves. Where curves
    are flat at that drop, all of these leaves go the same part of their flat way. Leaf by leaf
    $\mathrm{round}(n_l s_l)$ groups go, so that the total may be off by half a group a leaf (a stacked leaf: a layer).

    A sparsity above what the curves allow is refused where it is known; a traced one stops there.

    Attributes:
        curves: pattern of names -> ((sparsity, drop), ...); the first that matches wins. A leaf without a curve is
            refused, and a pattern that matches no leaf. `sensitivity(...).distribution()` makes them. Kept as a tuple
            of pairs.

    Raises:
        ValueError: a curve without a point above sparsity 0, with one sparsity twice, or with numbers out of range.

    References:
        Han et al. 2015, arXiv:1506.02626, and Li et al. 2017, arXiv:1608.08710, section 3.2, who read each layer's
        threshold, or number of filters, off such curves by eye.

    Example:
        >>> BySensitivity({"conv*": ((0.5, 0.01), (0.9, 0.2)), "*": ((0.5, 0.0), (0.9, 0.01))})
    """

    curves: Rules[Sequence[tuple[float, float]]]

    def __post_init__(self) -> None:
        checked = tuple((pattern, _checked(pattern, points)) for pattern, points in pairs(self.curves))
        object.__setattr__(self, "curves", checked)

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """One contest a leaf, each at its own sparsity."""
        shares = self.sparsities(groups, required(sparsity, self))
        return {name: contest(scores, shares[name]) for name, scores in groups.items()}

    def sparsities(self, groups: Groups, sparsity: Sparsity) -> dict[str, Sparsity]:
        """Leaf name -> sparsity.

        Raises:
            ValueError: the curves do not go as far; a leaf without a curve, a pattern that matches none.
        """
        curves = each_by_rule("BySensitivity", self.curves, groups)
        sizes = np.array([scores.size for scores in groups.values()], np.float64)
        way = _way(list(curves.values()))
        total = way @ sizes / max(sizes.sum(), 1.0)
        if not isinstance(sparsity, float):
            at = partial(jnp.interp, jnp.float32(sparsity), jnp.float32(total))  # beyond its end it stays there
            return dict(zip(groups, jax.vmap(at)(jnp.float32(way.T)), strict=True))
        if sparsity > total[-1] * (1 + 1e-9):
            raise ValueError(
                f"`BySensitivity`: sparsity {sparsity:g} is more than the {total[-1]:.6g} that the curves of "
                f"{list(groups)} reach. Scan further, or ask for less."
            )
        return {name: float(np.interp(sparsity, total, leaf)) for name, leaf in zip(groups, way.T, strict=True)}


def _checked(pattern: str, points: Sequence[Any]) -> Curve:
    curve = sorted((float(sparsity), float(drop)) for sparsity, drop in points)
    for sparsity, drop in curve:
        if not (0 <= sparsity < 1 and 0 <= drop < math.inf) or (sparsity == 0 and drop > 0):
            raise ValueError(
                f"`BySensitivity`: {pattern!r} has the point ({sparsity:g}, {drop:g}); expected (sparsity in [0, 1), "
                "drop of accuracy >= 0), and no drop at sparsity 0."
            )
    curve = [point for point in curve if point[0] > 0]
    if not curve or len(dict(curve)) != len(curve):
        raise ValueError(
            f"`BySensitivity`: the curve of {pattern!r} needs one point or more above sparsity 0, each at a sparsity "
            f"of its own; got {curve}."
        )
    drops = np.maximum.accumulate([0.0, *(drop for _, drop in curve)])
    return tuple(zip([0.0, *(sparsity for sparsity, _ in curve)], map(float, drops), strict=True))


def _way(curves: Sequence[Any]) -> Float[np.ndarray, "corners leaves"]:
    """Sparsities of all leaves as the common drop rises: straight from corner to corner.

    Every drop of a point is two corners: where the curves arrive at it, and where those that are flat there leave it.
    """
    drops = np.unique([drop for curve in curves for _, drop in curve])
    ends = [np.stack(_reached(curve, drops), axis=1).reshape(-1) for curve in curves]
    way = np.maximum.accumulate(np.stack(ends, axis=1), axis=0)
    moved = (np.diff(way, axis=0) > 0).any(axis=1)
    return way[np.concatenate([[True], moved])]


def _reached(curve: Curve, drops: Float[np.ndarray, "n"]) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """The least and the largest sparsity with each of these drops; the largest scanned where a drop is not reached."""
    sparsities, known = np.array(curve).T
    first = np.minimum(np.searchsorted(known, drops), len(known) - 1)
    last = np.searchsorted(known, drops, side="right") - 1
    rise = np.where(first > last, known[first] - known[last], 1.0)
    between = sparsities[last] + (drops - known[last]) / rise * (sparsities[first] - sparsities[last])
    met = known[last] == drops
    return np.where(met, sparsities[first], between), np.where(met, sparsities[last], between)
