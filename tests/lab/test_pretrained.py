"""Published weights: the layout of their files, their names in our tree, and photographs called what they are."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxprune.lab.models import parts, pretrained
from jaxprune.lab.models.resnet import ResNet50

pytestmark = pytest.mark.usefixtures("quick")

DATA = Path(os.environ.get("JAXPRUNE_DATA", "nowhere"))
MODEL = ResNet50((2, 1), width=4, classes=5, stride_first=True, epsilon=1e-3, image=(16, 16, 3))
# Layers of MODEL by Keras's names -> by ours.
CONVS = {
    "conv1": "conv1",
    "res2a_branch2a": "layer1.0.conv1", "res2a_branch2b": "layer1.0.conv2", "res2a_branch2c": "layer1.0.conv3",
    "res2a_branch1": "layer1.0.downsample.0",
    "res2b_branch2a": "layer1.1.conv1", "res2b_branch2b": "layer1.1.conv2", "res2b_branch2c": "layer1.1.conv3",
    "res3a_branch2a": "layer2.0.conv1", "res3a_branch2b": "layer2.0.conv2", "res3a_branch2c": "layer2.0.conv3",
    "res3a_branch1": "layer2.0.downsample.0",
}  # fmt: skip
KINDS = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}


def write(folder, arrays, shards=3, **changes):
    """What a converter writes: one manifest, and the bytes of all arrays cut into shards."""
    folder.mkdir(parents=True, exist_ok=True)
    data = b"".join(np.asarray(array, np.float32).tobytes() for array in arrays.values())
    paths, step = [f"shard{i}.bin" for i in range(shards)], -(-len(data) // shards)
    for i, path in enumerate(paths):
        (folder / path).write_bytes(data[i * step : (i + 1) * step])
    weights = [{"name": k, "shape": list(np.shape(v)), "dtype": "float32"} | changes for k, v in arrays.items()]
    (folder / "model.json").write_text(json.dumps({"weightsManifest": [{"paths": paths, "weights": weights}]}))
    return folder / "model.json"


def published():
    """Params of MODEL with biases before the batch norms, and the same as Keras's arrays."""
    params = parts.random_params(MODEL.shapes(), jax.random.key(0))
    arrays = {f"fc1000/{kind}": array for kind, array in params["fc"].items()}
    for i, (keras, ours) in enumerate(CONVS.items()):
        kernel, norm = params[ours]["kernel"], params[parts.norm_name(ours)]
        bias = np.random.default_rng(i).normal(size=kernel.shape[-1]).astype(np.float32)
        params[ours] = {"kernel": kernel, "bias": jnp.asarray(bias)}
        bn = "bn_conv1" if keras == "conv1" else keras.replace("res", "bn")
        arrays |= {f"{bn}/{theirs}": norm[kind] for theirs, kind in KINDS.items()}
        arrays |= {f"{keras}/kernel": kernel, f"{keras}/bias": bias}
    return params, arrays


def test_arrays_come_back_from_their_shards(tmp_path):
    arrays = {
        "a/kernel": np.arange(12.0).reshape(3, 4),
        "a/bias": np.array([-1.0]),
        "empty": np.zeros((0, 3)),
        "one": 7.0,
    }
    read = pretrained.read_arrays(write(tmp_path, arrays))
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == np.float32


def test_the_model_computes_what_the_published_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "KERAS_RESNET50", MODEL)
    expected, arrays = published()
    write(tmp_path / "ResNet50", arrays)
    model, params = pretrained.load_resnet50(tmp_path)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, MODEL.shapes())
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(params, images), apply(expected, images), rtol=1e-4, atol=1e-4)


def without(name):
    return {key: array for key, array in published()[1].items() if key != name}


def torn(folder):
    file = write(folder, {"a": np.ones(9)})
    (folder / "shard2.bin").write_bytes(b"")
    return file


def lost(folder):
    file = write(folder, {"a": np.ones(9)})
    (folder / "shard1.bin").unlink()
    return file


def changed(folder):
    (folder / "model.json").write_text('{"weights": []}')
    return folder / "model.json"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (torn, "lists 36 bytes of weights, its shards hold 24"),
        (lost, "shard1.bin cannot be read: No such file"),
        (changed, "is no model of TensorFlow.js: KeyError"),
        (lambda folder: folder / "nothing.json", "nothing.json cannot be read: No such file"),
        (lambda folder: write(folder, {"a": np.ones(9)}, dtype="int32"), "'a' is not stored as plain float32"),
        (lambda folder: write(folder, {"a": np.ones(9)}, quantization={}), "'a' is not stored as plain float32"),
    ],
)
def test_damaged_files_are_refused(tmp_path, make, words):
    with pytest.raises(ValueError, match=words):
        pretrained.read_arrays(make(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: without("bn2b_branch2c/gamma"), r"'bn2b_branch2c/gamma' should have shape \(16,\), nothing arrived"),
        (lambda: without("conv1/bias"), r"'conv1/bias' should have shape \(4,\), nothing arrived"),
        (
            lambda: published()[1] | {"fc1000/bias": np.zeros(6)},
            r"'fc1000/bias' should have shape \(5,\), shape \(6,\) arrived: this is no ResNet-50",
        ),
    ],
)
def test_other_models_are_refused(tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(pretrained, "KERAS_RESNET50", MODEL)
    write(tmp_path / "ResNet50", change())
    with pytest.raises(ValueError, match=words):
        pretrained.load_resnet50(tmp_path)


@pytest.mark.parametrize("size", [(80, 60), (60, 80), (64, 64), (7, 9)])
def test_images_are_cut_from_the_middle(tmp_path, size):
    """A picture of two halves, red on the left and blue on the right: the border stays in the middle."""
    picture = Image.new("RGB", size, (250, 0, 0))
    picture.paste((0, 0, 250), (size[0] // 2, 0, *size))
    picture.quantize(2).save(tmp_path / "halves.png")
    image = np.asarray(pretrained.load_image(tmp_path / "halves.png", 56))
    assert image.shape == (56, 56, 3)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[:, 2], np.broadcast_to([250, 0, 0], (56, 3)), atol=3)
    np.testing.assert_allclose(image[:, -3], np.broadcast_to([0, 0, 250], (56, 3)), atol=3)
    border = np.argmin(image[28, :, 0] > 125)
    assert abs(border - 28) <= 5


def test_preprocessing_puts_blue_first():
    pixels = jnp.asarray([[[[200.0, 150.0, 100.0]]]])
    expected = [100 - 103.939, 150 - 116.779, 200 - 123.68]
    np.testing.assert_allclose(pretrained.preprocess(pixels)[0, 0, 0], expected, rtol=1e-5)


@pytest.mark.skipif(
    not ((DATA / "resnet50").is_dir() and (DATA / "imagenet_samples").is_dir()),
    reason="JAXPRUNE_DATA names no folder with resnet50/ and imagenet_samples/ in it",
)
def test_resnet50_knows_what_is_in_the_photographs():
    model, params = pretrained.load_resnet50(DATA / "resnet50")
    names = pretrained.labels(DATA / "resnet50")
    assert (len(names), names[0], names[609]) == (1000, "tench", "jeep")
    files = sorted((DATA / "imagenet_samples").glob("*.jpg"))
    assert len(files) == 20
    logits = jax.jit(model.apply)(params, pretrained.preprocess(jnp.stack([*map(pretrained.load_image, files)])))
    truth = [int(file.stem.rsplit("_", 1)[1]) for file in files]
    assert sum(int(guess) == label for guess, label in zip(logits.argmax(-1), truth, strict=True)) >= 19
