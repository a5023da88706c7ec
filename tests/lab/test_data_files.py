"""Files to import: idx files are read to the byte, and whatever does not fit or cannot be written is refused.

The real MNIST, whose files these are, comes last.
"""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from data_helpers import N_TRAIN, SPLITS, idx_bytes, left_behind, refused, write_idx, write_sheets
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxprune.lab.data import importing
from jaxprune.lab.data.files import read_idx
from jaxprune.lab.data.importing import import_folder
from jaxprune.lab.data.sets import load

# --- idx files


@pytest.mark.parametrize("shape", [(5,), (0,), (3, 28, 28), (2, 3, 4, 5)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_round_trip(tmp_path, shape, pack):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / "file"
    path.write_bytes(pack(idx_bytes(array)))
    found = read_idx(path)
    np.testing.assert_array_equal(found, array)
    assert found.dtype == np.uint8
    assert found.flags.writeable


IDX = idx_bytes(np.arange(60, dtype=np.uint8).reshape(5, 4, 3))  # 16 + 60 bytes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x00\x00\x0d\x03" + IDX[4:], ["00 00 08", "00 00 0d 03"]),
        (b"\x89PNG" + IDX[4:], ["00 00 08", "89 50 4e 47"]),
        (b"\x00\x00\x08\x00" + IDX[4:], ["number of dimensions", "00 00 08 00"]),
        (b"", ["4 magic bytes", "has 0"]),
        (IDX[:10], ["header of 16 bytes", "has 10"]),
        (IDX[:-1], ["5 x 4 x 3", "76 bytes", "75 arrived", "truncated"]),
        (IDX + b"!!", ["76 bytes", "78 arrived", "do not belong"]),
        (IDX[:4] + struct.pack(">I", 6) + IDX[8:], ["6 x 4 x 3", "88 bytes", "76 arrived"]),
        (IDX[:4] + struct.pack(">I", 2**32 - 1) + IDX[8:], ["4294967295 x 4 x 3", "76 arrived"]),
        (gzip.compress(IDX, mtime=0)[:-9], ["gzip", "ends early"]),
        (gzip.compress(IDX, mtime=0)[:-8] + b"\x00" * 8, ["gzip", "CRC"]),
        (gzip.compress(IDX, mtime=0)[:10] + b"\xff" * 60, ["gzip", "damaged (Error -3"]),
        (gzip.compress(IDX, mtime=0) + b"garbage", ["gzip", "damaged"]),
        (gzip.compress(IDX[:-1], mtime=0), ["76 bytes", "75 arrived"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else value[:6].hex() + f"-{len(value)}",
)
def test_bad_idx_says_what_was_expected_and_what_arrived(tmp_path, content, words):
    path = tmp_path / "some-file"
    path.write_bytes(content)
    refused(lambda: read_idx(path), path, *words)


@given(part=st.floats(0, 1, exclude_max=True), zipped=st.booleans())
def test_every_truncation_is_refused(tmp_path_factory, part, zipped):
    path = tmp_path_factory.getbasetemp() / "truncated"
    whole = gzip.compress(IDX, mtime=0) if zipped else IDX
    path.write_bytes(whole[: int(part * len(whole))])
    refused(lambda: read_idx(path), path)


def test_missing_idx_file(tmp_path):
    refused(lambda: read_idx(tmp_path / "nowhere"), tmp_path / "nowhere", "No such file")


# --- imports that are refused

IMAGES, LABELS = SPLITS["train"]


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("train-images-idx3-ubyte", IMAGES[:-1], ["39 images", "40 labels", "one label for each image"]),
        ("train-labels-idx1-ubyte", LABELS[:-3], ["40 images", "37 labels"]),
        (
            "train-labels-idx1-ubyte",
            np.where(np.arange(N_TRAIN) == 7, 12, LABELS),
            ["0..9", "label 7 is 12", "1 of 40"],
        ),
        ("train-images-idx3-ubyte", IMAGES[:, :20], ["28 x 28 x 1", "20 x 28 x 1", "another data set"]),
        ("train-images-idx3-ubyte", LABELS, ["expected 3 dimensions for images", "announces 1"]),
        ("t10k-labels-idx1-ubyte", IMAGES, ["expected 1 dimensions for labels", "announces 3"]),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, name, array, words):
    files = write_idx(tmp_path / "files")
    (files / name).write_bytes(idx_bytes(array))
    refused(lambda: import_folder("mnist", files, tmp_path / "root"), files / name, *words)
    assert left_behind(tmp_path / "root") == []


def test_no_images_at_all_are_refused(tmp_path):
    files = write_idx(tmp_path / "files", {"train": (IMAGES[:0], LABELS[:0]), "test": SPLITS["test"]})
    refused(lambda: import_folder("mnist", files, tmp_path), "at least one image", "0 images")


def test_a_truncated_file_stops_the_import(tmp_path):
    files = write_idx(tmp_path / "files")
    path = files / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:5000])
    refused(lambda: import_folder("mnist", files, tmp_path / "root"), path, "31376 bytes", "5000 arrived")
    assert left_behind(tmp_path / "root") == []


def test_a_missing_file_is_named_with_what_is_there(tmp_path):
    files = write_idx(tmp_path / "files")
    (files / "t10k-labels-idx1-ubyte").unlink()
    refused(
        lambda: import_folder("mnist", files, tmp_path),
        files,
        "t10k-labels-idx1-ubyte, t10k-labels.idx1-ubyte, t10k-labels-idx1-ubyte.gz, t10k-labels.idx1-ubyte.gz",
        "holds t10k-images-idx3-ubyte, train-images",
    )


def test_import_names(tmp_path):
    refused(lambda: import_folder("mnits", tmp_path, tmp_path), "'mnits'", "did you mean 'mnist'", "cifar10")
    refused(lambda: import_folder("digits", tmp_path, tmp_path), "scikit-learn", "nothing to import")
    refused(lambda: import_folder("mnist", tmp_path / "gone", tmp_path), tmp_path / "gone", "expected a folder")


def png_of(mode: str, size: tuple[int, int]):
    return lambda path: Image.new(mode, size).save(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4000])


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("data_batch_3.png", cut, ["whole PNG", "damaged"]),
        ("data_batch_3.png", lambda path: path.write_bytes(b"no picture"), ["whole PNG", "cannot identify"]),
        ("test_batch.png", png_of("L", (1024, 3)), ["expected RGB", "found L"]),
        ("test_batch.png", png_of("RGB", (784, 3)), ["1024 pixels wide", "784 wide"]),
        ("test_lables.json", lambda path: path.write_text("[1, 2"), ["JSON list", "cannot be read"]),
        ("test_lables.json", lambda path: path.write_text("{}"), ["list of whole numbers"]),
        ("test_lables.json", lambda path: path.write_text("[1, 2.5, 3]"), ["list of whole numbers"]),
        ("test_lables.json", lambda path: path.write_text("[1, 2, 1000000000000000000000]"), ["whole numbers"]),
        ("test_lables.json", lambda path: path.write_text("[1, -1, 3]"), ["0..9", "label 1 is -1"]),
        ("train_lables.json", lambda path: path.write_text("[1, 2, 3]"), ["15 images", "3 labels"]),
    ],
)
def test_bad_cifar10_files_are_refused(tmp_path, name, damage, words):
    write_sheets(tmp_path / "files")
    damage(tmp_path / "files" / name)
    path = tmp_path / "files" / name
    message = refused(lambda: import_folder("cifar10", tmp_path / "files", tmp_path / "root"), path, *words)
    assert message.count(f"{path}: ") <= 1  # not one message wrapped in another
    assert left_behind(tmp_path / "root") == []


def test_a_missing_sheet_is_named(tmp_path):
    write_sheets(tmp_path / "files")
    (tmp_path / "files" / "data_batch_5.png").unlink()
    refused(lambda: import_folder("cifar10", tmp_path / "files", tmp_path), "expected one of data_batch_5.png")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    from array_record.python import array_record_module

    def no_space(*_):
        raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", no_space)
    files = write_idx(tmp_path / "files")
    refused(lambda: import_folder("mnist", files, tmp_path / "root"), tmp_path / "root", "No space left", "Free space")
    assert left_behind(tmp_path / "root") == []


def test_records_that_were_lost_are_noticed(tmp_path, monkeypatch):
    read = importing.read_records
    monkeypatch.setattr(importing, "read_records", lambda *which: read(*which)[1:])
    files = write_idx(tmp_path / "files")
    refused(lambda: import_folder("mnist", files, tmp_path / "root"), "wrote 40", "read back another number")
    assert left_behind(tmp_path / "root") == []


def test_a_data_dir_that_is_a_file(tmp_path):
    (tmp_path / "root").write_text("")
    files = write_idx(tmp_path / "files")
    refused(lambda: import_folder("mnist", files, tmp_path / "root"), tmp_path / "root", "another data directory")


# --- the real thing


MNIST = Path(os.environ.get("JAXPRUNE_DATA", "nowhere")) / "mnist"
needs_mnist = pytest.mark.skipif(not MNIST.is_dir(), reason="JAXPRUNE_DATA names no folder with mnist/ in it")


def sizes(mnist, train):
    assert mnist.train_images.shape == (train, 28, 28, 1)
    assert mnist.test_images.shape == (10_000, 28, 28, 1)


@needs_mnist
def test_real_mnist(tmp_path):
    """The whole test set, and the first 2,000 images of the other."""
    train, test = (
        tuple(read_idx(next(MNIST.glob(f"{split}-{part}*"))) for part in ("images", "labels"))
        for split in ("train", "t10k")
    )
    files = write_idx(tmp_path / "files", {"train": tuple(part[:2000] for part in train), "test": test})
    import_folder("mnist", files, tmp_path)
    mnist = load("mnist", tmp_path)
    sizes(mnist, 2_000)
    assert np.bincount(mnist.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    # the order of the set that TFDS itself publishes
    assert mnist.test_labels[:8].tolist() == [2, 0, 4, 8, 7, 6, 0, 6]
    assert test[0].sum(dtype=np.int64) == mnist.test_images.sum(dtype=np.int64)


@needs_mnist
@pytest.mark.slow
def test_all_of_real_mnist(tmp_path):
    import_folder("mnist", MNIST, tmp_path)
    mnist = load("mnist", tmp_path)
    sizes(mnist, 60_000)
    assert np.bincount(mnist.train_labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    # the order of the set that TFDS itself publishes
    assert mnist.train_labels[:8].tolist() == [4, 1, 0, 7, 8, 1, 2, 7]
    original = read_idx(next(MNIST.glob("train-images*")))
    assert original.sum(dtype=np.int64) == mnist.train_images.sum(dtype=np.int64)
