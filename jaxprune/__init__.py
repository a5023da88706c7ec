"""Functional pruning for JAX.

A pruning method answers four small questions. **Criterion**: how much does each weight matter? **Granularity**: which
weights live or die together? **Distribution**: who competes with whom, and how many win? **Schedule**: how sparse at
which step? Each answer is a pure function or a frozen dataclass, usable alone, and

    masks = expand(distribution(pool(criterion(params)), sparsity))

is the whole library in one line. `compute_masks` runs it, `prune` runs it while an optimizer trains and makes every
update land on exact zero, and `sparse` makes the zeros a weight of another kind, in the same model. `save` writes what
is left to a small file.
"""

from jaxprune import sparse, storage
from jaxprune.channels.compaction import Compacted, apply_compacted, compact, uncompact
from jaxprune.channels.coupling import Couplings, couplings
from jaxprune.channels.granularity import Channels
from jaxprune.channels.permutation import Permuted, permute_channels, reorder
from jaxprune.channels.resizing import resized
from jaxprune.criteria import (
    Running,
    activation_mean,
    apoz,
    evidence,
    fisher,
    geometric_median,
    gradient,
    grasp,
    joint_taylor,
    lamp,
    magnitude,
    momentum,
    movement,
    norm_scale,
    random,
    snip,
    squared_magnitude,
    synflow,
    taylor,
    taylor_squared,
    wanda,
)
from jaxprune.distributions import (
    ERK,
    NM,
    OWL,
    Budget,
    ByRule,
    BySensitivity,
    Global,
    PerOutput,
    SigmaThreshold,
    Threshold,
    Uniform,
)
from jaxprune.exact.ranking import kth_largest, top_k_mask
from jaxprune.granularity import Block, Element, GranularityByRule, Head, Input, Kernel, Output
from jaxprune.layout import BY_NAME, FLAX, TORCH, Axes, Layout
from jaxprune.masks import (
    apply_masks,
    nonzero_masks,
    overlap,
    pack_masks,
    rewind,
    sparsity_of,
    straight_through,
    unpack_masks,
)
from jaxprune.methods import Method, compute_masks
from jaxprune.report import summarize
from jaxprune.schedules import alternating, at, constant, cosine, cubic, every, exponential, linear, one_shot, rounds
from jaxprune.search.sensitivity import sensitivity
from jaxprune.search.targets import Within, compacted_cost, masks_within
from jaxprune.storage import load, save
from jaxprune.tracing import layout_of, trace, weights_of
from jaxprune.tracing.activations import peak_activations
from jaxprune.tracing.cost_model import byte_costs, costs, mac_costs
from jaxprune.training.distillation import distillation_loss
from jaxprune.training.dropout import adjusted_dropout
from jaxprune.training.loops import Iterated, Round, iterate, iterative
from jaxprune.training.penalties import group_lasso, growing_penalty, l1
from jaxprune.training.presets import Preset, presets
from jaxprune.training.prune import keep_params_sparse, prune, regrow
from jaxprune.training.regrowth import regrow_masks
from jaxprune.training.splice import splice
from jaxprune.tree import weights

__version__ = "0.1.0"

__all__ = [
    "BY_NAME",
    "ERK",
    "FLAX",
    "NM",
    "OWL",
    "TORCH",
    "Axes",
    "Block",
    "Budget",
    "ByRule",
    "BySensitivity",
    "Channels",
    "Compacted",
    "Couplings",
    "Element",
    "Global",
    "GranularityByRule",
    "Head",
    "Input",
    "Iterated",
    "Kernel",
    "Layout",
    "Method",
    "Output",
    "PerOutput",
    "Permuted",
    "Preset",
    "Round",
    "Running",
    "SigmaThreshold",
    "Threshold",
    "Uniform",
    "Within",
    "activation_mean",
    "adjusted_dropout",
    "alternating",
    "apoz",
    "apply_compacted",
    "apply_masks",
    "at",
    "byte_costs",
    "compact",
    "compacted_cost",
    "compute_masks",
    "constant",
    "cosine",
    "costs",
    "couplings",
    "cubic",
    "distillation_loss",
    "every",
    "evidence",
    "exponential",
    "fisher",
    "geometric_median",
    "gradient",
    "grasp",
    "group_lasso",
    "growing_penalty",
    "iterate",
    "iterative",
    "joint_taylor",
    "keep_params_sparse",
    "kth_largest",
    "l1",
    "lamp",
    "layout_of",
    "linear",
    "load",
    "mac_costs",
    "magnitude",
    "masks_within",
    "momentum",
    "movement",
    "nonzero_masks",
    "norm_scale",
    "one_shot",
    "overlap",
    "pack_masks",
    "peak_activations",
    "permute_channels",
    "presets",
    "prune",
    "random",
    "regrow",
    "regrow_masks",
    "reorder",
    "resized",
    "rewind",
    "rounds",
    "save",
    "sensitivity",
    "snip",
    "sparse",
    "sparsity_of",
    "splice",
    "squared_magnitude",
    "storage",
    "straight_through",
    "summarize",
    "synflow",
    "taylor",
    "taylor_squared",
    "top_k_mask",
    "trace",
    "uncompact",
    "unpack_masks",
    "wanda",
    "weights",
    "weights_of",
]
