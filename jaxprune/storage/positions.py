"""Patterns that list positions: rows of indices, and gaps. See `jaxprune.storage.patterns` for their bytes."""

import dataclasses
import math
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int

from jaxprune import native
from jaxprune.native import codecs
from jaxprune.storage.bits import ones, pack, packed_size, unpack
from jaxprune.storage.container import require
from jaxprune.storage.patterns import Bits, Pattern, Places, Shape, Streams, runs, unpacked


@dataclasses.dataclass(frozen=True)
class CSR(Pattern):
    """Compressed rows: where each row ends among the stored weights, and each one's index in its row.

    Attributes:
        width: bits of an index, 16 or 32.
    """

    form: ClassVar[str] = "csr{width}"

    width: int

    def misfit(self, shape: Shape) -> str:
        """See `Pattern.misfit`."""
        if len(shape) < 2:
            return "it has no rows"
        too_long = shape[-1] > 2**self.width or math.prod(shape) >= 2**32
        return f"rows of {shape[-1]} and {math.prod(shape)} weights are too many for its numbers" if too_long else ""

    def encode(self, bits: Bits, shape: Shape) -> Streams:
        """See `Pattern.encode`."""
        if native.why_not_loaded():
            rows = unpacked(bits, (math.prod(shape[:-1]), shape[-1]))
            ends = np.cumsum(np.count_nonzero(rows, axis=1)).astype("<u4")
            return {"ends": ends, "columns": np.nonzero(rows)[1].astype(f"<u{self.width // 8}")}
        ends, columns = np.empty(math.prod(shape[:-1]), "<u4"), np.empty(ones(bits), f"<u{self.width // 8}")
        codecs.csr(bits, ends, columns, shape[-1])
        return {"ends": ends, "columns": columns}

    def stream_bytes(self, shape: Shape, slots: int) -> dict[str, int]:
        """See `Pattern.stream_bytes`."""
        return {"ends": 4 * math.prod(shape[:-1]), "columns": self.width // 8 * slots}

    def places(self, streams: Streams, shape: Shape, slots: int) -> Places:
        """See `Pattern.places`."""
        ends, columns = streams["ends"].view("<u4"), streams["columns"].view(f"<u{self.width // 8}")
        climbing = bool((ends[1:] >= ends[:-1]).all()) and (int(ends[-1]) if len(ends) else 0) == slots
        require(climbing, "the rows do not end where the weights do")
        require(int(columns.max(initial=0)) < max(shape[-1], 1), f"an index is outside rows of {shape[-1]}")
        before = -1
        for first, last in runs(slots):
            rows = np.searchsorted(ends, np.arange(first, last, dtype="<u4"), side="right")
            flat = rows * shape[-1] + columns[first:last]
            require(before < flat[0] and bool((np.diff(flat) > 0).all()), "indices in a row do not ascend")
            before = flat[-1]
            yield flat

    def bits(self, streams: Streams, shape: Shape, slots: int) -> Bits:
        """See `Pattern.bits`."""
        made = np.zeros(packed_size(math.prod(shape), 1), np.uint8)
        ends, columns = streams["ends"].view("<u4"), streams["columns"].view(f"<u{self.width // 8}")
        if not native.why_not_loaded() and codecs.bits_of_csr(ends, columns, shape[-1], made):
            return made
        return super().bits(streams, shape, slots)  # which says what is wrong


@dataclasses.dataclass(frozen=True)
class Gaps(Pattern):
    """Distances from each living weight to the next.

    Attributes:
        width: bits of a code, 2 to 16.
    """

    width: int

    form: ClassVar[str] = "gaps{width}"

    def bytes_of(self, alive: Bool[np.ndarray, "..."]) -> int:
        """See `Pattern.bytes_of`."""
        return self.size_of(gaps_of(alive))

    def size_of(self, gaps: Int[np.ndarray, " alive"]) -> int:
        """Bytes for these gaps."""
        return packed_size(int((gaps // (2**self.width - 1)).sum()) + len(gaps), self.width)

    def encode(self, bits: Bits, shape: Shape) -> Streams:
        """See `Pattern.encode`."""
        if not native.why_not_loaded():
            room = np.empty(self.stream_bytes(shape, ones(bits))["gaps"] + 8, np.uint8)
            return {"gaps": room[: codecs.gaps(bits, math.prod(shape), self.width, room)]}
        skip = 2**self.width - 1
        skips, rest = np.divmod(gaps_of(unpacked(bits, shape)), skip)
        places = np.cumsum(skips + 1)
        codes = np.full(int(places[-1]) if len(places) else 0, skip, np.uint16)
        codes[places - 1] = rest
        return {"gaps": pack(codes, self.width)}

    def stream_bytes(self, shape: Shape, slots: int) -> dict[str, int]:
        """See `Pattern.stream_bytes`."""
        return {"gaps": packed_size(slots + math.prod(shape) // (2**self.width - 1), self.width)}

    def places(self, streams: Streams, shape: Shape, slots: int) -> Places:
        """See `Pattern.places`."""
        data, skip, size = streams["gaps"], 2**self.width - 1, math.prod(shape)
        at, seen, used = -1, 0, 0  # position, living weights and codes so far
        for first, last in runs(8 * len(data) // self.width):
            codes = unpack(data, self.width, first, last).astype(np.int64)
            living = codes != skip
            ends = at + np.cumsum(codes + living)
            here = np.flatnonzero(living)[: slots - seen]  # the last byte is filled up with what looks like more
            flat = ends[here]
            require(int(flat.max(initial=0)) < max(size, 1), f"a position is outside {size} weights")
            at, seen, used = int(ends[-1]), seen + len(here), first + int(here[-1]) + 1 if len(here) else used
            yield flat
        self._check_used(used, data)

    def bits(self, streams: Streams, shape: Shape, slots: int) -> Bits:
        """See `Pattern.bits`."""
        data, size = streams["gaps"], math.prod(shape)
        if native.why_not_loaded():
            return super().bits(streams, shape, slots)
        made = np.zeros(packed_size(size, 1), np.uint8)
        seen, used = codecs.bits_of_gaps(data, self.width, slots, made, size)
        require(seen >= 0, f"a position is outside {size} weights")
        self._check_used(used, data)
        return made

    def _check_used(self, used: int, data: np.ndarray) -> None:
        require(packed_size(used, self.width) == len(data), "there are more codes than weights")


def gaps_of(alive: Bool[np.ndarray, "..."]) -> Int[np.ndarray, " alive"]:
    """Dead weights before each living one, since the living one before it."""
    return np.diff(np.flatnonzero(alive), prepend=-1) - 1
