"""Small files that are whole or not there, and the results of a run."""

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


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a finished run.

    Raises:
        ValueError: the folder is no finished run.
    """
    try:
        return json.loads((folder / "results.json").read_text())
    except FileNotFoundError:
        state = "is not finished, run its command again" if (folder / "config.toml").exists() else "is no run folder"
        raise ValueError(f"{folder} {state}: it has no results.json.") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'results.json'} is damaged: {error}. Delete it and run again.") from None
