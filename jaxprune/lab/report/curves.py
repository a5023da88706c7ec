"""Curves over the weights kept: what accuracy and bytes come to as rounds, or the points of a sweep, remove more.

levels(result)          [Point(removed, accuracy, file, sparse), ...]      of rounds, or of a run alone
of_runs(results)        the figures that they fill, by name
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from jaxprune.lab.recipe import words
from jaxprune.lab.report import style, wording
from jaxprune.lab.report.style import INK, PERCENT

_COLOURS = [style.COLOURS[place] for place in (0, 2, 1, 3, 4, 5)]  # green before the orange of what is pruned
_PUBLISHED = "#5A6168"


class Point(NamedTuple):
    """A level of pruning: shares in [0, 1], bytes of a file, each a value for every seed."""

    removed: float
    accuracy: list[float]
    file: list[float]
    sparse: list[float]


def levels(result: dict[str, Any]) -> list[Point]:
    """The levels of a result: of its rounds, where every seed has the same ones; else the level that it ended with.

    The last one is as it was after fine-tuning, the others as they were after their round.

    Args:
        result: a run's results, or a point of a sweep's.
    """
    rounds, accuracy = result.get("rounds") or [], result["accuracy"]["finetuned"]["values"]
    files = result["artifact"]["bytes"]["values"] if "artifact" in result else []
    alike = len({tuple(round(one["removed"], 6) for one in seed) for seed in rounds}) == 1
    if alike and not any(one["group"] for one in rounds[0]):
        found = [
            Point(ones[0]["removed"], *([one[key] for one in ones] for key in ("accuracy", "bytes", "sparse_bytes")))
            for ones in zip(*rounds, strict=True)
        ]
        return [*found[:-1], found[-1]._replace(accuracy=accuracy, file=files)]
    return [Point(result["sparsity"]["mean"], accuracy, files, [])]


def of_runs(results: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Name -> figure, of those that a run's rounds or a sweep's points can fill: at least three levels.

    Args:
        results: of one run, or the points of a sweep, each a curve or one dot of the curve of its own.
    """
    found = [*zip(point_names(results), map(levels, results), strict=True)]
    if all(len(points) == 1 for _, points in found):
        found = [("ours", sorted((points[0] for _, points in found), key=lambda point: point.removed))]
    if not found or max(len(points) for _, points in found) < 3:
        return {}
    published = next((result["published"] for result in results if result.get("published")), [])
    dense = float(np.mean([result["accuracy"]["dense"]["mean"] for result in results]))
    figures = {"accuracy_over_kept": accuracy_over_kept(found, dense, published)}
    if all(point.sparse for _, points in found for point in points):
        figures["size_over_kept"] = size_over_kept(found, results[0]["artifact"]["dense_bytes"])
    return figures


def point_names(results: Sequence[dict[str, Any]]) -> list[str]:
    """What tells the points of a sweep from each other; "" of a run alone."""
    values = [result.get("values", {}) for result in results]
    axes = [words.texts([_named(key, one[key]) for one in values]) for key in values[0]]
    return [", ".join(filter(None, names)) for names in zip(*axes, strict=True)] or [""] * len(values)


def _named(key: str, value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {key.rpartition(".")[2]: value}


def accuracy_over_kept(
    curves: Sequence[tuple[str, Sequence[Point]]], dense: float, published: Sequence[dict[str, Any]] = ()
) -> Figure:
    """Test accuracy over the share of weights kept, on a log axis; what others published beside it.

    Args:
        curves: name and points of each.
        dense: accuracy of the dense model.
        published: "who", "removed", "accuracy" of each point; several of one name are joined.
    """
    figure, axes = style.single(9.0, 4.2, "both")
    axes.axhline(100 * dense, color=INK, linewidth=1.1, label="ours, dense")
    for (name, points), colour in zip(curves, _COLOURS, strict=False):
        kept = [100 * (1 - point.removed) for point in points]
        means = [100 * float(np.mean(point.accuracy)) for point in points]
        errors = [100 * float(np.std(point.accuracy, ddof=min(len(point.accuracy) - 1, 1))) for point in points]
        label = f"ours{f', {name}' if name not in ('', 'ours') else ''}, {len(points[0].accuracy)} seeds"
        axes.errorbar(kept, means, yerr=errors, color=colour, marker="o", markersize=4, capsize=2.5, label=label)
    for place, who in enumerate(dict.fromkeys(one["who"] for one in published)):
        theirs = [one for one in published if one["who"] == who and "removed" in one and "accuracy" in one]
        kept, means = ([100 * (1 - one["removed"]) for one in theirs], [100 * one["accuracy"] for one in theirs])
        look: dict[str, Any] = {"marker": "sDv^PX*"[place % 7], "markersize": 5, "color": _PUBLISHED}
        axes.plot(kept, means, linestyle="--" if len(theirs) > 2 else "", linewidth=1.2, label=who, **look)
    style.kept_axis(axes, LogLocator(subs=(1, 2, 5)))
    axes.set_ylabel("test accuracy")
    axes.yaxis.set_major_formatter(PERCENT)
    style.legend(figure, "right upper", fontsize=9)
    return figure


def size_over_kept(curves: Sequence[tuple[str, Sequence[Point]]], dense_bytes: int) -> Figure:
    """Bytes of the file and of the sparse weights in memory over the share of weights kept, both axes logarithmic.

    Args:
        curves: name and points of each.
        dense_bytes: of the dense model.
    """
    figure, axes = style.single(9.0, 4.2, "both")
    axes.axhline(dense_bytes, color=INK, linewidth=1.1)
    axes.annotate("dense", (1, dense_bytes), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=INK)
    for (name, points), colour in zip(curves, _COLOURS, strict=False):
        kept = [100 * (1 - point.removed) for point in points]
        rest = f", {name}" if name not in ("", "ours") else ""
        for key, line, what in (("file", "-", "file"), ("sparse", ":", "in memory, sparse")):
            sizes = [float(np.mean(getattr(point, key))) for point in points]
            axes.plot(kept, sizes, line, color=colour, marker="o", markersize=3.5, label=f"{what}{rest}")
    style.kept_axis(axes, LogLocator(subs=(1, 2, 5)))
    style.log_axis(axes.yaxis, form=FuncFormatter(wording.bytes_text))
    axes.set_ylabel("bytes (log scale)")
    style.legend(figure, "right upper", fontsize=9)
    return figure
