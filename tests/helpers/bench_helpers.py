"""What the tests of the benchmark share."""

import json
from pathlib import Path

import jax
import numpy as np

from jaxprune import tree
from jaxprune.lab.bench import layers, rows, sparsify
from jaxprune.lab.models import zoo

PROFILES = Path(__file__).parents[2] / "experiments" / "benchmarks" / "profiles" / "resnet50.csv"
PNG = b"\x89PNG\r\n\x1a\n"
PEAK = rows.Peak(gflops=100.0, gbytes=20.0, how="invented")
PLAN = layers.Layers(((32, 32),), (2,), (0.5, 0.9), ("bcsr",), repeats=2)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def nonzeros(params):
    return {name: np.count_nonzero(leaf) for name, leaf in tree.selected_leaves(tree.weights, params).items()}


def pruned_resnet():
    """A ResNet-50 for small images, the same pruned by a profile, and the counts."""
    network = zoo.deployed("resnet50", jax.random.key(0), 32)
    counts = sparsify.profile_counts(network.params, sparsify.read_profile(f"{PROFILES}:pruned_83"))
    return network, sparsify.prune_to(network.params, counts, jax.random.key(1)), counts
