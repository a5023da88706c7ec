"""Tables of results, ours beside those of others, and the Markdown file that they stand in.

    <!-- table: overview results/quickstart.json results/s1_mnist_mlp.json -->
    (here stands what `fill` writes; everything outside such marks is left as it is)
    <!-- end -->

`overview` has a row for every experiment, `levels` one for every round of one experiment, `grid` the test errors of
sweeps (`sweeps.table`), `latency` the times that `jaxprune bench` wrote, `presets` every preset with one measured row,
`rows` the cells that a script of `experiments/benchmarks` wrote. Paths are relative to the file.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxprune as jp
from jaxprune import files, tables
from jaxprune.lab.recipe import words
from jaxprune.lab.report import curves, sweeps, wording
from jaxprune.lab.report.results import read_rows

Record = dict[str, Any]
_MARKED = re.compile(r"(<!-- table: (\w+) ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(path: Path) -> int:
    """Write every marked table of a Markdown file anew; returns how many there are.

    Raises:
        ValueError: no table is marked, an unknown kind, or results that cannot be read.
        OSError: the file cannot be read or written.
    """
    text, count = _MARKED.subn(lambda found: _filled(path.parent, *found.groups()), path.read_text("utf-8"))
    if not count:
        raise ValueError(f"{path} marks no table: expected <!-- table: overview results/NAME.json --> ... <!-- end -->")
    files.write(path, text)
    return count


def _filled(folder: Path, begin: str, kind: str, names: str, end: str) -> str:
    kinds: dict[str, Callable[[Sequence[Record]], str]] = {
        "overview": overview,
        "levels": levels,
        "grid": sweeps.table,
        "latency": latency,
        "presets": presets,
        "rows": as_written,
    }
    if kind not in kinds:
        raise ValueError(f"A table is one of {', '.join(kinds)}; {kind!r} arrived.")
    paths = [folder / name for name in names.split()]
    found = [row for path in paths for row in read_rows(path)] if kind == "latency" else [read(path) for path in paths]
    try:
        return f"{begin}{kinds[kind](found)}\n{end}"
    except LookupError as error:
        raise ValueError(
            f"A table {kind!r} cannot be made of {names}: {error} is missing there. `grid` and `presets` are of "
            "sweeps, `rows` of benchmarks, `latency` of `jaxprune bench model`, the others of runs or sweeps."
        ) from error


def read(path: Path) -> Record:
    """Results of a run or a sweep.

    Raises:
        ValueError: no JSON, or no results.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or not {"command", "name"} <= found.keys():
        raise ValueError(f"{path} holds no results of `jaxprune run`.")
    return found


def overview(results: Sequence[Record]) -> str:
    """A row for every experiment, of a sweep for every point: what it is, how it is done again, what it came to.

    Accuracies are in per cent, mean and standard deviation over seeds. A published figure stands in the row of its
    experiment whose share of weights kept is nearest. Of rounds the last has the row, and the figures nearest to it, or
    the one that comes nearest; `levels` has them all.
    """
    head = ("experiment", "command", "minutes", "machine", "seeds", "removed", "dense", "pruned", "file", "published")
    return _markdown(head, [row for result in results for row in _overview_rows(result)])


def _overview_rows(result: Record) -> list[tuple[str, ...]]:
    points = result.get("points", [result])
    published = _nearest([point["sparsity"]["mean"] for point in points], points[0].get("published", []))
    title, lines = result.get("title") or result["name"], []
    for point, name, theirs in zip(points, curves.point_names(points), published, strict=True):
        stored, share = point.get("artifact"), point["sparsity"]["mean"]
        at_the_last = _nearest([level.removed for level in curves.levels(point)], theirs)[-1]
        if theirs and not at_the_last:
            at_the_last = [min(theirs, key=lambda one: _distance(one, share))]
        what = ("; ".join(filter(None, (title, name))), f"`{_command(result, point)}`") if not lines else (name, "")
        lines.append((
            *what, _minutes(point), _machine(point), str(len(point["seeds"])),
            wording.percent(share, 2),
            *(wording.points(point["accuracy"][name]) for name in ("dense", "finetuned")),
            f"{stored['ratio']:.3g}x smaller, {wording.points(stored['accuracy'])}" if stored else "-",
            "; ".join(map(_published, at_the_last)) or "-",
        ))  # fmt: skip
    return lines


def levels(results: Sequence[Record]) -> str:
    """A row for every round, or for every point of a sweep: accuracy and file at each share of weights kept."""
    [result] = results
    points = result.get("points", [result])
    names = [name or "ours" for name in curves.point_names(points)]
    found = [curves.levels(point) for point in points]
    published = _nearest([level.removed for level in found[0]], points[0].get("published", []))
    head = ["kept", "removed", *(cell for name in names for cell in (name, "file, times smaller")), "published"]
    lines = []
    for place, theirs in enumerate(published):
        kept = 1 - found[0][place].removed
        cells = []
        for point, ours in zip(points, found, strict=True):
            dense = point["artifact"]["dense_bytes"]
            cells += [
                wording.points(wording.spread(ours[place].accuracy)),
                f"{dense / float(np.mean(ours[place].file)):.3g}",
            ]
        lines.append((f"{kept:.3g}", wording.percent(1 - kept, 2), *cells, "; ".join(map(_published, theirs)) or "-"))
    return _markdown(head, lines)


def latency(measured: Sequence[Record]) -> str:
    """A row for every sparsity and batch: milliseconds of dense and of each contestant, and times faster than dense.

    Args:
        measured: rows of `jaxprune bench model`.
    """
    names = list(dict.fromkeys(row["contestant"] for row in measured))
    cases: dict[tuple[int, Any], dict[str, Record]] = {}
    for row in measured:
        cases.setdefault((row["batch"], row["sparsity"]), {})[row["contestant"]] = row
    lines = [
        (str(batch), _removed(sparsity), *(_milliseconds(found.get(name)) for name in names))
        for (batch, sparsity), found in sorted(cases.items(), key=lambda case: (case[0][0], str(case[0][1])))
    ]
    return _markdown(("batch", "removed", *(f"{name}, ms" for name in names)), lines)


def _removed(sparsity: Any) -> str:
    return wording.percent(sparsity, 0) if isinstance(sparsity, float) else str(sparsity)


def _milliseconds(row: Record | None) -> str:
    if row is None or row["refused"]:
        return "-"
    faster = "" if row["contestant"] == "dense" else f" ({row['ratio']:.2f}x)"
    return f"{row['median_ms']:.3g}{faster}"


def presets(sweeps: Sequence[Record]) -> str:
    """A row for every preset: paper, composition, and the test error of one point, at 95 % where there is one.

    Args:
        sweeps: results whose points name their preset.
    """
    errors = {}
    for point in (point for one in sweeps for point in one["points"]):
        values = point["values"].get("prune", {key[6:]: value for key, value in point["values"].items()})
        if values.get("sparsity", 0.95) in (0.95, 0.5):
            error = 100 * (1 - point["accuracy"]["finetuned"]["mean"])
            errors[values["preset"]] = f"{100 * point['sparsity']['mean']:.3g} %: {error:.2f} %"
    lines = [
        (f"`{name}`", preset.paper, words.composition(preset), errors.get(name, "not measured"))
        for name, preset in jp.presets().items()
    ]
    return _markdown(("preset", "paper", "composition", "MNIST, removed: error"), lines)


def as_written(results: Sequence[Record]) -> str:
    """The rows of one result, as they are."""
    [result] = results
    return _markdown(result["columns"], result["rows"])


def _nearest(removed: Sequence[float], published: Sequence[Record]) -> list[list[Record]]:
    """Published figures by the level that is nearest; those without one first."""
    found: list[list[Record]] = [[] for _ in removed]
    for one in published:
        found[int(np.argmin([_distance(one, level) for level in removed]))].append(one)
    return found


def _distance(one: Record, level: float) -> float:
    """In the logarithm of the share kept."""
    share = one.get("removed")
    return 0.0 if share is None else abs(math.log((1 - share) / (1 - level)))


def _published(one: Record) -> str:
    level = [f"{100 * one['accuracy']:.2f}"] if one.get("accuracy") is not None else []
    level += [f"{wording.percent(one['removed'], 2)} removed"] if one.get("removed") is not None else []
    file = [f"file {one['smaller']:g}x smaller"] if one.get("smaller") is not None else []
    said = ", ".join(filter(None, (" at ".join(level), *file)))
    return f"{said} ({one['who']})" if said else one["who"]


def _minutes(point: Record) -> str:
    seconds = point.get("seconds")
    return f"{sum(seconds['values']) / 60:.2g}" if seconds else "-"


def _command(result: Record, point: Record) -> str:
    """On as many cores as it was run on, since digits depend on that."""
    ours, fewer, _ = point.get("machine", {}).get("cores", "").partition(" of ")
    last = int(ours) - 1 if fewer else 0
    return f"taskset -c {f'0-{last}' if last else 0} {result['command']}" if fewer else result["command"]


def _machine(point: Record) -> str:
    machine = point.get("machine")
    return f"{machine['processor']}, {machine['cores']} cores, jax {machine['jax']}" if machine else "-"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return tables.markdown(head, cells, words=len(head))
