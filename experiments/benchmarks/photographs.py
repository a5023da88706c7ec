"""ResNet-50's published weights and 20 photographs from ImageNet, as the tests have them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxprune.lab.models import pretrained


def load(folder: Path) -> tuple[Any, Any, Any, np.ndarray]:
    """Model, params, photographs as the model expects them, and their classes.

    Args:
        folder: holds resnet50/ and imagenet_samples/.
    """
    model, params = pretrained.load_resnet50(folder / "resnet50")
    files = _files(folder)
    images = pretrained.preprocess(jnp.stack([pretrained.load_image(file) for file in files]))
    return model, params, images, np.asarray([int(file.stem.rsplit("_", 1)[1]) for file in files])


def crops(folder: Path, numbers: Iterable[int], count: int, *, seed: int, side: int = 224) -> Any:
    """Random squares of photographs as the model expects them, in a random order, every second one mirrored.

    Args:
        folder: see `load`.
        numbers: of the photographs.
        count: squares of each; their sides are 0.6 to 1 of the short side.
        seed: draws them.
        side: in pixels, of what comes out.
    """
    rng, files, found = np.random.default_rng(seed), _files(folder), []
    for number in numbers:
        with Image.open(files[number]) as opened:
            picture = opened.convert("RGB")
        for i in range(count):
            size = round(rng.uniform(0.6, 1) * min(picture.size))
            left, top = (int(rng.integers(length - size + 1)) for length in picture.size)
            square = picture.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + size, top + size))
            pixels = np.asarray(square, np.float32)
            found.append(pixels[:, ::-1] if i % 2 else pixels)
    return pretrained.preprocess(jnp.asarray(np.stack(found)[rng.permutation(len(found))]))


def _files(folder: Path) -> list[Path]:
    return sorted((folder / "imagenet_samples").glob("*.jpg"))
