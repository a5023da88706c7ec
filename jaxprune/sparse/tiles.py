"""The formats of the native CPU kernels: tiles of inputs, in each the runs of the outputs.

    W (out, in) = tiles of T inputs, one after the other; tile t holds run after run, one an output;
    a run holds (input - t T, value) pairs, sorted.

For batches, T = 128: a tile's inputs, for 64 columns of the batch, stay in the first-level cache while all outputs go
over them, so every non-zero costs a load and a multiply-add for each vector of columns and nothing else. For a single
column memory is what counts, and runs should be long: T = 65536, all that 16-bit indices reach. Bounds of runs take
4 (out + 1) ceil(in / T) bytes beside the 6 a non-zero.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO
from jaxtyping import Array, Float, Inexact, Int, Int32, UInt16

from jaxprune.sparse import native
from jaxprune.sparse.formats import FORMATS, SparseWeight
from jaxprune.sparse.matmul import linear_product, times, times_transposed


class NativeWeight(SparseWeight):
    """Tiles of 128 inputs, for the C++ kernels at batches above one: float32 on CPU.

    Attributes:
        index: input of every value, counted from its tile's first.
        bounds: where each run begins and ends, tile by tile, out + 1 a tile.
    """

    tile: ClassVar[int] = 128  # x 64 columns x 4 bytes: 32 KiB, a first-level cache

    index: UInt16[Array, " nse"] = eqx.field(converter=jnp.asarray)
    bounds: Int32[Array, " tiles_times_n_out_plus_1"] = eqx.field(converter=jnp.asarray)

    @classmethod
    def pack(
        cls,
        values: Any,
        rows: Int[np.ndarray, " nse"],
        cols: Int[np.ndarray, " nse"],
        leaf_shape: tuple[int, int],
        **fields: Any,
    ) -> "NativeWeight":
        """See `SparseWeight.pack`."""
        n_out, n_in = leaf_shape[::-1] if fields.get("outputs_last", True) else leaf_shape
        tiles, n_tiles = cols // cls.tile, -(-n_in // cls.tile)
        order = np.lexsort((cols, rows, tiles))
        ends = np.cumsum(np.bincount(tiles * n_out + rows, minlength=n_tiles * n_out)).reshape(n_tiles, n_out)
        starts = np.concatenate([[0], ends[:-1, -1]]) if ends.size else np.zeros(n_tiles, np.int64)
        bounds = np.concatenate([starts[:, None], ends], axis=1).astype(np.int32)
        index = (cols - tiles * cls.tile).astype(np.uint16)
        return cls(np.asarray(values)[order], index[order], bounds.ravel(), leaf_shape=leaf_shape, **fields)

    def _host_coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        n_out, n_in = self.sizes
        bounds = np.asarray(self.bounds, np.int64)
        if bounds.shape != (-(-n_in // self.tile) * (n_out + 1),) or self.index.shape != (self.nse,):
            raise ValueError(f"{self._who} has {bounds.size} bounds and {self.index.size} indices, which do not fit.")
        runs = bounds.reshape(-1, n_out + 1)
        climbs = not np.any(np.diff(bounds) < 0) and np.array_equal(runs[1:, 0], runs[:-1, -1])
        if runs.size and not (climbs and bounds[0] == 0 and bounds[-1] == self.nse):
            raise ValueError(f"{self._who} needs run bounds that climb from 0 to its {self.nse} values.")
        rows, cols = (np.asarray(part, np.int64) for part in self.coordinates())
        order = np.lexsort((cols, rows))
        # Checked as the base class checks any format, but in the order of outputs.
        return rows[order], cols[order]

    def coordinates(self) -> tuple[Int32[Array, " nse"], Int32[Array, " nse"]]:
        """See `SparseWeight.coordinates`; in the order of the tiles."""
        return _coordinates(self.index, self.bounds, n_out=self.sizes[0], tile=self.tile)

    @property
    def stored(self) -> BCOO:
        """W (out, in) as a `jax.experimental.sparse.BCOO`."""
        return BCOO((self.values, jnp.stack(self.coordinates(), axis=-1)), shape=self.sizes, unique_indices=True)


class NativeRowWeight(NativeWeight):
    """One tile of up to 65,536 inputs, for a batch of one; right at every batch, but slower than `NativeWeight`."""

    tile: ClassVar[int] = 65536


def _coordinates(index: Array, bounds: Array, *, n_out: int, tile: int) -> tuple[Array, Array]:
    starts = bounds.reshape(-1, n_out + 1)
    lengths = jnp.diff(starts, axis=1).ravel()
    run = jnp.repeat(jnp.arange(lengths.size, dtype=jnp.int32), lengths, total_repeat_length=index.shape[0])
    n = max(n_out, 1)
    return run % n, run // n * tile + index.astype(jnp.int32)


tiles_times = linear_product("tiles_times", native.product, _coordinates)


@times.register(NativeWeight)
def _times_native(weight: NativeWeight, x: Inexact[Array, "n_in n"]) -> Inexact[Array, "n_out n"]:
    if reason := _refusal(weight):
        raise TypeError(f"Leaf {weight.name!r} is stored for the native kernels. {reason}")
    return tiles_times(weight.values, weight.index, weight.bounds, x, n_out=weight.sizes[0], tile=weight.tile)


def _refusal(weight: NativeWeight) -> str:
    if weight.values.dtype != jnp.float32:
        return f"They take float32, here {weight.values.dtype}: cast, or use another format."
    if jax.default_backend() != "cpu":
        return f'They run on CPU, not on {jax.default_backend()}: use the format "bcoo" or "bcsr".'
    return native.why_missing()


@times_transposed.register(NativeWeight)
def _times_transposed_native(weight: NativeWeight, y: Inexact[Array, "n_out n"]) -> Float[Array, "n_in n"]:
    # No kernel of its own yet; the dense product is many times faster on CPU than a gather and a scatter.
    leaf = weight.decompress()
    return (leaf if weight.outputs_last else leaf.T) @ y


FORMATS["native"] = NativeWeight
FORMATS["native_row"] = NativeRowWeight
