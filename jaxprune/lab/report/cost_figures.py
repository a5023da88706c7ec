"""Figures of costs: where a model's weights and multiply-adds are, and which of its leaves bear pruning.

Drawn from `jaxprune.costs` and `jaxprune.sensitivity`, in the look of `jaxprune.lab.report.figures`.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from jaxprune.lab.report.figures import (
    _EDGE,
    _INK,
    _MOST_LEAVES,
    COLOURS,
    MARKERS,
    STAGE_COLOURS,
    _percent_axis,
    _shorten,
    _tidy,
)
from jaxprune.search.sensitivity import Sensitivity
from jaxprune.tracing.costs import Cost, Costs

_DENSE = "#A9CCE3"  # the colour of dense runs, lighter: what is left is drawn over it


def layer_costs(costs: Costs, title: str = "") -> Figure:
    """Weights and multiply-adds of every leaf that has products, dense and left, in the order they run.

    More than 80 such leaves are cut to the 80 with the most multiply-adds, which the title says.

    Args:
        costs: of one model.
        title: what the costs are of.
    """
    used = [leaf for leaf in costs.leaves if leaf.macs]
    shown = used
    if len(used) > _MOST_LEAVES:
        largest = sorted(range(len(used)), key=lambda place: -used[place].macs)[:_MOST_LEAVES]
        shown = [used[place] for place in sorted(largest)]
        title += f" (the {_MOST_LEAVES} of {len(used):,} leaves with the most multiply-adds)"
    figure = Figure(figsize=(11.0, 1.5 + 0.24 * max(len(shown), 2)), layout="constrained")
    weights, macs = figure.subplots(1, 2, sharey=True)
    total = Costs(tuple(used)).total
    _bars(weights, "weights", [(leaf.weights, leaf.nnz) for leaf in (*shown, total)])
    _bars(macs, "multiply-adds", [(leaf.macs, leaf.macs_left) for leaf in (*shown, total)])
    _name_rows(weights, shown)
    handles, labels = macs.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    if title:
        figure.suptitle(title, fontsize=12, color=_INK, parse_math=False)
    return figure


def _bars(axes: Axes, what: str, counts: Sequence[tuple[int, int]]) -> None:
    """A row a leaf; the last of the counts is the total, which the title tells."""
    *rows, (total, total_left) = counts
    places = range(len(rows))
    axes.barh(places, [dense for dense, _ in rows], height=0.72, color=_DENSE, label="dense")
    if total_left < total:
        axes.barh(places, [left for _, left in rows], height=0.42, color=STAGE_COLOURS["pruned"], label="left")
    short = EngFormatter(places=2, sep=" ")
    text = f"{short(total)} {what}"
    if total_left < total:
        text += f", {short(total_left)} left" + (f": {total / total_left:.2f}x fewer" if total_left else "")
    axes.set_title(text, fontsize=10, color=_INK, loc="left")
    axes.set_xlim(0, 1.04 * max((dense for dense, _ in rows), default=1))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    _tidy(axes, grid="x")


def _name_rows(axes: Axes, leaves: Sequence[Cost]) -> None:
    names = [_shorten(leaf.name.removesuffix("/kernel")) for leaf in leaves]
    axes.set_yticks(range(len(leaves)), labels=names, parse_math=False, fontsize=8)
    axes.set_ylim(max(len(leaves), 1) - 0.4, -0.6)


def leaf_sensitivity(found: Sensitivity, title: str = "") -> Figure:
    """Accuracy over the sparsity of one leaf, a line for each; the seven that suffer most have colours and names.

    Args:
        found: of one model, accuracies as fractions.
        title: what it is of.
    """
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.subplots()
    percent = 100 * np.asarray(found.accuracies, np.float64).reshape(len(found.names), len(found.sparsities))
    worst = sorted(range(len(found.names)), key=lambda place: percent[place].mean())[: len(COLOURS)]
    sparsities = [100 * sparsity for sparsity in found.sparsities]
    for place in set(range(len(found.names))) - set(worst):
        axes.plot(sparsities, percent[place], color=_EDGE, linewidth=0.8, alpha=0.6)
    for place, colour, marker in zip(worst, COLOURS, MARKERS, strict=False):
        name = _shorten(found.names[place], 36)
        axes.plot(sparsities, percent[place], color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=name)
    axes.axhline(100 * found.dense, color=_INK, linewidth=1.0, linestyle=(0, (4, 3)), label="dense")
    if len(worst) < len(found.names):
        axes.plot([], [], color=_EDGE, linewidth=0.8, label=f"{len(found.names) - len(worst)} others")
    axes.set_xlabel("sparsity of one leaf, the others dense", color=_INK)
    axes.set_ylabel("accuracy", color=_INK)
    for axis in (axes.xaxis, axes.yaxis):
        _percent_axis(axis)
    _tidy(axes, grid="both")
    legend = figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    if title:
        axes.set_title(title, fontsize=11, color=_INK, loc="left", parse_math=False)
    return figure
