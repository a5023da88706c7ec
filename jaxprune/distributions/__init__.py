"""Distribution: who competes with whom, and how many win.

A distribution maps group scores to verdicts, at a sparsity:

    kept = distribution(groups, sparsity, dims=dims)     # leaf name -> bool, shaped like the groups

`groups` maps leaf names to scores (*layers, spatial, in, out) and `dims` the same names to the sizes
(*spatial, in, out) of the leaf, for rules that look at them. Stacked layers are leaves of their own here, so that a
scanned model is pruned like the same model unrolled.

A contest of n groups at sparsity s removes exactly round(n * s), half to even; of equal scores the lower index
survives. `Budget` counts what groups cost instead.
"""

from jaxprune.distributions.budget import Budget
from jaxprune.distributions.by_rule import ByRule
from jaxprune.distributions.by_sensitivity import BySensitivity
from jaxprune.distributions.contest import Distribution as Distribution
from jaxprune.distributions.erk import ERK
from jaxprune.distributions.global_ import Global
from jaxprune.distributions.nm import NM
from jaxprune.distributions.owl import OWL
from jaxprune.distributions.per_output import PerOutput
from jaxprune.distributions.thresholds import SigmaThreshold, Threshold
from jaxprune.distributions.uniform import Uniform

__all__ = [
    "ERK", "NM", "OWL", "Budget", "ByRule", "BySensitivity", "Global", "PerOutput", "SigmaThreshold", "Threshold",
    "Uniform",
]  # fmt: skip
