r"""Streams: runs of bytes, as they are or deflated (RFC 1951), whichever is shorter.

    raw        the bytes
    deflate    deflated
    planesN    first bytes of all items of N bytes, then second bytes, ..., deflated: exponents of floats lie together

Deflating with Huffman codes alone comes within 1 to 3 % of the entropy on gaps and codes, as close as newer libraries
do; the standard library has it, and every language has a reader.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8

from jaxprune.storage import memory
from jaxprune.storage.container import Problem, require

CODERS = {"raw": 1, "deflate": 1, "planes2": 2, "planes4": 4, "planes8": 8}
"""Coder -> bytes of an item."""

MOST = 1032
"""Bytes that a byte of deflate can become, at most."""
_SEARCHED = 2**18  # bytes up to which repetitions are looked for: that takes up to three seconds for a million
_PIECE = 2**16  # bytes that are inflated at a time


class Stream(NamedTuple):
    """A stream as it stands in a file.

    Attributes:
        coder: "raw", "deflate", "planes2", "planes4" or "planes8".
        data: the bytes stored.
        size: bytes that they become.
    """

    coder: str
    data: bytes | memoryview
    size: int


def as_it_is(items: Shaped[np.ndarray, "..."]) -> Stream:
    """The bytes of an array."""
    data = np.ascontiguousarray(items).reshape(-1).view(np.uint8).data
    return Stream("raw", data, len(data))


def coded(made: Mapping[str, np.ndarray], deflate: bool) -> dict[str, Stream]:
    """Arrays by name, deflated, if they may be, where that makes them fewer bytes."""
    return {name: shortest(items) if deflate else as_it_is(items) for name, items in made.items()}


def shortest(items: Shaped[np.ndarray, "..."]) -> Stream:
    """The bytes of an array, deflated if that makes them fewer.

    Args:
        items: flat; items of several bytes are tried in planes too.
    """
    plain = as_it_is(items)
    tried = [plain, deflated(items)]
    if items.dtype.itemsize > 1:
        planes = np.frombuffer(plain.data, np.uint8).reshape(-1, items.dtype.itemsize).T.tobytes()
        tried.append(Stream(f"planes{items.dtype.itemsize}", _deflate(planes), plain.size))
    return min(tried, key=lambda stream: len(stream.data))


def deflated(items: Shaped[np.ndarray, "..."]) -> Stream:
    """The bytes of an array, deflated."""
    plain = as_it_is(items)
    return plain._replace(coder="deflate", data=_deflate(plain.data))


def _deflate(data: bytes | memoryview) -> bytes:
    def run(strategy: int) -> bytes:
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
        return coder.compress(data) + coder.flush()

    searched = [zlib.Z_DEFAULT_STRATEGY] if len(data) <= _SEARCHED else []
    strategies = [zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, *searched]  # runs of one byte are found at once
    return min(map(run, strategies), key=len)


def check_size(coder: str, stored: int, size: int) -> None:
    """Refuse a stream that cannot become what it says, before memory is taken for it.

    Raises:
        Problem: an unknown coder, or a size out of reach.
    """
    require(coder in CODERS, f"there is no coder {coder!r}")
    require(size % CODERS[coder] == 0, f"{size} bytes are no items of {CODERS[coder]}")
    fits = size == stored if coder == "raw" else size <= MOST * stored
    require(fits, f"{stored} bytes of {coder} cannot become {size}")


def decoded(stream: Stream) -> UInt8[np.ndarray, " size"]:
    """The bytes of the array; those of a raw stream are not copied.

    Args:
        stream: one that passed `check_size`.

    Raises:
        Problem: damaged, or longer or shorter than it says.
    """
    if stream.coder == "raw":
        return np.frombuffer(stream.data, np.uint8)
    made = memory.zeros(stream.size, np.uint8)
    planes = made.reshape(-1, CODERS[stream.coder]).T
    items, at = planes.shape[1], 0
    for piece in _inflated(stream.data):
        require(at + len(piece) <= stream.size, f"its deflated bytes become more than {stream.size}")
        while len(piece):
            plane, place = divmod(at, items)
            part = piece[: items - place]
            planes[plane, place : place + len(part)] = part
            piece, at = piece[len(part) :], at + len(part)
    require(at == stream.size, f"its deflated bytes become {at}, not {stream.size}")
    return made


def _inflated(data: bytes | memoryview) -> Iterator[UInt8[np.ndarray, " piece"]]:
    """Piece by piece, since the library itself holds everything twice for a moment."""
    decoder = zlib.decompressobj(-15)
    for first in range(0, len(data), _PIECE):
        rest, full = data[first : first + _PIECE], True
        while (len(rest) or full) and not decoder.eof:  # behind a full piece there may be more without another byte
            try:
                piece = decoder.decompress(rest, _PIECE)
            except zlib.error as error:
                raise Problem(f"its deflated bytes are damaged ({error})") from None
            yield np.frombuffer(piece, np.uint8)
            rest, full = decoder.unconsumed_tail, len(piece) == _PIECE
        ended = not decoder.unused_data and first + _PIECE >= len(data)
        require(ended or not decoder.eof, "something stands behind its deflated bytes")
    require(decoder.eof, "its deflated bytes are cut off")


def entropy(items: Shaped[np.ndarray, "..."]) -> float:
    r"""Bits of all items together, were each coded by its frequency: $-\sum_x c_x \log_2 (c_x / n)$.

    References:
        Shannon 1948.
    """
    counts = np.unique(items, return_counts=True)[1]
    return float(-(counts * np.log2(counts / max(items.size, 1))).sum()) + 0.0
