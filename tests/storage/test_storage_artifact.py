"""The artifact: whole or not there, read no further than asked, and refusals that name the leaf and the way out."""

import errno
import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from storage_helpers import affine, bits_of, codebook, everything_file, pruned

import jaxprune as jp
from jaxprune import files
from jaxprune.quantize.codes import dequantize
from jaxprune.storage import Artifact, FileError, artifact
from jaxprune.storage.values import DTYPES

RNG = np.random.default_rng(0)
WEIGHTS, MASK = pruned(RNG, "float32", (8, 6), 0.5)
PARAMS = {"first": {"kernel": WEIGHTS, "bias": np.arange(6, dtype=np.float32)}, "second": [WEIGHTS[:2]]}


@pytest.fixture
def saved(tmp_path):
    jp.save(tmp_path / "model.jaxprune", PARAMS)
    return tmp_path / "model.jaxprune"


def alone(path):
    """Nothing else was left beside it."""
    return [other.name for other in path.parent.iterdir()] == [path.name]


# ---- whole or not there


class Disk(io.FileIO):
    """A file on a disk with so much room."""

    def __init__(self, path, mode, room):
        super().__init__(path, mode)
        self.room = room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("room", [0, 7, 8, 100, 2000])
def test_a_full_disk_leaves_the_old_file(saved, monkeypatch, room):
    before = saved.read_bytes()
    monkeypatch.setattr(pathlib.Path, "open", lambda path, mode: Disk(path, mode, room))
    with pytest.raises(OSError, match="No space left"):
        jp.save(saved, {"other": np.ones(1000, np.float32) * RNG.normal(size=1000).astype(np.float32)})
    assert saved.read_bytes() == before
    assert alone(saved)


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_in_the_last_steps_leaves_the_old_file(saved, monkeypatch, step, error):
    before = saved.read_bytes()
    monkeypatch.setattr(os, step, lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        jp.save(saved, {"other": WEIGHTS})
    assert saved.read_bytes() == before
    assert alone(saved)


KILLED = """
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
def parts():
    for i in range(10):
        if i == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield bytes(100_000)
files.write(Path(sys.argv[2]), parts())
"""


@pytest.mark.parametrize("part", [0, 5])
def test_killed_in_the_middle_leaves_the_old_file(saved, part):
    before = saved.read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, files.__file__, saved, str(part)])
    assert done.returncode == -signal.SIGKILL
    assert saved.read_bytes() == before
    assert bits_of(jp.load(saved)["first"]["kernel"]) == bits_of(WEIGHTS)


def test_places_where_no_file_can_be(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place, error in ((tmp_path / "file" / "model", FileExistsError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error):
            jp.save(place, PARAMS)
    assert [other.name for other in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(saved):
    before = saved.read_bytes()
    saved.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            jp.save(saved, {"other": WEIGHTS})
    finally:
        saved.parent.chmod(0o700)
    assert saved.read_bytes() == before


def test_folders_are_made_and_files_replaced(tmp_path):
    for params in (PARAMS, {"other": WEIGHTS}):
        jp.save(str(tmp_path / "a" / "b" / "model"), params)
        assert jax.tree.structure(jp.load(tmp_path / "a" / "b" / "model")) == jax.tree.structure(params)
    assert alone(tmp_path / "a" / "b" / "model")


# ---- metadata and reading


def test_metadata_come_back(tmp_path):
    about = {"accuracy": 0.9921, "steps": 10**20, "ü\n": [None, True, {"a": "\ud800"}], "jaxprune": "mine", "": ""}
    jp.save(tmp_path / "file", PARAMS, metadata=about)
    with Artifact(tmp_path / "file") as file:
        assert file.metadata == about
        assert file.path == tmp_path / "file"
        assert list(file.records) == ["first/bias", "first/kernel", "second/0"]
    jp.save(tmp_path / "file", PARAMS)
    with Artifact(tmp_path / "file") as file:
        assert file.metadata == {}


@pytest.mark.parametrize(
    "metadata", [{"a": object()}, {"a": np.float32(1)}, {"a": {1, 2}}, {"a": b"bytes"}, {(1, 2): 3}]
)
def test_metadata_that_are_no_plain_data(saved, metadata):
    before = saved.read_bytes()
    with pytest.raises(TypeError):
        jp.save(saved, PARAMS, metadata=metadata)
    assert saved.read_bytes() == before


class Counted(io.FileIO):
    """A file that counts what is read of it."""

    read_bytes = 0

    def readinto(self, buffer):
        found = super().readinto(buffer)
        Counted.read_bytes += found
        return found

    def readall(self):
        raise AssertionError("the whole file was read")


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    params = {f"w{i}": np.random.default_rng(i).normal(size=(200, 100)).astype(np.float32) for i in range(20)}
    jp.save(tmp_path / "file", params, encoding="dense", deflate=False)
    monkeypatch.setattr(pathlib.Path, "open", lambda path, mode: io.BufferedReader(Counted(path)))
    monkeypatch.setattr(Counted, "read_bytes", 0)
    buffer, body = 2 * io.DEFAULT_BUFFER_SIZE, 4 * 200 * 100
    with Artifact(tmp_path / "file") as file:
        header = (tmp_path / "file").stat().st_size - 20 * body
        assert Counted.read_bytes <= header + buffer
        for i, name in enumerate(["w13", "w4"]):
            assert bits_of(file.read(name).array()) == bits_of(params[name])
            assert Counted.read_bytes <= header + (i + 1) * (body + buffer)
        with pytest.raises(KeyError, match="w20"):
            file.read("w20")


@pytest.mark.parametrize("to", ["dense", "masks", "quantized"])
def test_what_is_loaded(tmp_path, to):
    rng = np.random.default_rng(0)
    leaves = {"raw": WEIGHTS, "shared": codebook(rng, (8, 6), MASK), "counted": affine(rng, (8, 6), MASK, zeros=True)}
    jp.save(tmp_path / "file", leaves)
    found = jp.load(tmp_path / "file", to=to)
    for name, leaf in leaves.items():
        if to == "masks":
            assert bits_of(found[name]) == bits_of(MASK)
        elif to == "quantized" and name != "raw":
            assert type(found[name]) is type(leaf)
            assert all(
                bits_of(getattr(found[name], field)) == bits_of(getattr(leaf, field)) for field in ("codes", "alive")
            )
        else:
            assert isinstance(found[name], jax.Array)
            assert bits_of(found[name]) == bits_of(leaf if name == "raw" else leaf.dequantize())
    masks = {"raw": MASK, "shared": MASK, "counted": MASK}
    jp.save(tmp_path / "again", leaves, masks=masks)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


# ---- refusals of `save`


def rejected(tmp_path, error, match, params, **kwargs):
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(error, match=match):
        jp.save(tmp_path / "file", params, **kwargs)
    assert (tmp_path / "file").read_bytes() == b"before"
    assert alone(tmp_path / "file")


@pytest.mark.parametrize(
    ("leaf", "match"),
    [
        (1.5, r"Leaf 'a/w' is a float, an array was expected.*filter"),
        ("text", r"Leaf 'a/w' is a str, an array was expected"),
        (lambda: np.zeros(3, np.complex64), r"Leaf 'a/w' is complex64, which has no place.*apart .*real and imaginary"),
        (lambda: jax.random.key(0), r"Leaf 'a/w' is key<fry>, which has no place.*`jax.random.key_data`"),
        (lambda: np.array(["text"]), r"Leaf 'a/w' is <U4, which has no place.*leave it out"),
        (lambda: np.array([object()]), r"Leaf 'a/w' is object"),
        (lambda: np.zeros(3, "datetime64[s]"), r"Leaf 'a/w' is datetime64"),
        (lambda: jnp.zeros(3, jnp.int4), r"Leaf 'a/w' is int4"),
        (lambda: jax.ShapeDtypeStruct((3,), np.float32), r"Leaf 'a/w' has no values yet"),
    ],
)
def test_leaves_that_have_no_place(tmp_path, leaf, match):
    rejected(tmp_path, TypeError, match, {"a": {"w": leaf() if callable(leaf) else leaf}})


def test_traced_leaves(tmp_path):
    with pytest.raises(TypeError, match=r"Leaf 'w' has no values yet.*outside of `jit`"):
        jax.eval_shape(lambda w: jp.save(tmp_path / "file", {"w": w}), WEIGHTS)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"encoding": "zip"}, r"no encoding 'zip'.*There are: auto, dense"),
        ({"encoding": {"*": "zip"}}, r"no encoding 'zip'"),
        ({"encoding": {"frist/*": "csr16"}}, r"'frist/\*', which matches no leaf. There are: first/bias"),
        ({"encoding": "nm1:4@0"}, r"Leaf 'first/kernel': it cannot be encoded as 'nm1:4@0': \d weights.*'auto'"),
        ({"encoding": "block5x5"}, r"Leaf 'first/kernel': .*'block5x5': tiles of 5 x 5 do not fit its matrix.*'auto'"),
        ({"encoding": {"*": "csr16"}}, r"Leaf 'first/bias': .*'csr16': it has no rows. Choose another"),
        ({"masks": {"first": {"kernel": MASK}}}, r"The masks have no leaf 'first/bias'"),
        ({"masks": jax.tree.map(lambda leaf: leaf[:1] != 0, PARAMS)}, r"The masks have shape \(1,\) at 'first/bias'"),
        ({"masks": jax.tree.map(np.zeros_like, PARAMS)}, r"Leaf 'first/bias': .*dead is not zero.*`apply_masks`"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, kwargs, match):
    rejected(tmp_path, ValueError, match, PARAMS, **kwargs)


def test_an_encoding_that_would_lose_the_mask(tmp_path):
    weights = {"w": WEIGHTS * np.array([0, 1, 1, 1, 1, 1], np.float32)}
    rejected(tmp_path, ValueError, r"Leaf 'w': 'dense' stores.*Choose", weights, masks={"w": MASK}, encoding="dense")


@pytest.mark.parametrize("name", ["__metadata__", "a/b"])
def test_names_that_cannot_be(tmp_path, name):
    params = {name: WEIGHTS} | ({"a": {"b": WEIGHTS}} if "/" in name else {})
    rejected(tmp_path, ValueError, f"{name}.*Rename", params)


def test_paths_that_are_too_deep(tmp_path):
    tree = WEIGHTS
    for _ in range(101):
        tree = [tree]
    rejected(tmp_path, ValueError, r"Leaf '0/0/.*': its path has 101 keys", tree)


def test_dead_weights_that_are_nan(tmp_path):
    leaf = np.where(MASK, WEIGHTS, np.float32(np.nan))
    rejected(tmp_path, ValueError, r"Leaf 'w': .*`apply_masks`", {"w": leaf}, masks={"w": MASK})


def test_encodings_by_rule(tmp_path):
    rules = {"first/k*": "csr16", "first/*": "gaps3", "second/*": "bitmask"}
    jp.save(tmp_path / "file", PARAMS, encoding=rules)
    with Artifact(tmp_path / "file") as file:
        found = {name: record.encoding for name, record in file.records.items()}
    assert found == {"first/bias": "gaps3", "first/kernel": "csr16", "second/0": "bitmask"}


def test_a_name_is_for_weights_alone(tmp_path):
    leaves = {**PARAMS["first"], "scale": WEIGHTS, "steps": np.zeros((2, 2), np.int32)}
    leaves["bias_codes"] = codebook(RNG, (6,), np.ones(6, bool))
    jp.save(tmp_path / "file", leaves, encoding="csr16")
    with Artifact(tmp_path / "file") as file:
        found = {name: record.encoding for name, record in file.records.items()}
    assert found == {"kernel": "csr16", "bias": "dense", "scale": "dense", "steps": "dense", "bias_codes": "dense"}


# ---- refusals of `load`


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"to": "zip"}, ValueError, "`to` is dense, masks, quantized, bcoo, bcsr"),
        ({"like": {"first": WEIGHTS}}, ValueError, r"model.jaxprune have no leaf 'first', .*They have: 'first/bias'"),
        ({"like": {**PARAMS, "second": [WEIGHTS]}}, ValueError, r"have shape \(2, 6\) at 'second/0'"),
        ({"like": {"first": PARAMS["first"]}}, ValueError, "have a leaf 'second/0', the params do not"),
        ({"max_bytes": 8 * 6 * 4 + 23}, FileError, r"tensor 'first/kernel' \(8, 6\).* 216 bytes, 215 are.*`max_bytes`"),
    ],
)
def test_what_cannot_be_loaded(saved, kwargs, error, match):
    with pytest.raises(error, match=match):
        jp.load(saved, **kwargs)


def test_memory_of_the_machine_is_the_limit(saved, monkeypatch):
    dense = 4 * (8 * 6 + 6 + 12)
    monkeypatch.setattr(artifact, "_memory", lambda: dense)
    jp.load(saved, max_bytes=dense)
    jp.load(saved)
    monkeypatch.setattr(artifact, "_memory", lambda: dense - 1)
    with pytest.raises(FileError, match="'second/0'"):
        jp.load(saved)
    jp.load(saved, max_bytes=dense)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        jp.load(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        jp.load(tmp_path)
    for content in (b"", b"1234567", b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(100), b"{" * 100, bytes(8) + b"{}"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(FileError, match="file"):
            jp.load(tmp_path / "file")


# ---- plain safetensors, and that format's own library


def test_plain_files_are_read(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    names = [name for name in DTYPES if "float8" not in name and name != "bfloat16"]
    arrays = {f"layer.{name}/w": pruned(RNG, name, (3, 4), 0.5)[0] for name in names}
    arrays |= {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(3, np.float32)}
    library.save_file(arrays, tmp_path / "file", {"format": "np"})
    for like, found in ((None, jp.load(tmp_path / "file")), (arrays, jp.load(tmp_path / "file", like=arrays))):
        assert {name: bits_of(leaf) for name, leaf in found.items()} == {
            name: bits_of(leaf) for name, leaf in arrays.items()
        }
        assert like is None or list(found) == sorted(like)
    masks = jp.load(tmp_path / "file", to="masks")
    assert all(bits_of(masks[name])[2] == bits_of(arrays[name] != 0)[2] for name in ("layer.int8/w", "layer.bool/w"))
    with Artifact(tmp_path / "file") as file:
        assert file.metadata == {"format": "np"}
    with pytest.raises(FileError, match=r"tensor 'layer\.\w+/w' \(3, 4\)"):
        jp.load(tmp_path / "file", max_bytes=10)


def test_plain_files_of_short_floats_are_read(tmp_path):
    library = pytest.importorskip("safetensors.flax")
    arrays = {
        name: jnp.asarray(pruned(RNG, name, (3, 4), 0.5)[0]) for name in DTYPES if name in ("bfloat16", "float8_e4m3fn")
    }
    library.save_file(arrays, tmp_path / "file")
    found = jp.load(tmp_path / "file")
    assert {name: bits_of(leaf) for name, leaf in found.items()} == {
        name: bits_of(leaf) for name, leaf in arrays.items()
    }


def test_the_library_reads_our_dense_tensors(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    names = [name for name in DTYPES if "float8" not in name and name != "bfloat16"]
    arrays = {f"a/{name}": pruned(RNG, name, (3, 4), 0.5)[0] for name in names} | {"scalar": np.array(3, np.float32)}
    jp.save(tmp_path / "file", arrays, encoding={"*": "dense"}, deflate=False)
    found = library.load_file(tmp_path / "file")
    assert {name: bits_of(leaf) for name, leaf in found.items()} == {
        name: bits_of(leaf) for name, leaf in arrays.items()
    }


def test_the_library_opens_every_file_of_ours(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    params = everything_file(tmp_path / "file")
    with safetensors.safe_open(tmp_path / "file", framework="np") as file, Artifact(tmp_path / "file") as ours:
        assert set(file.keys()) == set(params)
        assert json.loads(file.metadata()["jaxprune.user"]) == {"accuracy": 0.5}
        for name, record in ours.records.items():
            if record.dtype not in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
                assert file.get_tensor(name).nbytes == record.stored_bytes


def test_files_of_ours_without_their_mark_are_no_plain_ones(saved):
    for name in (b"jaxprune", b"jaxprune.tensors", b"jaxprune.user", b"jaxprune.crc32"):
        data = saved.read_bytes()
        (saved.parent / "other").write_bytes(data.replace(b'"' + name + b'"', b'"' + b"x" * len(name) + b'"'))
        with pytest.raises(FileError, match=r"has version|its description"):
            jp.load(saved.parent / "other")


def test_quantized_trees_come_back_through_like(tmp_path):
    leaves = {"a": [codebook(RNG, (8, 6), MASK)], "b": WEIGHTS}
    jp.save(tmp_path / "file", leaves)
    like = dequantize(leaves)
    found = jp.load(tmp_path / "file", like=like)
    assert jax.tree.structure(found) == jax.tree.structure(like)
    assert list(map(bits_of, jax.tree.leaves(found))) == list(map(bits_of, jax.tree.leaves(like)))
