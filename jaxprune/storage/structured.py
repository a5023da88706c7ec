"""Patterns that hardware likes: N of every M weights, and tiles. See `jaxprune.storage.patterns` for their bytes."""

import dataclasses
import math
from typing import ClassVar

import numpy as np
from jaxtyping import Bool

from jaxprune.storage.bits import pack, packed_size, unpack
from jaxprune.storage.container import require
from jaxprune.storage.patterns import RUN, Bits, Pattern, Places, Shape, Streams, runs, unpacked


@dataclasses.dataclass(frozen=True)
class NM(Pattern):
    """At most n living weights in every run of m along an axis: n are stored, each with its place in the run.

    Attributes:
        n: weights stored of a run.
        m: length of a run, 2 to 256.
        axis: the one runs lie along.
    """

    form: ClassVar[str] = "nm{n}:{m}@{axis}"
    in_order: ClassVar[bool] = False

    n: int
    m: int
    axis: int

    @property
    def width(self) -> int:
        """Bits of a place."""
        return (self.m - 1).bit_length()

    def misfit(self, shape: Shape) -> str:
        """See `Pattern.misfit`."""
        fits = self.axis < len(shape) and shape[self.axis] % self.m == 0
        return "" if fits else f"runs of {self.m} do not fit its axis {self.axis}"

    def why_not(self, alive: Bool[np.ndarray, "..."]) -> str:
        """See `Pattern.why_not`."""
        if misfit := self.misfit(alive.shape):
            return misfit
        most = int(np.count_nonzero(self._runs(alive), axis=1).max(initial=0))
        return f"{most} weights of a run of {self.m} are alive" if most > self.n else ""

    def slots(self, alive: Bool[np.ndarray, "..."]) -> int:
        """See `Pattern.slots`."""
        return alive.size // self.m * self.n

    def encode(self, bits: Bits, shape: Shape) -> Streams:
        """See `Pattern.encode`."""
        places = np.sort(np.argsort(~self._runs(unpacked(bits, shape)), axis=1, kind="stable")[:, : self.n], axis=1)
        return {"places": pack(places.reshape(-1).astype(np.uint16), self.width)}

    def stream_bytes(self, shape: Shape, slots: int) -> dict[str, int]:
        """See `Pattern.stream_bytes`."""
        expected = math.prod(shape) // self.m * self.n
        require(slots == expected, f"{slots} weights are stored, {self.n} of every {self.m} are {expected}")
        return {"places": packed_size(slots, self.width)}

    def places(self, streams: Streams, shape: Shape, slots: int) -> Places:
        """See `Pattern.places`."""
        size, after = shape[self.axis], math.prod(shape[self.axis + 1 :])
        step = RUN // self.n  # runs at a time
        for first in range(0, slots // self.n, step):
            last = min(first + step, slots // self.n)
            found = unpack(streams["places"], self.width, first * self.n, last * self.n)
            places = found.reshape(-1, self.n).astype(np.int64)
            require(bool((np.diff(places, axis=1) > 0).all()), "places in a run do not ascend")
            require(int(places.max(initial=0)) < self.m, f"a place is outside its run of {self.m}")
            line, run = np.divmod(np.arange(first, last), size // self.m)  # lines lie along the axis
            before, behind = np.divmod(line, after)
            start = (before * size + run * self.m) * after + behind
            yield (start[:, None] + places * after).reshape(-1)

    def _runs(self, alive: Bool[np.ndarray, "..."]) -> Bool[np.ndarray, "runs m"]:
        return np.moveaxis(alive, self.axis, -1).reshape(-1, self.m)


@dataclasses.dataclass(frozen=True)
class Block(Pattern):
    """Tiles of rows x cols weights in which any is alive, whole.

    Attributes:
        rows: of a tile.
        cols: of a tile, which has at most 32,768 weights.
    """

    form: ClassVar[str] = "block{rows}x{cols}"
    in_order: ClassVar[bool] = False

    rows: int
    cols: int

    @property
    def size(self) -> int:
        """Weights of a tile."""
        return self.rows * self.cols

    def misfit(self, shape: Shape) -> str:
        """See `Pattern.misfit`."""
        fits = len(shape) > 1 and not math.prod(shape[:-1]) % self.rows and not shape[-1] % self.cols
        return "" if fits else f"tiles of {self.rows} x {self.cols} do not fit its matrix"

    def slots(self, alive: Bool[np.ndarray, "..."]) -> int:
        """See `Pattern.slots`."""
        return int(np.count_nonzero(self._live(alive))) * self.size

    def encode(self, bits: Bits, shape: Shape) -> Streams:
        """See `Pattern.encode`."""
        return {"tiles": np.packbits(self._live(unpacked(bits, shape)))}

    def stream_bytes(self, shape: Shape, slots: int) -> dict[str, int]:
        """See `Pattern.stream_bytes`."""
        require(slots % self.size == 0, f"{slots} weights are no whole tiles of {self.size}")
        return {"tiles": packed_size(math.prod(shape) // self.size, 1)}

    def places(self, streams: Streams, shape: Shape, slots: int) -> Places:
        """See `Pattern.places`."""
        inside = np.arange(self.rows)[:, None] * shape[-1] + np.arange(self.cols)
        for first, last in runs(math.prod(shape) // self.size):
            tiles = first + np.flatnonzero(unpack(streams["tiles"], 1, first, last))
            for i in range(0, len(tiles), max(RUN // self.size, 1)):
                down, right = np.divmod(tiles[i : i + max(RUN // self.size, 1)], shape[-1] // self.cols)
                corner = down * self.rows * shape[-1] + right * self.cols
                yield (corner[:, None, None] + inside).reshape(-1)

    def _live(self, alive: Bool[np.ndarray, "..."]) -> Bool[np.ndarray, "down right"]:
        down, right = math.prod(alive.shape[:-1]) // self.rows, alive.shape[-1] // self.cols
        return np.asarray(alive.reshape(down, self.rows, right, self.cols).any((1, 3)))
