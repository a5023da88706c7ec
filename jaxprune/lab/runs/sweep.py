"""A sweep: one experiment for every point of a grid, and the table that they come to.

    runs/NAME-HASH/                 a run for every point, as if it had been started alone
    runs/NAME-sweep/train/          dense trainings, which points that differ in what comes later have in common
    runs/NAME-sweep/results.json    what the points came to, and report.html to read it

A point that is done is not done again, whichever sweep it belongs to, so that a grid may grow.
"""

import json
from pathlib import Path
from typing import Any

from jaxprune import files
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.report import sweeps
from jaxprune.lab.runs import run as lab_run

KEPT = (
    *("hash", "seeds", "dataset", "accuracy", "sparsity", "sparse", "artifact", "seconds", "rounds", "machine"),
    "published",
)


def folder_of(name: str, root: Path) -> Path:
    """Where a sweep's results lie."""
    return root / f"{name}-sweep"


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
    folder = folder_of(sweep.name, root)
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
    sweeps.write_page(folder, results)
    files.write(folder / "results.json", json.dumps(results, indent=1))
    return results
