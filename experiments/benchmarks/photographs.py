"""ResNet-50's published weights and 20 photographs from ImageNet, as the tests have them."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.lab.models import pretrained


def load(folder: Path) -> tuple[Any, Any, Any, np.ndarray]:
    """Model, params, photographs as the model expects them, and their classes.

    Args:
        folder: holds resnet50/ and imagenet_samples/.
    """
    model, params = pretrained.load_resnet50(folder / "resnet50")
    files = sorted((folder / "imagenet_samples").glob("*.jpg"))
    images = pretrained.preprocess(jnp.stack([pretrained.load_image(file) for file in files]))
    return model, params, images, np.asarray([int(file.stem.rsplit("_", 1)[1]) for file in files])
