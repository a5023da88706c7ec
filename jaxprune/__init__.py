"""Functional pruning for JAX.

A pruning method answers four small questions. **Criterion**: how much does each weight matter? **Granularity**: which
weights live or die together? **Distribution**: who competes with whom, and how many win? **Schedule**: how sparse at
which step? Each answer is a pure function or a frozen dataclass, usable alone, and

    masks = expand(distribution(pool(criterion(params)), sparsity))

is the whole library in one line. `compute_masks` runs it, `prune` runs it while an optimizer trains and makes every
update land on exact zero, and `sparse` makes the zeros a weight of another kind, in the same model. `save` writes what
is left to a small file.
"""

from jaxprune import (
    channels,
    criteria,
    distributions,
    exact,
    granularity,
    layout,
    masks,
    oneshot,
    schedules,
    search,
    sparse,
    storage,
    tracing,
    training,
)
from jaxprune.channels import Channels, compact, couplings, permute_channels, resized, uncompact
from jaxprune.criteria import evidence, magnitude, movement, snip, synflow, taylor, wanda
from jaxprune.distributions import ERK, NM, OWL, Global, PerOutput, Uniform
from jaxprune.granularity import Block, Element, Head, Input, Kernel, Output
from jaxprune.layout import FLAX, TORCH, Layout
from jaxprune.masks import (
    apply_masks,
    nonzero_masks,
    pack_masks,
    rewind,
    sparsity_of,
    straight_through,
    unpack_masks,
)
from jaxprune.methods import Method, compute_masks
from jaxprune.report import summarize
from jaxprune.schedules import cubic, every
from jaxprune.search.sensitivity import sensitivity
from jaxprune.search.targets import masks_within
from jaxprune.storage import load, save
from jaxprune.tracing import costs, layout_of, trace, weights_of
from jaxprune.training.distillation import distillation_loss, feature_loss
from jaxprune.training.loops import iterative_masks, iterative_pruning
from jaxprune.training.presets import presets
from jaxprune.training.prune import keep_params_sparse, prune, regrow
from jaxprune.training.splice import splice
from jaxprune.tree import weights

__version__ = "0.1.0"

__all__ = [
    "ERK",
    "FLAX",
    "NM",
    "OWL",
    "TORCH",
    "Block",
    "Channels",
    "Element",
    "Global",
    "Head",
    "Input",
    "Kernel",
    "Layout",
    "Method",
    "Output",
    "PerOutput",
    "Uniform",
    "apply_masks",
    "channels",
    "compact",
    "compute_masks",
    "costs",
    "couplings",
    "criteria",
    "cubic",
    "distillation_loss",
    "distributions",
    "every",
    "evidence",
    "exact",
    "feature_loss",
    "granularity",
    "iterative_masks",
    "iterative_pruning",
    "keep_params_sparse",
    "layout",
    "layout_of",
    "load",
    "magnitude",
    "masks",
    "masks_within",
    "movement",
    "nonzero_masks",
    "oneshot",
    "pack_masks",
    "permute_channels",
    "presets",
    "prune",
    "regrow",
    "resized",
    "rewind",
    "save",
    "schedules",
    "search",
    "sensitivity",
    "snip",
    "sparse",
    "sparsity_of",
    "splice",
    "storage",
    "straight_through",
    "summarize",
    "synflow",
    "taylor",
    "trace",
    "tracing",
    "training",
    "uncompact",
    "unpack_masks",
    "wanda",
    "weights",
    "weights_of",
]
