"""Figures: what a run did to its weights and to its accuracy, drawn from plain data.

Every function takes what `metrics.jsonl` and `results.json` hold, or arrays of weights, and returns a
`matplotlib.figure.Figure`. None touches pyplot or any other global state, so figures can be drawn in any thread and
are freed with their last reference. A stage has one colour and one marker in all figures and in the report page.
"""

import base64
import io
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

# Okabe and Ito's colours stay apart for colour-blind eyes; the last one is theirs darkened, to be read on white.
STAGE_COLOURS = {"dense": "#0072B2", "pruned": "#D55E00", "finetuned": "#009E73", "sparse": "#A6538A"}
STAGE_NAMES = {"dense": "dense", "pruned": "pruned", "finetuned": "fine-tuned", "sparse": "sparse"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#A6538A", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
"""Of lines in one figure; the yellow is left out, it fades on white."""
_MARKERS = {"dense": "o", "pruned": "v", "finetuned": "s", "sparse": "D"}
_PANELS = {
    "dense": ("Before pruning", STAGE_COLOURS["dense"]),
    "pruned": ("After pruning", STAGE_COLOURS["pruned"]),
    "fine-tuned": ("After fine-tuning", STAGE_COLOURS["finetuned"]),
}
_TINTS = {"train": "#EAF2F8", "prune": "#FCEDE2", "finetune": "#E6F5EF", "quantize": "#F6EDF3"}
_TINT_NAMES = {"train": "train", "prune": "prune", "finetune": "fine-tune"}
_INK, _EDGE, _RULE = "#3A3F44", "#9AA1A8", "#D5D9DD"
_MOST_LEAVES = 80  # more bars than this make a picture taller than anybody scrolls


def weight_histograms(weights: dict[str, np.ndarray], threshold: float | None = None) -> Figure:
    """Draw one histogram per stage, all on the same axes and bins.

    Zeros are left out after pruning: they would be one bar a hundred times as high as the rest. The panel titles
    count what is drawn and what is left out.

    Args:
        weights: "dense", "pruned", "fine-tuned" -> weights of the pruned leaves, any shape; any of the three may lack.
        threshold: magnitude below which weights were pruned, marked at plus and minus.

    Raises:
        ValueError: if `weights` holds none of the three stages.
    """
    stages = [stage for stage in _PANELS if stage in weights]
    if not stages:
        raise ValueError(f"`weights` needs some of {', '.join(map(repr, _PANELS))}, but it holds {list(weights)}.")
    drawn, titles = {}, {}
    for stage in stages:
        drawn[stage], titles[stage] = _without_zeros(stage, np.asarray(weights[stage], dtype=np.float64).ravel())
    edges = _bin_edges(max((np.abs(values).max() for values in drawn.values() if values.size), default=1.0), threshold)
    counts = {stage: np.histogram(values, edges)[0] for stage, values in drawn.items()}
    figure = Figure(figsize=(2.9 * len(stages) + 0.4, 3.5), layout="constrained")
    panels = figure.subplots(1, len(stages), sharex=True, sharey=True, squeeze=False)[0]
    for axes, stage in zip(panels, stages, strict=True):
        axes.stairs(counts[stage], edges, fill=True, color=_PANELS[stage][1])
        axes.set_title(titles[stage], fontsize=10, color=_INK)
        if not drawn[stage].size:
            axes.text(0.5, 0.5, "no weights left", transform=axes.transAxes, ha="center", color=_INK)
        for edge in () if threshold is None else (-threshold, threshold):
            axes.axvline(edge, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _tidy(axes, grid="y")
    _count_axis(panels[0], list(counts.values()))
    figure.supxlabel(
        "weight" + (f"   (dashed: the threshold, ±{threshold:.4g})" if threshold is not None else ""),
        fontsize=10,
        color=_INK,
    )
    return figure


def _without_zeros(stage: str, values: np.ndarray) -> tuple[np.ndarray, str]:
    finite = values[np.isfinite(values)]
    kept = finite if stage == "dense" else finite[finite != 0]
    lines = [_PANELS[stage][0], f"{kept.size:,} weights"]
    if stage != "dense":
        lines.append(f"{finite.size - kept.size:,} zeros left out")
    if finite.size < values.size:
        lines.append(f"{values.size - finite.size:,} not finite, left out")
    return kept, "\n".join(lines)


def _bin_edges(largest: float, threshold: float | None) -> np.ndarray:
    largest = float(largest) or 1.0
    width = largest / 60
    if threshold is not None and width / 2 <= threshold <= largest:
        width = threshold / max(1, round(threshold / width))  # the threshold falls on an edge, not inside a bar
    reach = int(np.ceil(largest / width))
    return width * np.arange(-reach, reach + 1)


def _count_axis(axes: Axes, counts: list[np.ndarray]) -> None:
    """Scale the shared axis by logarithm where the survivors would otherwise vanish beside the dense peak."""
    peaks = [int(count.max(initial=0)) for count in counts]
    low = min((peak for peak in peaks if peak), default=1)
    if max(peaks) > 25 * low:
        axes.set_yscale("log")
        axes.set_ylim(0.7, 2.0 * max(peaks))
        axes.set_ylabel("weights per bar (log scale)", color=_INK)
        return
    axes.set_ylim(0, max(1.0, 1.06 * max(peaks)))
    axes.set_ylabel("weights per bar", color=_INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def training_curve(metrics: list[dict[str, Any]]) -> Figure:
    """Draw accuracy over steps, the sparsity beside it on an axis of its own, the stages behind both.

    Accuracy is that on validation data, or on training data where no record has one; the axis says which. Several
    seeds are thin lines of one colour; the stages are those of the first seed.

    Args:
        metrics: records of `metrics.jsonl`, in the order written.
    """
    key = "validation_accuracy" if any(m.get("validation_accuracy") is not None for m in metrics) else "train_accuracy"
    what = "validation accuracy" if key == "validation_accuracy" else "training accuracy (no validation data)"
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    axes = figure.subplots()
    right = axes.twinx()
    seeds = list(dict.fromkeys(record.get("seed", 0) for record in metrics))
    for seed in seeds:
        records = [record for record in metrics if record.get("seed", 0) == seed]
        style: dict[str, Any] = {"linewidth": 1.7 if len(seeds) == 1 else 0.9, "markersize": 3.2}
        style["marker"] = "o" if len(records) <= 40 else ""
        _line(axes, records, key, color=STAGE_COLOURS["dense"], label=f"{what}, seed {seed}", **style)
        _line(right, records, "sparsity", color=STAGE_COLOURS["pruned"], label=f"seed {seed}", linestyle="--", **style)
    _percent_axis(axes.yaxis)
    _percent_axis(right.yaxis)
    right.set_ylim(-2, 102)
    axes.set_ylim(top=min(axes.get_ylim()[1], 100.5))
    axes.set_ylabel(what, color=STAGE_COLOURS["dense"])
    right.set_ylabel("sparsity of the pruned leaves (dashed)", color=STAGE_COLOURS["pruned"])
    note = f"   ({len(seeds)} seeds, one thin line each)" if len(seeds) > 1 else ""
    axes.set_xlabel("step" + note, color=_INK)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _tidy(axes, grid="y")
    _tidy(right)
    right.spines["right"].set(visible=True, color=_EDGE)
    _mark_stages(axes, [record for record in metrics if record.get("seed", 0) == seeds[0]] if seeds else [])
    return figure


def _line(axes: Axes, records: list[dict[str, Any]], key: str, **style: Any) -> None:
    points = [(record["step"], 100 * record[key]) for record in records if record.get(key) is not None]
    axes.plot([step for step, _ in points], [percent for _, percent in points], **style)


def _mark_stages(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Tint each stage, rule its end, and name it above, or in a legend where its name has no room."""
    if not records:
        return
    # a record closes the stretch of steps it reports on, so a stage begins where the one before it was last seen
    stages = [(stage, list(run)[-1]["step"]) for stage, run in groupby(records, key=lambda record: record["stage"])]
    begin = min(0, records[0]["step"])
    total = max(stages[-1][1] - begin, 1)
    unnamed: dict[str, None] = {}
    named: set[str] = set()
    for stage, end in stages:
        axes.axvspan(begin, end, color=_TINTS.get(stage, "#EEEEEE"), linewidth=0, zorder=0)
        if begin > 0:
            axes.axvline(begin, color=_EDGE, linewidth=0.9, zorder=1)
        if (end - begin) / total >= 0.1:
            place = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "color": _INK}
            centre = ((begin + end) / 2, 1)
            axes.annotate(_stage_name(stage), centre, xycoords=axes.get_xaxis_transform(), parse_math=False, **place)
            named.add(stage)
        else:
            unnamed[stage] = None
        begin = end
    axes.set_xlim(min(0, records[0]["step"]), 1.012 * max(begin, 1))  # the last marker in full
    handles = [Patch(facecolor=_TINTS.get(stage, "#EEEEEE"), edgecolor=_EDGE, label=_stage_name(stage))
               for stage in unnamed if stage not in named]  # fmt: skip
    if handles:
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)


def _stage_name(stage: str) -> str:
    return _TINT_NAMES.get(stage, stage)


def leaf_sparsity(leaves: list[dict[str, Any]]) -> Figure:
    """Draw the sparsity of every leaf as a bar, with the weights left and the weights there written out beside it.

    More than 80 leaves are cut to the 80 largest, which the title says.

    Args:
        leaves: `leaves` of `results.json`: "name", "weights", "nnz", "sparsity" each.
    """
    shown, title = leaves, "Sparsity per leaf"
    if len(leaves) > _MOST_LEAVES:
        largest = sorted(range(len(leaves)), key=lambda i: -leaves[i]["weights"])[:_MOST_LEAVES]
        shown = [leaves[i] for i in sorted(largest)]
        title += f", the {_MOST_LEAVES} largest of {len(leaves):,} leaves"
    figure = Figure(figsize=(9.0, 1.1 + 0.3 * max(len(shown), 1)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(shown)), [100 * leaf["sparsity"] for leaf in shown], height=0.62, color=STAGE_COLOURS["pruned"])
    # a name or a run is somebody's text: a "$" in it must not start a formula
    names = [_shorten(leaf["name"]) for leaf in shown]
    axes.set_yticks(range(len(shown)), labels=names, parse_math=False, fontsize=9)
    for row, leaf in enumerate(shown):
        text = f"{leaf['nnz']:,} of {leaf['weights']:,} left"
        axes.text(1.015, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=_INK)
    axes.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    _percent_axis(axes.xaxis)
    axes.set_title(title, fontsize=11, color=_INK, loc="left")
    _tidy(axes, grid="x")
    axes.spines["right"].set(visible=True, color=_EDGE)
    return figure


def _shorten(name: str, most: int = 48) -> str:
    """Cut the middle out of the long parts of a long name, then out of the name: ends, where numbers are, stay."""
    if len(name) <= most:
        return name
    short = "/".join(part if len(part) <= 12 else f"{part[:5]}…{part[-5:]}" for part in name.split("/"))
    return short if len(short) <= most else f"{short[: most // 2 - 1]}…{short[-most // 2 :]}"


def comparison(results: list[dict[str, Any]]) -> Figure:
    """Draw the test accuracies of several runs side by side, with standard deviations over seeds.

    Every run is a named row. Where the runs of one data set reach three sparsities or more, a second panel draws the
    same accuracies over the share of weights kept.

    Args:
        results: `results.json` of each run.
    """
    kept = [100 * (1 - result["sparsity"]["mean"]) for result in results]
    datasets = {result.get("dataset", {}).get("name") for result in results}
    over_kept = len(datasets) == 1 and len({round(share, 6) for share in kept}) >= 3
    heights = [0.9 + 0.5 * max(len(results), 1)] + [3.4] * over_kept
    figure = Figure(figsize=(9.0, sum(heights) + 0.3), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _accuracy_rows(panels[0], results)
    if over_kept:
        _accuracy_over_kept(panels[1], results, kept)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _accuracy_rows(axes: Axes, results: list[dict[str, Any]]) -> None:
    for place, stage in enumerate(STAGE_NAMES):
        found = [(row, a) for row, result in enumerate(results) if (a := result["accuracy"].get(stage))]
        rows = [row + 0.18 * (place - 1.5) for row, _ in found]  # side by side, so equal accuracies do not hide
        means, errors = [100 * a["mean"] for _, a in found], [100 * a["std"] for _, a in found]
        if found:
            axes.errorbar(means, rows, xerr=errors, **_stage_style(stage))
    names = [f"{_shorten(r['name'], 36)}\n{_kept_text(r)}" for r in results]
    axes.set_yticks(range(len(results)), labels=names, parse_math=False, fontsize=9)
    axes.set_ylim(max(len(results), 1) - 0.5, -0.5)
    for row in range(1, len(results)):
        axes.axhline(row - 0.5, color=_RULE, linewidth=0.8)
    axes.set_xlabel("test accuracy", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    _percent_axis(axes.xaxis)
    _tidy(axes, grid="x")


def _kept_text(result: dict[str, Any]) -> str:
    return f"{100 * (1 - result['sparsity']['mean']):.3g} % of weights kept"


def _accuracy_over_kept(axes: Axes, results: list[dict[str, Any]], kept: Sequence[float]) -> None:
    for stage in STAGE_NAMES:
        found = sorted((share, a["mean"], a["std"]) for share, r in zip(kept, results, strict=True)
                       if (a := r["accuracy"].get(stage)) and share > 0)  # fmt: skip
        if found:
            shares, means, errors = zip(*found, strict=True)
            axes.errorbar(shares, [100 * m for m in means], yerr=[100 * e for e in errors], **_stage_style(stage))
    axes.set_xscale("log")
    axes.invert_xaxis()
    ticks = sorted({float(f"{share:.3g}") for share in kept if share > 0})
    # labels need room: of ticks closer than a twelfth of the axis only the first stays
    room = (np.log(ticks[-1]) - np.log(ticks[0])) / 12 if ticks else 0.0
    spaced: list[float] = []
    for tick in ticks:
        if not spaced or np.log(tick) - np.log(spaced[-1]) >= room:
            spaced.append(tick)
    axes.set_xticks(spaced, labels=[f"{tick:g} %" for tick in spaced])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.set_xlabel("weights kept in the pruned leaves (log scale, fewer to the right)", color=_INK)
    axes.set_ylabel("test accuracy", color=_INK)
    _percent_axis(axes.yaxis)
    _tidy(axes, grid="both")


def _stage_style(stage: str) -> dict[str, Any]:
    hollow = stage == "sparse"  # it should fall on the fine-tuned one, and must not hide it
    return {"color": STAGE_COLOURS[stage], "marker": _MARKERS[stage], "label": STAGE_NAMES[stage],
            "markersize": 7 if hollow else 5.5, "markerfacecolor": "none" if hollow else STAGE_COLOURS[stage],
            "linestyle": "", "elinewidth": 1.4, "capsize": 3}  # fmt: skip


def _percent_axis(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g} %"))


def _tidy(axes: Axes, grid: str = "") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_EDGE)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=_RULE, linewidth=0.7)  # pyright: ignore[reportArgumentType]


def png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file, 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the figure as a PNG file, creating its folder. A failed drawing leaves no half-written file."""
    data = png(figure)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data)


def data_uri(figure_or_path: Figure | str | os.PathLike[str]) -> str:
    """Return a figure, or a PNG file, as a `data:` address that a page can hold inline."""
    data = png(figure_or_path) if isinstance(figure_or_path, Figure) else Path(figure_or_path).read_bytes()
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
