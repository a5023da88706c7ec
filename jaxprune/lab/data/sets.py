"""Data: a data set is six arrays and a scale.

    images / scale in [0, 1],   label in 0 .. classes - 1

`digits` is embedded in scikit-learn and always there. The others are read by TensorFlow Datasets as *data
sources*, random access into array_record files, for which TensorFlow is not needed. Whole data sets are held
in memory as bytes: at these sizes an array is the fastest loader. ImageNet is not: see `jaxprune.lab.data.streams`.
"""

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.lab.data import own_data, streams
from jaxprune.lab.data.files import CLASSES, SPLITS, DataError
from jaxprune.lab.data.importing import (
    CIFAR10_CLASSES,
    one_line,
    open_builder,
    open_source,
    quiet_tfds,
    read_records,
    refuse_unknown,
)
from jaxprune.lab.recipe import words
from jaxprune.lab.recipe.data_section import Data
from jaxprune.lab.recipe.problems import ConfigError

IMAGES = words.DATA_SETS
"""Every name `load` knows, and height, width and channels of its images."""
NAMES = tuple(IMAGES)

LABELS = {
    "fashion_mnist": ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                      "Ankle boot"),
    "cifar10": tuple(CIFAR10_CLASSES),
}  # fmt: skip
"""Names of classes that are not digits."""

_DIGITS_TRAIN = 1437
DIGITS_SCALE = 16.0
"""What pixels of `digits` are divided by; those of other sets are divided by 255."""


class Dataset(NamedTuple):
    """Images and labels for training and for the final test.

    Arrays, or what is read as one looks at it. Shapes: images (n, height, width, channels) uint8, labels (n,) int32.
    `scale` is the number to divide pixels by to get [0, 1]; labels lie in [0, classes).
    """

    name: str
    train_images: Any
    train_labels: Any
    test_images: Any
    test_labels: Any
    scale: float
    classes: int


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Loads a data set by name, the same images in the same order every time.

    Args:
        name: `digits` (8x8, 1437 + 360 images, a fixed random split), `mnist`, `fashion_mnist` (28x28,
            60,000 + 10,000), `cifar10` (32x32x3, 50,000 + 10,000) or `imagenet2012` (224x224x3, 1,281,167 + 50,000,
            the validation images; read as they are needed).
        data_dir: the root that holds sets prepared for TFDS; None is TFDS's own, usually
            ~/tensorflow_datasets. Not used by `digits`.

    Returns:
        The data set. Order is that of the TFDS records, which is shuffled but fixed.

    Raises:
        DataError: unknown name, or a set that is not prepared (and cannot be downloaded here), is prepared in
            a format without random access, or is damaged.
    """
    if name not in NAMES:
        refuse_unknown(name, NAMES)
    return _load_digits() if name == "digits" else _load_tfds(name, data_dir)


def of_config(section: Data) -> Dataset:
    """The data set of a [data] section, ours or the user's own.

    Raises:
        DataError: see `load` and `own_data.load`.
        ConfigError: images are to be moved or mirrored, and there are none.
    """
    if not own_data.is_own(section.name):
        return load(section.name, section.data_dir or None)
    arrays, scale, count = own_data.load(section)
    if arrays[0].ndim != 4 and (section.shift or section.flip):
        key = "shift" if section.shift else "flip"
        raise ConfigError(f"data.{key}: only for images (n, h, w, c), {section.name} gives {arrays[0].shape}.")
    return Dataset(section.name, *arrays, scale=scale, classes=count)


def facts(section: Data) -> tuple[tuple[int, ...], int]:
    """Shape of one input, and how many classes there are; the user's own data are loaded for it."""
    if own_data.is_own(section.name):
        dataset = of_config(section)
        return dataset.train_images.shape[1:], dataset.classes
    return IMAGES[section.name], classes(section.name)


def classes(name: str) -> int:
    """How many classes a data set of ours has."""
    return 1000 if name == "imagenet2012" else CLASSES


def _load_digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f"The data set 'digits' is part of scikit-learn, which cannot be imported ({error}). "
            f"`pip install 'jaxprune[lab]'` brings it."
        ) from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = images.astype(np.uint8).reshape(-1, 8, 8, 1)[order]
    labels = labels.astype(np.int32)[order]
    n = _DIGITS_TRAIN
    return Dataset("digits", images[:n], labels[:n], images[n:], labels[n:], scale=DIGITS_SCALE, classes=10)


def _load_tfds(name: str, data_dir: str | Path | None) -> Dataset:
    splits, read = SPLITS, _read_split
    way_out = f"Run `jaxprune data import {name} FOLDER` on the folder of its files, for the same data directory."
    if name == "imagenet2012":
        splits, read = ("train", "validation"), _stream_split
        way_out = "Prepare it with TFDS as array_record, as its catalog says, from the archives of image-net.org."
    with quiet_tfds() as tfds:
        builder = open_builder(tfds, name, data_dir)
        if not builder.is_prepared():
            _download(name, builder, way_out)
            builder = open_builder(tfds, name, data_dir)
        try:
            arrays = [array for split in splits for array in read(tfds, builder, split)]
        except NotImplementedError as error:
            raise DataError(
                f"{builder.data_path} holds {name} as {builder.info.file_format.value}, but random access needs "
                f"array_record. Choose another data directory. {way_out}"
            ) from error
        except Exception as error:  # TFDS, array_record, protobuf and Pillow each have their own
            raise DataError(
                f"{builder.data_path} should hold a prepared {name}, but it is damaged or incomplete "
                f"({one_line(error)}). Delete this folder. {way_out}"
            ) from error
        classes = builder.info.features["label"].num_classes
    return Dataset(name, *arrays, scale=255.0, classes=classes)


def _download(name: str, builder: Any, way_out: str) -> None:
    here = f"The data set {name!r} is not prepared in {builder.data_dir_root}"
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(f"{here}, and TFDS can download and prepare it only where TensorFlow is installed. {way_out}")
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # no network, no space, a moved file: TFDS has many names for it
        raise DataError(f"{here}, and downloading it failed ({one_line(error)}). {way_out}") from error


def _read_split(tfds: Any, builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = _parsed(read_records(tfds, builder, split))
    shape = builder.info.features["image"].shape
    images = _decode_pngs([file for file, _ in pairs], shape)
    labels = np.array([label for _, label in pairs], np.int32)
    return images, labels


def _stream_split(tfds: Any, builder: Any, split: str) -> tuple[streams.Images, streams.Labels]:
    source = open_source(tfds, builder, split)
    return streams.split(lambda rows: _parsed(source.__getitems__(rows)), len(source), IMAGES[builder.name][0])


def _parsed(records: Sequence[bytes]) -> list[tuple[bytes, int]]:
    """The image file and the label of each record."""
    # TFDS's own message class: its generic decoder takes seven times as long for the same two fields
    from tensorflow_datasets.proto import tf_example_pb2

    parse = tf_example_pb2.Example.FromString  # pyright: ignore[reportAttributeAccessIssue]  (generated class)
    fields = [parse(record).features.feature for record in records]
    return [(one["image"].bytes_list.value[0], one["label"].int64_list.value[0]) for one in fields]


def _decode_pngs(files: Sequence[bytes], shape: tuple[int, int, int]) -> np.ndarray:
    # the class itself, not Image.open, which tries formats first; one buffer, not one array per image
    from PIL.PngImagePlugin import PngImageFile

    expected = ({1: "L", 3: "RGB"}[shape[2]], (shape[1], shape[0]))
    pixels = bytearray()
    for file in files:
        image = PngImageFile(io.BytesIO(file))
        if (image.mode, image.size) != expected:
            raise DataError(f"expected images of {expected}, found one of {(image.mode, image.size)}")
        pixels += image.tobytes()
    return np.frombuffer(pixels, np.uint8).reshape(len(files), *shape)


def split_validation(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, tuple[Any, Any]]:
    """Moves a random part of the training data out, for validation; the test data stay what they are.

    round(n * fraction) of the n training images are drawn without replacement; those that stay keep their order.

    Args:
        dataset: what to draw from; it is not changed.
        fraction: the part to move out, in [0, 1).
        seed: of the NumPy generator that draws.

    Returns:
        The data set with fewer training images, and the (images, labels) moved out. A fraction of 0 gives
        empty arrays.

    Raises:
        DataError: `fraction` is outside [0, 1) (a percentage, say), or would leave nothing to train on.
    """
    if not 0 <= fraction < 1:  # written so that NaN is refused as well
        hint = f" {fraction:g} looks like a percentage: write {fraction / 100:g}." if 1 < fraction <= 100 else ""
        raise DataError(f"The validation fraction must lie in [0, 1), but {fraction!r} arrived.{hint}")
    n = len(dataset.train_labels)
    moved = round(n * fraction)
    if n and moved == n:
        raise DataError(
            f"A validation fraction of {fraction!r} leaves none of {n} images to train on. Make it smaller."
        )
    order = np.random.default_rng(seed).permutation(n)
    out, stay = order[:moved], np.sort(order[moved:])
    images, labels = dataset.train_images, dataset.train_labels
    smaller = dataset._replace(train_images=_taken(images, stay), train_labels=_taken(labels, stay))
    return smaller, (_taken(images, out), _taken(labels, out))


def _taken(array: Any, rows: np.ndarray) -> Any:
    return array[rows] if isinstance(array, np.ndarray) else array.subset(rows)
