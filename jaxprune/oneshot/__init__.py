"""One-shot pruning: methods that move the weights that stay, to make up for those that go.

A product y = x W meets the inputs X of a few calibration samples. A *solver* looks at their second moments alone and
gives the sparse weight whose outputs are close to those wanted; the *order* decides which product is solved when, and
to whose outputs it is fitted. Nothing here trains: no loss, no optimizer. Masks for training stay with `training`.
"""

from jaxprune.oneshot.allocation import allocate, error_curves
from jaxprune.oneshot.alternating import AlternatingDirections
from jaxprune.oneshot.layerwise import Solved, Solver
from jaxprune.oneshot.least_squares import Magnitude, Wanda, refit
from jaxprune.oneshot.order import Solution, prune
from jaxprune.oneshot.sparsegpt import SparseGPT

__all__ = [
    "AlternatingDirections",
    "Magnitude",
    "Solution",
    "Solved",
    "Solver",
    "SparseGPT",
    "Wanda",
    "allocate",
    "error_curves",
    "prune",
    "refit",
]
