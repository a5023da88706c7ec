"""Types of GGUF's tensors: rows of 32 weights in a block with a scale of their own, and plain floats.

| type | a block holds | w |
|---|---|---|
| Q8_0 | float16 d; 32 int8 q | d q |
| Q4_0 | float16 d; 32 nibbles q | d (q - 8) |
| Q4_1 | float16 d, m; 32 nibbles q | d q + m |
| F32, F16, BF16 | | |

Of the nibbles the low ones come first. Dequantizing is exact: a product has fewer bits than float32. A zero has the
code 0 of Q8_0 and 8 of Q4_0, so these keep the zeros of a pruned model; Q4_1 (and Q5_1, Q2_K, Q4_K, Q5_K, whose blocks
have a minimum as well) moves them to the nearest of 16 values, which is hardly ever zero: it is read, not written.

Reference: https://github.com/ggml-org/ggml, `ggml-quants.c`, whose rounding is followed.
"""

import math
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped, UInt8

BLOCK = 32
PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
"""Of a block of each type."""
IDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12}
IDS |= {"Q5_K": 13, "Q6_K": 14, "BF16": 30}
"""The format's numbers of types."""
LOSE_ZEROS = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
WRITTEN = (*PLAIN, "Q8_0", "Q4_0")


def nbytes(type: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor.

    Raises:
        ValueError: a type that is not read, or rows that are no whole blocks.
    """
    if type in PLAIN:
        return math.prod(shape) * PLAIN[type].itemsize
    if type not in BYTES:
        raise ValueError(f"Tensors of type {type} are not read. There are: {', '.join((*PLAIN, *BYTES))}.")
    if not shape or shape[-1] % BLOCK:
        raise ValueError(f"Rows of {shape} are no whole blocks of {BLOCK}, which {type} has. Take F16 or F32.")
    return math.prod(shape) // BLOCK * BYTES[type]


def dequantize(type: str, data: UInt8[np.ndarray, "n_bytes"], shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """The float32 values of a tensor.

    Args:
        type: of the tensor.
        data: its bytes, as many as `nbytes` says.
        shape: slowest axis first.
    """
    if type in PLAIN:
        return data.view(PLAIN[type]).reshape(shape).astype(np.float32)
    blocks = data.reshape(-1, BYTES[type])
    scale = _half(blocks[:, :2])
    if type == "Q8_0":
        return (scale * blocks[:, 2:].view(np.int8).astype(np.float32)).reshape(shape)
    nibbles = blocks[:, -16:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32)
    values = scale * (codes - 8) if type == "Q4_0" else scale * codes + _half(blocks[:, 2:4])
    return values.reshape(shape)


def quantize(type: str, array: Shaped[np.ndarray, "..."]) -> Any:
    """The bytes of a tensor, as uint8.

    Args:
        type: one of `WRITTEN`.
        array: floats, finite.

    Raises:
        ValueError: a type that is not written; rows that are no whole blocks; values beyond float16 or not finite.
    """
    if type not in WRITTEN:
        way = f"There are: {', '.join(WRITTEN)}."
        if type in LOSE_ZEROS:
            raise ValueError(f"{type} has a minimum in every block, so zeros would not stay zero. {way}")
        raise ValueError(f"Tensors of type {type!r} are not written. {way}")
    nbytes(type, array.shape)
    array = np.ascontiguousarray(array, np.float32)
    if not np.all(np.abs(array) <= (65504 if type in ("F16", *BYTES) else np.inf)):
        raise ValueError(f"A value is not finite, or too large for the float16 numbers of {type}. Take F32.")
    if type in PLAIN:
        return array.astype(PLAIN[type]).reshape(-1).view(np.uint8)
    blocks = array.reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = np.abs(largest) / np.float32(127) if type == "Q8_0" else largest / np.float32(-8)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    if type == "Q8_0":
        scaled = blocks * inverse
        codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8).view(np.uint8)
    else:
        # In float64: the reference adds 8.5 with a fused multiply-add.
        codes = np.minimum(np.trunc(blocks.astype(np.float64) * inverse + 8.5), 15).astype(np.uint8)
        codes = codes[:, :16] | codes[:, 16:] << 4
    return np.concatenate([scale.astype("<f2").view(np.uint8), codes], axis=1).reshape(-1)


def _half(pairs: UInt8[np.ndarray, "blocks 2"]) -> Float[np.ndarray, "blocks 1"]:
    return np.ascontiguousarray(pairs).view("<f2").astype(np.float32)
