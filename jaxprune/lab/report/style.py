"""One look for all figures: colours, axes, titles and legends.

A figure is made and freed without pyplot or any other global state, so it can be drawn in any thread. Names of leaves,
runs and models are somebody's text: a "$" in them must not start a formula.
"""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

# Okabe and Ito's colours stay apart for colour-blind eyes; the fourth is theirs darkened, to be read on white, where
# the yellow, left out, fades.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#A6538A", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
INK, EDGE, RULE = "#3A3F44", "#9AA1A8", "#D5D9DD"
DASHED = (0, (4, 3))
PERCENT = "{x:.6g} %"
STAGES: dict[str, str] = dict(zip(("dense", "pruned", "finetuned", "sparse"), COLOURS, strict=False))
MOST_ROWS = 80
"""More bars than this make a picture taller than anybody scrolls."""


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def single(width: float, height: float, grid: str = "") -> tuple[Figure, Axes]:
    """A figure with one panel, which is `tidy`."""
    made = figure(width, height)
    return made, tidy(made.subplots(), grid)


def tidy(axes: Axes, grid: str = "") -> Axes:
    """Axes with two edges instead of four, and rules along "x", "y" or "both" behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(EDGE)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=RULE, linewidth=0.7)  # pyright: ignore[reportArgumentType]
    return axes


def title(axes: Axes, text: str, size: float = 10, loc: Any = "center") -> None:
    """What a panel shows, above it."""
    axes.set_title(text, fontsize=size, color=INK, loc=loc, parse_math=False)


def label(figure: Figure, x: str = "", y: str = "") -> None:
    """What all panels share below and beside them."""
    for text, write in ((x, figure.supxlabel), (y, figure.supylabel)):
        if text:
            write(text, fontsize=10, color=INK)


def legend(figure: Figure, where: str, entries: Axes | Sequence[Artist] | None = None, **more: Any) -> None:
    """A legend outside of the panels: of one of them, of artists, or of all that is labelled."""
    handles = entries.get_legend_handles_labels()[0] if isinstance(entries, Axes) else entries
    if handles is None or len(handles):
        given: dict[str, Any] = {"loc": f"outside {where}", "frameon": False, **more}
        made = figure.legend(**given) if handles is None else figure.legend(handles=list(handles), **given)
        for text in made.get_texts():
            text.set_parse_math(False)


def name_rows(axes: Axes, names: Sequence[str], size: float = 9, room: float = 0.6) -> None:
    """Names beside bars, the first above; `room` is left over the first."""
    axes.set_yticks(range(len(names)), labels=names, parse_math=False, fontsize=size)
    axes.set_ylim(max(len(names), 1) - 1 + room, -room)


def largest(sizes: Sequence[float]) -> list[int]:
    """Places of the `MOST_ROWS` largest, in the order given."""
    return sorted(sorted(range(len(sizes)), key=lambda place: -sizes[place])[:MOST_ROWS])


def shorten(name: str, most: int = 48) -> str:
    """Cut the middle out of the long parts of a long name, then out of the name: ends, where numbers are, stay."""
    if len(name) <= most:
        return name
    short = "/".join(part if len(part) <= 12 else f"{part[:5]}…{part[-5:]}" for part in name.split("/"))
    return short if len(short) <= most else f"{short[: most // 2 - 1]}…{short[-most // 2 :]}"


def log_axis(axis: Any, ticks: Any = None, form: Any = "{x:g}") -> None:
    """The axis of a panel on a log scale, numbers at its major ticks alone.

    Args:
        axis: `axes.xaxis` or `axes.yaxis`.
        ticks: a locator; None: at powers of ten.
        form: of the numbers, a formatter, or as `str.format` takes it, `x` being the value.
    """
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    if ticks is not None:
        axis.set_major_locator(ticks)
    axis.set_major_formatter(form)
    axis.set_minor_formatter(NullFormatter())


def kept_axis(axes: Axes, ticks: Any = None) -> None:
    """The share of weights kept in per cent, on a log scale, fewer to the right."""
    log_axis(axes.xaxis, ticks, PERCENT)
    axes.invert_xaxis()
    axes.tick_params(axis="x", which="minor", length=0)
    axes.set_xlabel("weights kept in the pruned leaves (log scale, fewer to the right)")


def apart(values: Sequence[float], least: float) -> list[float]:
    """Values on a log axis whose labels do not run into each other; the outermost two in any case.

    Args:
        values: above zero.
        least: distance of two labels, as a share of the axis.
    """
    ordered = sorted(values, reverse=True)
    room = least * math.log(ordered[0] / ordered[-1]) if ordered else 0.0
    kept = ordered[:1]
    for value in ordered[1:-1]:
        if math.log(kept[-1] / value) >= room and math.log(value / ordered[-1]) >= room:
            kept.append(value)
    return kept + ordered[1:][-1:]
