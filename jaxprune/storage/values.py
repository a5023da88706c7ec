"""Values: what a stored weight is, as it is or as a code.

    kind          streams
    raw           values
    codebookW     codes of W bits; table: the value of each code
    intW          codes of W bits, minus 2^(W-1); scale, float32, and zero, int8, as in `Affine`; no zero: all are 0

Codes lie side by side as bits, or, where that is shorter once deflated, as bytes.
"""

import math
import re

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from jaxprune.quantize.codes import Affine, Codebook
from jaxprune.storage import bits, container, streams
from jaxprune.storage.patterns import Index, Streams
from jaxprune.storage.streams import Stream

Leaf = np.ndarray | Affine | Codebook

DTYPES = {dtype.name: dtype for dtype in container.DTYPES.values()}
"""dtypes that a file can hold."""


def kind_of(leaf: Leaf) -> str:
    """The name of a leaf's values."""
    if isinstance(leaf, np.ndarray):
        return "raw"
    return f"{'codebook' if isinstance(leaf, Codebook) else 'int'}{leaf.bits}"


def bits_of(leaf: Leaf) -> int:
    """Bits of a stored weight, its tables left aside."""
    return 8 * leaf.dtype.itemsize if isinstance(leaf, np.ndarray) else leaf.bits


def encode(leaf: Leaf, where: Index, *, deflate: bool) -> dict[str, Stream]:
    """Streams of the weights at these places.

    Args:
        leaf: an array in host memory, or a quantized one.
        where: of `Pattern.stored`.
        deflate: whether they may be deflated.

    Raises:
        Problem: codes that its bits cannot hold, or scales that are not positive.
    """
    if isinstance(leaf, np.ndarray):
        return streams.coded({"values": leaf.reshape(-1)[where]}, deflate)
    if isinstance(leaf, Codebook):
        return {"codes": _codes(leaf.codes, where, leaf.bits, deflate), "table": streams.as_it_is(leaf.values)}
    unsigned = leaf.codes.reshape(-1).view(np.uint8) + np.uint8(2 ** (leaf.bits - 1))  # wraps around: from 0 on
    scale = leaf.scale.astype("<f4").reshape(-1)
    check_scale(scale)
    tables = {"scale": scale} | ({"zero": leaf.zero.reshape(-1)} if leaf.zero.any() else {})
    return {"codes": _codes(unsigned, where, leaf.bits, deflate)} | streams.coded(tables, deflate)


def _codes(codes: np.ndarray, where: Index, width: int, deflate: bool) -> Stream:
    found = codes.reshape(-1)[where]
    check_codes(found, width)
    side_by_side = streams.as_it_is(bits.pack(found, width))
    return min([side_by_side, *([streams.deflated(found)] if deflate else [])], key=lambda one: len(one.data))


def stream_bytes(
    kind: str, dtype: str, count: int, scale_shape: tuple[int, ...], *, side_by_side: bool
) -> dict[str, int]:
    """Stream -> its bytes.

    Args:
        kind: see `kind_of`.
        dtype: of the weight.
        count: weights stored.
        scale_shape: of an "int".
        side_by_side: whether codes are bits, not bytes.

    Raises:
        Problem: there is no such kind, or not for this dtype.
    """
    itemsize = DTYPES[dtype].itemsize
    if kind == "raw":
        return {"values": itemsize * count}
    known = re.fullmatch("codebook[1-8]|int[48]", kind) and "float" in dtype
    container.require(known, f"there are no values of kind {kind!r} for {dtype}")
    width, scales = int(kind[-1]), math.prod(scale_shape)
    codes = {"codes": bits.packed_size(count, width) if side_by_side else count}
    if kind.startswith("codebook"):
        return codes | {"table": itemsize * 2**width}
    return codes | {"scale": 4 * scales, "zero": scales}


def check(kind: str, dtype: str, made: Streams, *, side_by_side: bool) -> None:
    """Refuse streams with numbers that mean nothing.

    Args:
        kind: one that `stream_bytes` knows.
        dtype: of the weight.
        made: streams of the lengths that `stream_bytes` says.
        side_by_side: see `stream_bytes`.

    Raises:
        Problem: a code without a value, a bool that is neither 0 nor 1, or a scale that is not positive.
    """
    if kind != "raw" and not side_by_side:
        check_codes(made["codes"], int(kind[-1]))
    if "scale" in made:
        check_scale(made["scale"].view("<f4"))
    if dtype == "bool":
        container.require(made["values"].max(initial=0) <= 1, "a bool is neither 0 nor 1")


def check_codes(codes: UInt8[np.ndarray, "..."], width: int) -> None:
    """Refuse codes of more bits with a `Problem`."""
    largest = int(codes.max(initial=0))
    container.require(largest < 2**width, f"the code {largest} has more than {width} bits")


def check_scale(scale: Float32[np.ndarray, " scales"]) -> None:
    """Refuse scales that are not positive, or not finite, with a `Problem`."""
    container.require((np.isfinite(scale) & (scale > 0)).all(), "its scales are not all positive and finite")


def some(
    kind: str, dtype: str, made: Streams, first: int, last: int, *, side_by_side: bool
) -> Shaped[np.ndarray, " last_minus_first"]:
    """Stored weights number `first` to `last`: as they are, or their codes as bytes.

    Args:
        kind: see `check`.
        dtype: likewise.
        made: streams that passed `check`.
        first: of the stored weights.
        last: the one after.
        side_by_side: see `stream_bytes`.
    """
    if kind == "raw":
        return made["values"].view(DTYPES[dtype])[first:last]
    return bits.unpack(made["codes"], int(kind[-1]), first, last) if side_by_side else made["codes"][first:last]
