"""The manifest of a checkpoint folder: what has to be in it, to the last bit.

    {
      "version": 1, "step": 123, "meta": {...},
      "leaves": [{"name": "params/layers/0/kernel", "shape": [784, 512], "dtype": "float32"}, ...],
      "files": {"state/manifest.ocdbt": {"size": 115, "sha256": "..."}, ...},
      "sha256": "..."       the sum of all the rest, in every version
    }

It is written last and read first. That it exists, fits its own sum, and every file fits the sums in it, is what
"the checkpoint verifies" means.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jaxprune.lab.checkpoints.flat import Leaf

VERSION = 1
MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or none that can be used; the message says which and why."""


class Damaged(Exception):
    """What is wrong with one checkpoint, as the end of a sentence; the one before it may be used instead."""


def write_manifest(folder: Path, step: int, meta: dict[str, Any], leaves: list[Leaf]) -> None:
    """Describe everything that is in `folder` now, in `folder/manifest.json`."""
    files = {file.relative_to(folder).as_posix(): _digest(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    described = [leaf._asdict() for leaf in leaves]
    manifest = {"version": VERSION, "step": step, "meta": meta, "leaves": described, "files": files}
    text = json.dumps(manifest | {"sha256": _checksum(manifest)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, once it fits its own sum.

    Raises:
        Damaged: it is missing, torn or altered.
        CheckpointError: it is sound, but of another version.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        claimed, version = manifest.pop("sha256"), manifest["version"]
    except FileNotFoundError:
        raise Damaged(f"file {MANIFEST} is missing") from None
    except OSError as error:
        raise Damaged(f"file {MANIFEST} cannot be read: {reason(error)}") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise Damaged(f"file {MANIFEST} is torn: {type(error).__name__}: {error}") from None
    other = "" if version == VERSION else f"version {version}, this jaxprune reads version {VERSION}"
    # Every version keeps the sum over the rest: only so is damage told from a version of the future.
    if claimed != _checksum(manifest):
        raise Damaged(f"file {MANIFEST} is damaged: its content does not fit its sha256" + (other and f" ({other})"))
    if other:
        raise CheckpointError(
            f"{folder}: {MANIFEST} has {other}. Use the jaxprune it was written with, or a newer one."
        )
    return manifest


def check_leaves(folder: Path, manifest: dict[str, Any], expected: list[Leaf]) -> None:
    """Hold the leaves of a manifest against those of a template.

    Raises:
        CheckpointError: they differ, naming the first leaf that does.
    """
    stored = [Leaf(leaf["name"], tuple(leaf["shape"]), leaf["dtype"]) for leaf in manifest["leaves"]]
    if stored == expected:
        return
    pairs = zip(stored, expected, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(stored), len(expected)))
    have, want = (str(leaves[first]) if first < len(leaves) else "no leaf" for leaves in (stored, expected))
    raise CheckpointError(
        f"{folder} was written by another model or config: leaf {first} is {have}, {want} expected "
        f"({len(stored)} leaves, {len(expected)} expected). Run the config it was written with, or use another folder."
    )


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Hold size and sum of every file against the manifest.

    Raises:
        Damaged: the first file that differs, is missing or cannot be read.
    """
    for name, expected in manifest["files"].items():
        try:
            found = _digest(folder / name)
        except FileNotFoundError:
            raise Damaged(f"file {name} is missing") from None
        except OSError as error:
            raise Damaged(f"file {name} cannot be read: {reason(error)}") from None
        if found["size"] != expected["size"]:
            raise Damaged(f"file {name} has {found['size']} bytes, {expected['size']} expected")
        if found["sha256"] != expected["sha256"]:
            sums = f"its sha256 is {found['sha256'][:8]}..., {expected['sha256'][:8]}... expected"
            raise Damaged(f"file {name} is damaged: {sums}")


def reason(error: Exception) -> str:
    """An error in one phrase: the operating system's words, if it is one of its errors."""
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"size": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
