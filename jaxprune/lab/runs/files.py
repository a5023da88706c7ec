"""Small files that are whole or not there, and the results of a run or a sweep."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a kill leaves the old one or the new one. Makes its folder.

    Raises:
        OSError: disk full, no permission; the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


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
