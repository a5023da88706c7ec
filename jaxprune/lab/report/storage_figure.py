r"""The storage figure: bytes of a model over its sparsity, in every encoding, and where each begins to pay.

Sizes are those of `jaxprune.storage.patterns` for weights that die at random: of n weights k = (1 - s) n are alive, and
a gap is g or longer with probability $s^g$, so that codes of W bits are $k / (1 - s^m)$ on average, $m = 2^W - 1$.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from jaxprune.lab.report import style, wording

Curve = Float[np.ndarray, " sparsities"]
COLOURS = {name: style.COLOURS[place] for name, place in {"bitmask": 0, "csr16": 5, "csr32": 1, "gaps": 2}.items()}
_AUTO, _FILE = "#C9CED3", style.STAGES["sparse"]
_GRID = np.linspace(0, 1, 2001)[:-1]
_HIGH = 1 - np.geomspace(0.1, 1e-3, 200)


def storage(leaves: Sequence[dict[str, Any]], stored: dict[str, Any], sparsity: float) -> Figure:
    """Bytes over sparsity: all of it to the left, from 90 % on, both axes logarithmic, to the right.

    Leaves that were not pruned count as dense everywhere; without any that was, matrices and kernels count as pruned.

    Args:
        leaves: `leaves` of `results.json`: "shape", "weights", "nnz", "bytes" each.
        stored: `artifact` of `results.json`.
        sparsity: of the run's pruned leaves, where its own file is marked.
    """
    pruned = [leaf for leaf in leaves if leaf["nnz"] < leaf["weights"]]
    pruned = pruned or [leaf for leaf in leaves if len(leaf["shape"]) > 1]
    dense = sum(leaf["bytes"] for leaf in leaves)
    rest = dense - sum(leaf["bytes"] for leaf in pruned)
    figure = style.figure(9.0, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for axes, grid in ((left, _GRID), (right, _HIGH)):
        style.tidy(axes, "both")
        curves = {name: rest + curve for name, curve in sizes(pruned, grid).items()}
        _draw(axes, grid, curves, dense, marked=axes is left)
        if grid[0] <= sparsity <= grid[-1]:
            star = {"marker": "*", "markersize": 13, "markeredgecolor": "white", "color": _FILE, "linestyle": ""}
            axes.plot(100 * sparsity, stored["bytes"]["mean"], zorder=5, label=_file_label(stored), **star)
    _full_axes(left, dense)
    _high_axes(right)
    style.legend(figure, "lower center", left, ncols=3, fontsize=9)
    return figure


def sizes(leaves: Sequence[dict[str, Any]], sparsity: Curve) -> dict[str, Curve]:
    """Encoding -> bytes of these leaves together; "auto" takes the smallest for each leaf.

    Args:
        leaves: "shape", "weights" and "bytes" each.
        sparsity: of each leaf.
    """
    found = [_sizes_of(leaf, sparsity) for leaf in leaves]
    smallest = [
        np.minimum(leaf["bytes"], np.min(list(one.values()), axis=0)) for leaf, one in zip(leaves, found, strict=True)
    ]
    return {name: np.sum([one[name] for one in found], axis=0) for name in COLOURS} | {"auto": np.sum(smallest, axis=0)}


def _sizes_of(leaf: dict[str, Any], sparsity: Curve) -> dict[str, Curve]:
    n, rows = leaf["weights"], math.prod(leaf["shape"][:-1])
    alive = n * (1 - sparsity)
    values = alive * leaf["bytes"] / max(n, 1)
    skips = [2**width - 1 for width in range(2, 17)]
    gaps = [alive * width / (1 - sparsity**skip) / 8 for width, skip in zip(range(2, 17), skips, strict=True)]
    return {
        "bitmask": n / 8 + values,
        "csr16": 4 * rows + 2 * alive + values,
        "csr32": 4 * rows + 4 * alive + values,
        "gaps": np.min(gaps, axis=0) + values,
    }


def break_even(sparsity: Curve, curve: Curve, dense: float) -> float | None:
    """The sparsity from which on a curve is below dense; None if it never is."""
    above = np.flatnonzero(curve >= dense)
    first = int(above[-1]) + 1 if len(above) else 0
    return float(sparsity[first]) if first < len(sparsity) else None


def _draw(axes: Axes, grid: Curve, curves: dict[str, Curve], dense: float, *, marked: bool) -> None:
    axes.axhline(dense, color=style.INK, linewidth=1.2, linestyle=style.DASHED, label="dense")
    axes.plot(
        100 * grid, curves["auto"], color=_AUTO, linewidth=7, solid_capstyle="butt", label="auto: each leaf's smallest"
    )
    for name, colour in COLOURS.items():
        pays = break_even(grid, curves[name], dense)
        text = "never pays" if pays is None else f"pays from {100 * pays:.1f} %"
        axes.plot(100 * grid, curves[name], color=colour, linewidth=1.6, label=f"{name}, {text}")
        if marked and pays:
            axes.plot(100 * pays, dense, marker="o", markersize=5, color=colour, markeredgecolor="white", zorder=4)


def _file_label(stored: dict[str, Any]) -> str:
    how = "" if stored["quantize"] == "none" else f"{stored['quantize']}, "
    return f"this run's file ({how}header counted)"


def _full_axes(axes: Axes, dense: float) -> None:
    axes.set_ylim(0, 1.35 * dense)
    axes.set_xlim(0, 100)
    axes.yaxis.set_major_formatter(FuncFormatter(wording.bytes_text))
    axes.xaxis.set_major_formatter(style.PERCENT)
    axes.set_xlabel("sparsity of the pruned leaves")
    axes.set_ylabel("bytes of the whole model")


def _high_axes(axes: Axes) -> None:
    axes.set_xscale("function", functions=(_to_log, _from_log))
    style.log_axis(axes.yaxis, form=FuncFormatter(wording.bytes_text))
    axes.xaxis.set_major_locator(FixedLocator([90, 95, 98, 99, 99.5, 99.9]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(style.PERCENT)
    axes.set_xlim(100 * _HIGH[0], 100 * _HIGH[-1])
    axes.set_xlabel("sparsity (what is left on a log scale)")


def _to_log(percent: Any) -> Any:
    return -np.log(np.maximum(100 - np.asarray(percent, float), 1e-9))


def _from_log(position: Any) -> Any:
    return 100 - np.exp(-np.asarray(position, float))
