"""What a result was made with: versions and machine, as plain text."""

import ctypes
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from jaxprune import files
from jaxprune.sparse.tuning import machine

PACKAGES = ("jaxprune", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "quax")


def describe() -> dict[str, str]:
    """Name -> text: versions of the packages that results depend on, processor, cores, devices, XLA_FLAGS.

    Cores are those that the process may use, "1 of 2": on one, products add in another order than on more.
    """
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        **versions,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": machine.processor(),
        "cores": _cores(),
        "devices": ", ".join(f"{device.platform} {device.device_kind}" for device in jax.devices()),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _cores() -> str:
    ours, here = machine.cores(), os.cpu_count() or 1
    return str(here) if ours == here else f"{ours} of {here}"


def hand_back_freed_arrays() -> None:
    """Has the C library hand the memory of freed arrays back to the system, for the whole process.

    glibc keeps what is smaller than the largest array freed so far, up to 32 MiB, on a heap that only shrinks at its
    end: pruning a model of 538 MB, layer by layer, then ends with 600 MB of freed arrays.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD: larger ones are mapped by themselves


def record(path: Path, note: Callable[[str], None]) -> None:
    """Write `describe()` where nothing is written yet; where something is, note what is different today.

    A run that goes on with other versions or on another machine need not end bit-identical.
    """
    now = describe()
    if not path.exists():
        files.write(path, json.dumps(now, indent=1))
        return
    then = json.loads(path.read_text())
    changed = [f"{name} {then[name]} -> {text}" for name, text in now.items() if then.get(name, text) != text]
    if changed:
        note(f"This run was begun with other versions or on another machine: {'; '.join(changed)}.")
