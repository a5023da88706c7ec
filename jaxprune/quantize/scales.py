"""Integers and their scales: which scale a range of weights needs, what the codes are, which scale weights have."""

from typing import Any

import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

TINY = float(np.finfo(np.float32).tiny)
"""The smallest scale: below it, processors may take numbers for zero."""


def symmetric_scale(peak: Any, bits: int) -> Any:
    """Scale of the integers up to 2^(bits-1) - 1 for weights up to `peak`.

    Args:
        peak: largest magnitude, float32, of NumPy or of JAX.
        bits: of an integer.
    """
    limit = 2 ** (bits - 1) - 1
    return peak.clip(limit * TINY) * np.float32(1 / limit)  # no division: compilers may replace those, differently


def asymmetric_grid(low: Any, high: Any, bits: int) -> tuple[Any, Any]:
    """Scale of integers of so many bits for numbers from `low` to `high`, and which of them is 0, as float32.

    Args:
        low: at most 0, float32 of NumPy.
        high: at least 0, likewise.
        bits: of an integer.
    """
    steps = 2**bits - 1
    scale = (high / steps - low / steps).clip(TINY)
    return scale, -(2 ** (bits - 1)) - (low * (1 / scale)).round()


def to_codes(numbers: Any, scale: Any, zero: Any, bits: int) -> Any:
    """The nearest integer of each number, still as float32; what is outside of the grid goes to its end.

    Args:
        numbers: float32, of NumPy or of JAX.
        scale: see `Affine`.
        zero: likewise, as float32.
        bits: of an integer.
    """
    return ((numbers * (1 / scale)).round() + zero).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def short(scale: Float[Any, "*shape"]) -> Float32[Array, "*shape"]:
    """The nearest number of seven binary digits."""
    return lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=6)


def scale_of(weights: Float[np.ndarray, "n outputs"], bits: int) -> tuple[Float32[np.ndarray, " outputs"], Any]:
    """The scale of the grid that the weights of each output lie on, to the bit in their dtype, and which have none.

    The largest weight is some integer times the scale: each integer is tried.

    Args:
        weights: float32, float16 or bfloat16.
        bits: of an integer.
    """
    exact = weights.astype(np.float32)
    peak = np.abs(exact).max(axis=0, initial=0)
    scale, left = np.full(peak.shape, TINY, np.float32), np.flatnonzero(peak)
    for code in range(2 ** (bits - 1) - 1, 0, -1):
        tried = np.asarray(short((peak[left] / np.float32(code)).clip(TINY)))
        multiples = np.rint(exact[:, left] / tried) * tried
        fits = (multiples.astype(weights.dtype) == weights[:, left]).all(axis=0)
        scale[left[fits]], left = tried[fits], left[~fits]
    return scale, left
