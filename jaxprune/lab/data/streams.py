"""Images that are too many to be held: read and decoded when a batch asks for them.

    images, labels = split(read, n, side)       # like arrays: shape, dtype, [rows], but nothing is read yet
    for batch, order in batches(samples, key, order, steps, size): ...

Training sees a random part of each image, everything else the square in its middle. What is random is drawn from the
stage's key, the step and the place in the batch, so that a stage taken up again sees the same pixels.

References:
    Szegedy et al. 2015, arXiv:1409.4842, section 6: parts of 8 to 100 % of the area, of 3:4 to 4:3.
"""

import collections
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt8
from PIL import Image

from jaxprune.lab.data.files import DataError
from jaxprune.lab.data.images import MIDDLE
from jaxprune.lab.data.samples import Samples

AHEAD = 3  # batches decoded while one is trained on
AT_ONCE = 1000  # records read for their labels alone
Read = Callable[[Sequence[int]], list[tuple[bytes, int]]]


class Labels:
    """Labels of a split: an array that is read when it is looked at."""

    dtype = np.dtype(np.int32)

    def __init__(self, read: Read, rows: np.ndarray):
        self.read, self.rows, self.shape = read, rows, (len(rows),)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.asarray([label for _, label in self.read(_chosen(self.rows, rows))], np.int32)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        parts = [self[i : i + AT_ONCE] for i in range(0, len(self), AT_ONCE)]
        return np.concatenate([np.zeros(0, self.dtype), *parts]).astype(dtype or self.dtype)

    def subset(self, rows: np.ndarray) -> "Labels":
        """Some of them, unread."""
        return Labels(self.read, self.rows[rows])


class Images:
    """Images of a split, uint8 (n, side, side, 3): [rows] gives the square in the middle of each."""

    dtype = np.dtype(np.uint8)

    def __init__(self, read: Read, rows: np.ndarray, side: int):
        self.read, self.rows, self.side, self.shape = read, rows, side, (len(rows), side, side, 3)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> UInt8[Array, "rows side side 3"]:
        with ThreadPoolExecutor(_workers()) as pool:
            found = list(pool.map(lambda record: middle(record[0], self.side), self.read(_chosen(self.rows, rows))))
        return jnp.asarray(np.stack(found) if found else np.zeros((0, *self.shape[1:]), np.uint8))

    def subset(self, rows: np.ndarray) -> "Images":
        """Some of them, unread."""
        return Images(self.read, self.rows[rows], self.side)

    def parts(self, rows: np.ndarray, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Random parts of the images of some rows, and their labels."""
        found = self.read(self.rows[rows].tolist())
        pixels = [part(file, self.side, np.random.default_rng([*seed, i])) for i, (file, _) in enumerate(found)]
        return np.stack(pixels), np.asarray([label for _, label in found], np.int32)


def split(read: Read, n: int, side: int) -> tuple[Images, Labels]:
    """A split of a data set that is not held.

    Args:
        read: numbers of records -> the file and the label of each; called by several threads.
        n: how many there are.
        side: of the squares that a model takes.
    """
    return Images(read, np.arange(n), side), Labels(read, np.arange(n))


def held(samples: Samples, most: int) -> Samples:
    """The first samples, in memory; all of them if they are there already."""
    if not isinstance(samples.images, Images):
        return samples
    return samples._replace(images=samples.images[:most], labels=jnp.asarray(samples.labels[:most]))


def batches(
    samples: Samples, key: Key[Array, ""], order: Int[Array, "n"], steps: range, size: int
) -> Iterator[tuple[Samples, Int[Array, "n"]]]:
    """What each step of a stage reads: samples, and the order in which it finds its own among them.

    Args:
        samples: in memory, which every step is given as they are; or not, and then a step is given its batch alone.
        key: of the stage.
        order: permutation of the epoch that all these steps lie in.
        steps: which, counted from the stage's beginning.
        size: of a batch.
    """
    images = samples.images
    if not isinstance(images, Images):
        for _ in steps:
            yield samples, order
        return
    drawn, places = np.asarray(jax.random.key_data(key)).ravel().tolist(), np.asarray(order)
    every = len(places) // size  # as many steps has an epoch
    again = jnp.arange(len(places), dtype=order.dtype) % size
    with ThreadPoolExecutor(_workers()) as pool:
        waiting: collections.deque[Future[Any]] = collections.deque()
        left = iter(steps)
        while True:
            while len(waiting) < AHEAD + _workers() and (step := next(left, None)) is not None:
                rows = places[step % every * size :][:size]
                waiting.append(pool.submit(images.parts, rows, (*drawn, step)))
            if not waiting:
                return
            pixels, labels = waiting.popleft().result()
            yield Samples(jnp.asarray(pixels), jnp.asarray(labels), samples.scale), again


def middle(file: bytes, side: int) -> np.ndarray:
    """The square in the middle of an image file: 7/8 of its short side."""
    with _opened(file, side) as image:
        return _central(image, MIDDLE * min(image.size), side)


def part(file: bytes, side: int, rng: np.random.Generator) -> np.ndarray:
    """A random part of an image file as a square; the one in the middle where ten tries do not fit."""
    with _opened(file, side) as image:
        width, height = image.size
        for _ in range(10):
            area, ratio = width * height * rng.uniform(0.08, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                return _resized(image, (rng.uniform(0, width - w), rng.uniform(0, height - h), w, h), side)
        return _central(image, min(image.size), side)


def _chosen(records: np.ndarray, rows: Any) -> list[int]:
    return records[rows if isinstance(rows, slice) else np.asarray(rows)].tolist()


def _opened(file: bytes, side: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(file))
        image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at a half or less, never below this
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's names for damage
        raise DataError(f"An image of the data set cannot be decoded ({error}). Prepare the data set again.") from error


def _central(image: Image.Image, length: float, side: int) -> np.ndarray:
    width, height = image.size
    return _resized(image, ((width - length) / 2, (height - length) / 2, length, length), side)


def _resized(image: Image.Image, place: tuple[float, float, float, float], side: int) -> np.ndarray:
    left, top, width, height = place
    box = (left, top, left + width, top + height)
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box))


def _workers() -> int:
    return min(os.cpu_count() or 1, 16)
