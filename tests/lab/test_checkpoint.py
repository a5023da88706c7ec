"""Checkpoints come back bit for bit, or say what is wrong; the newest are kept, and a damaged one is passed over."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from checkpoint_helpers import assert_is_step, assert_same, names, save_steps, state_of
from flax import nnx

from jaxprune.lab.checkpoints import manifest
from jaxprune.lab.checkpoints.checkpoint import CheckpointError, restore_latest, save


def files_of(path):
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


# ---------------------------------------------------------------- round trips

BITS = {
    "float32": np.array([0x80000000, 0x7FC12345, 0xFF812345, 0x00000001, 0x7F800000], np.uint32).view(np.float32),
    "float64": np.array([0x8000000000000000, 0x7FF0000000000123], np.uint64).view(np.float64),
    "float16": np.array([0x8000, 0x7E01, 0x7C01], np.uint16).view(np.float16),
    "bfloat16": np.array([[0x8000, 0x7FC1, 0xFF81]], np.uint16).view(ml_dtypes.bfloat16),
    "float8": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
    "int4": np.array([-8, 7, 0], ml_dtypes.int4),
    "uint4": np.array([15, 7, 0], ml_dtypes.uint4),
    "bool": np.array([True, False, True]),
    "uint32": np.array([2**32 - 1, 0], np.uint32),
    "int64": np.array(-(2**63)),
    "uint64": np.array([2**64 - 1], np.uint64),
    "complex64": np.array([complex(-0.0, np.nan)], np.complex64),
    "all negative zeros": np.full((3, 4), -0.0, np.float32),
    "one negative zero": np.array(-0.0, np.float32),
    "one bfloat16": np.array(-0.0, ml_dtypes.bfloat16),
    "one bool": np.array(True),
    "empty": np.zeros((0, 3), np.float32),
    "empty bfloat16": np.zeros((2, 0), ml_dtypes.bfloat16),
    "by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "every second": np.arange(10)[::2],
    "numpy scalar": np.float32(0.1),
    "large": np.random.default_rng(0).standard_normal((300, 400)).astype(np.float32),
}


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    save(tmp_path, 1, BITS, {})
    found, rejected = restore_latest(tmp_path, jax.tree.map(np.zeros_like, BITS) | {"numpy scalar": np.float32(0)})
    assert rejected == []
    assert_same(found.state, BITS)


def test_training_state_comes_back_as_it_was(tmp_path):
    class Stage(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 5, rngs=rngs)
            self.norm = nnx.BatchNorm(5, rngs=rngs)

    def make(seed):
        params = nnx.state(Stage(nnx.Rngs(seed)))
        tx = optax.inject_hyperparams(optax.adamw)(learning_rate=0.1 * (seed + 1))
        return {
            "params": params,
            "opt": tx.init(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(seed)), nnx.Param)),
            "masks": jax.tree.map(lambda x: x > 0, params),
            "key": jax.random.key(seed),
            "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
            "no keys": jax.random.split(jax.random.key(seed), 3)[:0],
            "bf16": jnp.full((3,), seed, jnp.bfloat16),
            "weak": jnp.asarray(1.5 * seed),
            "pinned": jax.device_put(jnp.arange(3), jax.devices()[-1]),
            "python": (3 * seed, 0.1 + seed, seed > 1, None),
        }

    state = make(7)
    save(tmp_path, 12, state, {"stage": "prune", "best": 0.1, "seen": [1, 2, {"x": None}]})
    found, _ = restore_latest(tmp_path, make(0))
    assert found.step == 12
    assert found.meta == {"stage": "prune", "best": 0.1, "seen": [1, 2, {"x": None}]}
    assert_same(found.state, state)
    assert found.state["weak"].weak_type
    assert not found.state["bf16"].weak_type
    assert found.state["pinned"].sharding == state["pinned"].sharding
    assert found.state["pinned"].committed
    assert not found.state["bf16"].committed
    assert jax.random.bits(found.state["key"]) == jax.random.bits(state["key"])


def test_sharded_arrays_come_back_sharded(tmp_path):
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    state = {"w": jax.device_put(jnp.arange(16.0), sharding)}
    save(tmp_path, 1, state, {})
    found, _ = restore_latest(tmp_path, {"w": jax.device_put(jnp.zeros(16), sharding)})
    assert found.state["w"].sharding == sharding
    assert_same(found.state, state)


def test_shapes_will_do_as_template_and_an_empty_state_is_a_state(tmp_path):
    save(tmp_path / "a", 1, {"w": np.ones((2, 3), np.float32)}, {})
    found, _ = restore_latest(tmp_path / "a", {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)})
    assert isinstance(found.state["w"], jax.Array)
    save(tmp_path / "b", 0, {"w": None}, {"x": 1})
    assert restore_latest(tmp_path / "b", {"w": None}) == ((0, {"w": None}, {"x": 1}), [])


def test_plain_orbax_reads_the_arrays(tmp_path):
    import orbax.checkpoint as ocp

    path = save(tmp_path, 3, {"a": {"w": np.ones((2, 3), np.float32)}}, {})
    assert names(path) == ["manifest.json", "state"]
    logging.getLogger("absl").setLevel(logging.ERROR)
    found = ocp.PyTreeCheckpointer().restore(path / "state", restore_args={"0000.a.w": ocp.RestoreArgs(np.ndarray)})
    np.testing.assert_array_equal(found["0000.a.w"], np.ones((2, 3)))


# ---------------------------------------------------------------- keeping


def test_the_newest_are_kept_and_stale_temporaries_are_cleared(tmp_path):
    (tmp_path / ".tmp-00000002" / "state").mkdir(parents=True)
    save_steps(tmp_path, 1, 20, 300, keep=2)
    assert names(tmp_path) == ["00000020", "00000300"]
    save_steps(tmp_path, 300, keep=2)
    assert names(tmp_path) == ["00000020", "00000300"]


def test_after_going_back_the_new_checkpoint_outlives_the_damaged_later_ones(tmp_path):
    save_steps(tmp_path, 100, 200, 300)
    for later in ("00000200", "00000300"):
        (tmp_path / later / "manifest.json").unlink()
    save_steps(tmp_path, 150, keep=1)
    assert names(tmp_path) == ["00000150", "00000200", "00000300"]
    found, rejected = restore_latest(tmp_path, state_of(0))
    assert_is_step(found, 150)
    assert len(rejected) == 2
    save_steps(tmp_path, 200, 300, keep=1)
    assert names(tmp_path) == ["00000300"]


def test_nothing_there_is_no_error(tmp_path):
    assert restore_latest(tmp_path / "none", state_of(0)) == (None, [])
    (tmp_path / ".tmp-00000001").mkdir()
    (tmp_path / "notes").mkdir()
    assert restore_latest(tmp_path, state_of(0)) == (None, [])


def test_a_replacement_cut_short_between_its_renames_is_taken_back(tmp_path):
    save_steps(tmp_path, 5)
    os.replace(tmp_path / "00000005", tmp_path / ".old-00000005")
    assert_is_step(restore_latest(tmp_path, state_of(0))[0], 5)
    save_steps(tmp_path, 6)
    assert names(tmp_path) == ["00000005", "00000006"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: save(f, -1, {}, {}), ValueError, "`step` must be at least 0 .* got -1 and 2"),
        (lambda f: save(f, 1, {}, {}, keep=0), ValueError, "`keep` at least 1"),
        (lambda f: save(f, 1, {"a": {"name": "x"}}, {}), TypeError, "Leaf 'a/name' is a str, a numeric array was"),
        (lambda f: save(f, 1, {"a": np.array(["x"])}, {}), TypeError, "Leaf 'a' is a ndarray of <U1"),
        (lambda f: save(f, 1, {}, {"a": (1, 2)}), TypeError, "comes back changed: use lists for tuples"),
        (lambda f: save(f, 1, {}, {"a": np.float32(1)}), TypeError, "`meta` must be plain JSON: .*float32"),
        (lambda f: save(f, 1, {}, {"loss": float("nan")}), TypeError, "`meta` must be plain JSON: Out of range float"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path)
    assert names(tmp_path) == []


# ---------------------------------------------------------------- damage


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "flipped": (flip, "is damaged: its .*sha256|is torn"),
    "truncated": (lambda file: os.truncate(file, file.stat().st_size - 1), r"has \d+ bytes, \d+ expected|is torn"),
    "emptied": (lambda file: os.truncate(file, 0), "has 0 bytes|is torn"),
    "deleted": (Path.unlink, "is missing"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "cannot be read: Is a directory"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_named_and_the_one_before_is_used(tmp_path, damage):
    harm, message = DAMAGE[damage]
    save_steps(tmp_path, 100, 200)
    shutil.copytree(tmp_path / "00000200", tmp_path / "whole")
    files = files_of(tmp_path / "whole")
    assert "manifest.json" in files
    assert len(files) > 5
    for name in files:
        harm(tmp_path / "00000200" / name)
        found, rejected = restore_latest(tmp_path, state_of(0))
        assert_is_step(found, 100)
        assert len(rejected) == 1
        assert rejected[0].startswith(f"00000200: file {name} ")
        assert re.search(message, rejected[0]), rejected[0]
        shutil.rmtree(tmp_path / "00000200")
        shutil.copytree(tmp_path / "whole", tmp_path / "00000200")
    assert_is_step(restore_latest(tmp_path, state_of(0))[0], 200)


def parsed(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_any_altered_byte_of_the_manifest_is_seen(tmp_path):
    save_steps(tmp_path, 100)
    file = tmp_path / "00000100" / "manifest.json"
    whole = file.read_bytes()
    for position in range(0, len(whole), 7):
        for bit in (0, 4):
            data = bytearray(whole)
            data[position] ^= 1 << bit
            file.write_bytes(data)
            if json.loads(whole) == parsed(data):  # white space for white space
                assert_is_step(restore_latest(tmp_path, state_of(0))[0], 100)
                continue
            with pytest.raises(CheckpointError, match=r"00000100: file manifest\.json is (torn|damaged)"):
                restore_latest(tmp_path, state_of(0))


def test_all_damaged_names_each(tmp_path):
    save_steps(tmp_path, 100, 200)
    (tmp_path / "00000100" / "manifest.json").unlink()
    os.truncate(tmp_path / "00000200" / "manifest.json", 40)
    with pytest.raises(
        CheckpointError, match=r"00000200: file manifest.json is torn.*00000100: file manifest.json is mi"
    ):
        restore_latest(tmp_path, state_of(0))
    assert names(tmp_path) == ["00000100", "00000200"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.zeros((50, 31), np.float32)}, r"leaf 2 is 'w' float32\[50, 30\], 'w' float32\[50, 31\] expected"),
        ({"w": np.zeros((50, 30))}, r"leaf 2 is 'w' float32\[50, 30\], 'w' float64\[50, 30\] expected"),
        ({"x": np.zeros(2)}, r"leaf 3 is no leaf, 'x' float64\[2\] expected \(3 leaves, 4 expected\)"),
        ({"a": np.zeros(2)}, r"leaf 0 is 'mask' bool\[9\], 'a' float64\[2\] expected"),
    ],
)
def test_another_config_is_not_called_damaged(tmp_path, change, message):
    save_steps(tmp_path, 100, 200)
    with pytest.raises(CheckpointError, match="00000200 was written by another model or config: " + message):
        restore_latest(tmp_path, state_of(0) | change)
    with pytest.raises(CheckpointError, match=r"leaf 1 is 'step' int64\[\], no leaf expected \(3 leaves, 1 expected\)"):
        restore_latest(tmp_path, {"mask": state_of(0)["mask"]})


def test_a_newer_version_is_refused_with_its_number(tmp_path, monkeypatch):
    save_steps(tmp_path, 100)
    with monkeypatch.context() as future:
        future.setattr(manifest, "VERSION", 7)
        save_steps(tmp_path, 200)
    with pytest.raises(CheckpointError, match=r"00000200: manifest.json has version 7, this jaxprune reads version 1"):
        restore_latest(tmp_path, state_of(0))
    # A version that somebody changed by hand is damage, with the number all the same.
    file = tmp_path / "00000100" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 9}))
    shutil.rmtree(tmp_path / "00000200")
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged.*version 9, this"):
        restore_latest(tmp_path, state_of(0))
