"""Saving and loading a model of 100 million weights at 90 %, per stored byte, beside plain safetensors.

    pip install safetensors
    python experiments/benchmarks/storage_speed.py [--folder FOLDER] [--repeats 7]

25 float32 matrices of 2000 x 2000, every tenth weight alive at random. `plain` is the safetensors library, which writes
and reads them dense, its files brought to disk (fsync) as ours are. Speeds are stored bytes by time; ratios are within
a turn, median and quartiles, every way once a turn in an order drawn anew. Files are in the page cache when they are
read. Loading makes dense arrays: of ours those of JAX, of plain safetensors those of NumPy.

Cost: about a minute. It names what is below half the speed of plain safetensors.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from tables import describe_machine

import jaxprune as jp
from jaxprune.tables import columns

HEADER = ("MB", "ms", "MB/s", "of plain's speed")
WAYS = ("plain", "dense", "bitmask", "csr16", "csr32", "gaps4", "gaps5")


def model() -> dict[str, np.ndarray]:
    """25 matrices of 2000 x 2000, one weight of ten alive."""
    rng = np.random.default_rng(0)
    leaves = {f"layer_{i:02}": rng.standard_normal((2000, 2000), np.float32) for i in range(25)}
    for leaf in leaves.values():
        leaf[rng.random(leaf.shape, np.float32) < 0.9] = 0
    return leaves


def save(way: str, path: Path, params: dict[str, Any]) -> None:
    """Write the file, to disk."""
    if way != "plain":
        return jp.save(path, params, encoding=way, deflate=False)
    safetensors.numpy.save_file(params, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def load(way: str, path: Path) -> Any:
    """All weights, dense and in memory."""
    return safetensors.numpy.load_file(path) if way == "plain" else jax.block_until_ready(jp.load(path))


def seconds(work: Callable[..., Any], *given: Any) -> float:
    """How long the work takes, what it returns let go outside of it."""
    began = time.perf_counter()
    result = work(*given)
    took = time.perf_counter() - began
    del result
    return took


def rows(took: dict[str, list[float]], sizes: dict[str, int]) -> list[tuple[str, ...]]:
    """Way, MB, ms, MB/s, and the speed per stored byte as a part of plain's."""
    found = []
    for way, times in took.items():
        speed = [sizes[way] / one for one in times]
        plain = [sizes["plain"] / one for one in took["plain"]]
        low, middle, high = np.quantile(np.divide(speed, plain), [0.25, 0.5, 0.75])
        found.append((
            way, f"{sizes[way] / 1e6:.1f}", f"{1e3 * np.median(times):.0f}", f"{np.median(speed) / 1e6:.0f}",
            f"{middle:.2f} ({low:.2f}-{high:.2f})",
        ))  # fmt: skip
    return found


def main() -> None:
    """Take turns, print two tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    params, turns = model(), random.Random(0)
    took: dict[str, dict[str, list[float]]] = {"save": {way: [] for way in WAYS}, "load": {way: [] for way in WAYS}}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        files = {way: Path(folder) / way for way in WAYS}
        for turn in range(arguments.repeats + 1):  # the first is to warm up
            for work in (save, load):
                for way in turns.sample(WAYS, len(WAYS)):
                    given = (way, files[way], params) if work is save else (way, files[way])
                    one = seconds(work, *given)
                    if turn:
                        took[work.__name__][way].append(one)
        for name, path in files.items():
            back = load(name, path)
            assert all(np.array_equal(back[key], leaf) for key, leaf in params.items()), name
        sizes = {way: path.stat().st_size for way, path in files.items()}
    print(describe_machine())
    slow = []
    for name, times in took.items():
        table = rows(times, sizes)
        print(f"\n{columns((name, *HEADER), table, words=1)}")
        slow += [f"{name} {row[0]}" for row in table if float(row[-1].split()[0]) < 0.5]
    if slow:
        print(f"\nBelow half of plain's speed: {', '.join(slow)}")


if __name__ == "__main__":
    main()
