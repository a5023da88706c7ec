"""`jaxprune predict`: pictures as people have them come out as the digits they show; what is no picture is named."""

import dataclasses
import json
import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from file_helpers import pictures, write_linear
from PIL import Image

import jaxprune as jp
from jaxprune.lab.commands import convert, predict
from jaxprune.lab.commands import main as cli
from jaxprune.lab.data import files, images, sets
from jaxprune.storage import Artifact

EXPERIMENTS = Path(__file__).parents[2] / "experiments"

pytestmark = pytest.mark.usefixtures("quick")

DATA = Path(os.environ.get("JAXPRUNE_DATA", "nowhere"))


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A file of a pruned linear model of digits; not to be changed."""
    return write_linear(tmp_path_factory.mktemp("linear"))[0]


def share_right(model, shown, labels, folder):
    """Way of taking a picture -> share of digits that the model calls right."""
    right = {}
    for digit, label in zip(shown, labels, strict=True):
        for way, (suffix, content) in pictures(digit).items():
            path = folder / f"picture{suffix}"
            path.write_bytes(content)
            logits = model.apply(model.params, jnp.asarray(model.prepare(path))[None])
            right.setdefault(way, []).append(int(jnp.argmax(logits)) == label)
    return {way: float(np.mean(found)) for way, found in right.items()}


def test_digits_in_pictures_of_all_kinds(linear, tmp_path):
    digits = sets.load("digits")
    shown = np.uint8(np.round(255 / 16 * digits.test_images[:40, :, :, 0].astype(float)))
    right = share_right(predict.load(linear), shown, digits.test_labels[:40], tmp_path)
    assert min(right.values()) >= 0.75, right
    assert right["as it is"] >= 0.85, right
    assert right["as it is"] == right["dark on light"] == right["transparent"] == right["16 bits"] == right["palette"]


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "mnist").is_dir(), reason="JAXPRUNE_DATA names no folder with mnist/ in it")
def test_mnist_in_pictures_of_all_kinds(tmp_path):
    """A linear model is right on 86 % of the images as they are."""
    names = [f"{split}-{part}-ubyte" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1")]
    images, labels, shown, right_labels = (files.read_idx(DATA / "mnist" / name) for name in names)
    path, _ = write_linear(tmp_path, "mnist", images / 255, labels, 0.3)
    right = share_right(predict.load(path), shown.reshape(-1, 28, 28)[:200], right_labels[:200], tmp_path)
    assert min(right.values()) >= 0.8, right


def test_mnists_own_digits_stay_where_they_are():
    """A digit that is in its box of 20 x 20, its mass in the middle, is not moved."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        height, width = 20, int(rng.integers(6, 21))
        box = np.where(rng.random((height, width)) < 0.5, 1.0, 0.0).astype(np.float32)
        box[0, 0] = box[-1, -1] = 1.0
        canvas = np.zeros((28, 28), np.float32)
        rows, cols = (np.arange(length) + 0.5 for length in box.shape)
        at = [round(14.5 - float((box.sum(1 - i) * along).sum() / box.sum())) for i, along in enumerate((rows, cols))]
        canvas[at[0] : at[0] + height, at[1] : at[1] + width] = box
        again = images.digit(np.repeat(canvas[..., None], 3, 2), (28, 28, 1))[..., 0]
        assert np.array_equal(again, canvas)


def test_garments_and_photographs():
    rng = np.random.default_rng(0)
    photo = rng.random((32, 32, 3)).astype(np.float32)
    assert np.array_equal(images.photograph(photo, (32, 32, 3)), photo)
    wide = np.zeros((32, 64, 3), np.float32)
    wide[:, 16:48] = photo
    assert np.array_equal(images.photograph(wide, (32, 32, 3)), photo)
    shirt = np.zeros((28, 28), np.float32)
    shirt[4:24, 3:20] = 1
    white_behind = np.repeat(1 - shirt[..., None], 3, 2)
    assert np.array_equal(images.garment(white_behind, (28, 28, 1))[..., 0], shirt)


def test_the_command(linear, tmp_path, capsys):
    digits = sets.load("digits")
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        Image.fromarray(np.uint8(15 * digits.test_images[i, :, :, 0])).resize((80, 80)).save(path)
    assert cli.main(["predict", str(linear), *map(str, paths), "--formats", "bcsr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(" {2,}", line)[0] for line in lines[2:4]] == [str(path) for path in paths]
    assert re.fullmatch(r"dense +XLA +[\d.]+ ms +1\.00x", lines[7])
    assert re.fullmatch(r"bcsr +XLA +[\d.]+ ms +[\d.]+x", lines[8])
    assert cli.main(["predict", str(linear), str(paths[0]), "--formats", "bcsr", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert 0.1 < plain["answers"][0]["probability"] <= 1
    assert plain["answers"][0]["label"] == lines[2].split()[1]
    assert [one["form"] for one in plain["latencies"]] == ["dense", "bcsr"]


def test_probabilities_are_those_of_the_model(linear, tmp_path):
    image = sets.load("digits").test_images[:1]
    Image.fromarray(np.uint8(np.round(255 / 16 * image[0, :, :, 0].astype(float)))).save(tmp_path / "a.png")
    model = predict.load(linear)
    answer = predict.answers(model, [tmp_path / "a.png"])[0]
    (layer,) = jp.load(linear)["layers"]
    logits = np.asarray(model.prepare(tmp_path / "a.png")).reshape(-1) @ layer["kernel"] + layer["bias"]
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert answer.label == str(int(probabilities.argmax()))
    assert answer.probability == pytest.approx(float(probabilities.max()), rel=1e-5)


def test_what_did_not_run_says_why():
    latency = predict.Latency("native", None, None, {}, (), "there is no compiler")
    row = str(predict.Prediction((), (latency,))).splitlines()[-1]
    assert re.fullmatch("native +did not run: there is no compiler +- +-", row)
    ran = dataclasses.replace(latency, milliseconds=1.0, speedup=2.0, kernels={"k": 3}, dense_leaves=("a",), refused="")
    row = str(predict.Prediction((), (ran,))).splitlines()[-1]
    assert re.fullmatch(r"native +k x 3, 1 leaves dense +1\.000 ms +2\.00x", row)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("no.png", None, "no.png: No such file or directory"),
        ("text.png", b"text", "text.png is no image that can be read"),
        ("blank.png", "blank", "blank.png: nothing is to be seen: all of it has one colour."),
        ("cut.png", "cut", "cut.png is damaged"),
    ],
)
def test_what_is_no_picture_is_named(linear, tmp_path, capsys, name, content, line):
    whole = pictures(np.uint8(np.eye(30) * 255))["as it is"][1]
    if content == "blank":
        Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / name)
    elif content is not None:
        (tmp_path / name).write_bytes(whole[:-30] if content == "cut" else content)
    assert cli.main(["predict", str(linear), str(tmp_path / name)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].replace(f"{tmp_path}/", "").startswith(f"jaxprune: {line}")


def test_a_file_that_names_no_model(tmp_path, capsys):
    jp.save(tmp_path / "a.jaxprune", {"kernel": np.ones((2, 2), np.float32)})
    assert cli.main(["predict", str(tmp_path / "a.jaxprune"), "x.png"]) == 2
    assert "does not say which model it is" in capsys.readouterr().err


def test_a_file_that_names_another_model(linear, tmp_path, capsys):
    metadata = json.loads(json.dumps({"model": {"name": "lenet_300_100"}, "image": [8, 8, 1], "classes": 10}))
    jp.save(tmp_path / "a.jaxprune", jp.load(linear), metadata=metadata)
    assert cli.main(["predict", str(tmp_path / "a.jaxprune"), "x.png"]) == 2
    assert "tensors of" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    not ((DATA / "resnet50").is_dir() and (DATA / "imagenet_samples").is_dir()),
    reason="JAXPRUNE_DATA names no folder with resnet50/ and imagenet_samples/ in it",
)
def test_resnet50_from_kerass_shards_in_eight_bits(tmp_path):
    """Names of the samples end in their class."""
    path = tmp_path / "resnet50.jaxprune"
    assert cli.main(["convert", str(DATA / "resnet50"), str(path), "--quantize", "int8"]) == 0
    model, samples = predict.load(path), sorted((DATA / "imagenet_samples").iterdir())
    answers = predict.answers(model, samples)
    right = [
        answer.label == model.labels[int(sample.stem.split("_")[-1])]
        for answer, sample in zip(answers, samples, strict=True)
    ]
    assert sum(right) >= 17


@pytest.mark.parametrize("name", ["quickstart", "lenet_300_100"])
def test_the_models_that_come_with_the_experiments_answer(name, capsys):
    """They are those of the committed results, and take a digit that was drawn by hand."""
    path = EXPERIMENTS / "models" / f"{name}.jaxprune"
    results = json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text())
    with Artifact(path) as file:
        about = convert.metadata_of(file)
    points = results.get("points", [results])
    [found] = [point for point in points if point["hash"] == about["hash"]]
    assert found["artifact"]["bytes"]["values"][0] == path.stat().st_size
    assert found["artifact"]["accuracy"]["values"][0] == pytest.approx(about["accuracy"])
    assert predict.answers(predict.load(path), [EXPERIMENTS / "models" / "three.png"])[0].label == "3"
    assert cli.main(["inspect", str(path)]) == 0
    assert f"name: {name}" in capsys.readouterr().out
