"""A data set of the user's own, by MODULE:NAME in a config: a function that returns arrays.

def load(noise=0.1):                                # data.name = "mine:load", [data.options]: noise
    return (train_x, train_y), (test_x, test_y)     # inputs (n, ...), uint8 or floats; labels (n,), integers from 0 on

It is called again whenever a run goes on, and has to return the same.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune import files
from jaxprune.lab.data.files import DataError
from jaxprune.lab.recipe import words
from jaxprune.lab.recipe.data_section import Data
from jaxprune.lab.recipe.problems import reason

EXPECTED = "(train inputs, train labels), (test inputs, test labels)"
REMEMBERED = "data.txt"


def is_own(name: str) -> bool:
    """Whether a config's data set is the user's own."""
    return ":" in name


def load(section: Data) -> tuple[list[np.ndarray], float, int]:
    """What the user's function returns: inputs and labels of train and test; what pixels are divided by; classes.

    Raises:
        DataError: the function fails, or returns something else; says what arrived.
    """
    given = dict(section.options or {}) | ({"data_dir": section.data_dir} if section.data_dir else {})
    try:
        found = words.known("data set", section.name)(**given)
    except Exception as error:
        call = f"{section.name.partition(':')[2]}({', '.join(f'{name}={value!r}' for name, value in given.items())})"
        raise _refusal(section, f"called as {call} it failed, {reason(error)}") from error
    match found:
        case ((train_x, train_y), (test_x, test_y)):
            return _checked(section, [np.asarray(one) for one in (train_x, train_y, test_x, test_y)])
    raise _refusal(section, f"expected it to return {EXPECTED}, arrived {_described(found)}.")


def remember(dataset: Sequence[Any], name: str, folder: Path) -> None:
    """Write down what the arrays of a data set of the user's own are, or see that they are what they were.

    Args:
        dataset: of `jaxprune.lab.data.sets`.
        name: of the data set in a config; of those that are not the user's own there is nothing to see.
        folder: what they belong to.

    Raises:
        DataError: they are not.
    """
    if not is_own(name):
        return
    path, digest = folder / REMEMBERED, hashlib.blake2b(digest_size=16)
    for array in dataset[1:5]:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    now = digest.hexdigest()
    if not path.exists():
        files.write(path, now)
    elif path.read_text() != now:
        raise DataError(
            f"data.name: {name} returns other data than when {folder} was begun. Give every shuffle and split in "
            f"it a fixed seed; if the data themselves are new, delete {folder}."
        )


def _refusal(section: Data, what: str) -> DataError:
    return DataError(f"data.name: {section.name}: {what}")


def _described(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, tuple | list) and len(value) <= 4:
        return f"({', '.join(map(_described, value))})"
    return f"{type(value).__name__}{f' of {len(value)}' if hasattr(value, '__len__') else ''}"


def _checked(section: Data, arrays: list[np.ndarray]) -> tuple[list[np.ndarray], float, int]:
    """The arrays in the dtypes that runs work with."""
    of_pixels = [array.dtype == np.uint8 for array in arrays[::2]]
    for split, inputs, labels in (("train", *arrays[:2]), ("test", *arrays[2:])):
        _check_inputs(section, split, inputs)
        if labels.dtype.kind not in "iu" or labels.shape != inputs.shape[:1] or labels.min() < 0:
            hint = " Of one-hot labels take the argmax." if labels.ndim == 2 and labels.shape[1] > 1 else ""
            least = f", the least of them {labels.min()}" if labels.size and labels.dtype.kind in "iuf" else ""
            raise _refusal(
                section, f"expected {split} labels ({len(inputs)},), integers from 0 on, arrived "
                f"{_described(labels)}{least}.{hint}",
            )  # fmt: skip
    if arrays[0].shape[1:] != arrays[2].shape[1:] or len(set(of_pixels)) > 1:
        raise _refusal(
            section, f"expected train and test inputs alike, arrived {_described(arrays[0])}, {_described(arrays[2])}."
        )
    classes = 1 + max(int(labels.max()) for labels in arrays[1::2])
    if classes < 2:
        raise _refusal(section, "expected labels of at least two classes, arrived zeros alone.")
    done = [_inputs(one) if number % 2 == 0 else one.astype(np.int32) for number, one in enumerate(arrays)]
    return done, 255.0 if of_pixels[0] else 1.0, classes


def _check_inputs(section: Data, split: str, inputs: np.ndarray) -> None:
    known = inputs.dtype == np.uint8 or inputs.dtype.kind == "f"
    if not known or inputs.ndim < 2 or not inputs.size:
        hint = " Cast integers to float32." if inputs.dtype.kind in "iub" and inputs.ndim > 1 else ""
        raise _refusal(
            section, f"expected {split} inputs (n, ...), uint8 or floats, arrived {_described(inputs)}.{hint}"
        )
    if inputs.dtype.kind == "f" and not np.isfinite(inputs).all():
        raise _refusal(section, f"{split} inputs hold NaN or infinity.")


def _inputs(inputs: np.ndarray) -> np.ndarray:
    if inputs.dtype != np.uint8:
        return inputs.astype(np.float32)
    return inputs[..., None] if inputs.ndim == 3 else inputs
