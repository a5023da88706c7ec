"""A sweep: one experiment for every point of a grid, and the table that they come to.

    runs/NAME-HASH/                 a run for every point, as if it had been started alone
    runs/NAME-sweep/train/          dense trainings, which points that differ in what comes later have in common
    runs/NAME-sweep/results.json    what the points came to

A point that is done is not done again, whichever sweep it belongs to, so that a grid may grow.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxprune.lab import config as cfg
from jaxprune.lab import files
from jaxprune.lab import run as lab_run

KEPT = ("hash", "seeds", "accuracy", "sparsity", "seconds", "rounds")


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
    folder = root / f"{sweep.name}-sweep"
    shared, points = lab_run.Shared(folder / "train"), []
    for number, point in enumerate(sweep.points, 1):
        words = [f"--{key}={json.dumps(value)}" for key, value in point.values.items()]
        watcher.note(f"[{number}/{len(sweep.points)}] {' '.join(words)}")
        done = lab_run.run(point.config, lab_run.folder_of(point.config, root), command, watcher, shared=shared)
        points.append({"values": point.values, **{key: done[key] for key in KEPT if key in done}})
    results = {"name": sweep.name, "command": command, "axes": sweep.axes, "points": points}
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "results.json", json.dumps(results, indent=1))
    return results


def table(sweeps: Sequence[dict[str, Any]]) -> str:
    """Test errors in per cent as Markdown: a row for each combination of the first axes, a column a value of the last.

    Args:
        sweeps: results of sweeps with the same last axis.

    Raises:
        ValueError: their last axes differ.
    """
    last = {(key, tuple(values)) for one in sweeps for key, values in [list(one["axes"].items())[-1]]}
    if len(last) != 1:
        raise ValueError(f"Sweeps in one table need the same last axis, these have {sorted(map(str, last))}.")
    [(column, values)] = last
    rows = [[*_titles(sweeps[0], column), *map(_percent, values)]]
    rows.append(["---"] * len(rows[0]))
    for one in sweeps:
        cells = {json.dumps(point["values"]): point for point in one["points"]}
        others = {key: axis for key, axis in one["axes"].items() if key != column}
        for chosen in itertools.product(*others.values()):
            row = dict(zip(others, chosen, strict=True))
            found = [cells[json.dumps({**row, column: value})] for value in values]
            rows.append([*map(str, chosen), *map(_error, found)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _titles(sweep: dict[str, Any], column: str) -> list[str]:
    return [key.rpartition(".")[2] for key in sweep["axes"] if key != column]


def _percent(value: Any) -> str:
    return f"{100 * value:.6g} %" if isinstance(value, float) and 0 < value < 1 else str(value)


def _error(point: dict[str, Any]) -> str:
    accuracy = point["accuracy"]["finetuned"]
    return f"{100 * (1 - accuracy['mean']):.2f} ± {100 * accuracy['std']:.2f}"
