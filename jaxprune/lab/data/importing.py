"""Importing data sets: from the files their authors publish to what TFDS reads.

TensorFlow Datasets needs TensorFlow to *prepare* a data set only because it encodes images with
it. Handed finished PNG bytes, its own generator runs without, so an import is

    files -> arrays -> checked -> PNG -> the official builder, its download step replaced

and the result is the one TFDS would have written itself: same version, features and record order.
Nothing looks prepared until one rename at the very end.
"""

import contextlib
import difflib
import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jaxprune.lab.data.files import SHAPES, DataError, Split, read_files

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
Progress = Callable[[int, int], None]


def refuse_unknown(name: str, known: Sequence[str]) -> NoReturn:
    """Raises the `DataError` for a data set nobody knows, with the nearest name that is known."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? Known are" if nearest else "known are"
    raise DataError(f"There is no data set named {name!r}; {hint} {', '.join(known)}.")


@contextlib.contextmanager
def quiet_tfds() -> Iterator[Any]:
    """Gives the module `tensorflow_datasets`, with its log and progress bars silenced meanwhile.

    Imported only here, because it takes a good part of a second.

    Raises:
        DataError: the package is not installed.
    """
    try:
        import tensorflow_datasets as tfds
        from absl import logging
        from tensorflow_datasets.core.utils import tqdm_utils
    except ImportError as error:
        raise DataError(
            f"This data set is read by tensorflow-datasets, which cannot be imported ({error}). "
            f"`pip install 'jaxprune[lab]'` brings it; the data set 'digits' does without."
        ) from error
    verbosity, bars = logging.get_verbosity(), getattr(tqdm_utils, "_active", True)
    logging.set_verbosity(logging.ERROR)
    tfds.display_progress_bar(False)
    try:
        yield tfds
    finally:
        logging.set_verbosity(verbosity)
        tfds.display_progress_bar(bars)


def open_builder(tfds: Any, name: str, data_dir: str | Path | None) -> Any:
    """The official TFDS builder of `name` in `data_dir` (None: TFDS's own default), prepared or not.

    Raises:
        DataError: there is something prepared, but its metadata are damaged.
    """
    root = None if data_dir is None else Path(data_dir).expanduser().absolute()
    try:
        return tfds.builder(name, data_dir=root and os.fspath(root))
    except Exception as error:  # whatever TFDS trips over in its metadata
        raise DataError(
            f"The data set {name!r} in {root or 'the default directory of TFDS'} has damaged metadata "
            f"({one_line(error)}). Delete its folder and import it again: `jaxprune data import {name} FOLDER`."
        ) from error


def one_line(error: BaseException) -> str:
    """The first line of what an exception says, for use inside another sentence."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def import_folder(
    name: str, folder: str | Path, data_dir: str | Path | None = None, progress: Progress | None = None
) -> Path:
    """Turns published files into a data set that TFDS reads, without TensorFlow.

    Which files is said at `jaxprune.lab.data.files.read_files`. Any number of images is accepted.

    Args:
        name: one of `mnist`, `fashion_mnist`, `cifar10`.
        folder: where the files lie.
        data_dir: the root that holds prepared data sets; None is TFDS's own, usually ~/tensorflow_datasets.
        progress: called now and then with (images done, images in all).

    Returns:
        The prepared folder, `data_dir/name/version`. One that was prepared before is left as it is.

    Raises:
        DataError: unknown name; files missing, damaged or not fitting together; or nowhere to write.
    """
    if name == "digits":
        raise DataError("The data set 'digits' comes with scikit-learn: there is nothing to import, use it as it is.")
    if name not in SHAPES:
        refuse_unknown(name, tuple(SHAPES))
    with quiet_tfds() as tfds:
        builder = open_builder(tfds, name, data_dir)
        if not builder.is_prepared():
            _write_and_move(tfds, name, read_files(name, folder), Path(builder.data_path), progress)
        return Path(builder.data_path)


def _write_and_move(tfds: Any, name: str, splits: dict[str, Split], target: Path, progress: Progress | None) -> None:
    root = target.parent.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        # a sibling, so that the move stays within one file system and is atomic
        with tempfile.TemporaryDirectory(prefix=f".import-{name}-", dir=root) as scratch:
            _move_in_place(_write(tfds, name, splits, scratch, progress), target)
    except (OSError, RuntimeError) as error:  # array_record reports a full disk as RuntimeError
        raise DataError(
            f"The data set {name!r} could not be written to {root} ({one_line(error)}). "
            f"Free space there or choose another data directory."
        ) from error


def _move_in_place(written: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    try:
        os.rename(written, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not (target / "dataset_info.json").is_file():  # else another import of the same set was faster
            raise DataError(f"{target} is in the way, but no prepared data set. Move it away, import again.") from error


def _write(tfds: Any, name: str, splits: dict[str, Split], scratch: str, progress: Progress | None) -> Path:
    """Lets the official builder write `splits` below `scratch`; reads every record once, to be sure."""
    builder = tfds.builder(name, data_dir=scratch, file_format="array_record")
    label = builder.info.features["label"]
    # written down for every set, though only CIFAR-10's official builder learns them from the files
    label.names = CIFAR10_CLASSES if name == "cifar10" else label.names
    # The one step of the official builder that is replaced: where the examples come from
    builder._split_generators = lambda _: _generators(builder.info.features, splits, progress)
    builder._log_download_bytes = builder._log_download_done = lambda: None  # they print
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    for split, (_, labels) in splits.items():
        if len(read_records(tfds, builder, split)) != len(labels):
            raise OSError(f"wrote {len(labels)} images of split {split!r} but read back another number")
    return Path(builder.data_path)


def read_records(tfds: Any, builder: Any, split: str) -> list[bytes]:
    """Every record of a split, still serialized, in the order TFDS keeps them (checksums are verified)."""
    source = open_source(tfds, builder, split)
    return list(source.__getitems__(range(len(source))))


def open_source(tfds: Any, builder: Any, split: str) -> Any:
    """The records of a split, serialized, by their numbers: `source.__getitems__([3, 1])`."""
    return builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)


def _generators(features: Any, splits: dict[str, Split], progress: Progress | None) -> dict[str, Iterator[Any]]:
    total = sum(len(split.labels) for split in splits.values())
    starts = {"train": 0, "test": len(splits["train"].labels)}

    def examples(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(*splits[split], strict=True)):
            # the index is the key the official builders use, so records end up in the official order
            example = {"id": f"{split}_{index:05d}", "image": encode_png(image), "label": int(label)}
            yield index, {key: example[key] for key in features}
            done = starts[split] + index + 1
            if progress is not None and (done % 500 == 0 or done == total):
                progress(done, total)

    return {split: examples(split) for split in splits}


def encode_png(image: np.ndarray) -> bytes:
    """One image (height, width, 1 or 3) uint8 as the bytes of a PNG file, lossless."""
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.save(buffer, "PNG", compress_level=1)  # files this small gain nothing from more
    return buffer.getvalue()
