"""Criterion: how much does each weight matter?

A criterion maps weights, and evidence where it needs any, to scores: non-negative float32, larger = keep.

    scores = criterion(params, **evidence)

`params` is a mapping leaf name -> view (*layers, spatial, in, out), and so is evidence that has the structure of the
params. A criterion takes the evidence it needs as keyword-only arguments and lets the rest pass. Some need the weights
alone (`weights`), some gradients (`gradients`), some what activations were (`activations`), and some remember every
step (`running`). `jaxprune.evidence` computes what they look at.
"""

from jaxprune.criteria.activations import activation_mean, apoz, wanda
from jaxprune.criteria.gradients import fisher, gradient, grasp, joint_taylor, snip, synflow, taylor, taylor_squared
from jaxprune.criteria.running import Running as Running
from jaxprune.criteria.running import momentum, movement
from jaxprune.criteria.weights import geometric_median, lamp, magnitude, norm_scale, random, squared_magnitude

BY_AXES = frozenset({activation_mean, apoz, geometric_median, norm_scale, wanda})
"""Criteria to which it matters which axis of a weight is summed over."""

FACTORIES = {joint_taylor: "joint_taylor(Output())", momentum: "momentum(0.9)"}
"""Functions that make criteria and are none, and how they are called; all others in `__all__` are criteria."""

__all__ = [
    "activation_mean",
    "apoz",
    "fisher",
    "geometric_median",
    "gradient",
    "grasp",
    "joint_taylor",
    "lamp",
    "magnitude",
    "momentum",
    "movement",
    "norm_scale",
    "random",
    "snip",
    "squared_magnitude",
    "synflow",
    "taylor",
    "taylor_squared",
    "wanda",
]
