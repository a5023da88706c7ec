"""Images from files, made into what a model was trained on.

    digits        whatever differs from the colour of the border, scaled into a box, its centre of mass in the middle
    garments      the same, without moving anything
    photographs   the square in the middle

MNIST's digits lie in a box of 20 x 20 pixels, light on dark, centred by their mass in 28 x 28 (LeCun et al. 1998).
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image, ImageOps

MIDDLE = 7 / 8
"""Part of the short side of a photograph that most models for ImageNet are tested on."""
FAINT = 0.1
"""Differences from the border's colour below this part of the largest are paper, shadow or traces of JPEG."""

Pixels = Float32[np.ndarray, "height width c"]


def read(path: Path) -> Float32[np.ndarray, "h w 3"]:
    """Red, green and blue in [0, 1] of a PNG, a JPEG or what else Pillow reads.

    Transparent parts become white behind dark ink, and black behind light ink.

    Raises:
        ValueError: it is no image, or a damaged one.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file, Image.open(file) as opened:
            turned = ImageOps.exif_transpose(opened)
            if turned.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off
                grey = np.asarray(turned, np.float32) / 65535
                return np.repeat(grey[..., None], 3, axis=2)
            pixels = np.asarray(turned.convert("RGBA"), np.float32) / 255
    except (Image.UnidentifiedImageError, Image.DecompressionBombError, SyntaxError):
        raise ValueError(f"{path} is no image that can be read, or far too large.") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path} is damaged: {error}") from None
    colours, opaque = pixels[..., :3], pixels[..., 3:]
    dark = float((colours * opaque).sum()) < 0.5 * 3 * float(opaque.sum())
    return colours * opaque + (1 - opaque) * np.float32(dark)


def digit(
    image: Float32[np.ndarray, "h w 3"], shape: tuple[int, int, int], *, box: float = 20 / 28, behind: float = 0.5
) -> Pixels:
    """Light on dark, scaled into a box, its centre of mass in the middle.

    Args:
        image: red, green and blue in [0, 1].
        shape: (h, w, c) of the model's images.
        box: height and width of the box, as parts of the model's.
        behind: how many pixels the centre is behind the middle, on average; half a pixel in MNIST.

    Raises:
        ValueError: the image has one colour.
    """
    ink = _ink(image)
    height, width, channels = shape
    rows, cols = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    cut = ink[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    scale = min(box * height / cut.shape[0], box * width / cut.shape[1])
    small = _resized(cut, *(max(round(length * scale), 1) for length in cut.shape))
    canvas = np.zeros((height, width), np.float32)
    at = [_centred(small.sum(1 - axis), side, behind) for axis, side in enumerate((height, width))]
    canvas[at[0] : at[0] + small.shape[0], at[1] : at[1] + small.shape[1]] = small
    return np.repeat((canvas / canvas.max())[..., None], channels, axis=2)


def garment(image: Float32[np.ndarray, "h w 3"], shape: tuple[int, int, int]) -> Pixels:
    """Light on dark, the whole of it, as wide as high.

    Args:
        image: see `digit`.
        shape: see `digit`.

    Raises:
        ValueError: the image has one colour.
    """
    ink = _ink(image)
    side = max(ink.shape)
    square = np.zeros((side, side), np.float32)
    top, left = ((side - length) // 2 for length in ink.shape)
    square[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return np.repeat(_resized(square, *shape[:2])[..., None], shape[2], axis=2)


def photograph(image: Float32[np.ndarray, "h w 3"], shape: tuple[int, int, int], *, part: float = 1.0) -> Pixels:
    """The square in the middle, in the model's size.

    Args:
        image: see `digit`.
        shape: see `digit`.
        part: of the short side.
    """
    side = max(round(part * min(image.shape[:2])), 1)
    top, left = ((length - side) // 2 for length in image.shape[:2])
    square = image[top : top + side, left : left + side]
    colours = square if shape[2] == 3 else square.mean(2, keepdims=True)
    return np.stack([_resized(colour, *shape[:2]) for colour in np.moveaxis(colours, 2, 0)], axis=2)


PREPARE: dict[str, Callable[..., Pixels]] = {
    "digits": functools.partial(digit, box=1.0, behind=0.0),
    "mnist": digit,
    "fashion_mnist": garment,
    "cifar10": photograph,
    "imagenet2012": functools.partial(photograph, part=MIDDLE),
}
"""Data set -> how an image is made like those in it."""


def _ink(image: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w"]:
    """How far each pixel is from the border's colour, 1 where it is farthest: dark on light or light on dark alike."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    away = np.abs(image - np.median(border, axis=0)).max(2)
    if not away.max() > 0.02:
        raise ValueError("nothing is to be seen: all of it has one colour.")
    return np.clip((away / away.max() - FAINT) / (1 - FAINT), 0, 1).astype(np.float32)


def _resized(ink: Float32[np.ndarray, "h w"], height: int, width: int) -> Float32[np.ndarray, "height width"]:
    if ink.shape == (height, width):
        return ink
    picture = Image.fromarray(ink).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture, np.float32)


def _centred(mass: Float[np.ndarray, " n"], side: int, behind: float) -> int:
    """Where a strip of this mass begins so that its centre is in the middle, as far as it stays inside."""
    centre = float((mass * (np.arange(len(mass)) + 0.5)).sum() / mass.sum())
    return int(np.clip(round(side / 2 + behind - centre), 0, side - len(mass)))
