"""The formats of the native CPU kernels: tiles of inputs, in each the runs of the outputs.

    W (out, in) = tiles of T inputs, one after the other; tile t holds run after run, one an output;
    a run holds (input - t T, value) pairs, sorted.

A panel of T inputs and 64 rows of the batch is packed into the cache, and all outputs go over it, so every non-zero
costs a load and a multiply-add for each vector of rows and little else. T is small where there are many non-zeros, so
that the panel stays in the first level, and larger where runs would have hardly any. For a batch of one memory is what
counts, and runs should be long: T = 65536, all that 16-bit indices reach. Indices take a byte up to T = 256, two
beyond; bounds of runs 4 (out + 1) ceil(in / T) bytes.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Shaped, UInt8, UInt16

from jaxprune.sparse.eight_bits import EightBits
from jaxprune.sparse.formats import FORMATS, Indices, SparseWeight, Stored
from jaxprune.sparse.portable import run_numbers

# Density from which on a tile of so many inputs was the fastest (Zen 4, 32 KiB and 1 MiB of cache).
TILES = ((0.15, 128), (0.07, 192), (0.025, 256), (0.0, 1024))


class NativeWeight(SparseWeight):
    """Tiles of inputs, for the C++ kernels on CPU: float32 or bfloat16, matrices and convolutions.

    Attributes:
        index: input of every value, counted from its tile's first.
        bounds: where each run begins and ends, tile by tile, out + 1 a tile.
        tile: T, the inputs of a tile.
        group: outputs that share a run; each index then stands for so many values, side by side.
    """

    convolves: ClassVar[bool] = True
    by_output: ClassVar[bool] = False
    group: ClassVar[int] = 1

    index: UInt8[Array, " nse_by_group"] | UInt16[Array, " nse_by_group"] = eqx.field(converter=jnp.asarray)
    bounds: Int32[Array, " tiles_times_groups_plus_1"] = eqx.field(converter=jnp.asarray)
    tile: int = eqx.field(static=True, kw_only=True)

    @staticmethod
    def choose_tile(density: float) -> int:
        """T for a weight of this density."""
        return next(tile for least, tile in TILES if density >= least)

    @classmethod
    def parts(cls, values: Stored, rows: Indices, cols: Indices, sizes: tuple[int, int]) -> dict[str, Any]:
        """See `SparseWeight.parts`."""
        n_out, n_in = sizes
        # One key for each (group, input) that has a weight, in this order; the inverse says whose each weight is.
        keys, slots = np.unique(rows // cls.group * n_in + cols, return_inverse=True)
        tile = cls.choose_tile(keys.size * cls.group / max(n_out * n_in, 1))
        groups, inputs = keys // max(n_in, 1), keys % max(n_in, 1)
        tiles, n_tiles, n_groups = inputs // tile, -(-n_in // tile), n_out // cls.group
        ends = np.cumsum(np.bincount(tiles * n_groups + groups, minlength=n_tiles * n_groups))
        ends = ends.reshape(n_tiles, n_groups)
        starts = np.concatenate([[0], ends[:-1, -1]]) if ends.size else np.zeros(n_tiles, np.int64)
        bounds = np.concatenate([starts[:, None], ends], axis=1).astype(np.int32)
        stored = np.zeros((keys.size, cls.group), values.dtype)
        stored[slots, rows % cls.group] = values
        order = np.lexsort((inputs, groups, tiles))
        index = (inputs - tiles * tile).astype(np.uint8 if tile <= 256 else np.uint16)[order]
        return {"values": stored[order].ravel(), "index": index, "bounds": bounds.ravel(), "tile": tile}

    def check_parts(self) -> None:
        """See `SparseWeight.check_parts`."""
        n_tiles = -(-self.indexed // self.tile)
        self.check_bounds(self.bounds, self.sizes[0] // self.group, self.index.size, "indices", n_tiles)

    @property
    def indexed(self) -> int:
        """How many there are of what an index counts, inputs."""
        return self.sizes[1]

    def coordinates(self, xp: Any = jnp) -> tuple[Indices, Indices]:
        """See `SparseWeight.coordinates`; in the order of the tiles."""
        index, bounds = xp.asarray(self.index), xp.asarray(self.bounds)
        return coordinates(index, bounds, n_out=self.sizes[0], tile=self.tile, group=self.group, xp=xp)

    def output_scale(self) -> Float32[Array, " n_out_or_0"]:
        """What the sums of the stored values are multiplied by; nothing, so empty, unless the format rounds."""
        return jnp.zeros(0, jnp.float32)

    def of_activations(self) -> tuple[Shaped[Array, "..."], ...]:
        """What the kernel has to know besides of activations that it rounds; nothing, unless the format does."""
        return ()

    def grid_of_activations(self) -> tuple[float, ...]:
        """Of their codes, in the same case."""
        return ()


class NativeRowWeight(NativeWeight):
    """One tile of up to 65,536 inputs, for a batch of one; right at every batch, but slower than `NativeWeight`."""

    @staticmethod
    def choose_tile(density: float) -> int:
        """T, whatever the density."""
        return 65536


class NativeBlockWeight(NativeWeight):
    """Four outputs share their inputs, for masks of `Block(rows, 4 n)`: a load from the panel serves four products.

    An input that one of the four needs is stored for all; without such blocks that is more work, not less.
    """

    group: ClassVar[int] = 4

    @classmethod
    def why_not(cls, matrix: Shaped[np.ndarray, "n_out n_in"]) -> str:
        """See `SparseWeight.why_not`."""
        n_out, _ = matrix.shape
        return f"it takes outputs in groups of {cls.group}, here are {n_out}." if n_out % cls.group else ""


class NativeNMWeight(NativeWeight):
    """16 weights of every 32 inputs of an output, or of every 64, for masks of `NM(2, 4)`, `NM(4, 8)` or `NM(1, 4)`.

    For a batch of one: so many activations fit in registers and are picked out of them all at once (AVX-512). Where an
    output has fewer, zeros are stored. At other batches it is a `NativeWeight`, with those zeros.
    """

    @staticmethod
    def choose_tile(density: float) -> int:
        """T, the largest that an index of one byte reaches."""
        return 256

    @classmethod
    def why_not(cls, matrix: Shaped[np.ndarray, "n_out n_in"]) -> str:
        """See `SparseWeight.why_not`."""
        n_in = matrix.shape[1]
        if n_in % 32:
            return f"it takes inputs in runs of 32, here are {n_in}."
        most = _runs(matrix != 0, 32).sum(axis=2).max(initial=0)
        return f"it takes 16 non-zeros of every 32 inputs of an output, here are up to {most}." if most > 16 else ""

    @classmethod
    def parts(cls, values: Stored, rows: Indices, cols: Indices, sizes: tuple[int, int]) -> dict[str, Any]:
        """See `SparseWeight.parts`; stores dead inputs, the first of a run, until there are 16.

        Raises:
            ValueError: more than 16 non-zeros in a run.
        """
        matrix = np.zeros(sizes, values.dtype)
        matrix[rows, cols] = values
        if why_not := cls.why_not(matrix):
            raise ValueError(why_not)
        stored = matrix != 0
        in_64 = sizes[1] % 64 == 0 and bool(np.all(_runs(stored, 64).sum(axis=2) <= 16))
        runs = _runs(stored, 64 if in_64 else 32)
        missing = 16 - runs.sum(axis=2, keepdims=True)
        rows, cols = np.nonzero((runs | (np.cumsum(~runs, axis=2) <= missing)).reshape(sizes))
        return super().parts(matrix[rows, cols], rows, cols, sizes)


def _runs(stored: np.ndarray, span: int) -> np.ndarray:
    n_out, n_in = stored.shape
    return stored.reshape(n_out, n_in // span, span)


class NativeInt8Weight(EightBits, NativeWeight):
    """`NativeWeight` with values of 8 bits; lossy, so only used when named."""


def coordinates(
    index: Shaped[Array | np.ndarray, " nse_by_group"],
    bounds: Shaped[Array | np.ndarray, " tiles_times_groups_plus_1"],
    *,
    n_out: int,
    tile: int,
    group: int,
    xp: Any = jnp,
) -> tuple[Any, Any]:
    """Output and input of every value, from the index and bounds of a `NativeWeight`.

    `xp` is jax.numpy, or numpy for arrays in host memory.
    """
    n_groups = n_out // group
    run = run_numbers(bounds.reshape(-1, n_groups + 1), index.shape[0], xp)
    n = max(n_groups, 1)
    first, inputs = run % n * group, run // n * tile + index.astype(xp.int32)
    rows = first[:, None] + xp.arange(group, dtype=xp.int32)[None, :]
    return rows.ravel(), xp.repeat(inputs, group)


FORMATS["native"] = NativeWeight
FORMATS["native_row"] = NativeRowWeight
FORMATS["native_block"] = NativeBlockWeight
FORMATS["native_nm"] = NativeNMWeight
FORMATS["native_int8"] = NativeInt8Weight
