"""Small experiments, ways to stop them, and what two runs are compared by; shared by the tests of the lab."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from quick import QUICK

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab.checkpoints import flat, orbax_files
from jaxprune.lab.recipe import config
from jaxprune.lab.runs import stages

# 64 samples a step, 20 steps an epoch: 40 + 25 + 20 steps, saved 12 times. The ramp ends at step 21, between saves.
TINY = """
name = "tiny"
[model]
widths = [16]
[train]
duration = "2 epochs"
learning_rate = 1e-2
[prune]
how = "gradual"
sparsity = 0.8
duration = "25 steps"
update_every = "7 steps"
[finetune]
duration = "1 epoch"
[checkpoint]
every = "9 steps"
"""
STAGES = {"train": 40, "prune": 25, "finetune": 20}

# `python -c DRIVER how argument jaxprune's own words...`: the command line, with an accident built in.
DRIVER = """
import os, resource, signal, sys, threading
from jaxprune.lab.commands import main as cli
from jaxprune.lab.checkpoints import checkpoint

how, argument, *words = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have been told to ignore it
saving, calls, real_save = [], [], checkpoint.save

def die():
    os.kill(os.getpid(), signal.SIGINT if how == "interrupt" else signal.SIGKILL)

def save(*args, **kwargs):
    saving.append(1)
    if how == "full" and len(saving) == int(argument):  # no file may grow beyond this from here on
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
    try:
        if how in ("arrays", "interrupt"):  # save N, after so many milliseconds: TensorStore writes from threads of C++
            nth, after = argument.split("@")
            if len(saving) == int(nth):
                threading.Timer(float(after) / 1000, die).start()
        calls.append(None)
        return real_save(*args, **kwargs)
    finally:
        calls.pop()
        if how == "arrays" and len(saving) == int(argument.split("@")[0]):
            die()  # the save was faster than the timer: the last moment in it

def counted(real):
    def call(*args, **kwargs):
        if calls:
            seen.append(1)
            if len(seen) == int(argument):
                die()
        return real(*args, **kwargs)
    return call

seen = []
checkpoint.save = save
if how in ("fsync", "replace"):  # before the N-th of them inside a save
    setattr(os, how, counted(getattr(os, how)))
sys.exit(cli.main(words))
"""


def write_config(folder, text=TINY):
    path = Path(folder) / "tiny.toml"
    path.write_text(text)
    return path


def tiny(folder, *overrides):
    """The tiny config, with overrides of the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    return config.load(write_config(folder), overrides)


class Stopped(Exception):
    """An accident at a chosen step."""


class StopAt(stages.Watcher):
    """Remembers what it is told; raises at a step of a stage, if one is given."""

    def __init__(self, stage=None, step=None):
        self.at, self.now, self.stages, self.notes, self.steps = (stage, step), None, [], [], []

    def stage(self, seed, name, steps):
        self.now = name
        self.stages.append((seed, name, steps))

    def step(self, step):
        self.steps.append((self.now, step))
        if (self.now, step) == self.at:
            raise Stopped

    def note(self, text):
        self.notes.append(text)


def spawn(words, cache, how="none", argument="0"):
    """`jaxprune words...` in a process of its own, perhaps with an accident; its programs come from `cache`."""
    environment = os.environ | {
        "XLA_FLAGS": " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items()),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "COLUMNS": "120",
    }
    command = [sys.executable, "-c", DRIVER, how, str(argument), *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, timeout=120):
    """Exit code, standard output and standard error of a process of `spawn`, which must end by itself."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def checkpoints(stage):
    return sorted(path for path in stage.iterdir() if path.name.isdigit()) if stage.is_dir() else []


def arrays_of(path):
    """Leaf name -> array of one checkpoint."""
    leaves = [flat.Leaf(**leaf) for leaf in json.loads((path / "manifest.json").read_text())["leaves"]]
    keys = flat.keys(leaves)
    arrays = orbax_files.read_arrays(path / "state", filter(None, keys))
    return {leaf.name: arrays[key] for leaf, key in zip(leaves, keys, strict=True) if key}


def last_arrays(folder):
    """{"seed_0/train": leaf name -> array} of the last checkpoint of every stage."""
    stages = sorted(path for path in folder.glob("seed_*/*") if path.is_dir())
    return {stage.relative_to(folder).as_posix(): arrays_of(checkpoints(stage)[-1]) for stage in stages}


def results_of(folder):
    """results.json without what differs from one call to the next: times, and the command's paths."""
    results = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in results.items() if key not in ("started", "finished", "seconds", "command")}


def metrics_of(folder):
    """The lines of metrics.jsonl, without the time they took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(folder, reference):
    """Params, optimizer state and masks of every stage to the bit, metrics and results to the digit."""
    ours, theirs = last_arrays(folder), last_arrays(reference)
    assert ours.keys() == theirs.keys()
    for stage, leaves in theirs.items():
        assert ours[stage].keys() == leaves.keys()
        different = [name for name, array in leaves.items() if ours[stage][name].tobytes() != array.tobytes()]
        assert not different, (stage, different)
    assert metrics_of(folder) == metrics_of(reference)
    assert results_of(folder) == results_of(reference)


def params_and_masks(arrays):
    """Leaf name -> array and mask, from a checkpoint of a stage that prunes or keeps zeros."""
    params = {name.removeprefix("params/"): a for name, a in arrays.items() if name.startswith("params/")}
    masks = {name.split("/masks/")[1]: a for name, a in arrays.items() if "/masks/" in name}
    assert params.keys() == masks.keys()
    return params, masks


def assert_complete(folder, results, seeds=(0,)):
    """Everything a finished run has, and that it agrees with itself."""
    assert json.loads((folder / "results.json").read_text()) == results
    for model in ("dense", "pruned", "finetuned", "sparse"):
        values = results["accuracy"][model]["values"]
        assert len(values) == len(seeds)
        assert all(0 <= value <= 1 for value in values)
        assert results["accuracy"][model]["mean"] == pytest.approx(np.mean(values))
    assert results["accuracy"]["sparse"] == results["accuracy"]["finetuned"]
    assert results["sparse"]["agreement"]["values"] == [1.0] * len(seeds)
    assert results["seeds"] == list(seeds)

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for seed in seeds:
        ours = [(line["step"], list(STAGES).index(line["stage"])) for line in lines if line["seed"] == seed]
        assert ours == sorted(ours)
        assert {stage for _, stage in ours} == {0, 1, 2}
        masks = params_and_masks(arrays_of(checkpoints(folder / f"seed_{seed}/prune")[-1]))[1]
        params, kept = params_and_masks(arrays_of(checkpoints(folder / f"seed_{seed}/finetune")[-1]))
        for name, mask in masks.items():
            assert np.array_equal(mask, kept[name]), name
            assert not params[name][~mask].any(), name
            assert not np.signbit(params[name][~mask]).any(), name  # the zero is +0
            assert name.endswith("bias") or params[name][mask].all(), name  # and nothing else is zero
        leaves = {leaf["name"]: leaf for leaf in results["leaves"]}
        if seed == seeds[0]:
            assert {name: int(mask.sum()) for name, mask in masks.items()} == {n: x["nnz"] for n, x in leaves.items()}

    page = (folder / "report.html").read_text()
    assert "tiny" in page
    assert len(page) > 10_000
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)[^"']+|@import|url\((?!["']?data:)""", page)
    for seed, size in zip(seeds, results["artifact"]["bytes"]["values"], strict=True):
        path = folder / f"seed_{seed}" / "model.jaxprune"
        loaded = tree.named_leaves(jp.load(path))  # to the bit what was fine-tuned, and its masks
        params, kept = params_and_masks(arrays_of(checkpoints(folder / f"seed_{seed}/finetune")[-1]))
        assert {n: np.asarray(x).tobytes() for n, x in loaded.items()} == {n: x.tobytes() for n, x in params.items()}
        assert all(np.array_equal(kept[n], mask) for n, mask in tree.named_leaves(jp.load(path, to="masks")).items())
        assert path.stat().st_size == size
    assert results["artifact"]["accuracy"] == results["accuracy"]["finetuned"]
    pictures = sorted((folder / "figures").iterdir())
    assert [picture.name for picture in pictures] == [
        "leaf_sparsity.png",
        "storage.png",
        "training_curve.png",
        "weight_histograms.png",
    ]
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert base64.b64encode(picture.read_bytes()).decode() in page
    assert {"jax", "python", "processor"} <= json.loads((folder / "machine.json").read_text()).keys()
    assert not list(folder.rglob(".tmp-*"))


def bits(tree):
    return [array.tobytes() for array in flat.to_arrays(tree).values()]
