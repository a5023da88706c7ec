"""What the benchmarks here share: one timing, the machine in words, a table of medians and quartiles."""

import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def time_once(fn: Callable[..., Any], *arguments: Any) -> float:
    """Seconds until the result is there."""
    start = time.perf_counter()
    jax.block_until_ready(fn(*arguments))
    return time.perf_counter() - start


def describe_machine() -> str:
    """jax, processor, cores, and how busy the machine is."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if pathlib.Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0]
    return f"jax {jax.__version__} on {device.platform} ({device.device_kind}); {model}, {cores} cores, load {load:.1f}"


def print_table(
    seconds: Mapping[str, Sequence[float]], base: str, ratio_name: str, ratio: Callable[[float, float], float]
) -> None:
    """A row each: timings, median and quartiles in milliseconds, and its ratio to `base` (of medians)."""
    print(f"{'':<24}{'runs':>6}{'median ms':>12}{'quartiles ms':>20}{ratio_name:>16}")
    base_median = float(np.median(seconds[base]))
    for name, values in seconds.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        spread = f"{low * 1e3:.2f} - {high * 1e3:.2f}"
        print(f"{name:<24}{len(values):>6}{median * 1e3:>12.2f}{spread:>20}{ratio(base_median, float(median)):>16.3f}")
