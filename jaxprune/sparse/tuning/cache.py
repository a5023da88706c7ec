"""Timings kept from one call of `tune` to the next: a folder of small JSON files, named by what they depend on.

    file = sha256(everything that could change the timing) + ".json"

A file is whole or not there; one that cannot be read is as good as none. Reading one makes it young again, and where
all together are too large the oldest go, so several processes may share a folder. Values of weights are in no key and
no file: of a leaf's zeros a key holds how many there are and, coarsely, how they lie.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxprune import files, native
from jaxprune.compat import ClosedJaxpr

MOST_BYTES = 32 << 20
"""Of all files of a folder, some tens of thousands of timings; the least recently used go first."""

VERSION = 2
BLOCKS = ((4, 4), (16, 16), (64, 64), (16, 1), (1, 16), (4, 1), (1, 4))
"""Shapes (inputs, outputs) of the blocks that `pattern` counts."""


def key(**parts: Any) -> str:
    """Name of the file for these parts: any JSON values, with tuples as lists."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def text_of(jaxpr: ClosedJaxpr) -> str:
    """A jaxpr as text that is the same in another process."""
    return re.sub(r"0x[0-9a-f]+", "", str(jaxpr))  # addresses of functions in it


def kernels() -> str:
    """What else decides how fast this process's programs are: the native kernels' file, and XLA's flags."""
    library = native.LIBRARY.read_bytes() if native.LIBRARY.exists() else b""
    return hashlib.sha256(library).hexdigest() + os.environ.get("XLA_FLAGS", "")


def read(folder: Path | None, name: str) -> str | None:
    """Text of an entry; None if there is none that can be read, or no folder."""
    if folder is None:
        return None
    path = folder / f"{name}.json"
    try:
        text = path.read_text(encoding="utf-8")
        os.utime(path)
        return text
    except (OSError, UnicodeDecodeError):
        return None


def write(folder: Path | None, name: str, text: str) -> None:
    """Keep an entry, whole or not at all; nothing without a folder.

    Raises:
        OSError: the folder cannot be written.
    """
    if folder is None:
        return
    files.write(folder / f"{name}.json", text)


def trim(folder: Path | None) -> None:
    """Remove the least recently used entries until what is left fits, and what a killed process left an hour ago."""
    if folder is None:
        return
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            status = entry.stat()
            if entry.name.endswith(".json"):
                found.append((status.st_mtime, status.st_size, entry.path))
            elif entry.name.endswith(".tmp") and status.st_mtime < time.time() - 3600:
                os.unlink(entry.path)
    left = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if left <= MOST_BYTES:
            return
        Path(path).unlink(missing_ok=True)
        left -= size


def user_cache() -> Path:
    """Where `tune` keeps its timings unless told otherwise, by the environment as it is now."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "jaxprune" / "tune"


def prepare(cache: str | os.PathLike[str] | bool | None) -> Path | None:
    """The folder, made if it is not there; None for none.

    Args:
        cache: the folder; True for the user's, or for none where that cannot be written; None or False for none.

    Raises:
        ValueError: a folder that was named cannot be made or written.
    """
    if cache is None or cache is False:
        return None
    if cache is True:
        with contextlib.suppress(ValueError):
            return prepare(user_cache())
        return None
    folder = Path(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`cache` {str(folder)!r} cannot be made: {error}. Name another folder, or None.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"`cache` {str(folder)!r} cannot be written. Name another folder, or None for no cache.")
    return folder


def pattern(matrix: Shaped[np.ndarray, "n_in n_out"]) -> dict[str, Any]:
    """How the non-zeros of a matrix lie, as far as it may matter for speed.

    Their exact number, and how many blocks of several shapes hold one, in steps of the square root of two: a leaf
    pruned in blocks and one pruned at random are worlds apart for a block kernel, two draws of one kind are not.
    """
    alive = matrix != 0
    return {"nse": int(alive.sum()), "alive": [_alive_blocks(alive, *block) for block in BLOCKS]}


def _alive_blocks(alive: np.ndarray, tall: int, wide: int) -> int | None:
    n_in, n_out = alive.shape
    if not alive.size:
        return None
    by_input = np.logical_or.reduceat(alive, range(0, n_in, tall), axis=0)
    blocks = np.logical_or.reduceat(by_input, range(0, n_out, wide), axis=1)
    return round(2 * math.log2(blocks.mean())) if blocks.any() else None
