"""Codes of a few bits each, side by side: the highest bit first, the last byte filled up with zeros.

5, 1, 7 of 3 bits    ->    101 001 11|1 0000000
"""

import numpy as np
from jaxtyping import UInt, UInt8

_RUN = 2**20  # codes at a time, so that their single bits take little memory; a multiple of 8 fills whole bytes


def packed_size(count: int, width: int) -> int:
    r"""Bytes of `count` codes: $\lceil count \cdot width / 8 \rceil$."""
    return -(-count * width // 8)


def pack(codes: UInt[np.ndarray, " count"], width: int) -> UInt8[np.ndarray, " bytes"]:
    """Codes below 2^width, side by side.

    Args:
        codes: unsigned.
        width: bits of each, 1 to 16.
    """
    if width == 8:
        return codes.astype(np.uint8)
    places = np.arange(width - 1, -1, -1, dtype=codes.dtype)
    runs = [codes[i : i + _RUN, None] >> places & 1 for i in range(0, len(codes), _RUN)]
    return np.concatenate([np.packbits(run.astype(bool)) for run in runs] or [np.zeros(0, np.uint8)])


def unpack(
    data: UInt8[np.ndarray, " bytes"], width: int, first: int, last: int
) -> UInt[np.ndarray, " last_minus_first"]:
    """Codes number `first` to `last` of those that `pack` put together; takes 16 times their bits in memory.

    Args:
        data: at least `packed_size(last, width)` bytes.
        width: bits of each code.
        first: of the codes.
        last: the one after.
    """
    if width == 8:
        return data[first:last]
    start = first * width
    bits = np.unpackbits(data[start // 8 : packed_size(last, width)], count=start % 8 + (last - first) * width)
    codes = np.zeros(last - first, np.uint8 if width < 8 else np.uint16)
    for column in bits[start % 8 :].reshape(-1, width).T:
        codes <<= 1
        codes |= column
    return codes


def ones(bits: UInt8[np.ndarray, " bytes"], count: int | None = None) -> int:
    """How many of the first `count` bits are set, of all if None."""
    if count is None or 8 * len(bits) <= count:
        return int(np.bitwise_count(bits).sum(dtype=np.int64))
    rest = bits[count // 8 : count // 8 + 1] >> np.uint8(8 - count % 8) if count % 8 else bits[:0]
    return ones(bits[: count // 8]) + ones(rest)
