"""Zeros for a model that was never trained: random positions, exact counts.

    counts = uniform_counts(params, 0.9)  |  profile_counts(params, read_profile("resnet50.csv:pruned_83"))
    sparse_model = prune_to(params, counts, key)

Random positions are the hardest pattern for a kernel, since nothing lies together. What is left of a leaf is scaled up
to the variance that the dense leaf gave its outputs, so that activations stay finite through fifty layers.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxprune import tree
from jaxprune.checks import check_sparsity
from jaxprune.lab.models.parts import host_generator
from jaxprune.types import Params


class ProfileLine(NamedTuple):
    """What a profile says of one layer: the kernel's shape as (out, in, *window), and how many weights are not zero."""

    shape: tuple[int, ...]
    nonzero: int


def uniform_counts(params: Params, sparsity: float) -> dict[str, int]:
    """Leaf name -> weights left when every matrix and kernel loses the same fraction, round(n s) of n weights.

    Raises:
        ValueError: a sparsity outside [0, 1); a percentage is recognised.
    """
    check_sparsity(sparsity)
    leaves = tree.selected_leaves(tree.weights, params)
    return {name: leaf.size - round(leaf.size * sparsity) for name, leaf in leaves.items()}


def read_profile(place: str) -> dict[str, ProfileLine]:
    """Layer -> shape and non-zeros, from one column of a csv file.

    Args:
        place: "FILE:COLUMN"; the file has the columns `layer`, `shape_oihw` ("64x3x7x7") and `nonzero_COLUMN`, and may
            have comments, lines that begin with "#".

    Raises:
        ValueError: no such file or column, or a line that is no profile; the columns there are are named.
    """
    file, colon, column = place.rpartition(":")
    if not (colon and file and column):
        raise ValueError(f"A profile is FILE:COLUMN, such as profiles/resnet50.csv:pruned_83; {place!r} arrived.")
    reader, known = open_profile(file)
    column = column.removeprefix("nonzero_")
    if column not in known or not {"layer", "shape_oihw"} <= set(reader.fieldnames or ()):
        have = f"Columns of non-zeros there: {', '.join(known)}." if known else "It has no columns nonzero_...."
        raise ValueError(f"{file} holds no profile {column!r}. {have}")
    return {line["layer"]: _profile_line(file, line, column) for line in reader}


def open_profile(file: str) -> tuple[csv.DictReader, list[str]]:
    """The lines of a profile, comments left out, and the names of its columns of non-zeros.

    Raises:
        ValueError: no such file, or no text.
    """
    try:
        lines = [line for line in Path(file).read_text().splitlines() if line.strip() and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The profile {file} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    reader = csv.DictReader(lines)
    fields = reader.fieldnames or ()
    return reader, [field.removeprefix("nonzero_") for field in fields if field.startswith("nonzero_")]


def _profile_line(file: str, line: dict[str, str], column: str) -> ProfileLine:
    try:
        shape = tuple(int(side) for side in line["shape_oihw"].split("x"))
        return ProfileLine(shape, int(line[f"nonzero_{column}"]))
    except (ValueError, AttributeError, TypeError):
        raise ValueError(
            f"{file}: layer {line['layer']!r} needs a shape such as 64x3x7x7 and a number of non-zeros, it has "
            f"{line.get('shape_oihw')!r} and {line.get(f'nonzero_{column}')!r}."
        ) from None


def profile_counts(params: Params, profile: Mapping[str, ProfileLine]) -> dict[str, int]:
    """Leaf name -> weights left, for kernels named "LAYER/kernel", HWIO or (in, out).

    Raises:
        ValueError: layers or shapes of the profile are not those of the params, or a layer has more non-zeros than
            weights.
    """
    leaves = {name.removesuffix("/kernel"): leaf for name, leaf in tree.selected_leaves(tree.weights, params).items()}
    if unknown := [layer for layer in profile if layer not in leaves]:
        raise ValueError(f"The profile has a layer {unknown[0]!r}, the model has not. It has: {', '.join(leaves)}.")
    if missing := [layer for layer in leaves if layer not in profile]:
        raise ValueError(f"The profile lacks the model's layer {missing[0]!r}.")
    for layer, (shape, nonzero) in profile.items():
        *window, n_in, n_out = leaves[layer].shape
        if shape != (n_out, n_in, *window):
            raise ValueError(f"Layer {layer!r} is {shape} in the profile, {(n_out, n_in, *window)} in the model.")
        if not 0 <= nonzero <= leaves[layer].size:
            raise ValueError(f"Layer {layer!r} has {leaves[layer].size} weights, the profile keeps {nonzero}.")
    return {f"{layer}/kernel": profile[layer].nonzero for layer in leaves}


def prune_to(params: Params, counts: Mapping[str, int], key: Key[Array, ""]) -> Params:
    """The params with so many non-zeros in each named leaf, at random positions.

    Args:
        params: dense, none of the named leaves all zero.
        counts: leaf name -> non-zeros left; leaves without a count stay as they are.
        key: draws the positions.
    """
    rng = host_generator(key)

    def one(name: str, leaf: Array) -> Array:
        if name not in counts or counts[name] == leaf.size:
            return leaf
        pruned, dead = np.array(leaf), leaf.size - counts[name]
        # A drawn weight may be an exact zero, one in some millions, and would make the count wrong.
        pruned[pruned == 0] = np.finfo(pruned.dtype).eps
        pruned *= (leaf.size / max(counts[name], 1)) ** 0.5
        pruned.reshape(-1)[np.argpartition(rng.random(leaf.size, np.float32), dead - 1)[:dead]] = 0
        return jnp.asarray(pruned)

    return tree.map_named(one, params)
