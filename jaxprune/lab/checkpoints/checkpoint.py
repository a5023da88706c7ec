"""Checkpoints: either whole and verified, or not there.

A checkpoint is a folder that appears by one rename, after everything in it has been written and synced:

    00000123/
        manifest.json     step, meta, every leaf, the sum of every file: see `jaxprune.lab.checkpoints.manifest`
        state/            what Orbax writes: a flat dict of arrays, see `jaxprune.lab.checkpoints.flat`
    .tmp-00000123/        being written or being deleted: never read
    .old-00000123/        being replaced: read only while `00000123` is missing

so a process killed at any moment leaves the old checkpoint or the new one. What happens to the bytes later
is found by their sums: `restore_latest` names the damage and goes one checkpoint back.
"""

import contextlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune import files
from jaxprune.lab.checkpoints import flat, orbax_files
from jaxprune.lab.checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    Damaged,
    check_files,
    check_leaves,
    read_manifest,
    reason,
    write_manifest,
)

__all__ = ["Checkpoint", "CheckpointError", "is_checkpoint", "read_leaves", "restore_latest", "save"]

ARRAYS = "state"


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: the step it was saved at.
        state: arrays in the structure of the template they were read with.
        meta: plain JSON, as it was saved.
    """

    step: int
    state: Any
    meta: dict[str, Any]


def save(folder: Path, step: int, state: Any, meta: dict[str, Any], keep: int = 2) -> Path:
    """Write the checkpoint of a step, then delete all but the newest `keep` up to this step.

    Checkpoints of later steps are left alone: they are the damaged ones `restore_latest` went back from, and are
    replaced when the run passes them again.

    Args:
        folder: where the checkpoints of one run are; made if missing.
        step: the step, not negative; an existing checkpoint of the same step is replaced.
        state: any pytree of numeric arrays, typed PRNG keys and Python numbers.
        meta: plain JSON: no tuples, no NaN, string keys.
        keep: how many checkpoints stay, at least 1.

    Returns:
        Path of the checkpoint, `folder/00000123`.

    Raises:
        CheckpointError: it could not be written (disk full, no permission); the earlier ones are untouched.
        TypeError: a leaf that is no numeric array, or `meta` that JSON would change.
        ValueError: `step` or `keep` out of range.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"`step` must be at least 0 and `keep` at least 1, got {step} and {keep}.")
    path = Path(folder) / f"{int(step):08d}"
    _settle(path.parent)
    _write(path, int(step), state, meta)
    _rotate(path.parent, int(step), keep)
    return path


def restore_latest(folder: Path, like: Any) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest checkpoint that verifies, and say what was wrong with the newer ones.

    Args:
        folder: where `save` wrote; it need not exist.
        like: template with the structure, shapes and dtypes of the state. Every leaf is read as what the template has:
            NumPy array, JAX array (with its sharding, if committed), PRNG key, Python number.
            `jax.ShapeDtypeStruct` will do for an array, not for a PRNG key.

    Returns:
        The checkpoint, None if there is none at all; and one sentence for each newer one that was rejected, such as
        "00000200: file state/manifest.ocdbt has 12 bytes, 345 expected".

    Raises:
        CheckpointError: every checkpoint is damaged; or the newest sound one has other leaves than `like`, or was
            written by a newer version.
    """
    rejected = []
    for _, path in sorted(_checkpoints(Path(folder)).items(), reverse=True):
        try:
            return _read(path, like), rejected
        except Damaged as damage:
            rejected.append(f"{path.name}: {damage}")
    if rejected:
        raise CheckpointError(
            f"No checkpoint in {folder} can be used. {'; '.join(rejected)}. "
            f"Put a good copy back, or delete the folder to start from the beginning."
        )
    return None, []


def read_leaves(folder: Path) -> dict[str, np.ndarray]:
    """Leaf name -> array of a checkpoint, without a template; PRNG keys and Python numbers as what they are made of.

    Args:
        folder: a checkpoint, `folder/00000123`, or the folder of a stage: its newest then.

    Raises:
        CheckpointError: it is damaged, or no checkpoint.
    """
    found = _checkpoints(folder)
    path = found[max(found)] if found else folder
    try:
        manifest = read_manifest(path)
        check_files(path, manifest)
    except Damaged as damage:
        raise CheckpointError(f"{path} cannot be used: {damage}.") from None
    leaves = [flat.Leaf(**leaf) for leaf in manifest["leaves"]]
    return flat.by_name(_read_arrays(path, leaves), leaves)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of `save`, or holds some."""
    return (folder / MANIFEST).is_file() or bool(_checkpoints(folder))


def _write(path: Path, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Write a checkpoint beside its place, and move it there as the last act."""
    leaves, arrays = flat.leaves(state), flat.to_arrays(state)
    _check_plain(meta)
    new = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _recover(path)
        _remove(new)
        new.mkdir()
        if arrays:  # Orbax refuses an empty dict
            orbax_files.save(new / ARRAYS, arrays)
        write_manifest(new, step, meta, leaves)
        with ThreadPoolExecutor(8) as pool:  # at once: the file system then syncs its journal once, not 16 times
            list(pool.map(files.sync, [*new.rglob("*"), new]))
        _put(new, path)
    except Exception as error:  # not OSError alone: Orbax and TensorStore have others
        with contextlib.suppress(OSError):
            _recover(path)
        why = f"{path} could not be written: {reason(error)}. What was saved before is untouched."
        raise CheckpointError(why) from error
    finally:
        _remove(new)


def _read(path: Path, like: Any) -> Checkpoint:
    manifest = read_manifest(path)
    leaves = flat.leaves(like)
    check_leaves(path, manifest, leaves)
    check_files(path, manifest)
    try:
        state = flat.from_arrays(_read_arrays(path, leaves), like)
    except Exception as error:  # every byte is as it was written, so it is Orbax that cannot read its own files
        raise Damaged(f"folder {ARRAYS} cannot be read: {reason(error)}") from error
    return Checkpoint(manifest["step"], state, manifest["meta"])


def _read_arrays(path: Path, leaves: list[flat.Leaf]) -> dict[str, np.ndarray]:
    keys = [key for key in flat.keys(leaves) if key]
    return orbax_files.read_arrays(path / ARRAYS, keys) if keys else {}


def _check_plain(meta: dict[str, Any]) -> None:
    try:
        same = json.loads(json.dumps(meta, allow_nan=False)) == meta
    except (TypeError, ValueError) as error:
        raise TypeError(f"`meta` must be plain JSON: {error}") from None
    if not same:
        raise TypeError("`meta` must be plain JSON, but comes back changed: use lists for tuples, strings for keys.")


def _put(new: Path, path: Path) -> None:
    old = _old(path)
    if path.exists():
        _remove(old)
        os.replace(path, old)
    os.replace(new, path)
    files.sync(path.parent)
    _remove(old)


def _old(path: Path) -> Path:
    return path.with_name(f".old-{path.name}")


def _where(path: Path) -> Path:
    """The folder to read for a checkpoint: the replaced one while there is no other."""
    return _old(path) if _old(path).is_dir() and not path.exists() else path


def _recover(path: Path) -> None:
    """Take back a replacement that was cut short between its two renames."""
    if _where(path) != path:
        os.replace(_old(path), path)


def _settle(folder: Path) -> None:
    """Clear what killed saves have left behind."""
    with contextlib.suppress(OSError):  # before anything is removed, so that what could not be recovered stays
        for old in folder.glob(".old-*"):
            _recover(old.with_name(old.name.removeprefix(".old-")))
        for stale in [*folder.glob(".tmp-*"), *folder.glob(".old-*")]:
            _remove(stale)


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder to read."""
    names = {entry.name.removeprefix(".old-") for entry in folder.iterdir()} if folder.is_dir() else set()
    return {int(name): _where(folder / name) for name in names if re.fullmatch(r"\d{8,}", name)}


def _rotate(folder: Path, step: int, keep: int) -> None:
    with contextlib.suppress(OSError):  # the new checkpoint is safe: one too many is no reason to stop a run
        for _, path in sorted(item for item in _checkpoints(folder).items() if item[0] <= step)[:-keep]:
            doomed = path.with_name(f".tmp-{path.name}")
            os.replace(path, doomed)
            _remove(doomed)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
