"""Orbax, imported on first use and kept from printing; trees of arrays to and from its own folders."""

import contextlib
import gc
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

_MARK = "_METADATA"
"""The file in each folder that holds a PyTree."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Orbax from printing: what goes wrong is raised, and then told in one line."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before, hook = [logger.disabled for logger in loggers], sys.unraisablehook

    def drop(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    try:
        sys.unraisablehook = drop
        for logger in loggers:
            logger.disabled = True
        yield
    finally:
        sys.unraisablehook = hook
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


@contextlib.contextmanager
def _opened() -> Iterator[tuple[Any, Any]]:
    """Orbax, imported on first use (0.3 s), and a synchronous checkpointer, both quiet."""
    with quiet():
        import orbax.checkpoint as ocp

        # One database for all arrays: a dozen files, where a folder for every array has two each to sync and to sum.
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
            yield ocp, checkpointer


def save(folder: Path, tree: Any, metadata: dict[str, Any] | None = None) -> None:
    """A PyTree of arrays, at least one; `write_tree` refuses what Orbax cannot save.

    Raises:
        OSError: it cannot be written.
    """
    failure = None
    with quiet():
        try:
            with _opened() as (ocp, checkpointer):
                checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree, custom_metadata=metadata))
        except Exception as error:
            failure = _as_oserror(error)
        if failure:
            # Writes still under way fail too, and complain to a closed event loop, or when they are collected.
            time.sleep(0.1)
            gc.collect()
    if failure:
        raise failure


def _as_oserror(error: Exception) -> Exception:
    """What the operating system said, where it did: TensorStore has its code at the end of a paragraph."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else error


def _as_numpy(ocp: Any, tree: Any) -> Any:
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return ocp.args.PyTreeRestore(restore_args=args)


def read_arrays(folder: Path, keys: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of a flat dict with these keys; at least one."""
    with _opened() as (ocp, checkpointer):
        return checkpointer.restore(folder.absolute(), args=_as_numpy(ocp, dict.fromkeys(keys, 0)))


def read_tree(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Arrays of a PyTree checkpoint as Orbax writes it, in dicts and lists, and its own metadata.

    Raises:
        ValueError: it is no such folder, or damaged.
    """
    inside = [] if (folder / _MARK).exists() else [*folder.glob(f"*/{_MARK}"), *folder.glob(f"*/*/{_MARK}")]
    if inside:
        raise ValueError(
            f"{folder} has its arrays further down. Name one: {', '.join(str(one.parent) for one in inside)}."
        )
    try:
        with _opened() as (ocp, checkpointer):
            described = checkpointer.metadata(folder.absolute()).item_metadata
            if described is None:
                raise ValueError("it has no PyTree")
            arrays = checkpointer.restore(folder.absolute(), args=_as_numpy(ocp, described.tree))
            return arrays, dict(described.custom_metadata or {})
    except Exception as error:  # Orbax and TensorStore have many of their own
        raise ValueError(f"{folder} is no checkpoint that Orbax can read: {type(error).__name__}: {error}") from error


def write_tree(folder: Path, tree: Any, metadata: dict[str, Any]) -> None:
    """A PyTree checkpoint as Orbax reads it.

    Raises:
        ValueError: the folder is there already; an array has no elements, or there is none, which Orbax does not save;
            two leaves have one name in its files, of which it would keep one, and say nothing.
        OSError: it cannot be written.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already. Delete it, or choose another folder.")
    names: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where, name = jax.tree_util.keystr(path), jax.tree_util.keystr(path, simple=True, separator=".")
        if not leaf.size:
            raise ValueError(f"Orbax saves no arrays without elements: {where} {leaf.shape}.")
        if name in names:
            raise ValueError(
                f"The leaves {names[name]} and {where} are both named {name!r} in Orbax's files, which keep one of "
                "them. Rename one of the keys, or write another kind of file."
            )
        names[name] = where
    if not names:
        raise ValueError("Orbax saves no tree without elements.")
    save(folder, tree, metadata)
