"""The container: a safetensors file, read and written piece by piece.

    8 bytes: length of the header    header: JSON, filled up with spaces    the tensors' bytes, one after the other

The header maps names to {"dtype", "shape", "data_offsets"}, and "__metadata__" to texts. This is written here, and not
left to that format's library, because reading must take no memory for what it refuses, nor map the file.

Reference: https://huggingface.co/docs/safetensors
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from jaxprune import files

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(bool),
    **{f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""The format's names of dtypes."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000  # the format's own limit


class FileError(ValueError):
    """A file that cannot be read as what it should be; says which, and what is wrong with it."""


class Problem(ValueError):
    """What is wrong with one tensor, or its record, as the end of a sentence; its name is known further up."""


def require(holds: Any, otherwise: str) -> None:
    """Raises the `Problem` unless it holds."""
    if not holds:
        raise Problem(otherwise)


class Entry(NamedTuple):
    """A tensor of the container.

    Attributes:
        dtype: one of `DTYPES`.
        shape: of the stored array.
        start: of its bytes in the file.
        end: likewise.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    end: int


class Blob(NamedTuple):
    """A tensor to be written.

    Attributes:
        dtype: one of `DTYPES`.
        shape: of the stored array.
        pieces: its bytes, in so many pieces.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Sequence[bytes | memoryview]


def blob_of(array: Shaped[np.ndarray, "..."]) -> Blob:
    """An array as it is."""
    return Blob(array.dtype, array.shape, [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data])


class Header(NamedTuple):
    """What a container says of itself."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(file: BinaryIO, path: Path) -> Header:
    """The header, checked: tensors lie one after the other and fill the file.

    Args:
        file: open at its beginning.
        path: for messages.

    Raises:
        FileError: it is no safetensors file, or a damaged one.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise FileError(f"{path} is no safetensors file, or cut off: {size} bytes, and a header of {length}.")
    try:
        found = parsed(file.read(length).decode("utf-8"))
    except ValueError as error:
        raise FileError(f"{path} has a damaged header: {error}.") from None
    if not isinstance(found, dict):
        raise FileError(f"{path} has a damaged header: it is no JSON object.")
    metadata = found.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise FileError(f"{path} has a damaged header: its metadata are no texts.")
    entries = {name: _entry(path, name, entry, 8 + length) for name, entry in found.items()}
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise FileError(f"{path}: tensor {name!r} begins at byte {entry.start}, {at} was expected.")
        at = entry.end
    if at != size:
        raise FileError(f"{path} has {size} bytes, its tensors end at {at}. It is cut off, or something was added.")
    return Header(entries, metadata)


def parsed(text: str) -> Any:
    """Plain data from JSON.

    Raises:
        ValueError: it is none, is nested too deep, or has a name twice in one place.
    """
    try:
        return json.loads(text, object_pairs_hook=_no_doubles)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _entry(path: Path, name: str, entry: Any, data: int) -> Entry:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if dtype in DTYPES:
            counts = all(type(size) is int and 0 <= size < 2**63 for size in (*shape, start, end)) and len(shape) <= 64
            if counts and 0 <= start <= end and math.prod(shape) * DTYPES[dtype].itemsize == end - start:
                return Entry(DTYPES[dtype], tuple(shape), data + start, data + end)
    raise FileError(f"{path}: the header's entry of tensor {name!r} is damaged or not supported: {str(entry)[:200]}.")


def write(path: Path, tensors: Mapping[str, Blob], metadata: Mapping[str, str]) -> None:
    """A file that is whole or not there, see `jaxprune.files`.

    Args:
        path: where; its folder is made.
        tensors: by name.
        metadata: name -> text.

    Raises:
        ValueError: a tensor has the name that the format keeps for itself.
        OSError: disk full, no permission; an old file is untouched.
    """
    if _METADATA in tensors:
        raise ValueError(
            f"No leaf of a file can be named {_METADATA!r}, the container has its metadata there. Rename it."
        )
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    at = 0
    for name, blob in tensors.items():
        end = at + sum(map(len, blob.pieces))
        header[name] = {"dtype": NAMES[blob.dtype], "shape": list(blob.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pieces = (piece for blob in tensors.values() for piece in blob.pieces)
    files.write(path, [len(text).to_bytes(8, "little"), text, *pieces])
