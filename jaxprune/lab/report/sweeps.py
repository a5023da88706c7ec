"""What is read of sweeps: the page of one, and the test errors of several in one table."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxprune import files, tables
from jaxprune.lab.recipe import words
from jaxprune.lab.report import wording


def write_page(folder: Path, results: dict[str, Any]) -> Path:
    """The page of a sweep, from its results; returns where it is."""
    from jaxprune.lab.report import curves, figures, html

    drawn = {name: figures.png(figure) for name, figure in curves.of_runs(results["points"]).items()}
    files.write(path := folder / "report.html", html.sweep_page(results, drawn))
    return path


def side_by_side(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs, and the points of sweeps as runs, named by what tells them apart; a run that is also a point comes once."""
    from jaxprune.lab.report import curves

    runs = {one["hash"]: one for one in results if "points" not in one}
    of_sweeps = {point["hash"] for one in results for point in one.get("points", ())}
    found = []
    for one in results:
        if "points" in one:
            names = curves.point_names(one["points"])
            found += [
                {"command": one["command"], **point, **runs.get(point["hash"], {}), "name": f"{one['name']}: {name}"}
                for name, point in zip(names, one["points"], strict=True)
            ]
        elif one["hash"] not in of_sweeps:
            found.append(one)
    return found


def text(sweeps: Sequence[dict[str, Any]]) -> str:
    """Test errors for a terminal: a table for all sweeps of the same axes, under a line that says what is in it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in sweeps:
        groups.setdefault(json.dumps([list(one["axes"]), list(one["axes"].values())[1:][-1:]]), []).append(one)
    return "\n\n".join(f"{_caption(group)}\n\n{table(group)}" for group in groups.values())


def _caption(sweeps: Sequence[dict[str, Any]]) -> str:
    seeds = {len(point["accuracy"]["finetuned"]["values"]) for one in sweeps for point in one["points"]}
    several = f", mean ± standard deviation over {max(seeds)} seeds" if max(seeds) > 1 else ", one seed"
    across = [*sweeps[0]["axes"]][1:][-1:]
    columns = f" Columns: {across[0]}." if across else ""
    return f"{', '.join(one['name'] for one in sweeps)}: test error after fine-tuning in per cent{several}.{columns}"


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
    titles = [*(key.rpartition(".")[2] for key in axes[0]), *(map(words.text, values) if column else ["error, %"])]
    rows = []
    for one, others in zip(sweeps, axes, strict=True):
        cells = {json.dumps(point["values"], sort_keys=True): point for point in one["points"]}
        named = (zip(axis, words.texts(axis), strict=True) for axis in others.values())
        for chosen in itertools.product(*named):
            row = {key: value for key, (value, _) in zip(others, chosen, strict=True)}
            keys = [json.dumps(row | ({column: value} if column else {}), sort_keys=True) for value in values]
            rows.append([*(name for _, name in chosen), *(_error(cells.get(key)) for key in keys)])
    return tables.markdown(titles, rows, words=len(titles))


def _error(point: dict[str, Any] | None) -> str:
    if point is None:
        return "-"
    accuracy = point["accuracy"]["finetuned"]
    return wording.points({**accuracy, "mean": 1 - accuracy["mean"]})
