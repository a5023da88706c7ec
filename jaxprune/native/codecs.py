"""The codecs of `jaxprune.storage` in C++: one pass over memory each, which lets other threads run meanwhile.

Bits are those of the pattern "bitmask": one for each weight, the first in the highest bit of a byte. Arrays that are
written must be as large as is said here; what is read may hold anything.
"""

import ctypes
import functools
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8, UInt32

from jaxprune.native import library

Bits = UInt8[np.ndarray, " bytes_of_bits"]
Codes = UInt8[np.ndarray, " bytes_of_codes"]
_ARGUMENTS = {
    "gather": "dense count itemsize bits values",
    "spread": "bits count values stored itemsize dense",
    "gaps": "bits count width codes",
    "bits_of_gaps": "codes bytes width stored count bits used",
    "csr": "bits rows cols width ends columns",
    "bits_of_csr": "ends columns rows cols width stored bits",
}
_NUMBERS = {"count", "stored", "itemsize", "width", "bytes", "rows", "cols"}


@functools.cache
def _function(name: str) -> Any:
    found = getattr(library(), f"jaxprune_{name}")
    found.argtypes = [ctypes.c_int64 if word in _NUMBERS else ctypes.c_void_p for word in _ARGUMENTS[name].split()]
    found.restype = ctypes.c_int64
    return found


def _call(name: str, *arguments: Any) -> int:
    return _function(name)(*(one.ctypes.data if isinstance(one, np.ndarray) else one for one in arguments))


def gather(dense: Shaped[np.ndarray, " count"], bits: Bits, values: Shaped[np.ndarray, " room"]) -> int:
    """Writes a bit for each item, 1 where its own bits are not all zero, and those items; returns how many they are.

    Args:
        dense: contiguous and aligned items of 1, 2, 4 or 8 bytes.
        bits: to be written, one for each item.
        values: to be written, with room for 16 more than there are items, since whole vectors are.
    """
    return _call("gather", dense, len(dense), dense.dtype.itemsize, bits, values)


def spread(bits: Bits, values: Shaped[np.ndarray, " nnz"], dense: Shaped[np.ndarray, " count"]) -> None:
    """Writes the next value where a bit is set, and zero elsewhere: what `gather` had.

    Args:
        bits: for each item; as many are set as there are values, which the caller has made sure of.
        values: contiguous, of the dtype of `dense`.
        dense: to be written.
    """
    _call("spread", bits, len(dense), values, len(values), values.dtype.itemsize, dense)


def gaps(bits: Bits, count: int, width: int, codes: Codes) -> int:
    """Writes the gaps before the bits that are set, in codes of `width` bits side by side; returns how many bytes.

    Args:
        bits: of `count` weights, behind which none is set.
        count: of weights.
        width: 2 to 16.
        codes: to be written, with room for a code for each bit set and each 2^width - 1 weights, and 8 bytes.
    """
    return _call("gaps", bits, count, width, codes)


def bits_of_gaps(codes: Codes, width: int, stored: int, bits: Bits, count: int) -> tuple[int, int]:
    """Sets the bits before which the gaps are; returns how many it has set, or -1 if one is outside, and codes used.

    Args:
        codes: of `width` bits, side by side.
        width: 2 to 16.
        stored: bits to set at most.
        bits: of zeros, to be written.
        count: of weights.
    """
    used = np.zeros(1, np.int64)
    return _call("bits_of_gaps", codes, len(codes), width, stored, count, bits, used), int(used[0])


def csr(bits: Bits, ends: UInt32[np.ndarray, " rows"], columns: Shaped[np.ndarray, " nnz"], cols: int) -> None:
    """Writes how many bits are set up to the end of each row, and of each its index in the row.

    Args:
        bits: of rows x cols weights, behind which none is set; fewer than 2^32.
        ends: to be written.
        columns: to be written, uint16 or uint32, one for each bit that is set.
        cols: weights of a row.
    """
    _call("csr", bits, len(ends), cols, columns.dtype.itemsize, ends, columns)


def bits_of_csr(ends: UInt32[np.ndarray, " rows"], columns: Shaped[np.ndarray, " nnz"], cols: int, bits: Bits) -> bool:
    """Sets the bits that `csr` had; False: rows do not end where the indices do, indices do not ascend, or one is
    outside its row.

    Args:
        ends: as `csr` writes it.
        columns: likewise.
        cols: weights of a row.
        bits: of zeros, to be written.
    """
    return bool(_call("bits_of_csr", ends, columns, len(ends), cols, columns.dtype.itemsize, len(columns), bits))
