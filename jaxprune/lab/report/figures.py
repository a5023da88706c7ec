"""Figures: what a run did to its weights and to its accuracy, drawn from plain data.

Every function takes what `metrics.jsonl` and `results.json` hold, or arrays of weights, and returns a
`matplotlib.figure.Figure`. A stage has one colour and one marker in all figures and in the report page.
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
from matplotlib.ticker import MaxNLocator

from jaxprune import files
from jaxprune.lab.report import style
from jaxprune.lab.report.style import EDGE, INK, PERCENT, STAGES

_NAMES = {"dense": "dense", "pruned": "pruned", "finetuned": "fine-tuned", "sparse": "sparse"}
_MARKERS = {"dense": "o", "pruned": "v", "finetuned": "s", "sparse": "D"}
_PANELS = {
    "dense": ("Before pruning", STAGES["dense"]),
    "pruned": ("After pruning", STAGES["pruned"]),
    "fine-tuned": ("After fine-tuning", STAGES["finetuned"]),
}
_SHOWN = {"finetune": "fine-tune"}
_TINTS = {"train": "#EAF2F8", "prune": "#FCEDE2", "finetune": "#E6F5EF", "quantize": "#F6EDF3"}


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
    figure = style.figure(2.9 * len(stages) + 0.4, 3.5)
    panels = figure.subplots(1, len(stages), sharex=True, sharey=True, squeeze=False)[0]
    for axes, stage in zip(panels, stages, strict=True):
        style.tidy(axes, "y")
        axes.stairs(counts[stage], edges, fill=True, color=_PANELS[stage][1])
        style.title(axes, titles[stage])
        if not drawn[stage].size:
            axes.text(0.5, 0.5, "no weights left", transform=axes.transAxes, ha="center", color=INK)
        for edge in () if threshold is None else (-threshold, threshold):
            axes.axvline(edge, color=INK, linewidth=0.9, linestyle=style.DASHED)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    _count_axis(panels[0], list(counts.values()))
    style.label(figure, "weight" + (f"   (dashed: the threshold, ±{threshold:.4g})" if threshold is not None else ""))
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
        axes.set_ylabel("weights per bar (log scale)")
        return
    axes.set_ylim(0, max(1.0, 1.06 * max(peaks)))
    axes.set_ylabel("weights per bar")
    axes.yaxis.set_major_formatter("{x:,.0f}")
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
    figure, axes = style.single(9.0, 4.2, "y")
    right = style.tidy(axes.twinx())
    seeds = list(dict.fromkeys(record.get("seed", 0) for record in metrics))
    for seed in seeds:
        records = [record for record in metrics if record.get("seed", 0) == seed]
        look: dict[str, Any] = {"linewidth": 1.7 if len(seeds) == 1 else 0.9, "markersize": 3.2}
        look["marker"] = "o" if len(records) <= 40 else ""
        _line(axes, records, key, color=STAGES["dense"], label=f"{what}, seed {seed}", **look)
        _line(right, records, "sparsity", color=STAGES["pruned"], label=f"seed {seed}", linestyle="--", **look)
    axes.yaxis.set_major_formatter(PERCENT)
    right.yaxis.set_major_formatter(PERCENT)
    right.set_ylim(-2, 102)
    axes.set_ylim(top=min(axes.get_ylim()[1], 100.5))
    axes.set_ylabel(what, color=STAGES["dense"])
    right.set_ylabel("sparsity of the pruned leaves (dashed)", color=STAGES["pruned"])
    note = f"   ({len(seeds)} seeds, one thin line each)" if len(seeds) > 1 else ""
    axes.set_xlabel("step" + note)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    right.spines["right"].set(visible=True, color=EDGE)
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
    stages = [
        (str(stage), list(run)[-1]["step"]) for stage, run in groupby(records, key=lambda record: record["stage"])
    ]
    begin = min(0, records[0]["step"])
    total = max(stages[-1][1] - begin, 1)
    unnamed: dict[str, None] = {}
    named: set[str] = set()
    for stage, end in stages:
        axes.axvspan(begin, end, color=_TINTS.get(stage, "#EEEEEE"), linewidth=0, zorder=0)
        if begin > 0:
            axes.axvline(begin, color=EDGE, linewidth=0.9, zorder=1)
        if (end - begin) / total >= 0.1:
            place = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "color": INK}
            centre = ((begin + end) / 2, 1)
            axes.annotate(
                _SHOWN.get(stage, stage), centre, xycoords=axes.get_xaxis_transform(), parse_math=False, **place
            )
            named.add(stage)
        else:
            unnamed[stage] = None
        begin = end
    axes.set_xlim(min(0, records[0]["step"]), 1.012 * max(begin, 1))  # the last marker in full
    handles = [Patch(facecolor=_TINTS.get(stage, "#EEEEEE"), edgecolor=EDGE, label=_SHOWN.get(stage, stage))
               for stage in unnamed if stage not in named]  # fmt: skip
    if handles:
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)


def leaf_sparsity(leaves: list[dict[str, Any]]) -> Figure:
    """Draw the sparsity of every leaf as a bar, with the weights left and the weights there written out beside it.

    More than 80 leaves are cut to the 80 largest, which the title says.

    Args:
        leaves: `leaves` of `results.json`: "name", "weights", "nnz", "sparsity" each.
    """
    shown, title = leaves, "Sparsity per leaf"
    if len(leaves) > style.MOST_ROWS:
        shown = [leaves[place] for place in style.largest([leaf["weights"] for leaf in leaves])]
        title += f", the {len(shown)} largest of {len(leaves):,} leaves"
    figure, axes = style.single(9.0, 1.1 + 0.3 * max(len(shown), 1), "x")
    axes.barh(range(len(shown)), [100 * leaf["sparsity"] for leaf in shown], height=0.62, color=STAGES["pruned"])
    style.name_rows(axes, [style.shorten(leaf["name"]) for leaf in shown])
    for row, leaf in enumerate(shown):
        text = f"{leaf['nnz']:,} of {leaf['weights']:,} left"
        axes.text(1.015, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=INK)
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_formatter(PERCENT)
    style.title(axes, title, 11, "left")
    axes.spines["right"].set(visible=True, color=EDGE)
    return figure


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
    figure = style.figure(9.0, sum(heights) + 0.3)
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _accuracy_rows(panels[0], results)
    if over_kept:
        _accuracy_over_kept(panels[1], results, kept)
    style.legend(figure, "upper center", panels[0], ncols=4)
    return figure


def _accuracy_rows(axes: Axes, results: list[dict[str, Any]]) -> None:
    style.tidy(axes, "x")
    for place, stage in enumerate(STAGES):
        found = [(row, a) for row, result in enumerate(results) if (a := result["accuracy"].get(stage))]
        rows = [row + 0.18 * (place - 1.5) for row, _ in found]  # side by side, so equal accuracies do not hide
        means, errors = [100 * a["mean"] for _, a in found], [100 * a["std"] for _, a in found]
        if found:
            axes.errorbar(means, rows, xerr=errors, **_stage_style(stage))
    kept = [f"{100 * (1 - result['sparsity']['mean']):.3g} % of weights kept" for result in results]
    names = [style.shorten(result["name"], 36) for result in results]
    style.name_rows(axes, [f"{name}\n{share}" for name, share in zip(names, kept, strict=True)], room=0.5)
    for row in range(1, len(results)):
        axes.axhline(row - 0.5, color=style.RULE, linewidth=0.8)
    axes.set_xlabel("test accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter(PERCENT)


def _accuracy_over_kept(axes: Axes, results: list[dict[str, Any]], kept: Sequence[float]) -> None:
    style.tidy(axes, "both")
    for stage in STAGES:
        found = sorted((share, a["mean"], a["std"]) for share, r in zip(kept, results, strict=True)
                       if (a := r["accuracy"].get(stage)) and share > 0)  # fmt: skip
        if found:
            shares, means, errors = zip(*found, strict=True)
            axes.errorbar(shares, [100 * m for m in means], yerr=[100 * e for e in errors], **_stage_style(stage))
    ticks = sorted({float(f"{share:.3g}") for share in kept if share > 0})
    style.kept_axis(axes)
    axes.set_xticks(style.apart(ticks, 1 / 12))
    axes.set_ylabel("test accuracy")
    axes.yaxis.set_major_formatter(PERCENT)


def _stage_style(stage: str) -> dict[str, Any]:
    hollow = stage == "sparse"  # it should fall on the fine-tuned one, and must not hide it
    return {"color": STAGES[stage], "marker": _MARKERS[stage], "label": _NAMES[stage],
            "markersize": 7 if hollow else 5.5, "markerfacecolor": "none" if hollow else STAGES[stage],
            "linestyle": "", "elinewidth": 1.4, "capsize": 3}  # fmt: skip


def png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file, 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the figure as a PNG file, creating its folder. A failed drawing leaves no half-written file."""
    files.write(Path(path), png(figure))


def data_uri(picture: bytes) -> str:
    """A PNG file as a `data:` address that a page can hold inline."""
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")
