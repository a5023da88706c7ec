"""Small files that are whole or not there."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a kill leaves the old one or the new one. Makes its folder.

    Raises:
        OSError: disk full, no permission; the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)
