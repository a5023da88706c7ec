"""Files that are whole or not there: written beside their place, brought to disk, and renamed.

A process killed at any moment, or a full disk, leaves the old file or the new one. What a kill leaves beside it is
called `.NAME-0123abcd.tmp`, and nobody reads it.
"""

import os
import secrets
from collections.abc import Iterable
from pathlib import Path


def write(path: Path, content: str | bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file, whole or not at all.

    Args:
        path: where; its folder is made, an old file replaced.
        content: text, which becomes UTF-8, or bytes, perhaps in parts.

    Raises:
        OSError: disk full, no permission; an old file is untouched.
    """
    parts = [content.encode()] if isinstance(content, str) else [content] if isinstance(content, bytes) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:40]}-{secrets.token_hex(4)}.tmp")  # two processes may write at once
    try:
        with temporary.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Bring to disk what is written to a file, or what stands in a folder.

    Raises:
        OSError: it cannot be opened, or the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
