"""What the benchmarks here share: the machine in words, rows in a file, and a table of medians and quartiles."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune.sparse.tuning import machine, timing


def describe_machine() -> str:
    """Versions, processor, cores, and how busy the machine is."""
    here = machine.describe()
    words = f"jax {here['jax']} on {here['platform']} ({here['device']}); {here['processor']}, {here['cores']} cores"
    return f"{words}, load {os.getloadavg()[0]:.1f}"


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """A row as a line of JSON, at the end of a file and on the screen."""
    line = json.dumps(row)
    with path.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def print_table(
    seconds: Mapping[str, Sequence[float]], base: str, ratio_name: str, ratio: Callable[[float, float], float]
) -> None:
    """A row each: timings, median and quartiles in milliseconds, and its ratio to `base` (of medians)."""
    print(f"{'':<24}{'runs':>6}{'median ms':>12}{'quartiles ms':>20}{ratio_name:>16}")
    base_median = timing.spread(seconds[base]).median
    for name, values in seconds.items():
        median, low, high, runs = timing.spread(values)
        quartiles = f"{low:.2f} - {high:.2f}"
        print(f"{name:<24}{runs:>6}{median:>12.2f}{quartiles:>20}{ratio(base_median, median):>16.3f}")
