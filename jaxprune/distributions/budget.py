r"""A contest of groups that cost differently: a target in multiply-adds, bytes or weights, not in groups.

    kept = the highest scores whose costs together are at most the budget         cost of a group = c x weights in it

Costs are whole numbers here, of a unit that divides them all where there is one, so that what is compared with the
budget is exact and the same on any number of devices.
"""

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from jaxprune.distributions.contest import Dims, Groups, Kept, required
from jaxprune.exact.numerics import settled
from jaxprune.exact.ranking import fitting_masks
from jaxprune.exact.wide import Wide, larger, left_of, wide
from jaxprune.tree import Rules, each_by_rule, pairs
from jaxprune.types import Sparsity

FINEST = 1 << 62  # of these units the whole is made where no unit divides all costs
ROUNDING = Fraction(1, 1 << 50)  # of a sparsity that is a Python float


@dataclasses.dataclass(frozen=True)
class Budget:
    r"""All groups of all leaves compete; the best survive whose costs together are at most the budget.

    A group costs $c_l$, the cost of one weight of its leaf, times its weights, and the budget is $(1 - s)$ times the
    cost of all groups, s being the sparsity: $\sum_{i \text{ alive}} \text{cost}_i \le (1 - s) \sum_i \text{cost}_i$.
    Groups survive from the highest score down, of equal ones the lower index first, and the first that does not fit
    ends it, whatever cheaper ones come after. So the budget is never exceeded, and is missed by less than one group.
    (A sparsity is as exact as its type: a traced one may make the budget larger by 2**-24 of the whole, a float by
    2**-50. A limit is exact.)

    The weights of a group are those of a layer over its groups: of `Block`, whose tiles at the far edges may be
    smaller, that is the mean, so that the survivors may cost more or less than was counted where sizes do not divide.
    Leaves that cost nothing stay whole, since nothing would be gained. Groups that are dead by earlier masks score 0
    and come last; where the next one was too large, the room it left may bring smaller ones of them back.

    Attributes:
        costs: pattern of names -> cost of one weight, >= 0; the first that matches wins. `mac_costs(sites, params)` and
            `byte_costs(params)` make them; without any, every weight costs 1. A leaf without a cost is refused, and a
            pattern that matches no leaf. Kept as a tuple of pairs.
        limit: what the pruned leaves may cost together, in the unit of the costs, instead of a sparsity. Where there is
            one too (a gradual schedule), the budget is the larger of both: sparsity rises until the limit is reached.
        per_cost: scores compete divided by the cost of one weight, so that a leaf must be worth what it costs. A
            group's score is the mean of its weights', so this is the worth of the group by the cost of the group.

    Raises:
        ValueError: a cost or limit that is negative or not finite; where it is called, a limit that all groups are
            within, or that the cheapest exceeds, and leaves and patterns as above.

    References:
        Groups by worth and cost until the room is taken: Dantzig 1957, doi:10.1287/opre.5.2.266, who goes on with part
        of the next. Scores set against FLOPs: Molchanov et al. 2017, arXiv:1611.06440, there by subtraction.

    Example:
        >>> macs = jp.tracing.mac_costs(jp.trace(apply_fn, params, x), params)
        >>> masks = jp.compute_masks(jp.Method(distribution=jp.distributions.Budget(macs, limit=1e5)), params)
    """

    is_priced: ClassVar[bool] = True

    costs: Rules[float] | None = None
    limit: float | None = None
    per_cost: bool = False

    def __post_init__(self) -> None:
        given = pairs({"*": 1.0} if self.costs is None else self.costs)
        object.__setattr__(self, "costs", tuple((pattern, float(cost)) for pattern, cost in given))
        object.__setattr__(self, "limit", None if self.limit is None else float(self.limit))
        for pattern, cost in given:
            if not 0 <= cost < math.inf:
                raise ValueError(f"`Budget`: a weight of {pattern!r} costs {cost:g}; costs are finite and at least 0.")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ValueError(
                "`Budget(limit=...)` is what the pruned leaves may cost together, above 0 and finite; got "
                f"{self.limit:g}."
            )

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """One contest over everything that costs something."""
        if sparsity is not None or self.limit is None:
            required(sparsity, self)
        weight = each_by_rule("Budget", self.costs or (), groups)
        paid = {name: scores for name, scores in groups.items() if weight[name] > 0 and scores.size}
        if not paid:
            raise ValueError(f"`Budget` finds nothing to save: the weights of {list(groups)} cost 0 each.")
        prices = {name: _price(weight[name], scores.shape, dims[name]) for name, scores in paid.items()}
        ledger = _ledger(prices, {name: scores.size for name, scores in paid.items()})
        budget = self._budget(ledger, prices, sparsity)
        if self.per_cost:
            most = max(weight.values())
            paid = {name: settled(scores * (most / weight[name])) for name, scores in paid.items()}
        kept = dict(zip(paid, fitting_masks(list(paid.values()), ledger.each, budget), strict=True))
        return {name: kept.get(name, jnp.ones(scores.shape, bool)) for name, scores in groups.items()}

    def _budget(self, ledger: "_Ledger", prices: Mapping[str, Fraction], sparsity: Sparsity | None) -> Wide:
        if self.limit is None:
            return _share_of(ledger, sparsity)
        self._check_limit(ledger, prices)
        end = wide(ledger.units(Fraction(self.limit)))
        return end if sparsity is None else larger(end, _share_of(ledger, sparsity))

    def _check_limit(self, ledger: "_Ledger", prices: Mapping[str, Fraction]) -> None:
        limit, most = Fraction(self.limit or 0), ledger.whole
        if limit > Fraction(float(most)):  # a sum of costs in float64 may be above the exact one
            raise ValueError(
                f"`Budget(limit={self.limit:.10g})` asks for nothing: the pruned leaves {list(prices)} cost "
                f"{float(most):.10g} together. Lower it, or check its unit: `costs` are of one weight."
            )
        cheapest = min(prices, key=lambda name: prices[name])
        if limit < prices[cheapest]:
            raise ValueError(
                f"`Budget(limit={self.limit:.10g})` leaves nothing alive: the cheapest group of {list(prices)} costs "
                f"{float(prices[cheapest]):.10g}, in {cheapest!r}, and all together {float(most):.10g}. Raise it, or "
                "take smaller groups."
            )


class _Ledger(NamedTuple):
    """Costs as whole numbers of units."""

    each: tuple[int, ...]  # of one group, leaf by leaf
    total: int  # of all groups
    whole: Fraction  # the same in the unit of the costs
    unit: Fraction

    def units(self, amount: Fraction) -> int:
        """An amount of the costs, rounded down."""
        return self.total if amount >= self.whole else math.floor(amount / self.unit)


def _price(weight: float, shape: tuple[int, ...], sizes: tuple[int, ...]) -> Fraction:
    """Of one group: the cost of a weight x the weights of a layer / its groups."""
    return Fraction(weight) * math.prod(sizes) / math.prod(shape[-3:])


def _ledger(prices: Mapping[str, Fraction], sizes: Mapping[str, int]) -> _Ledger:
    whole = sum((prices[name] * n for name, n in sizes.items()), Fraction(0))
    common = math.lcm(*(price.denominator for price in prices.values()))
    unit = Fraction(math.gcd(*(int(price * common) for price in prices.values())), common)
    # Where there are too many of these, coarser ones and every price rounded up, so that the budget still holds.
    unit = max(unit, whole / FINEST)
    each = {name: math.ceil(price / unit) for name, price in prices.items()}
    return _Ledger(tuple(each.values()), sum(each[name] * n for name, n in sizes.items()), whole, unit)


def _share_of(ledger: _Ledger, sparsity: Any) -> Wide:
    """(1 - sparsity) of the whole; a sum that falls short of it by its rounding alone, such as 1 - 0.7, reaches it."""
    if isinstance(sparsity, float | int):
        return wide(ledger.units((1 - Fraction(sparsity) + ROUNDING) * ledger.whole))
    return left_of(ledger.total, sparsity)
