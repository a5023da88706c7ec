"""A distribution of its own for every leaf, by name."""

import dataclasses
from typing import Any

from jaxprune.checks import check_sparsity
from jaxprune.distributions.contest import Dims, Distribution, Groups, Kept, required
from jaxprune.distributions.uniform import Uniform
from jaxprune.tree import Rules, each_by_rule, pairs
from jaxprune.types import Sparsity


@dataclasses.dataclass(frozen=True)
class ByRule:
    """A sparsity or a distribution of its own for every leaf, by name.

    Leaves of one rule share its distribution: a `Global` there is a contest among them. A number is `Uniform` at that
    sparsity, and is where the leaf ends: a sparsity handed in moves all numbers in proportion, reaching them when it
    reaches the largest, so a schedule up to the largest number ramps every leaf to its own. Distributions are handed
    the sparsity as it is.

    Attributes:
        rules: pattern of names -> sparsity or distribution; the first that matches wins. A leaf without a rule is
            refused, and a rule whose pattern matches no leaf. Kept as a tuple of pairs.
    """

    rules: Rules[float | Distribution]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", pairs(self.rules))
        for pattern, rule in pairs(self.rules):
            if not callable(rule):
                check_sparsity(rule, f"ByRule: {pattern}")

    def _any(self, what: str) -> bool:
        return any(getattr(rule, what, False) for _, rule in pairs(self.rules))

    looks_at_axes = property(lambda self: self._any("looks_at_axes"), doc="Whether a rule does.")
    spans_axes = property(lambda self: self._any("spans_axes"), doc="Whether contests of a rule do.")
    is_pattern = property(lambda self: self._any("is_pattern"), doc="Whether a rule is.")
    is_priced = property(lambda self: self._any("is_priced"), doc="Whether groups of a rule are.")

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """The rules' contests."""
        members: dict[int, list[str]] = {}
        rules = pairs(self.rules)
        places = tuple((pattern, i) for i, (pattern, _) in enumerate(rules))
        for name, i in each_by_rule("ByRule", places, groups).items():
            members.setdefault(i, []).append(name)
        kept: Kept = {}
        for i, names in members.items():
            distribution, share = self._rule(rules[i][1], sparsity)
            kept |= distribution({name: groups[name] for name in names}, share, dims=dims)
        return {name: kept[name] for name in groups}

    def _rule(self, rule: Any, sparsity: Sparsity | None) -> tuple[Any, Sparsity | None]:
        if callable(rule):
            return rule, sparsity
        largest = max(number for _, number in pairs(self.rules) if not callable(number))
        if sparsity is None or largest == 0:
            return Uniform(), float(rule)
        return Uniform(), rule * (required(sparsity, self) / largest)
