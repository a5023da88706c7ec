"""One call of `jaxprune bench`: measure the machine, then case after case, and keep every row as soon as it is there.

OUT/bench.jsonl     a line a row: what was measured, the raw times, machine, versions, date, command
OUT/*.png           drawn from all rows of that file
"""

import datetime
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from jaxprune import sparse
from jaxprune.lab.bench import layers, rivals, table, whole
from jaxprune.lab.bench import peak as peaks
from jaxprune.lab.bench.layers import Layers, Progress
from jaxprune.lab.bench.rows import append
from jaxprune.lab.bench.whole import Whole
from jaxprune.lab.report.results import Row, read_rows
from jaxprune.sparse.tuning import machine

FILE = "bench.jsonl"
Measure = Callable[[peaks.Peak, Progress], Iterator[list[Row]]]


def default_formats(platform: str) -> tuple[str, ...]:
    """What runs if no formats are named: those made for the platform, without those that always lose there."""
    made_for_cpu = [name for name in sparse.FORMATS if name.startswith("native")]
    if platform != "cpu":
        return tuple(name for name in sparse.FORMATS if name not in made_for_cpu)
    return (*made_for_cpu, "bcsr")


def use_platform(name: str | None) -> str:
    """Have JAX run on "cpu", "gpu" or "tpu", or where it would anyway; returns where that is.

    Raises:
        ValueError: there is no such device here, or JAX runs on another already.
    """
    if name is not None:
        jax.config.update("jax_platforms", name)
    try:
        platform = jax.default_backend()
    except RuntimeError as error:
        raise ValueError(f"There is no {name} that JAX can use here: {error}") from None
    if name is not None and platform != name:
        raise ValueError(f"JAX runs on {platform} here, not on {name}.")
    return platform


def prepare(plan: Layers | Whole) -> Measure:
    """Read and build what a plan needs; what it returns does the measuring.

    Raises:
        ValueError: a model, a profile or a run that cannot be used.
    """
    return functools.partial(layers.measure, plan) if isinstance(plan, Layers) else whole.prepare(plan)


def run(plan: Layers | Whole, measure: Measure, out: Path, command: str, progress: Progress) -> str:
    """Measure all cases, write rows and figures to a folder; returns the report for the terminal.

    Args:
        plan: what is measured.
        measure: from `prepare(plan)`.
        out: folder; rows are added to those that are there.
        command: how to do it again.
        progress: told (cases done, cases in all, which one comes).

    Raises:
        WrongAnswer: a contestant does not compute what dense does.
    """
    progress(0, 1, "peak of this machine")
    peak = peaks.measure()
    about = {
        "seed": plan.seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine.describe(),
        "versions": {"numpy": importlib.metadata.version("numpy"), **rivals.versions()},
        "peak": peak._asdict(),
    }
    rows: list[Row] = []
    for case in measure(peak, progress):
        rows += [{**row, **about} for row in case]
        append(out / FILE, rows[-len(case) :])
    drawn = draw(out / FILE, out)
    return "\n\n".join(["\n".join(_opening(plan, rows)), table.text(rows), "\n".join(_closing(out, drawn))])


def _opening(plan: Layers | Whole, rows: Sequence[Row]) -> list[str]:
    about, peak = rows[0]["machine"], rows[0]["peak"]
    lines = [
        f"{about['processor']}, {about['cores']} cores; {about['platform']} {about['device']}; jax {about['jax']}",
        f"peak: {peak['gflops']:.0f} GFLOP/s, {peak['gbytes']:.1f} GB/s ({peak['how']})",
    ]
    if reason := sparse.native.why_missing():
        lines.append(f"native formats are left out: {reason}")
    return lines + (rivals.missing() if isinstance(plan, Layers) and plan.rivals else [])


def _closing(out: Path, drawn: Sequence[Path]) -> list[str]:
    return [f"rows: {out / FILE}", *(f"figure: {path}" for path in drawn)]


def draw(file: Path, out: Path) -> list[Path]:
    """Draw the figures of a file of rows into a folder; returns where they are.

    Raises:
        ValueError: the file holds no rows, or none that ran.
    """
    from jaxprune.lab.bench import figures as bench_figures
    from jaxprune.lab.report import figures

    rows = [row for row in read_rows(file) if not row["refused"]]
    if not rows:
        raise ValueError(f"{file} holds no row that ran: there is nothing to draw.")
    made = bench_figures.all_figures(rows)
    for name, figure in made.items():
        figures.save(figure, out / f"{name}.png")
    return [out / f"{name}.png" for name in made]
