"""A bit for each weight, and the values of those whose bit is set: a format that is small at 40 to 80 % sparsity.

    W (out, in) = words of 64 inputs; bit i of word k of output o says whether W[o, 64 k + i] is stored

For a batch of one to four, where a product takes as long as its weights take to be read: at 50 % in float32 that is
2.1 bytes a weight instead of 4 dense and 2.5 to 3 with an index for each. Words are expanded in registers (AVX-512 has
an instruction for it, others a table), and rows of activations, up to eight, go over them together.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxprune.sparse.eight_bits import EightBits
from jaxprune.sparse.formats import FORMATS, Indices, Stored
from jaxprune.sparse.portable import run_numbers
from jaxprune.sparse.tiles import NativeWeight

WORD = 64
"""Inputs of a word."""
PAGE = 1 << 21
"""Bytes of a large page."""
BITMAP = 0
"""The `tile` that tells the kernels of bits, as in product.cc."""


class NativeBitsWeight(NativeWeight):
    """A bit for each weight, for the C++ kernels on CPU: values float32, bfloat16 or float16, matrices alone.

    Attributes:
        index: the bits, in words of 8 bytes, little endian, output after output.
        bounds: where the values of each output begin, and the last one's end.
        tile: 0, which tells the kernels that there are none.
    """

    convolves: ClassVar[bool] = False
    by_output: ClassVar[bool] = True

    @classmethod
    def parts(cls, values: Stored, rows: Indices, cols: Indices, sizes: tuple[int, int]) -> dict[str, Any]:
        """See `SparseWeight.parts`."""
        n_out, n_in = sizes
        stored = np.zeros((n_out, padded(n_in)), bool)
        stored[rows, cols] = True
        bits = np.packbits(stored, axis=1, bitorder="little").ravel()
        bounds = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_out))]).astype(np.int32)
        return {"values": in_large_pages(values), "index": in_large_pages(bits), "bounds": bounds, "tile": BITMAP}

    def check_parts(self) -> None:
        """See `SparseWeight.check_parts`.

        Raises:
            ValueError: bits of another number, beyond the inputs, or other than the bounds say.
        """
        n_out, n_in = self.sizes
        n_bytes = n_out * padded(n_in) // 8
        if self.tile != BITMAP or self.index.dtype != jnp.uint8 or self.index.shape != (n_bytes,):
            raise ValueError(
                f"{self._who} needs a `tile` of 0 and {n_bytes} bytes of bits, {self.tile} and "
                f"{jax.typeof(self.index).str_short()} arrived."
            )
        self.check_bounds(self.bounds, n_out, self.nse, "values")
        stored = unpacked(np.asarray(self.index), n_out, n_in)
        if stored[:, n_in:].any() or not np.array_equal(stored.sum(axis=1), np.diff(np.asarray(self.bounds))):
            raise ValueError(f"{self._who} has bits that do not fit its {n_in} inputs or its bounds.")

    def coordinates(self, xp: Any = jnp) -> tuple[Indices, Indices]:
        """See `SparseWeight.coordinates`."""
        index, bounds = xp.asarray(self.index), xp.asarray(self.bounds)
        return coordinates(index, bounds, n_out=self.sizes[0], n_in=self.sizes[1], nse=self.nse, xp=xp)


class NativeBitsInt8Weight(EightBits, NativeBitsWeight):
    """`NativeBitsWeight` with values of 8 bits; lossy, so only used when named.

    With AVX-512 VNNI activations are taken as integers of 24 bits against the largest of their row, and sums are exact:
    an error of at most 2^-23 of the largest activation for each weight, times the weight.
    """


def padded(n_in: int) -> int:
    """Inputs of whole words."""
    return -(-n_in // WORD) * WORD


def unpacked(bits: Shaped[np.ndarray, " bytes"], n_out: int, n_in: int) -> Shaped[np.ndarray, "n_out padded"]:
    """Whether each weight is stored, the rest of the last word included."""
    return np.unpackbits(bits.reshape(n_out, padded(n_in) // 8), axis=1, bitorder="little").astype(bool)


def coordinates(bits: Any, bounds: Any, *, n_out: int, n_in: int, nse: int, xp: Any = jnp) -> tuple[Any, Any]:
    """Output and input of every value, from the bits and bounds of a `NativeBitsWeight`; `xp` as there."""
    if xp is np:
        rows, cols = np.nonzero(unpacked(bits, n_out, n_in))
        return rows, cols
    if not nse:
        return jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32)
    stored = jnp.unpackbits(bits.reshape(n_out, padded(n_in) // 8), axis=1, bitorder="little")
    (places,) = jnp.nonzero(stored.ravel(), size=nse)
    return run_numbers(bounds, nse), places % stored.shape[1]


def in_large_pages(array: Shaped[np.ndarray, " n"]) -> Shaped[Array, " n"]:
    """The same array on the default device; on a CPU in pages of 2 MiB, where the system gives them.

    Memory is then read 10 to 20 % faster (Zen 4, a Linux that leaves large pages to `madvise`). NumPy asks for them in
    what it allocates, and `jax.device_put` takes an array that begins where a page does as it is, without a copy.
    """
    if array.nbytes < PAGE:
        return jnp.asarray(array)
    whole = np.empty(array.nbytes + PAGE, np.uint8)
    start = -whole.ctypes.data % PAGE
    placed = whole[start : start + array.nbytes].view(array.dtype)
    placed[:] = array
    return jax.device_put(placed)


FORMATS["native_bits"] = NativeBitsWeight
FORMATS["native_bits_int8"] = NativeBitsInt8Weight
