"""Published weights: ResNet-50 as trained on ImageNet, read from the files of TensorFlow.js, and images for it.

    model, params = load_resnet50(folder)                 # folder/ResNet50/model.json and its shards
    logits = model.apply(params, preprocess(jnp.stack([load_image(path)])))
    labels(folder)[int(logits.argmax())]                  # folder/assets/labels.json

A manifest in `model.json` lists names, shapes and dtypes of arrays that lie one after the other in the shards.
"""

import json
import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from jaxprune.lab.models.parts import Shapes, norm_name
from jaxprune.lab.models.resnet import ResNet50

KERAS_RESNET50 = ResNet50(stride_first=True, epsilon=1e-3)
BLUE_GREEN_RED = (103.939, 116.779, 123.68)
"""Mean of ImageNet's pixels, which this model's images have lost."""

KERAS_NORM = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
KERAS_BRANCH = {"conv1": "2a", "conv2": "2b", "conv3": "2c", "downsample.0": "1"}


def load_resnet50(folder: Path) -> tuple[ResNet50, dict[str, dict[str, Array]]]:
    """The model and its weights, shaped as `model.shapes()` says.

    These convolutions have biases before their batch norms; what they add is taken from the means instead.

    Args:
        folder: holds ResNet50/model.json.

    Raises:
        ValueError: files that are missing, torn, or of another model.
    """
    arrays = read_arrays(folder / "ResNet50" / "model.json")
    shapes = KERAS_RESNET50.shapes()
    params = {}
    for name, layer in shapes.items():
        if "kernel" not in layer:
            continue
        keras = _keras_name("res", name)
        params[name] = _taken(arrays, layer, {kind: f"{keras}/{kind}" for kind in layer})
        if (norm := norm_name(name)) in shapes and norm != name:
            names = {kind: f"{_keras_name('bn', name)}/{KERAS_NORM[kind]}" for kind in shapes[norm]}
            params[norm] = _taken(arrays, shapes[norm], names)
            params[norm]["mean"] -= _taken(arrays, shapes[norm], {"bias": f"{keras}/bias"})["bias"]
    return KERAS_RESNET50, params


def _keras_name(kind: str, name: str) -> str:
    """Keras's name of a layer, "res3a_branch2b", or of the batch norm after it, "bn3a_branch2b"."""
    found = re.fullmatch(r"layer(\d)\.(\d)\.(.+)", name)
    if found is None:
        return {"fc": "fc1000", "conv1": "conv1" if kind == "res" else "bn_conv1"}[name]
    return f"{kind}{int(found[1]) + 1}{'abcdef'[int(found[2])]}_branch{KERAS_BRANCH[found[3]]}"


def _taken(arrays: dict[str, np.ndarray], layer: Shapes, names: dict[str, str]) -> dict[str, Array]:
    for kind, name in names.items():
        if name not in arrays or arrays[name].shape != layer[kind].shape:
            arrived = f"shape {arrays[name].shape}" if name in arrays else "nothing"
            raise ValueError(
                f"{name!r} should have shape {layer[kind].shape}, {arrived} arrived: this is no ResNet-50 in Keras's "
                "layout."
            )
    return {kind: jnp.asarray(arrays[name]) for kind, name in names.items()}


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Name -> array, for every array of a TensorFlow.js model in float32.

    Args:
        file: model.json; its shards lie beside it.

    Raises:
        ValueError: a file is missing, is no such model, or holds more or less than the manifest says.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        groups = json.loads(file.read_text())["weightsManifest"]
        for group in groups:
            data = b"".join((file.parent / path).read_bytes() for path in group["paths"])
            arrays |= _parted(file, np.frombuffer(data, np.uint8), group["weights"])
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}.") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no model of TensorFlow.js: {error!r}.") from None
    return arrays


def _parted(file: Path, data: np.ndarray, weights: list[dict]) -> dict[str, np.ndarray]:
    if other := [weight for weight in weights if weight["dtype"] != "float32" or "quantization" in weight]:
        raise ValueError(f"{file}: {other[0]['name']!r} is not stored as plain float32.")
    sizes = [4 * math.prod(weight["shape"]) for weight in weights]
    if sum(sizes) != data.size:
        raise ValueError(f"{file} lists {sum(sizes)} bytes of weights, its shards hold {data.size}: fetch them again.")
    parts = np.split(data, np.cumsum(sizes)[:-1])
    return {w["name"]: part.view("<f4").reshape(w["shape"]) for w, part in zip(weights, parts, strict=True)}


def labels(folder: Path) -> list[str]:
    """Names of the 1000 classes.

    Args:
        folder: holds assets/labels.json.
    """
    named = json.loads((folder / "assets" / "labels.json").read_text())
    return [named[str(i)] for i in range(len(named))]


def load_image(path: Path, side: int = 224) -> Float[Array, "side side 3"]:
    """A picture as most models for ImageNet are tested: short side 8/7 of the model's, then the square in its middle.

    Args:
        path: JPEG, PNG or what else Pillow reads.
        side: of the square.

    Returns:
        Red, green and blue from 0 to 255.
    """
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    scale = round(side * 8 / 7) / min(picture.size)
    width, height = (round(length * scale) for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    picture = picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
    return jnp.asarray(np.asarray(picture, np.float32))


def preprocess(images: Float[Array, "batch h w 3"]) -> Float[Array, "batch h w 3"]:
    """Pixels from 0 to 255 as the weights of `load_resnet50` expect them: blue first, mean taken off."""
    return images[..., ::-1] - jnp.expand_dims(jnp.asarray(BLUE_GREEN_RED, jnp.float32), (0, 1, 2))
