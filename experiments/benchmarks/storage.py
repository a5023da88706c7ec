"""The CNN of the TensorFlow tutorial as a file, from 0 to 99 % sparsity, in every encoding, beside published sizes.

    python experiments/benchmarks/storage.py [--markdown]

The weights of the fully connected layers are pruned by magnitude, each layer to the same sparsity, and all others stay
dense, as in S0, the iterative pruning of this network whose file sizes were published. Weights are random: sizes depend
on where the zeros are and, where bytes are deflated, on how values are distributed, but not on what the network knows.
Whole files are written and counted, in MiB: the 3,274,634 numbers of the dense network are the published 12.49 in it.

Cost: half a minute. It ends with an error if a file is larger than it must be: auto never beyond dense and 4 KiB; at
90 % at most 1.75 MB (10^6 bytes) in float32 and 0.6 MB in int8.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import jaxprune as jp
from jaxprune import tables
from jaxprune.lab.models import zoo
from jaxprune.quantize.codes import to_integers

PUBLISHED = {0.0: 12.49, 0.1: 21.86, 0.2: 19.45, 0.3: 17.05, 0.4: 14.64, 0.5: 12.23, 0.6: 9.83, 0.7: 7.42, 0.8: 5.02,
             0.9: 2.61}  # fmt: skip
"""Sparsity of the fully connected layers -> MiB, published by S0 (as MB)."""
SPARSITIES = (*PUBLISHED, 0.95, 0.99)
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"encoding": "dense", "deflate": False},
    "bitmask": {"encoding": "bitmask", "deflate": False},
    "csr32": {"encoding": "csr32", "deflate": False},
    "gaps": {"encoding": "gaps", "deflate": False},
    "auto": {"deflate": False},
    "auto, deflated": {},
    "int8, deflated": {},
}
MOST_AT_90 = {"auto": 1.75, "auto, deflated": 1.75, "int8, deflated": 0.6}
"""MB of the file at 90 %."""


def pruned_params(params: Any, sparsity: float) -> tuple[Any, Any]:
    """Params and masks with this part of the weights of both fully connected layers gone."""
    method = jp.Method(distribution=jp.Uniform(), select=("fc*/kernel",))
    masks = jp.compute_masks(method, params, sparsity)
    return jp.apply_masks(params, masks), masks


def sizes(params: Any, masks: Any, folder: Path) -> dict[str, int]:
    """Way -> bytes of the whole file."""
    found = {}
    for way, options in WAYS.items():
        stored = to_integers(params, masks) if way.startswith("int8") else params
        tried = [options]
        if options.get("encoding") == "gaps":  # the best width
            tried = [{**options, "encoding": f"gaps{width}"} for width in range(2, 9)]
        for one in tried:
            jp.save(folder / "model.jaxprune", stored, masks=masks, **one)
            size = (folder / "model.jaxprune").stat().st_size
            found[way] = min(size, found.get(way, size))
    return found


def row(sparsity: float, found: Mapping[str, int]) -> tuple[str, ...]:
    """Cells of one sparsity."""
    published = f"{PUBLISHED[sparsity]:.2f}" if sparsity in PUBLISHED else ""
    return (f"{sparsity:.0%}", published, *(f"{size / 2**20:.2f}" for size in found.values()))


def too_large(sparsity: float, found: Mapping[str, int]) -> list[str]:
    """What is larger than it must be, in words."""
    wrong = [f"{way} at {sparsity:.0%} is {found[way]:,} bytes, dense is {found['dense']:,}"
             for way in ("auto", "auto, deflated") if found[way] > found["dense"] + 4096]  # fmt: skip
    if sparsity == 0.9:
        wrong += [f"{way} is {found[way]:,} bytes" for way, most in MOST_AT_90.items() if found[way] > 1e6 * most]
    return wrong


def main() -> None:
    """Write every file, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    params = zoo.build("tf_tutorial_cnn", jax.random.key(0)).params
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as folder:
        for sparsity in SPARSITIES:
            found = sizes(*pruned_params(params, sparsity), Path(folder))
            rows.append(row(sparsity, found))
            wrong += too_large(sparsity, found)
    table = tables.markdown if arguments.markdown else tables.columns
    print(table(("sparsity", "S0, MiB", *WAYS), rows, words=0))
    if wrong:
        raise SystemExit("Larger than it must be: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
