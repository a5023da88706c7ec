"""Files of models made without training, and pictures of digits as people have them; shared by the tests of files."""

import io

import jax.numpy as jnp
import numpy as np
from PIL import Image

import jaxprune as jp
from jaxprune.lab.data import sets
from jaxprune.lab.recipe import config
from jaxprune.lab.runs import store

LINEAR = """
name = "linear"
[data]
name = "{data}"
[model]
widths = []
"""


def linear_classifier(images, labels, ridge=1e-2):
    """Least squares: weights (pixels, 10) and biases, found at once."""
    x = np.concatenate([images.reshape(len(images), -1), np.ones((len(images), 1))], axis=1)
    targets = np.eye(10)[labels]
    found = np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ targets)
    return (10 * found).astype(np.float32)


def write_linear(folder, name="digits", images=None, labels=None, sparsity=0.5):
    """A file of a pruned linear model as `jaxprune run` would write it; returns its path and params."""
    if images is None:
        digits = sets.load("digits")
        images, labels = digits.train_images / digits.scale, digits.train_labels
    found = linear_classifier(np.asarray(images, np.float64), labels, 1e-3)
    params = {"layers": [{"kernel": jnp.asarray(found[:-1]), "bias": jnp.asarray(found[-1])}]}
    params = jp.apply_masks(params, masks := jp.compute_masks(jp.Method(), params, sparsity))
    (folder / "linear.toml").write_text(LINEAR.format(data=name))
    of_it = config.load(folder / "linear.toml")
    about = store.identity(of_it, 0, *sets.facts(of_it.data))
    jp.save(folder / "linear.jaxprune", params, masks=masks, metadata={**about, "accuracy": 0.5})
    return folder / "linear.jaxprune", params


def pictures(digit):
    """Name -> (suffix, bytes) of one digit, light on dark uint8 (h, w), as a picture in every way that people have."""
    rng, size = np.random.default_rng(0), digit.shape[0]
    grey = Image.fromarray(digit)
    large = np.asarray(grey.resize((12 * size, 12 * size), Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    paper = 228 - 150 * large[..., 0] + rng.normal(0, 3, large.shape[:2])
    coloured = large * np.array([20, 60, 200]) + (1 - large) * np.array([240, 230, 150])
    wide = Image.new("L", (30 * size, 20 * size), 255)
    wide.paste(Image.fromarray(255 - np.uint8(255 * large[..., 0])), (15 * size, 2 * size))
    ink = np.zeros((*digit.shape, 4), np.uint8)
    ink[..., 3] = digit
    return {
        "as it is": _encoded(grey, "PNG"),
        "dark on light": _encoded(Image.fromarray(255 - digit), "PNG"),
        "large": _encoded(grey.resize((7 * size, 7 * size), Image.Resampling.BICUBIC), "PNG"),
        "JPEG, paper": _encoded(Image.fromarray(paper.clip(0, 255).astype(np.uint8)), "JPEG"),
        "colours": _encoded(Image.fromarray(coloured.astype(np.uint8)), "JPEG"),
        "wide, in a corner": _encoded(wide, "JPEG"),
        "transparent": _encoded(Image.fromarray(ink), "PNG"),
        "16 bits": _encoded(Image.fromarray(digit.astype(np.uint16) * 257), "PNG"),
        "palette": _encoded(grey.convert("P"), "PNG"),
    }


def _encoded(image, form):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return {"PNG": ".png", "JPEG": ".jpg"}[form], buffer.getvalue()
