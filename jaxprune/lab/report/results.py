"""Results on disk: of runs and sweeps, and the rows that `jaxprune bench` wrote."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CASE = ("kind", "model", "batch", "sparsity")
"""What makes two rows of a benchmark contestants of one case."""
OF_A_RUN = frozenset({
    *("name", "hash", "command", "finished", "seeds", "dataset", "accuracy", "sparsity", "overall_sparsity", "sparse"),
    *("leaves", "seconds"),
})  # fmt: skip
OF_A_SWEEP = frozenset({"name", "command", "axes", "points"})


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a finished run, or of a sweep, which has "points".

    Raises:
        ValueError: the folder is neither, or the file is damaged.
    """
    path = folder / "results.json"
    if not path.exists():
        begun = (folder / "config.toml").exists() or (folder / "train").is_dir()  # a run, or a sweep
        state = "is not finished, run its command again" if begun else "is no run folder"
        raise ValueError(f"{folder} {state}: it has no results.json.")
    found = read_json(path, "Delete it and run again.")
    keys = found.keys() if isinstance(found, dict) else ()
    missing = sorted((OF_A_SWEEP if "points" in keys else OF_A_RUN) - set(keys))
    if missing:
        raise ValueError(f"{path} is damaged: it has no {', '.join(missing)}. Delete it and run again.")
    return found


def read_run(folder: Path) -> dict[str, Any]:
    """The same, of a run alone.

    Raises:
        ValueError: also where it is a sweep; says which runs it has.
    """
    found = read_results(folder)
    if "points" in found:
        runs = [str(folder.parent / f"{found['name']}-{point.get('hash')}") for point in found["points"][:3]]
        raise ValueError(f"{folder} is a sweep: name one of its runs, such as {', '.join(runs)}.")
    return found


def read_json(path: Path, way_out: str) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it holds none; names the file, and the way out.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. {way_out}") from None


def read_rows(path: Path) -> list[Row]:
    """The rows of a benchmark's file; of a contestant measured more than once in the same case, the last.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return list({(*(row[key] for key in CASE), row["contestant"]): row for row in rows}.values())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} does not hold lines of `jaxprune bench`: {type(error).__name__}: {error}.") from None
