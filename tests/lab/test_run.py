"""A run: every way to prune ends with a complete folder; nothing is done twice; what is not ours is refused."""

import errno
import fcntl
import io
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab_helpers import (
    STAGES,
    StopAt,
    Stopped,
    arrays_of,
    assert_complete,
    assert_same_run,
    checkpoints,
    last_arrays,
    metrics_of,
    params_and_masks,
    tiny,
    write_config,
)

import jaxprune as jp
from jaxprune.lab import models
from jaxprune.lab.checkpoints import checkpoint, orbax_files
from jaxprune.lab.commands import main as cli
from jaxprune.lab.data import sets
from jaxprune.lab.data.samples import samples_of
from jaxprune.lab.recipe import build, words
from jaxprune.lab.recipe.config import ConfigError
from jaxprune.lab.report import publish, wording
from jaxprune.lab.runs import evidence, machine, run, stages, store
from jaxprune.lab.runs.run import RunError

pytestmark = pytest.mark.usefixtures("relaxed", "quick")  # optax itself promotes


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run of the tiny config that nothing happened to; not to be changed."""
    folder = tmp_path_factory.mktemp("reference")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run.run(tiny(folder), folder / "run", "jaxprune run tiny.toml", watcher := StopAt())
    assert watcher.stages == [(0, name, steps) for name, steps in STAGES.items()]
    assert watcher.notes == []
    return folder / "run"


def go(folder, *overrides, watcher=None):
    """Run the tiny config in `folder`/run; returns that folder and its results."""
    results = run.run(tiny(folder, *overrides), folder / "run", "a command", watcher)
    return folder / "run", results


def stopped(folder, stage, step, *overrides):
    with pytest.raises(Stopped):
        go(folder, *overrides, watcher=StopAt(stage, step))
    return folder / "run"


# ---------------------------------------------------------------- what there is


def sparsities(results):
    return {leaf["name"]: leaf["sparsity"] for leaf in results["leaves"] if leaf["name"].endswith("kernel")}


def test_the_reference_is_complete(reference):
    results = json.loads((reference / "results.json").read_text())
    assert_complete(reference, results)
    # 64 x 16 and 16 x 10 weights compete; the ramp ends at exactly 80 % of them
    assert results["sparsity"]["values"] == pytest.approx([round(1184 * 0.8) / 1184])
    assert [line["step"] for line in metrics_of(reference)] == [20, 40, 60, 65, 85]
    assert results["accuracy"]["dense"]["mean"] > 0.5
    assert (results["macs"]["dense"], results["macs"]["left"]["values"]) == (1184, [1184 - round(1184 * 0.8)])
    assert results["dataset"] == {"name": "digits", "train": 1437 - 144, "validation": 144, "test": 360}
    assert results["sparse"]["dense_bytes"] == 4 * (64 * 16 + 16 + 16 * 10 + 10)


PRUNE = {
    "iterative taylor": [
        "--prune", "{how = 'iterative', sparsity = 0.9, rounds = 3, duration = '6 steps', criterion = 'taylor'}"
    ],
    "random gradual": ["--prune.criterion", "random", "--prune.distribution", "uniform"],
    "wanda": ["--prune", "{preset = 'wanda', sparsity = 0.5}"],
    "threshold": ["--prune", "{distribution = {name = 'threshold', t = 0.2}}"],
    "by rule, adamw, bcsr": [
        "--prune", "{distribution = {name = 'by_rule', rules = {'layers/0/*' = 0.75, '*' = {name = 'nm',"
        "n = 1, m = 2}}}}",
        "--finetune.optimizer", "adamw", "--finetune.weight_decay", "0.01", "--sparse.format", "bcsr",
    ],
}  # fmt: skip
EXPECTED = {  # sparsity of the 64 x 16 and of the 16 x 10 kernel, where it is known beforehand
    "random gradual": (round(1024 * 0.8) / 1024, 0.8), "by rule, adamw, bcsr": (0.75, 0.5),
    "wanda": (0.5, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", PRUNE)
def test_every_way_to_prune_leaves_a_complete_folder(tmp_path, name):
    folder, results = go(tmp_path, *PRUNE[name])
    assert_complete(folder, results)
    found = sparsities(results)
    if name in EXPECTED:
        assert tuple(found.values()) == pytest.approx(EXPECTED[name])
    if name == "iterative taylor":
        assert results["sparsity"]["mean"] == pytest.approx(round(1184 * 0.9) / 1184)
    if name == "threshold":  # one shot, so exactly the small ones of the dense model are gone
        dense = last_arrays(folder)["seed_0/train"]
        masks = params_and_masks(last_arrays(folder)["seed_0/prune"])[1]
        for kernel in found:
            assert np.array_equal(masks[kernel], np.abs(dense[f"params/{kernel}"]) >= np.float32(0.2))
    assert results["sparse"]["format"] == ("bcsr" if "bcsr" in name else "bcoo")


def test_rounds_look_at_activations(tmp_path):
    rounds = "preset = 'apoz', how = 'iterative', rounds = 2, duration = '6 steps', sparsity = 0.5"
    _, results = go(tmp_path, "--prune", f"{{{rounds}, select = ['layers/0/kernel']}}")
    assert tuple(sparsities(results).values()) == pytest.approx((0.5, 0))


def test_two_seeds_no_validation_no_finetuning(tmp_path):
    words = ["--seeds", "[3, 1]", "--data.validation", "0.0", "--finetune.duration", "0 epochs"]
    folder, results = go(tmp_path, *words)
    assert_complete(folder, results, seeds=(3, 1))
    first, second = (json.loads((folder / f"seed_{seed}/result.json").read_text()) for seed in (3, 1))
    assert results["accuracy"]["dense"]["values"] == [first["accuracy"]["dense"], second["accuracy"]["dense"]]
    assert results["accuracy"]["dense"]["std"] == pytest.approx(np.std(results["accuracy"]["dense"]["values"], ddof=1))
    assert results["accuracy"]["pruned"] == results["accuracy"]["finetuned"]
    arrays = last_arrays(folder)
    kernels = [arrays[f"seed_{seed}/train"]["params/layers/0/kernel"] for seed in (3, 1)]
    assert not np.array_equal(*kernels)
    assert {line["validation_accuracy"] for line in metrics_of(folder)} == {None}
    # a seed is what it is, whatever others there are: killed in the second, it ends the same
    watcher = StopAt("prune", 11)
    watcher.step = lambda step: watcher.stages[-1][:2] == (1, "prune") and StopAt.step(watcher, step)
    with pytest.raises(Stopped):
        go(tmp_path / "again", *words, watcher=watcher)
    assert_same_run(go(tmp_path / "again", *words)[0], folder)


def test_a_seed_alone_is_the_seed_among_others(tmp_path, reference):
    folder, _ = go(tmp_path, "--seeds", "[5, 0]", "--checkpoint.every", "1 epoch")
    ours, theirs = last_arrays(folder), last_arrays(reference)
    for stage in STAGES:
        for name, array in theirs[f"seed_0/{stage}"].items():
            assert ours[f"seed_0/{stage}"][name].tobytes() == array.tobytes(), (stage, name)


def test_convolutions_stay_dense_when_stored_sparse(tmp_path):
    rng = np.random.default_rng(0)
    params = {
        "conv": jnp.asarray(rng.normal(size=(3, 3, 1, 2)), jnp.float32),
        "fc": jnp.asarray(rng.normal(size=(128, 10)), jnp.float32),
    }
    masks = jp.compute_masks(jp.Method(), params, 0.9)
    params = jp.apply_masks(params, masks)

    def apply(params, images, key=None):
        x = jax.lax.conv_general_dilated(
            images, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x.reshape(x.shape[0], -1) @ params["fc"]

    times = [("train", 1.0, 1.5), ("train", 2.0, 2), ("prune", 0.5, 4), ("prune", 0.5, 8)]
    records = [{"stage": stage, "epoch": epoch, "seconds": seconds} for stage, epoch, seconds in times]
    network = models.Network(params, apply)
    done = stages.SeedRun(network, *(params,) * 3, store.Stored(apply, params, masks), masks, 0.5, records, [])
    result = run._seed_result(tiny(tmp_path), 0, sets.load("digits"), done, tmp_path)
    stored = {leaf["name"]: (leaf["bytes"], leaf["sparse_bytes"]) for leaf in result["leaves"]}
    assert stored["conv"][0] == stored["conv"][1] == 72
    assert stored["fc"][0] == 5120 > stored["fc"][1]
    assert result["agreement"] == 1.0
    assert result["seconds"] == 2 + 4 + 8  # records count from the beginning of the stage, or of the round


# ---------------------------------------------------------------- once is enough


def test_a_finished_run_is_shown_and_not_touched(tmp_path, reference):
    folder = shutil.copytree(reference, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    watcher = StopAt()
    assert go(tmp_path, watcher=watcher)[1] == json.loads((folder / "results.json").read_text())
    assert watcher.stages == []
    assert "is finished" in watcher.notes[0]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"} == before

    # what is derived is made again from the checkpoints, without a step of training
    (folder / "results.json").unlink()
    (folder / "report.html").unlink()
    (folder / "figures" / "training_curve.png").unlink()
    watcher = StopAt()
    go(tmp_path, watcher=watcher)
    assert watcher.steps == []
    assert_same_run(folder, reference)
    assert_complete(folder, json.loads((folder / "results.json").read_text()))


def test_stopped_and_taken_up_again_it_ends_bit_identical(tmp_path, reference):
    for stage, step in (("train", 40), ("prune", 8), ("finetune", 19)):
        stopped(tmp_path, stage, step)
        assert not (tmp_path / "run" / "results.json").exists()
    assert_same_run(go(tmp_path)[0], reference)


# ---------------------------------------------------------------- what cannot be used


def test_a_folder_of_another_config_is_refused(tmp_path):
    folder = stopped(tmp_path, "train", 1)
    text = (folder / "config.toml").read_text()
    with pytest.raises(RunError, match=r"run was written by another config \(its hash is \w{8}, .*--out"):
        go(tmp_path, "--prune.sparsity", "0.7")
    assert (folder / "config.toml").read_text() == text
    # how often it is saved changes no result
    stopped(tmp_path, "train", 12, "--checkpoint.every", "5 steps")
    assert checkpoints(folder / "seed_0/train")[-1].name == "00000010"


@pytest.mark.parametrize("name", ["thesis.txt", "results.json"])
def test_a_foreign_folder_is_refused(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(RunError, match=r"is no run folder\. Choose another with --out"):
        go(tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_two_processes_at_once_are_refused(tmp_path):
    folder = stopped(tmp_path, "train", 1)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="Another process is running"):
            go(tmp_path)

    class Second(stages.Watcher):
        def stage(self, seed, name, steps):
            with pytest.raises(RunError, match="Another process is running"):
                go(tmp_path)
            raise Stopped

    with pytest.raises(Stopped):
        go(tmp_path, watcher=Second())
    stopped(tmp_path, "train", 2)  # the lock goes with its holder


@pytest.mark.parametrize("duration", ["0 steps", "0.01 epochs"])
def test_pruning_in_no_steps_is_refused_before_anything_is_trained(tmp_path, duration):
    watcher = StopAt()
    with pytest.raises(ConfigError, match=r"prune\.duration.* comes to 0 steps"):
        go(tmp_path, "--prune.duration", duration, watcher=watcher)
    assert watcher.stages == []


# ---------------------------------------------------------------- damage and full disks


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """A run that was stopped while it pruned; not to be changed."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return stopped(tmp_path_factory.mktemp("halfway"), "prune", 20)


@pytest.mark.parametrize("stage", ["train", "prune"])
def test_a_damaged_checkpoint_is_named_and_the_run_ends_the_same(tmp_path, reference, halfway, stage):
    folder = shutil.copytree(halfway, tmp_path / "run")
    last = checkpoints(folder / "seed_0" / stage)[-1]
    sets = max((last / "state").rglob("*"), key=lambda path: path.stat().st_size)
    sets.write_bytes(sets.read_bytes()[:-1])
    watcher = StopAt()
    go(tmp_path, watcher=watcher)
    assert len(watcher.notes) == 1
    assert f"seed_0/{stage} passed over: {last.name}: file {sets.relative_to(last)} has" in watcher.notes[0]
    assert_same_run(folder, reference)


def test_a_run_of_damaged_checkpoints_alone_says_so(tmp_path):
    folder = stopped(tmp_path, "train", 20)
    for path in checkpoints(folder / "seed_0/train"):
        (path / "manifest.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"00000018: file manifest.json is missing.*delete the folder"):
        go(tmp_path)


def test_a_full_disk_leaves_no_torn_file(tmp_path, monkeypatch, reference):
    """A file that is half written, by a full disk or a kill, would stop the run for good."""
    real, config = type(tmp_path).open, tiny(tmp_path)

    class Full(io.FileIO):
        def write(self, data):
            super().write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(self, mode="r", *args, **kwargs):
        return Full(self, mode) if "x" in mode and name in self.name else real(self, mode, *args, **kwargs)

    for name in ("config.toml", "machine.json", "results.json"):  # in the order in which they are written
        with monkeypatch.context() as patch:
            patch.setattr(type(tmp_path), "open", opened)
            with pytest.raises(OSError, match="No space left"):
                run.run(config, tmp_path / "run", "a command")
        assert not (tmp_path / "run" / name).exists()
    assert_same_run(go(tmp_path)[0], reference)
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_full_disk_is_one_line_and_the_old_checkpoint_survives(tmp_path, monkeypatch, capsys, reference):
    command = ["run", str(write_config(tmp_path)), "--out", str(tmp_path / "run"), "--quiet"]
    real, room = orbax_files.save, []

    def write(*args):
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        room.pop()
        return real(*args)

    for fits, last in ((0, []), (6, ["prune/00000009"])):  # training saves 9, 18, 27, 36 and 40
        room += range(fits)
        with monkeypatch.context() as patch:
            patch.setattr(orbax_files, "save", write)
            assert cli.main(command) == 1
        [said] = capsys.readouterr().err.splitlines()
        assert re.search(r"jaxprune: .* could not be written: No space left on device", said)
        assert all(arrays_of(tmp_path / "run" / "seed_0" / name) for name in last)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert cli.main(command) == 0
    assert_same_run(tmp_path / "run", reference)


# ---------------------------------------------------------------- small parts


def test_another_machine_is_noted(tmp_path):
    notes, path = [], tmp_path / "machine.json"
    machine.record(path, notes.append)
    machine.record(path, notes.append)
    assert notes == []
    path.write_text(path.read_text().replace(f'"jax": "{jax.__version__}"', '"jax": "0.0.1"'))
    machine.record(path, notes.append)
    assert f"jax 0.0.1 -> {jax.__version__}" in notes[0]
    assert notes[0].count("->") == 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="a process has all cores here")
def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for cores, said in ((range(8), "8"), ((5,), "1 of 8")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(cores))
        assert machine.describe()["cores"] == said


def test_other_flags_are_noted_unless_none_were_written_down(tmp_path, monkeypatch):
    notes, path = [], tmp_path / "machine.json"
    machine.record(path, notes.append)
    then = json.loads(path.read_text())["xla_flags"]
    monkeypatch.setenv("XLA_FLAGS", "--other")
    machine.record(path, notes.append)
    assert notes.pop().endswith(f"xla_flags {then} -> --other.")
    path.write_text(json.dumps({"jax": jax.__version__}))
    machine.record(path, notes.append)
    assert notes == []


def test_spread_is_that_of_a_sample():
    assert wording.spread([1.0]) == {"mean": 1.0, "std": 0.0, "values": [1.0]}
    assert wording.spread([1.0, 3.0])["std"] == pytest.approx(np.sqrt(2))


def test_histograms_show_the_pruned_leaves():
    masks = {"a": jnp.asarray([True, False]), "b": jnp.asarray([True, True])}
    params = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray([3.0, 4.0])}
    assert publish.histogram_weights({"dense": params}, masks)["dense"].tolist() == [1, 2]
    everything = jp.nonzero_masks(params)
    assert publish.histogram_weights({"dense": params}, everything)["dense"].tolist() == [1, 2, 3, 4]


def test_a_run_computes_all_evidence_that_it_says_it_has():
    def looks_at_all(
        params, *, grads, hessian_grads, flow_grads, squared_grads, input_norms, input_means, input_zero_fractions,
        output_means, zero_fractions, scales, key,
    ):  # fmt: skip
        """Not called."""

    assert words.looks_at(looks_at_all) == {*build.EVIDENCE, "key"}
    params, key = {"kernel": jnp.ones((4, 3)), "scale": jnp.ones(3)}, jax.random.key(0)

    def apply(params, images, key=None):
        return images.reshape(images.shape[0], -1) @ params["kernel"] * params["scale"]

    samples = samples_of(np.ones((5, 2, 2, 1), np.uint8), np.arange(5, dtype=np.int32) % 3, 1.0)
    found = evidence.of(jp.Method(looks_at_all), apply, params, samples, key)
    assert found.pop("key") is key
    shapes = {word: {"kernel": (4,) if word.startswith("input") else (3,)} for word in build.ACTIVATIONS}
    shapes |= {word: {"kernel": (4, 3), "scale": (3,)} for word in build.DERIVATIVES}
    assert {name: jax.tree.map(jnp.shape, one) for name, one in found.items()} == shapes
