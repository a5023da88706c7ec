"""Storing a run: the file is what was measured, small, exact, and the same after a kill; [store] means what it says."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab_helpers import (
    STAGES,
    TINY,
    StopAt,
    Stopped,
    assert_same_run,
    last_arrays,
    metrics_of,
    params_and_masks,
)

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab.data import sets
from jaxprune.lab.data.samples import samples_of
from jaxprune.lab.recipe import config
from jaxprune.lab.report import html, storage_figure, wording
from jaxprune.lab.runs import run, stages, store, train
from jaxprune.quantize.codes import dequantize
from jaxprune.storage import Artifact
from jaxprune.storage.encodings import pattern_of, smallest, stored_bytes

pytestmark = pytest.mark.usefixtures("relaxed", "quick")  # optax itself promotes

STORED = (
    TINY
    + """
[store]
quantize = "codebook"
bits = 3
duration = "15 steps"
learning_rate = 3e-3
"""
)
RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "quickstart.json"


def go(folder, text=STORED, watcher=None):
    (folder / "tiny.toml").write_text(text)
    return run.run(config.load(folder / "tiny.toml"), folder / "run", "a command", watcher)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run with codebooks that nothing happened to; not to be changed."""
    folder = tmp_path_factory.mktemp("stored")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        results = go(folder, watcher=(watcher := StopAt()))
    assert watcher.stages == [(0, name, steps) for name, steps in {**STAGES, "quantize": 15}.items()]
    return folder / "run", results


def test_the_file_holds_what_the_stage_came_to(stored):
    """Its values are those of the last checkpoint, 2^bits of them a leaf; its masks those of the pruning."""
    folder, _ = stored
    path = folder / "seed_0" / "model.jaxprune"
    params, kept = params_and_masks(last_arrays(folder)["seed_0/quantize"])
    before, masks = params_and_masks(last_arrays(folder)["seed_0/prune"])
    loaded, loaded_masks = (tree.named_leaves(jp.load(path, to=to)) for to in ("dense", "masks"))
    for name, array in params.items():
        assert np.array_equal(loaded_masks[name], masks[name]), name
        assert np.array_equal(kept[name], masks[name]), name
        np.testing.assert_allclose(loaded[name], array, rtol=1e-6, atol=1e-7, err_msg=name)
        assert not np.asarray(loaded[name])[~masks[name]].any(), name
        if name.endswith("kernel"):
            assert len(np.unique(np.asarray(loaded[name])[masks[name]])) <= 8, name
            assert len(np.unique(before[name][masks[name]])) > 8, name
    with Artifact(path) as file:
        kinds = {name: record.values for name, record in file.records.items()}
    assert {kind for name, kind in kinds.items() if name.endswith("kernel")} == {"codebook3"}
    assert {kind for name, kind in kinds.items() if name.endswith("bias")} == {"raw"}


def test_training_the_shared_values_helps(stored):
    losses = {line["stage"]: line["loss"] for line in metrics_of(stored[0])}
    digits, params = sets.load("digits"), last_arrays(stored[0])
    network, _ = stages._network(config.load(stored[0] / "config.toml"), 0, digits)
    before, masks = params_and_masks(params["seed_0/finetune"])
    like = jax.tree.map(jnp.asarray, tree.map_named(lambda name, _: before[name], network.params))
    alive = tree.map_named(lambda name, _: jnp.asarray(masks[name]), network.params)
    start = store.quantize(config.load(stored[0] / "config.toml").store, like, alive)
    samples = samples_of(digits.train_images, digits.train_labels, digits.scale)
    loss = train.mean_loss(network.apply, dequantize(start), samples, jnp.arange(1437), None)[0]
    assert losses["quantize"] < float(loss)


def test_results_page_and_terminal_have_the_file(stored):
    folder, results = stored
    found, size = results["artifact"], (folder / "seed_0" / "model.jaxprune").stat().st_size
    assert found["bytes"] == {"mean": float(size), "std": 0.0, "values": [size]}
    assert found["dense_bytes"] == 4 * (64 * 16 + 16 + 16 * 10 + 10)
    assert found["ratio"] == found["dense_bytes"] / size
    text = html.summary_text(results)
    assert f"codebook, {size:,} bytes, {found['ratio']:.2f} times smaller than dense; accuracy" in text
    page = (folder / "report.html").read_text()
    assert f"File, {found['ratio']:.2f} times smaller" in page
    assert f"{100 * found['accuracy']['mean']:.2f}" in page
    row = html.summary_markdown([results]).splitlines()[-1]
    assert f"| {100 * found['accuracy']['mean']:.2f} | {found['ratio']:.1f} |" in row


def test_the_accuracy_is_that_of_the_loaded_file(stored):
    folder, results = stored
    digits, path = sets.load("digits"), folder / "seed_0" / "model.jaxprune"
    network, _ = stages._network(config.load(folder / "config.toml"), 0, digits)
    params = jp.load(path, like=network.params)
    logits = network.apply(params, jnp.asarray(digits.test_images, jnp.float32) / 16)
    mine = float(np.mean(np.argmax(np.asarray(logits), -1) == digits.test_labels))
    assert results["artifact"]["accuracy"]["values"] == [pytest.approx(mine, abs=1e-6)]
    with Artifact(path) as file:
        assert file.metadata["accuracy"] == round(mine, 6)


def test_what_the_file_says_of_itself_is_small(stored):
    folder, results = stored
    with Artifact(folder / "seed_0" / "model.jaxprune") as file:
        about = file.metadata
    assert about["hash"] == results["hash"]
    assert (about["name"], about["seed"], about["data"]) == ("tiny", 0, "digits")
    assert about["model"] == {"name": "mlp", "widths": [16]}
    assert (about["image"], about["classes"]) == ([8, 8, 1], 10)
    assert len(json.dumps(about)) < 600


def test_killed_while_the_shared_values_are_trained_it_ends_bit_identical(tmp_path, stored):
    with pytest.raises(Stopped):
        go(tmp_path, watcher=StopAt("quantize", 12))  # the last save was at 9
    assert not (tmp_path / "run" / "seed_0" / "model.jaxprune").exists()
    go(tmp_path, watcher=(watcher := StopAt()))
    assert next(step for step in watcher.steps if step[0] == "quantize") == ("quantize", 10)
    assert_same_run(tmp_path / "run", stored[0])
    ours, theirs = (folder / "seed_0" / "model.jaxprune" for folder in (tmp_path / "run", stored[0]))
    assert ours.read_bytes() == theirs.read_bytes()


# ---------------------------------------------------------------- [store]


PARAMS = {
    "a": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(20, 12)), jnp.float32), "bias": jnp.ones(12)}
}


@pytest.mark.parametrize(
    ("table", "kinds"),
    [
        ({}, {"float32"}),
        ({"quantize": "codebook", "bits": 2}, {"float32", "Codebook"}),
        ({"quantize": "codebook", "select": ["*"]}, {"Codebook"}),
        ({"quantize": "int8"}, {"float32", "Affine"}),
        ({"quantize": "int4"}, {"float32", "Affine"}),
        ({"quantize": "bfloat16"}, {"float32", "bfloat16"}),
        ({"quantize": "float16", "select": ["a/bias"]}, {"float32", "float16"}),
    ],
)
def test_quantize(table, kinds):
    params = jp.apply_masks(PARAMS, masks := jp.compute_masks(jp.Method(), PARAMS, 0.5))
    made = tree.named_leaves(store.quantize(config.Store.model_validate(table), params, masks))
    found = {str(leaf.dtype) if isinstance(leaf, jax.Array) else type(leaf).__name__ for leaf in made.values()}
    assert found == kinds
    for name, leaf in made.items():
        if hasattr(leaf, "bits"):
            assert leaf.bits == table.get("bits", {"int8": 8}.get(table["quantize"], 4))
            assert np.array_equal(leaf.alive, tree.named_leaves(masks)[name])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--store.bits", "9", "--store.quantize", "codebook"], "--store.bits: expected less than or equal to 8"),
        (["--store.bits", "3"], '--store.bits: only for quantize = "codebook", here quantize = "none"'),
        (
            ["--store.quantize", "int8", "--store.duration", "1 epoch"],
            '--store.duration: only for quantize = "codebook"',
        ),
        (["--store.select", "['a']"], '--store.select: only for quantize = "codebook" or "int8"'),
        (["--store.encoding", "zip"], "--store.encoding: There is no encoding 'zip'"),
        (["--store.quantise", "int8"], "--store.quantise: unknown key, did you mean quantize?"),
    ],
)
def test_what_the_table_cannot_mean_is_refused(tmp_path, words, line):
    (tmp_path / "a.toml").write_text('name = "a"')
    with pytest.raises(config.ConfigError) as error:
        config.load(tmp_path / "a.toml", words)
    assert str(error.value).startswith(line)


def test_hashes_of_experiments_without_the_table_are_as_before(tmp_path):
    (tmp_path / "a.toml").write_text('name = "a"')
    plain, other = (config.load(tmp_path / "a.toml", words) for words in ([], ["--store.quantize", "int8"]))
    tree_of = plain.model_dump(mode="json", exclude={"name": True, "checkpoint": True, "data": {"data_dir"}})
    assert "store" in tree_of
    assert config.config_hash(plain) != config.config_hash(other)
    published = config.load(RESULTS.parents[1] / "quickstart.toml")
    assert config.config_hash(published) == json.loads(RESULTS.read_text())["hash"]
    (tmp_path / "b.toml").write_text(config.dump(other))
    assert config.load(tmp_path / "b.toml") == other


# ---------------------------------------------------------------- the figure


def leaf(shape, sparsity, itemsize=4):
    weights = int(np.prod(shape))
    return {"name": "a", "shape": list(shape), "weights": weights, "nnz": round(weights * (1 - sparsity)),
            "bytes": weights * itemsize}  # fmt: skip


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9, 0.99])
def test_curves_are_the_sizes_of_random_masks(sparsity):
    shape = (300, 400)
    alive = np.random.default_rng(1).random(shape) >= sparsity
    curves = storage_figure.sizes([leaf(shape, 0)], np.asarray([1 - alive.mean()]))
    for name in ("bitmask", "csr16", "csr32"):
        assert curves[name][0] == pytest.approx(stored_bytes(pattern_of(name), alive, 32), abs=1), name
    gaps = min(stored_bytes(pattern_of(f"gaps{width}"), alive, 32) for width in range(2, 17))
    assert curves["gaps"][0] == pytest.approx(gaps, rel=5e-3)
    best = stored_bytes(smallest(alive, 32, exact=True), alive, 32)
    assert curves["auto"][0] == pytest.approx(best, rel=5e-3)


def test_break_even():
    """Bitmask: n / 8 + 4 k = 4 n at 1 / 32; CSR with a large row: 6 k = 4 n, 8 k = 4 n."""
    grid = np.linspace(0, 1, 2001)[:-1]
    curves = storage_figure.sizes([leaf((1000, 1000), 0.5)], grid)
    found = {name: storage_figure.break_even(grid, curve, 4e6) for name, curve in curves.items()}
    assert found["bitmask"] == pytest.approx(1 / 32, abs=1e-3)
    assert found["csr16"] == pytest.approx(1 / 3, abs=1e-3)
    assert found["csr32"] == pytest.approx(1 / 2, abs=1e-3)
    assert storage_figure.break_even(grid, np.full(2000, 5e6), 4e6) is None


@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.95])
def test_the_figure_marks_the_runs_own_file(sparsity):
    leaves = [leaf((64, 16), sparsity), leaf((16,), 0)]
    found = {"quantize": "int8", "bytes": wording.spread([900])}
    figure = storage_figure.storage(leaves, found, sparsity)
    left, right = figure.axes
    stars = [[line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "*"] for axes in (left, right)]
    assert stars == [[[[pytest.approx(100 * sparsity), 900]]], [[[95, 900]]] if sparsity == 0.95 else []]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "this run's file (int8, header counted)" in labels
    assert any(label.startswith("bitmask, pays from 3.") for label in labels)
