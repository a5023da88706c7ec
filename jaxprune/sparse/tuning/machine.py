"""The machine in words: what a timing depends on besides the program.

A time measured elsewhere, on another processor, with other versions or other kernels, says nothing here; so every plan
and every cached timing carries this description.
"""

import functools
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

from jaxprune import native


def describe(device: Any = None) -> dict[str, Any]:
    """Processor, cores, device, versions and native kernels, as plain data.

    Args:
        device: the `jax.Device` that runs; without one, jax's default.

    Returns:
        `processor`, model name; `cores`, as many as this process may use; `platform` and `device`, kind of the device;
        `jax`, `jaxlib`, `jaxprune` and `python`, versions; `native`, instruction set of the kernels or why they are
        missing.
    """
    device = default_device() if device is None else device
    return {
        "processor": processor(),
        "cores": cores(),
        "platform": device.platform,
        "device": device.device_kind,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "jaxprune": importlib.metadata.version("jaxprune"),
        "python": platform.python_version(),
        "native": native.instruction_set() or native.why_missing(),
    }


@functools.cache
def processor() -> str:
    """Model name of the processor, "unknown" where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def default_device() -> Any:
    """Where jax puts an array that is sent nowhere."""
    return next(iter(jax.device_put(0.0).devices()))
