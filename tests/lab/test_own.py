"""A model and a data set of the user's own in a config: what they get and must give, and what a run makes of them."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import own_models
import pytest
from flax import nnx
from lab_helpers import StopAt, Stopped, assert_same_run, write_config

from jaxprune import tree
from jaxprune.lab import models
from jaxprune.lab.bench import whole
from jaxprune.lab.commands import convert, predict
from jaxprune.lab.commands import main as cli
from jaxprune.lab.data import sets
from jaxprune.lab.data.files import DataError
from jaxprune.lab.models.parts import followed
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.runs import run
from jaxprune.storage import Artifact

pytestmark = pytest.mark.usefixtures("relaxed", "quick")
OWN = """
name = "own"
model = { name = "own_models:Net", options.width = 6 }
data = { name = "own_models:pixels", options.n = 140 }
train = { duration = "2 epochs", batch_size = 16 }
prune = { how = "gradual", sparsity = 0.75, duration = "6 steps", update_every = "2 steps" }
finetune.duration = "1 epoch"
checkpoint.every = "3 steps"
"""
FEATURES = """
name = "features"
data.name = "own_models:features"
model.name = "own_models:pair"
train.duration = "2 epochs"
prune.sparsity = 0.5
finetune.duration = "1 epoch"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run of an own model on own data."""
    folder = tmp_path_factory.mktemp("own")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run.run(cfg.load(write_config(folder, OWN)), folder / "run", "a command")
    return folder / "run"


# ---------------------------------------------------------------- a run


def test_a_run_of_ones_own_has_all_that_a_run_has(folder):
    results = json.loads((folder / "results.json").read_text())
    accuracy = {name: one["mean"] for name, one in results["accuracy"].items()}
    assert results["dataset"] == {"name": "own_models:pixels", "train": 63, "validation": 7, "test": 70}
    assert results["sparsity"]["mean"] == pytest.approx(0.75, abs=1e-3)
    assert results["sparse"]["agreement"]["values"] == [1.0]
    assert results["artifact"]["accuracy"]["mean"] == accuracy["finetuned"] == accuracy["sparse"]
    assert {leaf["name"] for leaf in results["leaves"]} >= {"conv/kernel", "norm/mean", "norm/scale", "fc1/kernel"}
    assert cli.main(["report", str(folder)]) == 0
    assert "own_models:pixels" in (folder / "report.html").read_text()
    assert not cfg.load(folder / "config.toml").model.dropout
    assert cfg.load(folder / "config.toml").model.options == {"width": 6}


def test_stopped_and_taken_up_again_it_ends_bit_identical(tmp_path, folder):
    """Dropout and the statistics of batch norms included."""
    config = cfg.load(write_config(tmp_path, OWN))
    with pytest.raises(Stopped):
        run.run(config, tmp_path / "run", "a command", StopAt("train", 5))
    run.run(config, tmp_path / "run", "a command")
    assert_same_run(tmp_path / "run", folder)


def test_its_files_are_read_back_by_predict_convert_and_bench(folder, tmp_path, capsys):
    file, image = folder / "seed_0/model.jaxprune", tmp_path / "one.npy"
    test, _ = own_models.pixels(140)[1]
    np.save(image, test[3])
    assert cli.main(["predict", str(file), str(image)]) == 2
    said = capsys.readouterr().err
    assert "own_models:Net, and a file alone imports no code: say --model own_models:Net" in said
    model = predict.load(file, "own_models:Net")
    found = [predict.answers(model, [image])[0]]
    with Artifact(file) as stored:
        about = convert.metadata_of(stored)
    network = whole.of_run(folder)
    logits = network.apply(network.params, jnp.asarray(test[3:4, ..., None], jnp.float32) / 255)
    assert found[0].label == str(int(jnp.argmax(logits)))
    assert found[0].probability == pytest.approx(float(jax.nn.softmax(logits).max()), rel=1e-4)
    assert (about["image"], about["classes"], about["data"]) == ([8, 8, 1], 3, "own_models:pixels")
    converted = convert.read(folder / "seed_0/finetune").metadata
    assert converted == {key: value for key, value in about.items() if key in converted}
    assert converted["model"] == {"name": "own_models:Net", "options": {"width": 6}}
    with pytest.raises(ValueError, match="is of the model own_models:Net, not of other:Net"):
        predict.load(file, "other:Net")


def test_any_framework_and_inputs_that_are_no_images(tmp_path, capsys):
    """A function's params and apply, on features; a weight that is looked up is made dense where it is."""
    config = cfg.load(write_config(tmp_path, FEATURES), ["--model.options.look_up", "true"])
    results = run.run(config, tmp_path / "run", "a command")
    assert results["accuracy"]["sparse"] == results["accuracy"]["finetuned"] == results["artifact"]["accuracy"]
    assert sets.facts(config.data) == ((8,), 3)
    np.save(tmp_path / "one.npy", own_models.features()[1][0][0])
    np.save(tmp_path / "two.npy", np.ones((2, 8)))
    own, file = ["--model", "own_models:pair"], str(tmp_path / "run/seed_0/model.jaxprune")
    capsys.readouterr()
    assert cli.main(["predict", file, str(tmp_path / "one.npy"), *own, "--formats", "bcoo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["label"] in "012"
    assert cli.main(["predict", file, str(tmp_path / "two.npy"), *own]) == 2
    assert "expected one sample (8,), floats or uint8 pixels, arrived float64 (2, 8)" in capsys.readouterr().err
    assert cli.main(["predict", file, "x.png", *own]) == 2
    assert "expected a sample of shape (8,) as a .npy file" in capsys.readouterr().err


def test_data_that_change_are_no_data_to_go_on_with(tmp_path, monkeypatch):
    words = ["--data.name", "own_models:moody", "--model", "{name = 'mlp', widths = [4]}"]
    config = cfg.load(write_config(tmp_path, FEATURES), words)
    with pytest.raises(Stopped):
        run.run(config, tmp_path / "run", "a command", StopAt("train", 1))
    monkeypatch.setitem(own_models.STATE, "seed", 1)
    with pytest.raises(DataError, match=r"own_models:moody returns other data than when .*run was begun\. Give every"):
        run.run(config, tmp_path / "run", "a command")
    monkeypatch.setitem(own_models.STATE, "seed", 0)
    with pytest.raises(Stopped):  # goes on
        run.run(config, tmp_path / "run", "a command", StopAt("train", 2))


# ---------------------------------------------------------------- the model


def own(name, image=(8, 8, 1), key=0, **options):
    model = cfg.Model(name=f"own_models:{name}", options=options or None)
    return models.build(model, jax.random.key(key), image, 3)


def test_in_training_a_module_does_what_flax_does_with_it():
    """Batch norm by the batch, its statistics moved by the module's own momentum; else by the statistics."""
    network, x = own("Net", rate=0.0), jax.random.normal(jax.random.key(1), (5, 8, 8, 1))
    module = own_models.Net((8, 8, 1), 3, nnx.Rngs(jax.random.key(0)), rate=0.0)
    params = network.params
    assert network.observe is not None
    for step in range(3):
        module.train()
        logits, seen = network.observe(params, x, jax.random.key(step))
        np.testing.assert_allclose(logits, module(x), atol=1e-6)
        params = followed(params, seen)
        module.eval()
        np.testing.assert_allclose(network.apply(params, x), module(x), atol=1e-6)
    ours, theirs = (
        tree.named_leaves(one) for one in (params, nnx.as_pure(nnx.state(module, (nnx.Param, nnx.BatchStat))))
    )
    assert ours.keys() == theirs.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), dict(ours), dict(theirs))
    assert not np.allclose(ours["norm/mean"], 0)


@pytest.mark.parametrize(("name", "image"), [("Net", (8, 8, 1)), ("pair", (8,))])
def test_what_is_drawn_in_training_comes_from_the_key(name, image):
    network, x = own(name, image), jax.random.normal(jax.random.key(1), (64, *image))
    once, again, other = (network.apply(network.params, x, jax.random.key(key)) for key in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert np.any(np.asarray(once) != np.asarray(other))
    np.testing.assert_array_equal(network.apply(network.params, x), network.apply(network.params, x))
    leaves = (tree.named_leaves(own(name, image, key).params) for key in (0, 0, 1))
    first, same, different = ([np.asarray(leaf) for leaf in one.values()] for one in leaves)
    assert all(map(np.array_equal, first, same))
    assert not all(map(np.array_equal, first, different))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "OnlyRngs",
            r"called as OnlyRngs\(image=\(8, 8, 1\), classes=3, rngs=\.{3}\) it failed, TypeError: .*'image'",
        ),
        ("FiveLogits", r"expected float logits \(2, 3\) for inputs \(2, 8, 8, 1\), arrived float32 \(2, 5\)"),
        ("Constants", r"holds table, which are no nnx\.Param .* Make them nnx\.Param, or compute them in __call__"),
        ("WithFlag", r"fails on inputs \(2, 8, 8, 1\) outside training, TypeError: .*'train'"),
        ("Linen", r"expected it to return \(params, apply\), arrived Linen"),
        ("module", r"returned an nnx\.Module: name its class"),
        ("integers", r"has no params to train, or some that are no floats: w\."),
        ("nothing", r"has no params to train, .*: none at all"),
        ("no_function", r"called as no_function\(.*\) it failed, TypeError"),
    ],
)
def test_a_model_that_is_none_says_what_arrived(name, says):
    with pytest.raises(cfg.ConfigError, match=rf"model\.name: own_models:{name}: {says}"):
        own(name)


def test_options_are_the_models_own():
    assert own("Net", width=5).params["fc1"]["kernel"].shape == (256, 5)
    with pytest.raises(cfg.ConfigError, match=r"classes=3, depth=2, rngs=\.\.\.\) it failed, TypeError: .*'depth'"):
        own("Net", depth=2)


# ---------------------------------------------------------------- the data


SAYS = {
    "one": r"expected it to return \(train inputs, train labels\), \(test .*\), arrived float64 \(4, 3\)\.",
    "four": r"arrived \(float64 \(4, 3\), int64 \(4,\), float64 \(4, 3\), int64 \(4,\)\)",
    "one_hot": r"expected train labels \(4,\), integers from 0 on, arrived int64 \(4, 4\).*Of one-hot .* argmax",
    "float_labels": r"expected test labels \(4,\), integers from 0 on, arrived float64 \(4,\)",
    "negative": r"expected train labels .*the least of them -1",
    "one_class": r"at least two classes",
    "integers": r"expected train inputs .*, uint8 or floats, arrived int64 \(4, 3\)\. Cast integers to float32",
    "no_axis": r"expected train inputs \(n, \.\.\.\), uint8 or floats, arrived float64 \(4,\)",
    "nothing": r"expected train inputs .* arrived float64 \(0, 3\)",
    "other_shapes": r"expected train and test inputs alike, arrived float64 \(4, 3\), float64 \(4, 2\)",
    "other_dtypes": r"expected train and test inputs alike, arrived float64 \(4, 3\), uint8 \(4, 3\)",
    "not_finite": r"train inputs hold NaN or infinity",
    "too_few_labels": r"expected train labels \(4,\), .* arrived int64 \(3,\)",
}


@pytest.mark.parametrize("kind", own_models.BAD)
def test_data_that_are_none_say_what_arrived(kind):
    section = cfg.Data(name="own_models:bad", options={"kind": kind})
    with pytest.raises(DataError, match=rf"data\.name: own_models:bad: .*{SAYS[kind]}"):
        sets.of_config(section)


def test_data_become_what_a_run_works_with():
    found = sets.of_config(cfg.Data(name="own_models:pixels", data_dir="somewhere"))
    assert (found.train_images.shape, found.train_images.dtype, found.scale) == ((60, 8, 8, 1), np.uint8, 255)
    assert (found.test_labels.dtype, found.classes) == (np.int32, 3)
    found = sets.of_config(cfg.Data(name="own_models:features"))
    assert (found.train_images.shape, found.train_images.dtype, found.scale) == ((60, 8), np.float32, 1)
    assert models.shapes(cfg.Model(widths=(5,)), (8,), 3).params["layers"][0]["kernel"].shape == (8, 5)
    with pytest.raises(DataError, match=r"called as features\(m=3\) it failed, TypeError: .*'m'"):
        sets.of_config(cfg.Data(name="own_models:features", options={"m": 3}))
    with pytest.raises(DataError, match=r"called as bad\(kind='no'\) it failed, KeyError: 'no'"):
        sets.of_config(cfg.Data(name="own_models:bad", options={"kind": "no"}))
    with pytest.raises(cfg.ConfigError, match=r"data\.shift: only for images .* own_models:features gives \(60, 8\)"):
        sets.of_config(cfg.Data(name="own_models:features", shift=1))
    with pytest.raises(cfg.ConfigError, match=r"lenet_5 takes images .* the data has \(8,\)"):
        models.build(cfg.Model(name="lenet_5"), jax.random.key(0), (8,), 3)


# ---------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model.options.width", "3"], r'--model\.options: only for a name of your own, .* here name = "mlp"'),
        (["--data.options", "{a = 1}"], r'--data\.options: only for a name of your own, .* here name = "digits"'),
        (
            ["--model.name", "own_models:Net", "--model.dropout", "0.5"],
            r"--model\.dropout: only for .*one of its options",
        ),
        (["--model.name", "vgg16", "--model.dropout", "0.5"], r'--model\.dropout: only for name = "mlp" or .*"vgg16"$'),
        (["--model.name", "own_models:Not"], r'--model\.name: "own_models:Not" cannot be imported: .*no attribute'),
        (["--data.name", "no_such:f"], r'--data\.name: "no_such:f" cannot be imported: No module'),
        (["--data.name", "broken:f"], r'--data\.name: "broken:f" cannot be imported: SyntaxError'),
        (["--model.name", "resnet_50"], r'expected a model by its name or MODULE:NAME, arrived .*mean "resnet50"\?'),
        (["--data.name", "cifar"], r'expected a data set by its name or MODULE:NAME, arrived .*mean "cifar10"\?'),
    ],
)
def test_what_is_not_meant_is_refused(tmp_path, monkeypatch, words, says):
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(cfg.ConfigError) as refused:
        cfg.load(write_config(tmp_path, 'name = "x"'), words)
    assert re.search(says, str(refused.value)), refused.value


def test_options_count_in_the_hash_whatever_their_names():
    def of(*options):
        given = {"name": "own_models:Net", **({"options": dict(options)} if options else {})}
        return cfg.config_hash(cfg.Config(name="x", model=cfg.Model(**given)))

    different = [of(), of(("along", "inputs")), of(("shift", 0)), of(("flip", False)), of(("flip", True))]
    assert len(set(different)) == len(different)
    assert of(("a", 1), ("b", [2, {"c": 3, "d": 4}])) == of(("b", [2, {"d": 4, "c": 3}]), ("a", 1))
