r"""Patterns: which weights of a tensor are stored, and how that is written down.

    encode : a bit a weight -> streams          places : streams -> index of the stored weights in the flat tensor

    pattern     bytes, for n weights of which k are alive, each of b bytes                 stores
    dense       n b                                                                        all
    bitmask     n / 8 + k b                                                                those alive
    csr16       4 rows + (2 + b) k           rows of the last axis; csr32: 4 bytes         those alive
    gapsW       W codes / 8 + k b            codes = sum_i (gap_i div (2^W - 1) + 1)       those alive
    nmN:M@A     runs N (log2(M) / 8 + b)     runs of M along axis A                        N of every run
    blockRxC    tiles / 8 + live R C b       tiles of the last two axes' matrix            whole tiles

`CSR` and `Gaps` are in `jaxprune.storage.positions`, `NM` and `Block` in `structured`. Each byte count is rounded up. A
gap is the number of dead weights before a living one; a code of 2^W - 1 stands for that many dead weights and no living
one (Han et al. 2016, arXiv:1510.00149, pads with zero weights instead). Tensors are flat in C order; a matrix has all
axes but the last as its rows.
"""

import abc
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar, TypeAlias

import numpy as np
from jaxtyping import Bool, Int, UInt8

from jaxprune.storage.bits import packed_size, unpack
from jaxprune.storage.container import require

Shape: TypeAlias = tuple[int, ...]
Streams: TypeAlias = dict[str, np.ndarray]
Index: TypeAlias = Any
"""A slice, a mask or positions in the flat tensor."""
Bits: TypeAlias = UInt8[np.ndarray, " bytes"]
"""One for each weight, the first in the highest bit of a byte; what fills the last byte does not count."""
Places: TypeAlias = Iterator[Int[np.ndarray, " some"]]

RUN = 2**15
"""Weights that are placed at a time: their positions are to take little memory beside the tensor."""


class Pattern(abc.ABC):
    """One way to write down which weights are stored."""

    form: ClassVar[str]
    """The name, with the attributes' names in place of their numbers."""
    in_order: ClassVar[bool] = True
    """Whether weights are stored in the order of the flat tensor."""

    @property
    def name(self) -> str:
        """The one that `jaxprune.storage.encodings.pattern_of` reads."""
        return self.form.format(**vars(self))

    def misfit(self, shape: Shape) -> str:
        """Why no tensor of this shape has such a pattern; "" if one may."""
        return ""

    def why_not(self, alive: Bool[np.ndarray, "..."]) -> str:
        """Why these weights have no such pattern; "" if they have."""
        return self.misfit(alive.shape)

    def slots(self, alive: Bool[np.ndarray, "..."]) -> int:
        """Weights stored."""
        return int(np.count_nonzero(alive))

    def bytes_of(self, alive: Bool[np.ndarray, "..."]) -> int:
        """Bytes of the streams, without making them."""
        return sum(self.stream_bytes(alive.shape, self.slots(alive)).values())

    @abc.abstractmethod
    def encode(self, bits: Bits, shape: Shape) -> Streams:
        """The streams, each an array of bytes or of little-endian integers, from a bit for each weight."""

    def stored(self, alive: Bool[np.ndarray, "..."]) -> Index:
        """Which of the flat weights are stored, in their order."""
        if self.in_order:
            return alive.reshape(-1)
        places = self.places(self.encode(np.packbits(alive), alive.shape), alive.shape, self.slots(alive))
        return np.concatenate([np.zeros(0, np.int64), *places])

    @abc.abstractmethod
    def stream_bytes(self, shape: Shape, slots: int) -> dict[str, int]:
        """Stream -> its bytes for so many weights stored; of gaps, at most.

        Args:
            shape: one without `misfit`.
            slots: weights stored.

        Raises:
            Problem: so many cannot be stored.
        """

    @abc.abstractmethod
    def places(self, streams: Streams, shape: Shape, slots: int) -> Places:
        """Which of the flat weights are stored, in their order, about `RUN` at a time.

        Args:
            streams: of the lengths that `stream_bytes` says.
            shape: one without `misfit`.
            slots: weights stored; whether there are so many places is for the caller to see.

        Raises:
            Problem: positions doubled or outside the tensor.
        """

    def bits(self, streams: Streams, shape: Shape, slots: int) -> Bits:
        """A bit for each weight, 1 where it is stored; arguments and errors are those of `places`."""
        stored = np.zeros(math.prod(shape), bool)
        for places in self.places(streams, shape, slots):
            stored[places] = True
        return np.packbits(stored)


@dataclasses.dataclass(frozen=True)
class Dense(Pattern):
    """Every weight."""

    form: ClassVar[str] = "dense"

    def slots(self, alive: Bool[np.ndarray, "..."]) -> int:
        """See `Pattern.slots`."""
        return alive.size

    def encode(self, bits: Bits, shape: Shape) -> Streams:
        """See `Pattern.encode`."""
        return {}

    def stored(self, alive: Bool[np.ndarray, "..."]) -> Index:
        """See `Pattern.stored`."""
        return slice(None)

    def stream_bytes(self, shape: Shape, slots: int) -> dict[str, int]:
        """See `Pattern.stream_bytes`."""
        require(slots == math.prod(shape), f"{slots} weights are stored of {math.prod(shape)}")
        return {}

    def places(self, streams: Streams, shape: Shape, slots: int) -> Places:
        """See `Pattern.places`."""
        for first, last in runs(slots):
            yield np.arange(first, last)


@dataclasses.dataclass(frozen=True)
class Bitmask(Pattern):
    """A bit for every weight."""

    form: ClassVar[str] = "bitmask"

    def encode(self, bits: Bits, shape: Shape) -> Streams:
        """See `Pattern.encode`."""
        return {"mask": bits}

    def bits(self, streams: Streams, shape: Shape, slots: int) -> Bits:
        """See `Pattern.bits`."""
        return streams["mask"]

    def stream_bytes(self, shape: Shape, slots: int) -> dict[str, int]:
        """See `Pattern.stream_bytes`."""
        return {"mask": packed_size(math.prod(shape), 1)}

    def places(self, streams: Streams, shape: Shape, slots: int) -> Places:
        """See `Pattern.places`."""
        for first, last in runs(math.prod(shape)):
            yield first + np.flatnonzero(unpack(streams["mask"], 1, first, last))


def unpacked(bits: Bits, shape: Shape) -> Bool[np.ndarray, "..."]:
    """The mask of a bit for each weight."""
    return np.unpackbits(bits, count=math.prod(shape)).view(bool).reshape(shape)


def runs(count: int) -> Iterator[tuple[int, int]]:
    """First and last of so many items, `RUN` at a time."""
    return ((first, min(first + RUN, count)) for first in range(0, count, RUN))
