"""Loading: a file as dense params, as masks, as the quantized leaves that were saved, or as compressed ones."""

import math
import os
from typing import Any

import jax
import numpy as np

from jaxprune import tree
from jaxprune.layout import BY_NAME, Layout
from jaxprune.sparse.compression import has_form
from jaxprune.sparse.formats import FORMATS, SparseWeight, Unsupported, check_unsupported, out_in
from jaxprune.storage import paths
from jaxprune.storage.artifact import Artifact
from jaxprune.storage.container import FileError, Problem
from jaxprune.storage.memory import on_device
from jaxprune.storage.tensors import Stored
from jaxprune.storage.threads import each

_LARGE = 2**24
"""Bytes in a file from which on a tensor is decoded alone, so that one at most is in memory twice."""


def load(
    path: str | os.PathLike[str],
    *,
    to: str = "dense",
    like: Any = None,
    select: tree.Select = tree.weights,
    layout: Layout = BY_NAME,
    unsupported: Unsupported = "refuse",
    max_bytes: int | None = None,
) -> Any:
    """Params, or masks, from a file; tensor by tensor, so that of large ones one at most is in memory twice.

    Args:
        path: of a file that `save` wrote, or of plain safetensors (then leaves are dense, and alive where not zero).
        to: "dense" arrays; "masks", all True where nothing was pruned; "quantized", the leaves as they were saved; or a
            sparse format ("bcsr", "native", ...): what `sparse.compress` makes of the selected leaves, without a dense
            array in between.
        like: a tree (arrays, or `jax.ShapeDtypeStruct`s) whose structure the result has, leaves paired by name, such as
            an Equinox module, or `nnx.state(model)`. Without, dicts, lists and tuples come back as they were, other
            containers as dicts, and NNX's Variables as their arrays: either is what `nnx.update` takes.
        select: leaves that become sparse, as in `sparse.compress`.
        layout: likewise.
        unsupported: likewise, for selected leaves without a sparse form.
        max_bytes: most bytes of dense tensors that are loaded; None: what the machine has.

    Returns:
        jax arrays, or, where `jax_enable_x64` is off, NumPy arrays of 64 bits, so that none is lost.

    Raises:
        FileError: damaged, of a newer version, or larger than allowed; the message names the tensor.
        ValueError: the file's leaves are not those of `like`; an unknown `to`; a selected leaf without a sparse form.
        OSError: it cannot be read.

    Example:
        >>> jp.save("model.jaxprune", params)
        >>> params = jp.load("model.jaxprune", like=params)
    """
    check_unsupported(unsupported)
    uncalibrated = [name for name, format in FORMATS.items() if not format.calibrated]
    if to not in ("dense", "masks", "quantized", *uncalibrated):
        raise ValueError(f"`to` is dense, masks, quantized, {', '.join(uncalibrated)}; {to!r} arrived.")
    with Artifact(path) as file:
        file.check_memory(file.records, max_bytes)
        shapes = {name: jax.ShapeDtypeStruct(record.shape, record.dtype) for name, record in file.records.items()}
        if like is not None:
            _check_like(file, shapes, like)
        try:
            paths.nested({record.path: None for record in file.records.values()})
        except Problem as error:
            raise FileError(f"{file.path} is damaged: {error}.") from None
        sparse = _sparse_forms(shapes, to, select, layout, unsupported) if to in FORMATS else {}
        large = max((file.records[name].stored_bytes for name in shapes), default=0) > _LARGE
        found = each(lambda name: _leaf(file, name, to, sparse.get(name), unsupported), shapes, at_once=not large)
        leaves = dict(zip(shapes, found, strict=True))
        if like is not None:
            return tree.map_named(lambda name, _: leaves[name], like)
        return paths.nested({file.records[name].path: leaf for name, leaf in leaves.items()})


def _check_like(file: Artifact, shapes: dict[str, jax.ShapeDtypeStruct], like: Any) -> None:
    try:
        tree.check_like(f"The tensors of {file.path}", shapes, like)
    except ValueError as error:
        raise ValueError(
            f"{error} Hand in as `like` a tree with the leaves that were saved, no more and no fewer, of an NNX model "
            "`nnx.state(model)` with the filter that it was saved with."
        ) from None


def _sparse_forms(
    shapes: dict[str, jax.ShapeDtypeStruct], to: str, select: tree.Select, layout: Layout, unsupported: Unsupported
) -> dict[str, bool]:
    """Leaves that become sparse -> whether their outputs come last."""
    found = {}
    for name, leaf in tree.selected_leaves(select, shapes).items():
        nothing = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # takes no memory
        if has_form(name, nothing, FORMATS[to], layout, unsupported):
            found[name] = layout.axes(name, leaf.shape).outputs == (len(leaf.shape) - 1,)
    return found


def _leaf(file: Artifact, name: str, to: str, outputs_last: bool | None, unsupported: Unsupported) -> Any:
    try:
        if outputs_last is not None:
            weight = _compressed(file.read(name), name, FORMATS[to], outputs_last, unsupported)
            if weight is not None:
                return weight
        if to == "masks":
            return on_device(file.read(name).mask())
        found = file.read(name).leaf() if to == "quantized" else file.read(name).array()
    except Problem as error:
        raise file.problem(name, error) from None
    return on_device(found) if isinstance(found, np.ndarray) else found


def _compressed(
    stored: Stored, name: str, format: type[SparseWeight], outputs_last: bool, unsupported: Unsupported
) -> SparseWeight | None:
    """The non-zeros of a leaf (*window, in, out), or (out, in, *window), as W (out, in), window and inputs together.

    None if there are too many in some place for the format, and such leaves are to stay dense.
    """
    positions, values = stored.nonzeros()
    if np.isnan(values).any():
        raise ValueError(f"Leaf {name!r} holds a NaN, so it has no sparse form. Load it dense, with `select`.")
    shape = stored.record.shape
    if outputs_last:
        cols, rows = np.divmod(positions, shape[-1])
    else:
        window = math.prod(shape[2:])
        rows, within = np.divmod(positions, shape[1] * window)
        channel, tap = np.divmod(within, window)
        cols = tap * shape[1] + channel
    order = np.argsort(rows * out_in(shape, outputs_last)[1] + cols, kind="stable")
    try:
        return format.pack(values[order], rows[order], cols[order], shape, outputs_last=outputs_last, name=name)
    except ValueError:
        if unsupported == "refuse":
            raise
        return None
