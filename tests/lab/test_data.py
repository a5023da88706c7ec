"""Data: what is imported comes out, through TFDS itself; a set that cannot be loaded is refused with its reason.

The oracle is the arrays the files were made from. Images are random, hence all different, so each can be found
again whatever the order, and its label with it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import IDX_NAMES, N_TEST, SPLITS, left_behind, pairs, random_split, refused, write_idx, write_sheets
from hypothesis import given
from hypothesis import strategies as st

from jaxprune.lab.data import importing, sets
from jaxprune.lab.data.importing import import_folder
from jaxprune.lab.data.sets import Dataset, load, split_validation


def source_pairs(source) -> dict[bytes, int]:
    return pairs(np.stack([example["image"] for example in source]), [example["label"] for example in source])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    import_folder("mnist", write_idx(root / "files"), root)
    return root


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    shutil.copytree(prepared / "mnist", tmp_path / "mnist")
    return tmp_path


# --- import and read back


@pytest.mark.parametrize("form", IDX_NAMES)
def test_imported_mnist_is_read_by_tfds_itself(tmp_path, form):
    import tensorflow_datasets as tfds

    path = import_folder("mnist", write_idx(tmp_path / "files", form=form), tmp_path / "root")
    assert path == tmp_path / "root" / "mnist" / str(tfds.builder_cls("mnist").VERSION)
    assert left_behind(tmp_path / "root") == ["mnist"]
    official = tfds.builder_cls("mnist")(data_dir=str(tmp_path / "elsewhere"), file_format="array_record").info
    restored = tfds.builder_from_directory(path)
    assert restored.info.version == official.version
    assert restored.info.features.to_json() == official.features.to_json()
    assert restored.info.features["label"].names == list("0123456789")
    loaded = load("mnist", tmp_path / "root")
    for split, (images, labels) in SPLITS.items():
        source = tfds.data_source("mnist", split=split, data_dir=tmp_path / "root", download=False)
        assert len(source) == len(labels) == restored.info.splits[split].num_examples
        assert source_pairs(source) == pairs(images, labels) == source_pairs(restored.as_data_source(split))
        ours = getattr(loaded, f"{split}_images"), getattr(loaded, f"{split}_labels")
        np.testing.assert_array_equal(ours[0], [example["image"] for example in source])  # the same order, too
        np.testing.assert_array_equal(ours[1], [example["label"] for example in source])
        assert (ours[0].dtype, ours[1].dtype) == (np.uint8, np.int32)
        assert ours[0].shape == (len(labels), 28, 28, 1)
    assert (loaded.name, loaded.scale, loaded.classes) == ("mnist", 255.0, 10)
    assert "tensorflow" not in sys.modules


def test_imported_fashion_mnist_has_its_class_names(tmp_path):
    import tensorflow_datasets as tfds

    path = import_folder("fashion_mnist", write_idx(tmp_path / "files"), tmp_path / "root")
    assert tfds.builder_from_directory(path).info.features["label"].int2str(9) == "Ankle boot"
    assert pairs(*load("fashion_mnist", tmp_path / "root")[1:3]) == pairs(*SPLITS["train"])


def test_imported_cifar10_has_colours_ids_and_class_names(tmp_path):
    import tensorflow_datasets as tfds

    splits = write_sheets(tmp_path / "files")
    path = import_folder("cifar10", tmp_path / "files", tmp_path / "root")
    loaded = load("cifar10", tmp_path / "root")
    assert loaded.train_images.shape == (15, 32, 32, 3)
    assert pairs(*loaded[1:3]) == pairs(*splits["train"])
    assert pairs(*loaded[3:5]) == pairs(*splits["test"])
    assert (path / "label.labels.txt").read_text().split()[:2] == ["airplane", "automobile"]
    for example in tfds.data_source("cifar10", split="train", data_dir=tmp_path / "root"):
        place = int(example["id"].decode().removeprefix("train_"))
        np.testing.assert_array_equal(example["image"], splits["train"][0][place])


def test_a_prepared_set_is_left_alone(copy):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.rglob("*") if path.is_file()}
    path = import_folder("mnist", copy / "no such folder", copy)
    assert path.is_dir()
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.rglob("*") if path.is_file()}


def test_import_and_load_say_nothing_and_restore_the_log(tmp_path, capfd):
    from absl import logging
    from tensorflow_datasets.core.utils import tqdm_utils

    level = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
        import_folder("mnist", write_idx(tmp_path / "files"), tmp_path)
        load("mnist", tmp_path)
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(level)
    assert tuple(capfd.readouterr()) == ("", "")
    assert tqdm_utils._active


def test_progress_ends_at_the_total(tmp_path):
    seen = []
    splits = {"train": random_split(1100, 4), "test": random_split(30, 5)}
    import_folder("mnist", write_idx(tmp_path / "files", splits), tmp_path, lambda *now: seen.append(now))
    assert seen == [(500, 1130), (1000, 1130), (1130, 1130)]


KILLED = """
import os, signal, sys
from jaxprune.lab.data import importing
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "writing": importing.import_folder("mnist", sys.argv[1], sys.argv[2], die)
importing._move_in_place = die
importing.import_folder("mnist", sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("moment", ["writing", "before the move"])
def test_a_killed_import_leaves_nothing_that_looks_prepared(tmp_path, moment):
    files, root = write_idx(tmp_path / "files"), tmp_path / "root"
    run = subprocess.run([sys.executable, "-c", KILLED, files, root, moment], check=False)
    assert run.returncode == -signal.SIGKILL
    assert left_behind(root) != []  # it was killed in the middle, not before
    refused(lambda: load("mnist", root), "not prepared")
    import_folder("mnist", files, root)
    assert pairs(*load("mnist", root)[1:3]) == pairs(*SPLITS["train"])


def test_the_default_directory_is_that_of_tfds(tmp_path):
    code = (
        "import sys; from absl import logging; logging.set_verbosity(logging.INFO)\n"
        "from jaxprune.lab.data import importing, sets\n"
        "print(importing.import_folder('mnist', sys.argv[1])); assert len(sets.load('mnist').test_labels) == 12"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, write_idx(tmp_path / "files")],
        env={**os.environ, "TFDS_DATA_DIR": str(tmp_path / "default")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.startswith(str(tmp_path / "default" / "mnist"))
    assert run.stderr == ""  # a fresh process, so TFDS's log has nowhere to hide


def test_the_faster_of_two_imports_wins(tmp_path, prepared):
    target = tmp_path / "root" / "mnist"

    def another_import(*_):
        shutil.copytree(prepared / "mnist", target)

    path = import_folder("mnist", write_idx(tmp_path / "files"), tmp_path / "root", another_import)
    assert left_behind(tmp_path / "root") == ["mnist"]
    assert path.parent == target
    assert len(load("mnist", tmp_path / "root").test_labels) == N_TEST


def test_a_foreign_folder_in_the_way_is_kept(tmp_path, prepared):
    version = next((prepared / "mnist").iterdir()).name
    foreign = tmp_path / "mnist" / version / "diary.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("dear diary")
    refused(lambda: import_folder("mnist", write_idx(tmp_path / "files"), tmp_path), foreign.parent, "in the way")
    assert foreign.read_text() == "dear diary"


# --- loads that are refused


def test_load_names_the_nearest(tmp_path):
    refused(lambda: load("mist", tmp_path), "'mist'", "did you mean 'mnist'", "digits, mnist, fashion_mnist, cifar10")
    assert "did you mean" not in refused(lambda: load("svhn_cropped", tmp_path), "digits, mnist")


def with_tensorflow(monkeypatch, there: bool) -> None:
    monkeypatch.setattr(sets.importlib.util, "find_spec", lambda name: object() if there else None)


def test_not_prepared_and_no_tensorflow(tmp_path, monkeypatch):
    with_tensorflow(monkeypatch, False)
    refused(lambda: load("mnist", tmp_path), tmp_path, "TensorFlow", "`jaxprune data import mnist FOLDER`")
    assert left_behind(tmp_path) == []


def test_not_prepared_and_no_network(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def no_network(self, file_format):
        raise ConnectionError("name not resolved\nmore about it")

    with_tensorflow(monkeypatch, True)
    monkeypatch.setattr(tfds.builder_cls("mnist"), "download_and_prepare", no_network)
    refused(lambda: load("mnist", tmp_path), "downloading it failed (name not resolved)", "data import mnist FOLDER")


def test_download_where_it_can_work(tmp_path, prepared, monkeypatch):
    import tensorflow_datasets as tfds

    def download(self, file_format):
        assert file_format == "array_record"
        shutil.copytree(prepared / "mnist", tmp_path / "mnist")

    with_tensorflow(monkeypatch, True)
    monkeypatch.setattr(tfds.builder_cls("mnist"), "download_and_prepare", download)
    assert pairs(*load("mnist", tmp_path)[1:3]) == pairs(*SPLITS["train"])


@pytest.mark.parametrize("package", ["tensorflow_datasets", "sklearn.datasets"])
def test_a_package_that_is_missing(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    name = "mnist" if package == "tensorflow_datasets" else "digits"
    refused(lambda: load(name, tmp_path), package, "pip install 'jaxprune[lab]'")


def shard(root: Path) -> Path:
    return next(root.rglob("mnist-train.array_record*"))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 5] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, flip_a_byte, *(lambda path, n=n: os.truncate(path, n) for n in (0, 1000, 65536))],
    ids=["missing", "flipped byte", "empty", "1000 bytes", "65536 bytes"],
)
def test_a_damaged_shard_is_refused(copy, damage):
    path = shard(copy)
    damage(path)
    refused(lambda: load("mnist", copy), path.parent, "damaged or incomplete", "data import mnist FOLDER")


def test_a_missing_split_is_refused(copy):
    info = next(copy.rglob("dataset_info.json"))
    content = json.loads(info.read_text())
    content["splits"] = content["splits"][:1]
    info.write_text(json.dumps(content))
    refused(lambda: load("mnist", copy), info.parent, "damaged or incomplete")


def test_damaged_metadata_are_refused(copy):
    next(copy.rglob("dataset_info.json")).write_text('{"name": "mni')
    refused(lambda: load("mnist", copy), copy, "damaged metadata", "import it again")
    refused(lambda: import_folder("mnist", copy, copy), copy, "damaged metadata")


def test_a_format_without_random_access_is_refused(copy):
    info = next(copy.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    refused(lambda: load("mnist", copy), "as tfrecord", "needs array_record", "another data directory")


def test_an_image_of_another_size_is_refused(tmp_path, monkeypatch):
    small = importing.encode_png(np.zeros((20, 28, 1), np.uint8))
    monkeypatch.setattr(importing, "encode_png", lambda image: small)
    import_folder("mnist", write_idx(tmp_path / "files"), tmp_path)
    refused(lambda: load("mnist", tmp_path), "damaged or incomplete", "(28, 28)", "(28, 20)")


# --- digits and validation


def test_digits_are_all_there_and_always_split_alike():
    from sklearn.datasets import load_digits

    digits = load("digits")
    assert (digits.scale, digits.classes, digits.name) == (16.0, 10, "digits")
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    assert (digits.train_images.dtype, digits.train_labels.dtype) == (np.uint8, np.int32)
    images = np.concatenate([digits.train_images, digits.test_images])
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    assert images.max() == 16
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    np.testing.assert_array_equal(images[..., 0], bunch.images[order])
    np.testing.assert_array_equal(labels, bunch.target[order])


def numbered(n: int) -> Dataset:
    images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
    return Dataset("numbered", images, np.arange(n, dtype=np.int32), images[:0], images[:0, 0, 0, 0], 255.0, 10)


@given(n=st.integers(2, 200), fraction=st.floats(0, 0.7), seed=st.integers(0, 2**32))
def test_validation_is_a_partition(n, fraction, seed):
    whole = numbered(n)
    smaller, (images, labels) = split_validation(whole, fraction, seed)
    assert len(images) == len(labels) == round(n * fraction)
    np.testing.assert_array_equal(images[:, 0, 0, 0], labels)
    np.testing.assert_array_equal(smaller.train_images[:, 0, 0, 0], smaller.train_labels)
    assert sorted([*labels, *smaller.train_labels]) == list(range(n))
    assert (np.diff(smaller.train_labels) > 0).all()
    assert smaller.test_images is whole.test_images
    np.testing.assert_array_equal(split_validation(whole, fraction, seed)[1][1], labels)


def test_validation_depends_on_the_seed_and_can_be_empty():
    whole = numbered(100)
    assert set(split_validation(whole, 0.2, 0)[1][1]) != set(split_validation(whole, 0.2, 1)[1][1])
    smaller, (images, labels) = split_validation(whole, 0, 0)
    assert (images.shape, labels.shape, len(smaller.train_labels)) == ((0, 1, 1, 1), (0,), 100)


@pytest.mark.parametrize(
    ("fraction", "words"),
    [
        (10, ["[0, 1)", "10 arrived", "percentage", "write 0.1"]),
        (1.0, ["[0, 1)"]),
        (-0.1, ["-0.1"]),
        (float("nan"), ["nan"]),
        (0.999, ["leaves none of 100"]),
    ],
)
def test_bad_fractions_are_refused(fraction, words):
    refused(lambda: split_validation(numbered(100), fraction, 0), *words)
