"""Figures of a benchmark: where sparsity starts to pay, whole networks side by side, and the roofline.

Drawn from rows that ran, `jaxprune.lab.bench.rows`. A batch has one colour and one marker in all figures.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from jaxprune.lab.bench.rows import break_even
from jaxprune.lab.report import style
from jaxprune.lab.report.results import Row
from jaxprune.lab.report.style import COLOURS, EDGE, INK, MARKERS, PERCENT
from jaxprune.lab.report.wording import zeros

_LOSS = "#F6F1EC"


def all_figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Name -> figure, of those that these rows can fill.

    Args:
        rows: of any kind, none refused.
    """
    layers = [row for row in rows if row["kind"] == "layers"]
    models = [row for row in rows if row["kind"] == "model"]
    training = [row for row in rows if row["kind"] == "train"]
    made = {"speedup": speedup(layers)} if len(_contestants(layers)) and layers else {}
    if training:
        made["training"] = speedup(training)
    if models:
        made["models"] = whole_models(models)
    over_sparsity = [row for row in models if isinstance(row["sparsity"], float)]
    if len({row["sparsity"] for row in over_sparsity}) > 2:
        made["latency"] = latency(over_sparsity)
    return made | {"roofline": roofline(rows)}


def speedup(rows: Sequence[Row]) -> Figure:
    """Times faster than dense over sparsity: a panel for each size and contestant, a line for each batch.

    Below 1, tinted, dense wins. Where a line crosses 1 upwards for good, the sparsity is written under it.

    Args:
        rows: of `bench layers` or `bench train`, at least one that is not dense.
    """
    sizes, contestants = list(dict.fromkeys(row["model"] for row in rows)), _contestants(rows)
    figure = style.figure(1.2 + 3.9 * len(sizes), 1.3 + 2.9 * len(contestants))
    panels = figure.subplots(len(contestants), len(sizes), sharex=True, sharey="row", squeeze=False)
    batches = _batches(rows)
    for line, contestant in zip(panels, contestants, strict=True):
        for axes, size in zip(line, sizes, strict=True):
            chosen = [row for row in rows if row["model"] == size and row["contestant"] == contestant]
            _speedup_panel(axes, chosen, batches)
            style.title(axes, f"{contestant}, {size.replace('x', ' x ')}")
        _speedup_axis(line[0], [row["ratio"] for row in rows if row["contestant"] == contestant])
    _sparsity_axis(panels[0, 0], sorted({row["sparsity"] for row in rows}))
    style.label(figure, "sparsity (fraction of weights left on a log scale)", "times faster than dense (log scale)")
    style.legend(figure, "upper center", _batch_handles(batches), ncols=len(batches))
    return figure


def _speedup_panel(axes: Axes, rows: Sequence[Row], batches: Sequence[int]) -> None:
    style.tidy(axes, "both")
    axes.axhspan(1e-6, 1, color=_LOSS, linewidth=0, zorder=0)
    axes.axhline(1, color=INK, linewidth=1.1, zorder=1)
    crossings = []
    for batch in batches:
        points = sorted((row["sparsity"], row["ratio"]) for row in rows if row["batch"] == batch)
        if not points:
            continue
        look = _look(batches.index(batch))
        sparsities, ratios = np.array(points).T
        # Between points as break-even takes it, linear in the ratio; straight lines on log axes would cross elsewhere.
        between = np.linspace(sparsities[0], sparsities[-1], 400)
        axes.plot(1 - between, np.interp(between, sparsities, ratios), linewidth=1.6, color=look["color"])
        axes.plot(1 - sparsities, ratios, linestyle="", markersize=4.5, **look)
        word, sparsity = break_even(points)
        if word == "at" and sparsity is not None:
            crossings.append((1 - sparsity, look["color"]))
    _write_crossings(axes, crossings)


def _write_crossings(axes: Axes, crossings: Sequence[tuple[float, str]]) -> None:
    """Break-even sparsities: a dotted line from the crossing to the foot of the panel, where the number is written."""
    for place, (left, colour) in enumerate(sorted(crossings, reverse=True)):
        axes.plot([left, left], [1, 1e-6], linestyle=":", linewidth=1.1, color=colour, zorder=1)
        text: dict[str, Any] = {"xytext": (3, 4 + 10 * (place % 3)), "textcoords": "offset points", "fontsize": 8}
        text |= {"color": colour, "bbox": {"facecolor": _LOSS, "edgecolor": "none", "pad": 0.5}}
        axes.annotate(f"{100 * (1 - left):.0f} %", (left, 0), xycoords=axes.get_xaxis_transform(), **text)


def latency(rows: Sequence[Row]) -> Figure:
    """Milliseconds over sparsity: a panel for each model and batch, a line for dense and each contestant.

    Args:
        rows: of `bench model`, with sparsities that are numbers.
    """
    cases = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    figure = style.figure(1.2 + 4.0 * len(cases), 4.0)
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, (model, batch) in zip(panels, cases, strict=True):
        style.tidy(axes, "both")
        for place, name in enumerate(names):
            points = sorted(
                (row["sparsity"], row["median_ms"])
                for row in rows
                if (row["model"], row["batch"], row["contestant"]) == (model, batch, name)
            )
            across, up = np.array(points).reshape(-1, 2).T
            axes.plot(100 * across, up, markersize=4.5, label=name, **_look(place))
        style.title(axes, f"{model}, batch {batch}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.6g}")
        axes.xaxis.set_major_formatter(PERCENT)
    style.label(figure, "sparsity of the pruned leaves", "milliseconds, median (log scale)")
    style.legend(figure, "upper center", panels[0], ncols=len(names))
    return figure


def whole_models(rows: Sequence[Row]) -> Figure:
    """Milliseconds of whole networks as bars, a panel for each network, batch and sparsity, with the ratio to dense.

    Args:
        rows: of `bench model`.
    """
    cases = list(dict.fromkeys((row["model"], row["batch"], zeros(row["sparsity"])) for row in rows))
    grouped = [[row for row in rows if (row["model"], row["batch"], zeros(row["sparsity"])) == case] for case in cases]
    heights = [0.75 + 0.32 * len(group) for group in grouped]
    figure = style.figure(8.0, 0.5 + sum(heights))
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (model, batch, sparse), group in zip(panels, cases, grouped, strict=True):
        _bars(axes, group)
        of_zeros = f"{sparse} zeros" if sparse.endswith("%") else f"zeros of {sparse}"
        style.title(axes, f"{model}, batch {batch}, {of_zeros}", loc="left")
    panels[-1].set_xlabel("milliseconds, median and quartiles; beside it, times faster than dense")
    return figure


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    style.tidy(axes, "x")
    middle = [row["median_ms"] for row in rows]
    spread = [[row["median_ms"] - row["low_ms"] for row in rows], [row["high_ms"] - row["median_ms"] for row in rows]]
    colours = [EDGE if row["contestant"] == "dense" else COLOURS[0 if row["ratio"] > 1 else 1] for row in rows]
    errors = {"ecolor": INK, "elinewidth": 1}
    axes.barh(range(len(rows)), middle, xerr=spread, height=0.66, color=colours, error_kw=errors)
    style.name_rows(axes, [row["contestant"] for row in rows], room=0.5)
    for place, row in enumerate(rows):
        ratio = "" if row["contestant"] == "dense" else f"   {row['ratio']:.2f}x"
        axes.text(row["high_ms"], place, f"  {row['median_ms']:.3g} ms{ratio}", va="center", fontsize=9, color=INK)
    axes.set_xlim(0, 1.25 * max(row["high_ms"] for row in rows))


def roofline(rows: Sequence[Row]) -> Figure:
    """Useful GFLOP/s over FLOP per byte, under the machine's measured roofs; a panel for each contestant.

    Points of one model and batch are joined in the order of sparsity, the first and last labelled where there is room.
    One above the slope had its bytes in a cache.

    Args:
        rows: of one machine; the roofs are those of the last.

    References:
        Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
    """
    contestants = list(dict.fromkeys(row["contestant"] for row in rows))
    wide = min(len(contestants), 3)
    deep = -(-len(contestants) // wide)
    figure = style.figure(1.0 + 3.9 * wide, 1.4 + 3.1 * deep)
    panels = figure.subplots(deep, wide, sharex=True, sharey=True, squeeze=False)
    batches, models = _batches(rows), list(dict.fromkeys(row["model"] for row in rows))
    _roofline_limits(panels[0, 0], rows)
    for axes, contestant in zip(panels.flat, contestants, strict=False):
        style.tidy(axes, "both")
        _roofs(axes, rows[-1]["peak"])
        _roofline_points(axes, [row for row in rows if row["contestant"] == contestant], batches, models)
        style.title(axes, contestant)
    for place, axes in enumerate(panels.flat):
        axes.set_visible(place < len(contestants))
        axes.tick_params(labelbottom=place + wide >= len(contestants))  # also where the panel below is empty
    style.label(figure, "useful FLOP per byte (weights as stored, activations in and out)", "useful GFLOP/s")
    handles = _batch_handles(batches) + (_model_handles(models) if len(models) > 1 else [])
    style.legend(figure, "upper center", handles, ncols=min(len(handles), 4 * wide))
    return figure


def _roofline_limits(axes: Axes, rows: Sequence[Row]) -> None:
    peak = rows[-1]["peak"]
    reach, rate = [row["intensity"] for row in rows], [row["gflops"] for row in rows]
    ridge = peak["gflops"] / peak["gbytes"]
    for axis in (axes.xaxis, axes.yaxis):
        style.log_axis(axis)
    axes.set_xlim(min(*reach, ridge) / 2, 4 * max(*reach, ridge))
    axes.set_ylim(min(rate) / 2, 2.5 * max(*rate, peak["gflops"]))


def _roofs(axes: Axes, peak: dict[str, float]) -> None:
    low, high = axes.get_xlim()
    reach = np.geomspace(low, high, 200)
    axes.plot(reach, np.minimum(peak["gflops"], reach * peak["gbytes"]), color=INK, linewidth=1.3, zorder=1)
    look: dict[str, Any] = {"fontsize": 8, "color": INK, "textcoords": "offset points", "ha": "right"}
    axes.annotate(f"{peak['gflops']:.0f} GFLOP/s", (high, peak["gflops"]), xytext=(-3, 3), **look)
    at = np.sqrt(low * peak["gflops"] / peak["gbytes"])
    axes.annotate(f"{peak['gbytes']:.0f} GB/s", (at, at * peak["gbytes"]), xytext=(-7, 2), **look)


def _roofline_points(axes: Axes, rows: Sequence[Row], batches: Sequence[int], models: Sequence[str]) -> None:
    taken: list[tuple[float, float]] = []
    for case in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        joined = [row for row in rows if (row["model"], row["batch"]) == case]
        joined.sort(key=lambda row: row["effective_sparsity"])
        reach, rate = [row["intensity"] for row in joined], [row["gflops"] for row in joined]
        look = _look(batches.index(case[1]))
        axes.plot(reach, rate, linewidth=0.8, markersize=_size_of(case[0], models), alpha=0.85, **look)
        for row in dict.fromkeys((0, len(joined) - 1)):
            text = zeros(joined[row]["sparsity"])
            text = text if joined[row]["kind"] == "layers" else f"{case[0]} {text}"
            _label_point(axes, (reach[row], rate[row]), text, taken)


def _label_point(axes: Axes, point: tuple[float, float], text: str, taken: list[tuple[float, float]]) -> None:
    """Write beside a point, unless another text is there already; places are fractions of the panel."""
    x, y = axes.transAxes.inverted().transform(axes.transData.transform(point))
    if any(abs(x - other[0]) < 0.035 * len(text) and abs(y - other[1]) < 0.06 for other in taken):
        return
    taken.append((x, y))
    on_the_left = x > 0.75
    place = {"xytext": (-8 if on_the_left else 8, -3), "ha": "right" if on_the_left else "left"}
    axes.annotate(text, point, textcoords="offset points", fontsize=7.5, color=INK, parse_math=False, **place)


def _size_of(model: str, models: Sequence[str]) -> float:
    return 4 + 4 * models.index(model) / max(len(models) - 1, 1)


def _model_handles(models: Sequence[str]) -> list[Line2D]:
    look: dict[str, Any] = {"linestyle": "", "marker": "o", "color": EDGE}
    return [Line2D([], [], label=model, markersize=_size_of(model, models), **look) for model in models]


def _contestants(rows: Sequence[Row]) -> list[str]:
    return [name for name in dict.fromkeys(row["contestant"] for row in rows) if name != "dense"]


def _batches(rows: Sequence[Row]) -> list[int]:
    return sorted({row["batch"] for row in rows})


def _look(place: int) -> dict[str, Any]:
    """Of one of several lines."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def _batch_handles(batches: Sequence[int]) -> list[Line2D]:
    return [Line2D([], [], label=f"batch {batch}", **_look(place)) for place, batch in enumerate(batches)]


def _sparsity_axis(axes: Axes, sparsities: Sequence[float]) -> None:
    left = [1 - sparsity for sparsity in sparsities]
    axes.set_xlim(1.15 * max(left), min(left) / 1.15)  # first: a new scale would choose limits, and warn of one point
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(style.apart(left, 0.07)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * (1 - value):.3g} %"))


def _speedup_axis(axes: Axes, ratios: Sequence[float]) -> None:
    low, high = min(*ratios, 0.8), max(*ratios, 1.25)
    axes.set_ylim(low / 2, high * 1.25)  # the foot is kept for the sparsities of break-even
    axes.set_yscale("log")
    ticks = [base * 10.0**power for power in range(-3, 4) for base in (1, 2, 5)]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
