"""A sweep: one experiment for every point of a grid, and the table that they come to.

    runs/NAME-HASH/                 a run for every point, as if it had been started alone
    runs/NAME-sweep/train/          dense trainings, which points that differ in what comes later have in common
    runs/NAME-sweep/results.json    what the points came to, and report.html to read it

A point that is done is not done again, whichever sweep it belongs to, so that a grid may grow.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxprune import tables
from jaxprune.lab import config as cfg
from jaxprune.lab import files, words
from jaxprune.lab import run as lab_run

KEPT = ("hash", "seeds", "accuracy", "sparsity", "artifact", "seconds", "rounds", "machine", "published")


def run(sweep: cfg.Sweep, root: Path, command: str, watcher: lab_run.Watcher) -> dict[str, Any]:
    """Do all points that are not done yet, and return what stands in results.json.

    Args:
        sweep: of `config.load_sweep`.
        root: where run folders are made.
        command: how to do it again.
        watcher: told what happens.

    Raises:
        ValueError, RuntimeError: from a run; its message names the point.
    """
    from jaxprune.lab import curves, figures, html  # brings matplotlib

    folder = root / f"{sweep.name}-sweep"
    shared, points = lab_run.Shared(folder / "train"), []
    for number, point in enumerate(sweep.points, 1):
        options = [f"--{key}={json.dumps(value)}" for key, value in point.values.items()]
        watcher.note(f"[{number}/{len(sweep.points)}] {' '.join(options)}")
        done = lab_run.run(point.config, lab_run.folder_of(point.config, root), command, watcher, shared=shared)
        points.append({"values": point.values, **{key: done[key] for key in KEPT if key in done}})
    results = {
        "name": sweep.name,
        "title": sweep.points[0].config.title,
        "command": command,
        "axes": sweep.axes,
        "points": points,
    }
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {name: figures.png(figure) for name, figure in curves.of_runs(points).items()}
    (folder / "report.html").write_text(html.sweep_page(results, drawn))
    files.write_text(folder / "results.json", json.dumps(results, indent=1))
    return results


def table(sweeps: Sequence[dict[str, Any]]) -> str:
    """Test errors in per cent as Markdown: a row for each value of the first axes, a column for each of the last.

    Args:
        sweeps: results of sweeps with the same last axis, or each with one axis, whose values are rows then.

    Raises:
        ValueError: their last axes differ.
    """
    last = {json.dumps(list(one["axes"].items())[1:][-1:]) for one in sweeps}
    if len(last) != 1:
        raise ValueError(f"Sweeps in one table need the same last axis, these have {', '.join(sorted(last))}.")
    columns = dict(json.loads(last.pop()))
    (column, values), *_ = [*columns.items(), ("", [None])]
    axes = [{key: axis for key, axis in one["axes"].items() if key != column} for one in sweeps]
    titles = [*(key.rpartition(".")[2] for key in axes[0]), *(map(words.text, values) if column else ["error"])]
    rows = []
    for one, others in zip(sweeps, axes, strict=True):
        cells = {json.dumps(point["values"], sort_keys=True): point for point in one["points"]}
        named = (zip(axis, words.texts(axis), strict=True) for axis in others.values())
        for chosen in itertools.product(*named):
            row = {key: value for key, (value, _) in zip(others, chosen, strict=True)}
            keys = [json.dumps(row | ({column: value} if column else {}), sort_keys=True) for value in values]
            rows.append([*(name for _, name in chosen), *(_error(cells[key]) for key in keys)])
    return tables.markdown(titles, rows, words=len(titles))


def _error(point: dict[str, Any]) -> str:
    accuracy = point["accuracy"]["finetuned"]
    return f"{100 * (1 - accuracy['mean']):.2f} ± {100 * accuracy['std']:.2f}"
