"""Values: what a stored weight is, as it is or as a code.

    kind          streams
    raw           values
    codebookW     codes of W bits; table: the value of each code
    intW          codes of W bits, minus 2^(W-1); scale, float32, and zero, int8, as in `Affine`; no zero: all are 0

Codes lie side by side as bits, or, where that is shorter once deflated, as bytes.
"""

import numpy as np
from jaxtyping import Float32, UInt8

from jaxprune.quantize.codes import Affine, Codebook
from jaxprune.storage import bits, container, streams
from jaxprune.storage.patterns import Index
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


def check_codes(codes: UInt8[np.ndarray, "..."], width: int) -> None:
    """Refuse codes of more bits with a `Problem`."""
    largest = int(codes.max(initial=0))
    container.require(largest < 2**width, f"the code {largest} has more than {width} bits")


def check_scale(scale: Float32[np.ndarray, " scales"]) -> None:
    """Refuse scales that are not positive, or not finite, with a `Problem`."""
    container.require((np.isfinite(scale) & (scale > 0)).all(), "its scales are not all positive and finite")
