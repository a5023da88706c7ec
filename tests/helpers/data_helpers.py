"""Random images in the files that people have, and ways to find them again; shared by the tests of data."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxprune.lab.data.files import DataError

N_TRAIN, N_TEST = 40, 12
IDX_NAMES = [f"{dot}idx{{}}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def random_split(n: int, seed: int, shape=(28, 28)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)


SPLITS = {"train": random_split(N_TRAIN, 0), "test": random_split(N_TEST, 1)}


def write_idx(folder: Path, splits=SPLITS, form: str = IDX_NAMES[0]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, stem in (("train", "train"), ("test", "t10k")):
        for array, part, dims in zip(splits[split], ("images", "labels"), (3, 1), strict=True):
            content = idx_bytes(array)
            name = f"{stem}-{part}{form.format(dims)}"
            (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def write_sheets(folder: Path, rows: int = 3) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": random_split(5 * rows, 2, (32, 32, 3)), "test": random_split(rows, 3, (32, 32, 3))}
    sheets = [*np.split(splits["train"][0], 5), splits["test"][0]]
    for name, images in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], sheets, strict=True):
        Image.fromarray(images.reshape(rows, 1024, 3)).save(folder / f"{name}.png")
    for split, (_, labels) in splits.items():
        (folder / f"{split}_lables.json").write_text(json.dumps(labels.tolist()))
    return splits


def pairs(images: np.ndarray, labels: np.ndarray) -> dict[bytes, int]:
    found = {np.asarray(image).tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    assert len(found) == len(labels)
    return found


def refused(call, *words: str) -> str:
    """Calls, and returns the message of the DataError, which must hold every word and no traceback."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"
    assert "\n" not in message
    return message


def left_behind(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir()) if root.exists() else []
