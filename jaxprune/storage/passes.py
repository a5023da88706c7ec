"""Between a flat array and its non-zeros, in one pass over memory: in C++ where it was built, else in NumPy.

gather(dense)                ->  bits, values           the bits are those of the pattern "bitmask"
spread(bits, values, count)  ->  dense

Zeros of either sign are zeros. Where signs are to be kept a -0.0 is stored, for its bits are not all zero.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped, UInt, UInt8

from jaxprune import native
from jaxprune.native import codecs
from jaxprune.storage import memory
from jaxprune.storage.bits import ones
from jaxprune.storage.threads import each

_PART = 2**22
"""Items that a thread takes at a time, a multiple of 8."""
_LOOK = 2**16
"""Items that are looked at at a time, few enough to stay in a cache."""


def gather(dense: Shaped[np.ndarray, " count"]) -> tuple[UInt8[np.ndarray, " bytes"], Shaped[np.ndarray, " nnz"]]:
    """A bit for each item, and those whose bits are not all zero."""
    dense = np.require(dense, requirements=["C", "ALIGNED"])
    if native.why_not_loaded():
        kept = any_bit(dense)
        return np.packbits(kept), dense[kept]
    bits = np.empty(-(-len(dense) // 8), np.uint8)

    def part(first: int) -> Shaped[np.ndarray, " some"]:
        here = dense[first : first + _PART]
        values = np.empty(len(here) + 16, dense.dtype)
        return values[: codecs.gather(here, bits[first // 8 : (first + len(here) + 7) // 8], values)]

    found = each(part, range(0, len(dense), _PART))
    return bits, found[0] if len(found) == 1 else np.concatenate([dense[:0], *found])


def spread(
    bits: UInt8[np.ndarray, " bytes"], values: Shaped[np.ndarray, " nnz"], count: int
) -> Shaped[np.ndarray, " count"] | None:
    """The array that `gather` had; None: not as many bits are set as there are values.

    Args:
        bits: of `count` items, then up to a byte of others that do not matter.
        values: in order.
        count: items of the array.
    """
    starts = range(0, count, _PART)
    ends = np.cumsum([ones(bits[first // 8 : (first + _PART) // 8], count - first) for first in starts], dtype=int)
    if (int(ends[-1]) if count else 0) != len(values):
        return None
    dense = memory.zeros(count, values.dtype)

    def part(first: int) -> None:
        end = int(ends[first // _PART])
        here, mask = dense[first : first + _PART], bits[first // 8 : -(-min(first + _PART, count) // 8)]
        some = values[int(ends[first // _PART - 1]) if first else 0 : end]
        if native.why_not_loaded():
            here[np.unpackbits(mask, count=len(here)).view(bool)] = some
        else:
            codecs.spread(mask, some, here)

    each(part, starts)
    return dense


def nonzero(array: Shaped[np.ndarray, "*axes"]) -> Bool[np.ndarray, "*axes"]:
    """Where a number is not zero, whatever its sign; a NaN is not."""
    found = any_bit(array)
    if has_negative_zeros(array):
        found &= _bits(array) != _sign(array)
    return found


def any_bit(array: Shaped[np.ndarray, "*axes"]) -> Bool[np.ndarray, "*axes"]:
    """Where the bits are not all zero."""
    return np.asarray(_bits(array) != 0)


def has_negative_zeros(array: Shaped[np.ndarray, "..."]) -> bool:
    """Whether a zero has its sign set."""
    flat, sign = _bits(array).reshape(-1), _sign(array)
    parts = range(0, len(flat), _LOOK) if "float" in array.dtype.name else ()
    return any((flat[first : first + _LOOK] == sign).any() for first in parts)


def without_signs(array: Shaped[np.ndarray, "*axes"]) -> Shaped[np.ndarray, "*axes"]:
    """The array with 0.0 for every -0.0, all other bits as they are; the same one where there is none."""
    if not has_negative_zeros(array):
        return array
    made = np.array(_bits(array), order="C")
    flat, sign = made.reshape(-1), _sign(array)
    for first in range(0, len(flat), _LOOK):
        part = flat[first : first + _LOOK]
        part[part == sign] = 0
    return made.view(array.dtype)


def _bits(array: Shaped[np.ndarray, "*axes"]) -> UInt[np.ndarray, "*axes"]:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)


def _sign(array: Shaped[np.ndarray, "..."]) -> Any:
    return np.dtype(f"u{array.dtype.itemsize}").type(1 << 8 * array.dtype.itemsize - 1)
