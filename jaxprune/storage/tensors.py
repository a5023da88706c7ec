"""One tensor: from an array and its mask to a record and bytes, and back to whatever is asked for.

encode(path, leaf, mask, "auto")  ->  record, bytes
Stored(record, bytes)             ->  .array()  .mask()  .leaf()  .nonzeros()
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Int, Int8, Shaped, UInt8

from jaxprune.quantize.codes import Affine, Codebook
from jaxprune.storage import memory, passes, records, streams, values
from jaxprune.storage.bits import ones, unpack
from jaxprune.storage.container import Problem, require
from jaxprune.storage.encodings import pattern_of, smallest, stores_just
from jaxprune.storage.passes import any_bit, has_negative_zeros, nonzero
from jaxprune.storage.patterns import Bitmask, Dense, Pattern
from jaxprune.storage.positions import Gaps
from jaxprune.storage.records import Part, Record
from jaxprune.storage.streams import Stream
from jaxprune.storage.values import Leaf

Pieces: TypeAlias = Sequence[bytes | memoryview]


def encode(
    path: tuple[Any, ...], leaf: Leaf, mask: Bool[np.ndarray, "..."] | None, encoding: str, *, deflate: bool
) -> tuple[Record, Pieces]:
    """A record and the bytes that go with it, in pieces.

    Args:
        path: keys, as they stand in the file.
        leaf: an array in host memory, or a quantized one.
        mask: which weights are alive; None: a quantized leaf knows, of an array those that are not zero. A -0.0 is
            stored, alive or not.
        encoding: a name, or "auto".
        deflate: whether streams may be deflated.

    Raises:
        Problem: no such encoding, one that these weights do not have or that would lose the mask, a dead weight
            that is not zero, or a dead -0.0 beside a living zero.
    """
    if encoding != "auto" and (made := _nonzeros_in(path, leaf, mask, pattern_of(encoding), deflate)):
        return made
    quantized = not isinstance(leaf, np.ndarray)
    living = leaf.alive if quantized else nonzero(leaf)
    alive = living if mask is None else mask
    if quantized and not np.array_equal(alive, living):
        raise Problem("it was quantized with another mask. Quantize with the masks that you save")
    if (living & ~alive).any():
        raise Problem("a weight that the mask has dead is not zero, and would be lost. Call `apply_masks` first")
    exact = quantized or not np.array_equal(alive, living)
    kept = alive if quantized or not has_negative_zeros(leaf) else np.asarray(alive | any_bit(leaf))
    if exact and not np.array_equal(kept, alive):
        raise Problem("a zero is alive and a -0.0 is dead, of which a file keeps one. Leave out `signed_zeros`")
    count = int(np.count_nonzero(alive))
    # What is kept, coded: the same in every pattern that stores just that, in order, so it is done once.
    kept_coded = functools.cache(lambda deflate: values.encode(leaf, kept.reshape(-1), deflate=deflate))
    if encoding != "auto":
        return _in_pattern(path, leaf, kept, count, _usable(encoding, kept, exact), deflate, kept_coded)
    found = smallest(kept, values.bits_of(leaf), exact=exact)
    # Which is the smallest once it is deflated cannot be told beforehand; these two deflate best.
    tried: dict[Pattern, None] = dict.fromkeys([found, *([Bitmask(), Gaps(8)] if deflate else [])])
    ways = (_in_pattern(path, leaf, kept, count, one, deflate, kept_coded) for one in tried)
    return min(ways, key=lambda made: made[0].stored_bytes)


def _usable(encoding: str, kept: Bool[np.ndarray, "..."], exact: bool) -> Pattern:
    pattern = pattern_of(encoding)
    if why_not := pattern.why_not(kept):
        raise Problem(f"it cannot be encoded as {encoding!r}: {why_not}. Choose another, or 'auto'")
    if exact and not stores_just(pattern, kept):
        raise Problem(
            f"{encoding!r} stores dead weights beside the living ones and would lose the mask, since a living weight "
            'is zero here, or weights are quantized. Choose "auto", "bitmask", "csr16" or "gaps5"'
        )
    return pattern


def _in_pattern(
    path: tuple[Any, ...], leaf: Leaf, kept: Bool[np.ndarray, "..."], alive: int, pattern: Pattern, deflate: bool,
    kept_coded: Callable[[bool], dict[str, Stream]],
) -> tuple[Record, Pieces]:  # fmt: skip
    count = pattern.slots(kept)
    told, scales = "stored" if count == alive else "nonzero", leaf.scale.shape if isinstance(leaf, Affine) else ()
    kinds = (leaf.dtype.name, pattern.name, values.kind_of(leaf))
    what = Record(path, kept.shape, *kinds, count, told, scale_shape=scales)

    def made(deflate: bool) -> dict[str, Stream]:
        made = streams.coded(pattern.encode(np.packbits(kept), kept.shape), deflate)
        if pattern.in_order and pattern != Dense():
            return made | kept_coded(deflate)
        return made | values.encode(leaf, pattern.stored(kept), deflate=deflate)

    return _joined(what, made, deflate)


def _nonzeros_in(
    path: tuple[Any, ...], leaf: Leaf, mask: Bool[np.ndarray, "..."] | None, pattern: Pattern, deflate: bool
) -> tuple[Record, Pieces] | None:
    """What `_in_pattern` makes of an array with just its non-zeros alive, in one pass over it; None of any other."""
    if not isinstance(leaf, np.ndarray) or not pattern.in_order or pattern.misfit(leaf.shape):
        return None
    flat = leaf.reshape(-1)
    bits, found = (np.packbits(nonzero(flat)), flat) if pattern == Dense() else passes.gather(flat)
    signed = pattern != Dense() and has_negative_zeros(found)  # its bits are not those of the living then
    if mask is not None and (signed or not np.array_equal(np.packbits(mask), bits)):
        return None
    alive = "stored" if ones(bits) == len(found) and not signed else "nonzero"
    what = Record(path, leaf.shape, leaf.dtype.name, pattern.name, "raw", len(found), alive)
    parts = pattern.encode(bits, leaf.shape) | {"values": found}
    return _joined(what, functools.partial(streams.coded, parts), deflate)


def _joined(what: Record, made: Callable[[bool], dict[str, Stream]], deflate: bool) -> tuple[Record, Pieces]:
    """The record with its streams, and their bytes.

    Args:
        what: the record without streams.
        made: streams, deflated or not.
        deflate: whether they may be; they are not where they would become more than the dense tensor.
    """
    found = made(deflate)
    pieces = [stream.data for stream in found.values()]
    parts = tuple(Part(name, stream.coder, len(stream.data), stream.size) for name, stream in found.items())
    record = what._replace(parts=parts, crc32=functools.reduce(lambda crc, piece: zlib.crc32(piece, crc), pieces, 0))
    if record.inflated_bytes > record.dense_bytes:  # which a reader refuses
        return _joined(what, made, False)
    records.check(record, sum(map(len, pieces)))
    return record, pieces


class Stored:
    """A tensor out of a file, decoded as far as is asked for.

    Beside what it hands out and the bytes of the file it takes at most the bytes of the dense tensor, and those for
    some thousand weights.

    Attributes:
        record: one that passed `records.check`.

    Raises:
        Problem: other bytes than were written.
        Problem: bytes that mean nothing; from any method.
    """

    def __init__(self, record: Record, blob: bytes | memoryview) -> None:
        if len(blob) != record.stored_bytes:
            raise Problem(f"{len(blob)} bytes were read of its {record.stored_bytes}")
        if record.crc32 not in (None, zlib.crc32(blob)):
            raise Problem("its bytes are not those that were written: the checksum differs")
        self.record = record
        self._streams, at, whole = {}, 0, memoryview(blob)
        for part in record.parts:
            self._streams[part.name] = streams.decoded(Stream(part.coder, whole[at : at + part.stored], part.size))
            at += part.stored
        self._check_values()

    def array(self) -> Shaped[np.ndarray, "..."]:
        """The dense weight, bit for bit; of a quantized one what its codes mean."""
        kind = (self.record.encoding, self.record.values)
        if kind == ("dense", "raw"):
            return self._streams["values"].view(self._dtype).reshape(self.record.shape)
        if kind[1] == "raw" and self.record.pattern.in_order:
            return self._spread_out().reshape(self.record.shape)
        whole = memory.zeros(math.prod(self.record.shape), self._dtype)
        for places, found in self._weights():
            whole[places] = found
        return whole.reshape(self.record.shape)

    def mask(self) -> Bool[np.ndarray, "..."]:
        """Which weights are alive."""
        whole = memory.zeros(math.prod(self.record.shape), bool)
        for places, found in self._runs():
            whole[places] = nonzero(found) if self.record.alive == "nonzero" else True
        return whole.reshape(self.record.shape)

    def _spread_out(self) -> Shaped[np.ndarray, " weights"]:
        record = self.record
        bits = record.pattern.bits(self._streams, record.shape, record.count)
        whole = passes.spread(bits, self._streams["values"].view(self._dtype), math.prod(record.shape))
        if whole is None:
            raise self._other_count()
        return whole

    def leaf(self) -> Leaf:
        """The leaf that was saved: an array, or a quantized one; codes of dead weights are those of 0."""
        if self.record.values == "raw":
            return self.array()
        whole = np.zeros(self.record.shape, np.uint8)
        if self.record.values.startswith("int"):
            whole += self._zero.view(np.uint8) + np.uint8(self._half)
        flat = whole.reshape(-1)
        for places, found in self._runs():
            flat[places] = found
        return self._quantized(whole, self.mask())

    def nonzeros(self) -> tuple[Int[np.ndarray, " nnz"], Shaped[np.ndarray, " nnz"]]:
        """Positions in the flat tensor, ascending, and values of what is not zero; nothing dense is made."""
        runs = [(np.zeros(0, np.int64), np.zeros(0, self._dtype))]
        runs += [(places[kept], found[kept]) for places, found in self._weights() if (kept := nonzero(found)).any()]
        positions, found = (np.concatenate(parts) for parts in zip(*runs, strict=True))
        order = np.argsort(positions, kind="stable")
        return positions[order], found[order]

    def _runs(self) -> Iterator[tuple[Int[np.ndarray, " some"], np.ndarray]]:
        """Positions in the flat tensor with what is stored for them, weights or codes, some thousand at a time."""
        record, at = self.record, 0
        for places in record.pattern.places(self._streams, record.shape, record.count):
            end = at + len(places)
            if end > record.count:
                break
            yield places, self._stored(at, end)
            at = end
        if at != record.count:
            raise self._other_count()

    def _stored(self, first: int, last: int) -> Shaped[np.ndarray, " last_minus_first"]:
        """Weights that are stored, as they are, or their codes as bytes."""
        if self.record.values == "raw":
            return self._streams["values"].view(self._dtype)[first:last]
        codes, width = self._streams["codes"], int(self.record.values[-1])
        return unpack(codes, width, first, last) if self.record.side_by_side else codes[first:last]

    def _check_values(self) -> None:
        if self.record.values != "raw" and not self.record.side_by_side:
            values.check_codes(self._streams["codes"], int(self.record.values[-1]))
        if "scale" in self._streams:
            values.check_scale(self._streams["scale"].view("<f4"))
        if self.record.dtype == "bool":
            require(self._streams["values"].max(initial=0) <= 1, "a bool is neither 0 nor 1")

    def _other_count(self) -> Problem:
        return Problem(f"it has not as many places as weights, which are {self.record.count}")

    def _weights(self) -> Iterator[tuple[Int[np.ndarray, " some"], Shaped[np.ndarray, " some"]]]:
        """Like `_runs`, the meaning of codes in their stead."""
        if self.record.values == "raw":
            yield from self._runs()
            return
        for places, codes in self._runs():
            leaf = self._quantized(codes, np.ones(len(codes), bool))
            if isinstance(leaf, Affine) and leaf.scale.ndim:
                at = np.unravel_index(places, self.record.shape)
                at = tuple(one * (size > 1) for one, size in zip(at, leaf.scale.shape, strict=True))
                leaf = dataclasses.replace(leaf, scale=leaf.scale[at], zero=leaf.zero[at])
            with np.errstate(all="ignore"):  # what is too large becomes infinite here, in a foreign file
                yield places, leaf.dequantize()

    @property
    def _dtype(self) -> np.dtype[Any]:
        return values.DTYPES[self.record.dtype]

    @property
    def _half(self) -> int:
        return 2 ** (int(self.record.values[-1]) - 1)

    @functools.cached_property
    def _zero(self) -> Int8[np.ndarray, "..."]:
        shape = self.record.scale_shape
        return self._streams.get("zero", np.zeros(math.prod(shape), np.uint8)).view(np.int8).reshape(shape)

    def _quantized(self, codes: UInt8[np.ndarray, "..."], alive: Bool[np.ndarray, "..."]) -> Affine | Codebook:
        bits = int(self.record.values[-1])
        if self.record.values.startswith("codebook"):
            return Codebook(codes=codes, values=self._streams["table"].view(self._dtype), bits=bits, alive=alive)
        scale = self._streams["scale"].view("<f4").reshape(self.record.scale_shape)
        signed = np.asarray(codes - np.uint8(self._half)).view(np.int8)
        return Affine(codes=signed, scale=scale, zero=self._zero, bits=bits, alive=alive, dtype=self._dtype)
