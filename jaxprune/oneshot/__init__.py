"""One-shot pruning: methods that move the weights that stay, to make up for those that go.

A product y = x W meets the inputs X of a few calibration samples. A *solver* looks at their second moments alone and
gives the sparse weight whose outputs are close to those wanted; the *order* decides which product is solved when, and
to whose outputs it is fitted. Nothing here trains: no loss, no optimizer. Masks for training stay with `training`.
"""

from jaxprune.oneshot.allocation import allocate, allocation, error_curves
from jaxprune.oneshot.alternating import AlternatingDirections
from jaxprune.oneshot.depth import layer_importance, prune_layers, without_layers
from jaxprune.oneshot.importance import (
    ActivationImportance,
    CompensatedImportance,
    Importance,
    OutputImportance,
    Reader,
    WeightImportance,
)
from jaxprune.oneshot.layerwise import Solved, Solver
from jaxprune.oneshot.least_squares import LeastSquares, Magnitude, Wanda, refit
from jaxprune.oneshot.order import Solution, prune
from jaxprune.oneshot.sparsegpt import SparseGPT
from jaxprune.oneshot.structured import prune_channels

__all__ = [
    "ActivationImportance",
    "AlternatingDirections",
    "CompensatedImportance",
    "Importance",
    "LeastSquares",
    "Magnitude",
    "OutputImportance",
    "Reader",
    "Solution",
    "Solved",
    "Solver",
    "SparseGPT",
    "Wanda",
    "WeightImportance",
    "allocate",
    "allocation",
    "error_curves",
    "layer_importance",
    "prune",
    "prune_channels",
    "prune_layers",
    "refit",
    "without_layers",
]
