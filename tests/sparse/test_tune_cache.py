"""What `tune` keeps in files: a second call measures nothing, whatever differs is measured."""

import concurrent.futures
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_helpers import make_leaf, make_x
from tune_helpers import PARAMS, install_clock, mlp, tune

from jaxprune import sparse
from jaxprune.sparse.tuning import cache, machine, race, timing, whole


@pytest.fixture
def clock(monkeypatch):
    return functools.partial(install_clock, monkeypatch)


def forbid(monkeypatch):
    def measured(*_, **__):
        raise AssertionError("Something was measured or compiled.")

    for module, name in [(timing, "interleaved"), (race, "compiled"), (whole, "compiled"), (race, "activations")]:
        monkeypatch.setattr(module, name, measured)


def test_a_second_call_measures_and_compiles_nothing(clock, monkeypatch, tmp_path):
    clock(bcsr=0.1, planned=0.5)
    first = tune(cache=tmp_path / "a" / "b")
    forbid(monkeypatch)
    assert tune(cache=tmp_path / "a" / "b") == first
    assert tune(cache=str(tmp_path / "a" / "b")) == first
    # Other values of as many non-zeros are the same model.
    assert tune(params=jax.tree.map(lambda leaf: 2 * leaf, PARAMS), cache=tmp_path / "a" / "b") == first


def test_a_model_that_stayed_dense_is_not_measured_again(clock, monkeypatch, tmp_path):
    clock(bcsr=0.1, planned=2.0)
    first = tune(cache=tmp_path)
    forbid(monkeypatch)
    assert tune(cache=tmp_path) == first


def test_without_a_cache_every_call_measures(clock):
    fake = clock(bcsr=0.1, planned=0.5)
    tune()
    tune()
    assert len(fake.races) == 6


OTHER = {
    "another batch": {"x": make_x((7, 32))},
    "another activation": {"fn": lambda params, x: jnp.sin(mlp(params, x))},
    "another number of zeros": {"params": PARAMS | {"b": {"kernel": make_leaf((48, 16), 0.5, "float32")}}},
    "other formats": {"formats": ["bcsr"]},
    "other repeats": {"repeats": 20},
    "another selection": {"select": ["a/kernel"]},
}


@pytest.mark.parametrize("what", OTHER)
def test_what_differs_is_measured(clock, tmp_path, what):
    fake = clock(bcsr=0.1, planned=0.5)
    tune(cache=tmp_path)
    before = len(fake.races)
    tune(cache=tmp_path, **OTHER[what])
    assert len(fake.races) > before


@pytest.mark.parametrize(
    ("name", "value"), [("processor", "other"), ("cores", 99), ("jaxlib", "9"), ("native", "avx9"), ("device", "x")]
)
def test_another_machine_measures_anew(clock, monkeypatch, tmp_path, name, value):
    fake = clock(bcsr=0.1, planned=0.5)
    tune(cache=tmp_path)
    here = machine.describe()
    monkeypatch.setattr(machine, "describe", lambda *_: here | {name: value})
    assert tune(cache=tmp_path).machine[name] == value
    assert len(fake.races) == 6


def test_sites_are_shared_between_models(clock, tmp_path):
    fake = clock(bcsr=0.1, planned=0.5)
    tune(cache=tmp_path)
    tune(lambda params, x: jnp.sin(mlp(params, x)), cache=tmp_path)
    assert fake.races[3:] == [["dense", "planned"]]


DAMAGE = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda _: "",
    "another type": lambda _: "[1, 2]",
    "no field": lambda _: "{}",
    "binary": lambda _: b"\xff\xfe\x00",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_measured_again(clock, tmp_path, damage):
    fake = clock(bcsr=0.1, planned=0.5)
    first = tune(cache=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    assert all(path.suffix == ".json" for path in files)
    for path in files:
        broken = DAMAGE[damage](path.read_text())
        path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    again = tune(cache=tmp_path)
    assert again.formats == first.formats
    assert len(fake.races) == 6
    assert sparse.Plan.from_json(again.to_json()) == again
    assert tune(cache=tmp_path) == again
    assert len(fake.races) == 6


def test_a_write_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(cache.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.write(tmp_path, "name", "text")
    assert list(tmp_path.iterdir()) == []


def test_the_least_recently_used_go(monkeypatch, tmp_path):
    for place, name in enumerate("abcd"):
        cache.write(tmp_path, name, "x" * 10)
        os.utime(tmp_path / f"{name}.json", (place, place))
    (tmp_path / ".left.tmp").write_text("half")
    os.utime(tmp_path / ".left.tmp", (0, 0))
    (tmp_path / ".young.tmp").write_text("another process writes")
    assert cache.read(tmp_path, "a") == "x" * 10  # and is the youngest now
    monkeypatch.setattr(cache, "MOST_BYTES", 20)
    cache.trim(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".young.tmp", "a.json", "d.json"]


def test_tune_keeps_its_folder_small(clock, monkeypatch, tmp_path):
    clock(bcsr=0.1, planned=0.5)
    monkeypatch.setattr(cache, "MOST_BYTES", 0)
    tune(cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_share_a_folder(monkeypatch, tmp_path):
    """Each writes, reads and trims what the others write, read and trim."""
    monkeypatch.setattr(cache, "MOST_BYTES", 1000)

    def work(seed):
        for name in np.random.default_rng(seed).integers(0, 20, 200):
            cache.write(tmp_path, f"{name}", "y" * 100)
            assert cache.read(tmp_path, f"{name}") in (None, "y" * 100)
            cache.trim(tmp_path)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000


def test_the_users_folder_is_looked_for_when_called(clock, monkeypatch, tmp_path):
    clock(bcsr=0.1, planned=0.5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tune(cache=True)
    assert sparse.user_cache() == tmp_path / "jaxprune" / "tune"
    assert len(list(sparse.user_cache().iterdir())) == 3
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    tune(cache=True)  # nowhere to keep it: measured all the same
    with pytest.raises(ValueError, match="cannot be made"):
        tune(cache=tmp_path / "file" / "folder")


def test_a_pattern_tells_blocks_from_draws():
    draw = np.random.default_rng(0).random((256, 256)) < 0.25
    blocks = np.kron(np.random.default_rng(0).random((16, 16)) < 0.25, np.ones((16, 16), bool))
    other = np.random.default_rng(1).permuted(draw.ravel()).reshape(draw.shape)
    assert cache.pattern(draw) == cache.pattern(other)
    assert cache.pattern(draw)["alive"] != cache.pattern(blocks)["alive"]
    assert cache.pattern(np.zeros((0, 3)))["nse"] == 0


def test_progress(clock):
    clock(bcsr=0.1, planned=0.5)
    seen = []
    tune(progress=lambda *report: seen.append(report))
    assert seen == [(0, 3, "a/kernel"), (1, 3, "b/kernel"), (2, 3, "model"), (3, 3, "model")]
