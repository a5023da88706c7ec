"""Files and folders of version 0.1 still open: `tests/golden` was written by it, and is never written anew."""

import json
import shutil
from pathlib import Path

import pytest
from lab_helpers import StopAt
from storage_helpers import bits_of, everything

import jaxprune as jp
from jaxprune.lab.bench.whole import of_run
from jaxprune.lab.checkpoints import checkpoint
from jaxprune.lab.recipe import config
from jaxprune.lab.runs import run
from jaxprune.quantize.codes import dequantize, is_quantized
from jaxprune.storage import Artifact

GOLDEN = Path(__file__).parents[1] / "golden"
RELAXED = pytest.mark.usefixtures("relaxed", "quick")


def test_an_artifact_of_every_encoding_opens():
    params, _ = everything()
    found, masks = (jp.load(GOLDEN / "everything.jaxprune", to=kind) for kind in ("quantized", "masks"))
    assert found.keys() == params.keys()
    for name, leaf in params.items():
        assert bits_of(dequantize(found[name])) == bits_of(dequantize(leaf))
        if is_quantized(leaf):
            assert bits_of(found[name].codes) == bits_of(leaf.codes)
            assert bits_of(masks[name]) == bits_of(leaf.alive)
    with Artifact(GOLDEN / "everything.jaxprune") as file:
        assert file.metadata == {"accuracy": 0.5}


def test_leaves_of_a_checkpoint_open():
    leaves = checkpoint.read_leaves(GOLDEN / "run" / "seed_0" / "prune")
    manifest = json.loads((GOLDEN / "run/seed_0/prune/00000002/manifest.json").read_text())
    assert list(leaves) == [leaf["name"] for leaf in manifest["leaves"]]
    assert leaves["step"] == 2


@RELAXED
def test_a_run_that_was_stopped_goes_on(tmp_path):
    """From its last checkpoints: no step of the dense training is done again."""
    folder = tmp_path / "run"
    shutil.copytree(GOLDEN / "run", folder)
    trained = json.loads((folder / "metrics.jsonl").read_text())
    results = run.run(config.load(folder / "config.toml"), folder, "a command", watcher := StopAt())
    assert watcher.steps[0] == ("prune", 3)
    assert {stage for stage, _ in watcher.steps} == {"prune", "finetune"}
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) == trained
    assert results["hash"] == "ceab6967"
    assert of_run(folder).params.keys() == {"layers"}
