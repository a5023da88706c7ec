"""Samples: images and labels on the device, and what is done to images in training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num


class Samples(NamedTuple):
    """Images and labels on the device, or read as they are looked at (`jaxprune.lab.data.streams`).

    Attributes:
        images: uint8 (n, h, w, c), or what else a model takes, (n, ...).
        labels: int32, (n,).
        scale: what pixels are divided by to come into [0, 1]; 1 of what are no pixels.
    """

    images: Num[Array, "n ..."]
    labels: Int[Array, "n"]
    scale: Float[Array, ""]


def samples_of(images: Any, labels: Any, scale: float) -> Samples:
    """Arrays of a data set on the device; those of `streams` stay where they are."""
    images, labels = (jnp.asarray(one) if isinstance(one, np.ndarray) else one for one in (images, labels))
    return Samples(images, labels, jnp.float32(scale))


def scaled(samples: Samples, images: Num[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Pixels as float32 in [0, 1]; what are no pixels as they are."""
    return images.astype(jnp.float32) / samples.scale


def shifted(images: Num[Array, "b h w c"], key: Key[Array, ""], most: int) -> Num[Array, "b h w c"]:
    """Each image moved up or down and sideways, by -most to most pixels with equal chance; what comes in is 0."""
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * most + 1)
    cut = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))
    return cut(padded, corners)


def mirrored(images: Num[Array, "b h w c"], key: Key[Array, ""]) -> Num[Array, "b h w c"]:
    """Each image as it is or mirrored sideways, with equal chance."""
    chosen = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)
