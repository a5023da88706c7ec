"""How much can go: the search for a sparsity by measurement.

`sensitivity` prunes one leaf at a time and evaluates; `targets` finds the sparsity whose compacted model fits a bound.
Both call `compute_masks` and whatever function the user hands in; what a method does is not decided here.
"""

from jaxprune.search.targets import MasksWithin, compacted_cost

__all__ = ["MasksWithin", "compacted_cost"]
