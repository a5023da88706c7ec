"""Published files of data sets, read strictly: bytes on disk -> arrays, or a reason.

Two layouts are known: the idx files of MNIST and Fashion-MNIST, and CIFAR-10 as sheets of PNG. Whatever is not
exactly as announced is refused, because a shortened or mixed-up training set trains without complaint.
"""

import gzip
import json
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

SHAPES = {"mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
"""The data sets known here: height, width and channels of their images."""

CLASSES = 10
_AGAIN = "Fetch it again."
SPLITS = ("train", "test")


class DataError(ValueError):
    """A data set that cannot be had as asked: what was expected, what arrived, where, and the way out."""


class Split(NamedTuple):
    """Images (n, height, width, channels) uint8 and their labels (n,) of one split."""

    images: np.ndarray
    labels: np.ndarray


# --- idx files -------------------------------------------------------------------------------------


def read_idx(path: str | Path) -> np.ndarray:
    """Reads one idx file of unsigned bytes, plain or gzipped (told by content, not by name).

    An idx file is the bytes `00 00 08 d`, then d big-endian 32-bit sizes, then their product in bytes.

    Args:
        path: the file.

    Returns:
        A uint8 array of the shape in the header: (n, height, width) for images, (n,) for labels.

    Raises:
        DataError: the file is missing, not idx, damaged gzip, or not exactly as long as its header says.
    """
    path = Path(path)
    data = _unzipped(path)
    if len(data) < 4:
        raise DataError(f"{path}: an idx file starts with 4 magic bytes, this one has {len(data)}. {_AGAIN}")
    if data[:3] != b"\x00\x00\x08" or data[3] == 0:
        raise DataError(
            f"{path}: expected the magic bytes 00 00 08 and the number of dimensions (idx, unsigned bytes), "
            f"found {data[:4].hex(' ')}. This is another kind of file."
        )
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise DataError(f"{path}: expected a header of {header} bytes, the file has {len(data)}. {_AGAIN}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", count=data[3], offset=4))
    expected = header + math.prod(shape)
    if len(data) != expected:
        trouble = "truncated" if len(data) < expected else "followed by bytes that do not belong to it"
        raise DataError(
            f"{path}: the header announces {' x '.join(map(str, shape))}, so {expected} bytes were expected, "
            f"but {len(data)} arrived: the file is {trouble}. {_AGAIN}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def _unzipped(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        reason = "the stream ends early" if isinstance(error, EOFError) else error
        raise DataError(
            f"{path}: expected a whole gzip file, but its {len(data)} bytes are damaged ({reason}). {_AGAIN}"
        ) from error


def _find(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    present = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
    raise DataError(f"{folder}: expected one of {', '.join(names)}; the folder holds {present}.")


def _read_idx_split(folder: Path, split: str, name: str) -> Split:
    stem = {"train": "train", "test": "t10k"}[split]
    arrays, paths = [], []
    for part, dims in (("images", 3), ("labels", 1)):
        path = _find(folder, *(f"{stem}-{part}{dot}idx{dims}-ubyte{gz}" for gz in ("", ".gz") for dot in "-."))
        array = read_idx(path)
        if array.ndim != dims:
            raise DataError(f"{path}: expected {dims} dimensions for {part}, the header announces {array.ndim}.")
        arrays.append(array)
        paths.append(path)
    images, labels = arrays
    return _checked(Split(images[..., None], labels), name, *paths)


# --- CIFAR-10 as sheets of PNG ---------------------------------------------------------------------


def _read_sheet_split(folder: Path, split: str, name: str) -> Split:
    batches = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    images = np.concatenate([_read_sheet(_find(folder, f"{batch}.png"), SHAPES[name]) for batch in batches])
    # "lables" is how the published package spells it
    path = _find(folder, f"{split}_lables.json", f"{split}_labels.json")
    return _checked(Split(images, _read_json_labels(path)), name, folder, path)


def _read_sheet(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """One image per row of pixels: a sheet of (n, height * width) RGB pixels becomes (n, *shape)."""
    from PIL import Image

    height, width, _ = shape
    try:
        with Image.open(path) as sheet:
            if sheet.mode != "RGB" or sheet.width != height * width:
                raise DataError(
                    f"{path}: expected RGB, {height * width} pixels wide (one {height}x{width} image per row), "
                    f"found {sheet.mode}, {sheet.width} wide. This is another kind of file."
                )
            return np.asarray(sheet).reshape(-1, *shape)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's names for damage
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected a whole PNG file, but it is damaged ({error}). {_AGAIN}") from error


def _read_json_labels(path: Path) -> np.ndarray:
    try:
        labels = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a JSON list of labels, but it cannot be read ({error}). {_AGAIN}") from error
    if not isinstance(labels, list) or not all(type(label) is int and abs(label) < 2**31 for label in labels):
        raise DataError(f"{path}: expected a JSON list of whole numbers, found something else. {_AGAIN}")
    return np.array(labels, np.int64)


def _checked(split: Split, name: str, images_from: Path, labels_from: Path) -> Split:
    images, labels = split
    shape = SHAPES[name]
    if images.shape[1:] != shape:
        arrived = " x ".join(map(str, images.shape[1:]))
        raise DataError(
            f"{images_from}: {name} has images of {' x '.join(map(str, shape))}, these are {arrived}. "
            f"Is this the folder of another data set?"
        )
    if len(images) != len(labels) or not len(images):
        raise DataError(
            f"Expected one label for each image and at least one image, but {images_from} holds {len(images)} images "
            f"and {labels_from} {len(labels)} labels. Do the files belong together?"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= CLASSES))
    if wrong.size:
        raise DataError(
            f"{labels_from}: labels of {name} lie in 0..{CLASSES - 1}, but label {wrong[0]} is {labels[wrong[0]]} "
            f"({wrong.size} of {len(labels)} are out of range). {_AGAIN}"
        )
    return split


_READERS = {"mnist": _read_idx_split, "fashion_mnist": _read_idx_split, "cifar10": _read_sheet_split}


def read_files(name: str, folder: str | Path) -> dict[str, Split]:
    """Reads the published files of a data set, both splits, and checks that they fit together.

    `mnist` and `fashion_mnist` are four idx files, plain or gzipped, named with a hyphen or a dot before `idx`;
    `cifar10` is sheets of PNG with one image per row, `data_batch_{1..5}.png` and `test_batch.png`, and their
    labels in `train_lables.json` and `test_lables.json`.

    Args:
        name: a key of `SHAPES`.
        folder: where the files lie.

    Returns:
        Split name ("train", "test") -> images (n, height, width, channels) uint8 and labels (n,).

    Raises:
        DataError: a file is missing or damaged, images have another size, there is not one label for each
            image, or a label is out of range.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with the files of {name}, but there is none.")
    return {split: _READERS[name](folder, split, name) for split in SPLITS}
