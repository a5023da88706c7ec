"""One call of `jaxprune bench`: measure the machine, then case after case, and keep every row as soon as it is there.

OUT/bench.jsonl     a line a row: what was measured, the raw times, machine, versions, date, command
OUT/*.png           drawn from all rows of that file
"""

import contextlib
import datetime
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from jaxprune import sparse, tables
from jaxprune.lab.bench import layers, rivals, rows
from jaxprune.lab.bench.layers import Layers, Progress
from jaxprune.lab.bench.rows import Peak
from jaxprune.lab.report import wording
from jaxprune.lab.report.results import Row, read_rows
from jaxprune.sparse.tuning import machine

if TYPE_CHECKING:
    from jaxprune.lab.bench.training import Training
    from jaxprune.lab.bench.whole import Whole

FILE = "bench.jsonl"
Measure = Callable[[Peak, Progress], Iterator[list[Row]]]


def default_formats(platform: str) -> tuple[str, ...]:
    """What runs if no formats are named: those made for the platform, without those that always lose there."""
    made_for_cpu = [name for name in sparse.FORMATS if name.startswith("native")]
    if platform != "cpu":
        return tuple(
            name for name, format in sparse.FORMATS.items() if name not in made_for_cpu and not format.calibrated
        )
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


def prepare(plan: "Layers | Whole | Training") -> Measure:
    """Read and build what a plan needs; what it returns does the measuring.

    Raises:
        ValueError: a model, a profile or a run that cannot be used.
    """
    if isinstance(plan, Layers):
        return functools.partial(layers.measure, plan)
    from jaxprune.lab.bench import training, whole  # bring the readers of runs and checkpoints

    return training.prepare(plan) if isinstance(plan, training.Training) else whole.prepare(plan)


@contextlib.contextmanager
def bar(*, quiet: bool) -> Iterator[Progress]:
    """A bar on standard error, told (cases done, cases in all, which one comes)."""
    words = TextColumn("{task.description}", markup=False)
    columns = (words, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # Redrawn twice a second only: the machine is being measured.
    with Bars(*columns, console=Console(stderr=True), disable=quiet, refresh_per_second=2) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total, what: bars.update(task, completed=done, total=total, description=what)


def run(plan: "Layers | Whole | Training", measure: Measure, out: Path, command: str, progress: Progress) -> str:
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
    peak = rows.measure_peak()
    about = {
        "seed": plan.seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine.describe(),
        "versions": {"numpy": importlib.metadata.version("numpy"), **rivals.versions()},
        "peak": peak._asdict(),
    }
    found: list[Row] = []
    for case in measure(peak, progress):
        found += [{**row, **about} for row in case]
        rows.append(out / FILE, found[-len(case) :])
    drawn = [f"figure: {path}" for path in draw(out / FILE, out)]
    return "\n\n".join(["\n".join(_opening(plan, found)), text(found), "\n".join([f"rows: {out / FILE}", *drawn])])


def _opening(plan: "Layers | Whole | Training", found: Sequence[Row]) -> list[str]:
    about, peak = found[0]["machine"], found[0]["peak"]
    lines = [
        f"{about['processor']}, {about['cores']} cores; {about['platform']} {about['device']}; jax {about['jax']}",
        f"peak: {peak['gflops']:.0f} GFLOP/s, {peak['gbytes']:.1f} GB/s ({peak['how']})",
    ]
    if reason := sparse.native.why_missing():
        lines.append(f"native formats are left out: {reason}")
    return lines + (rivals.missing() if isinstance(plan, Layers) and plan.rivals else [])


def draw(file: Path, out: Path) -> list[Path]:
    """Draw the figures of a file of rows into a folder; returns where they are.

    Raises:
        ValueError: the file holds no rows, or none that ran.
    """
    from jaxprune.lab.bench.figures import all_figures
    from jaxprune.lab.report import figures

    ran = [row for row in read_rows(file) if not row["refused"]]
    if not ran:
        raise ValueError(f"{file} holds no row that ran: there is nothing to draw.")
    made = all_figures(ran)
    for name, figure in made.items():
        figures.save(figure, out / f"{name}.png")
    return [out / f"{name}.png" for name in made]


# ---------------------------------------------------------------- rows as text

HEADER = ("model", "zeros", "contestant", "batch", "median ms", "(quartiles)", "x dense", "GFLOP/s", "of peak", "GB/s",
          "of peak", "MB", "lower s", "compile s", "custom calls")  # fmt: skip


def text(found: Sequence[Row]) -> str:
    """The numbers as a table, the sparsities of break-even, and what was left out with the reason."""
    parts = [tables.columns(HEADER, [_cells(row) for row in found if not row["refused"]], words=3)]
    return "\n\n".join(filter(None, [*parts, _break_evens(found), _stayed_dense(found), _refused(found)]))


def _cells(row: Row) -> tuple[str, ...]:
    calls = [f"{target} x{n}" if n > 1 else target for target, n in sorted(row["custom_calls"].items())]
    return (
        row["model"],
        wording.zeros(row["sparsity"]),
        row["contestant"],
        str(row["batch"]),
        f"{row['median_ms']:.3f}",
        f"({row['low_ms']:.3f}-{row['high_ms']:.3f})",
        f"{row['ratio']:.2f}",
        f"{row['gflops']:.1f}",
        f"{row['of_peak_gflops']:.0%}",
        f"{row['gbytes']:.1f}",
        f"{row['of_peak_gbytes']:.0%}",
        f"{row['bytes'] / 1e6:.2f}",
        *("" if row[step] is None else f"{row[step]:.2f}" for step in ("lower_s", "compile_s")),
        ", ".join(calls),
    )


def _break_evens(found: Sequence[Row]) -> str:
    """A line per model and contestant: the sparsity from which on it beats dense, at each batch."""
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for (model, batch, contestant), (word, sparsity) in rows.break_evens(found).items():
        answer = word if sparsity is None else f"{'below ' if word == 'below' else ''}{100 * sparsity:.3g} %"
        lines.setdefault((model, contestant), {})[batch] = answer
    batches = sorted({batch for answers in lines.values() for batch in answers})
    cells = [(*names, *(answers.get(batch, "") for batch in batches)) for names, answers in lines.items()]
    head = "Break-even: the sparsity from which on it is faster than dense (none: not at any measured)"
    header = ("model", "contestant", *(f"batch {batch}" for batch in batches))
    return f"{head}\n\n{tables.columns(header, cells, words=2)}" if cells else ""


def _stayed_dense(found: Sequence[Row]) -> str:
    lines: dict[str, None] = {}
    for row in found:
        for why, names in row.get("dense_leaves", {}).items():
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            total = row["compressed_leaves"] + sum(map(len, row["dense_leaves"].values()))
            lines[f"{row['model']} {row['contestant']}: {len(names)} of {total} leaves dense ({some}): {why}"] = None
    return "\n".join(lines)


def _refused(found: Sequence[Row]) -> str:
    """One line per contestant and model, however many cases it was refused in."""
    first = {(row["model"], row["contestant"]): row["refused"] for row in reversed(found) if row["refused"]}
    return "\n".join(f"{model} {contestant} did not run: {reason}" for (model, contestant), reason in first.items())
