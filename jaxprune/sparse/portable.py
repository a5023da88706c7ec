"""The formats of `jax.experimental.sparse`, which run on any platform."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCSR
from jaxtyping import Array, Int

from jaxprune.sparse.formats import FORMATS, Indices, SparseWeight, Stored, index


def run_numbers(bounds: Any, total: int, xp: Any = jnp) -> Any:
    """The number of the run that each of `total` places is in.

    Args:
        bounds: where each run begins and the last one ends, (runs + 1,); or such rows, whose runs are counted on.
        total: places in all runs.
        xp: jax.numpy; or numpy, for bounds in host memory.
    """
    lengths = xp.diff(bounds).ravel()
    static = {"total_repeat_length": total} if xp is jnp else {}
    return xp.repeat(xp.arange(lengths.size, dtype=xp.int32), lengths, **static)


class BCOOWeight(SparseWeight):
    """Coordinates: an (output, input) pair beside each value, 8 bytes of index a non-zero.

    Portable and plain. Its product gathers and scatters, which a CPU does slowly.
    """

    indices: Int[Array, "nse 2"] = eqx.field(converter=index)

    @classmethod
    def parts(cls, values: Stored, rows: Indices, cols: Indices, sizes: tuple[int, int]) -> dict[str, Any]:
        """See `SparseWeight.parts`."""
        return {"values": values, "indices": np.stack([rows, cols], axis=-1)}

    def check_parts(self) -> None:
        """See `SparseWeight.check_parts`.

        Raises:
            ValueError: indices of another shape.
        """
        if self.indices.shape != (self.nse, 2):
            raise ValueError(f"{self._who} needs indices ({self.nse}, 2), {self.indices.shape} arrived.")

    def coordinates(self, xp: Any = jnp) -> tuple[Indices, Indices]:
        """See `SparseWeight.coordinates`."""
        indices = xp.asarray(self.indices)
        return indices[..., 0], indices[..., 1]


class BCSRWeight(SparseWeight):
    """Compressed outputs: an input index beside each value, and where each output's run begins.

    4 bytes of index a non-zero. On CPU its product is Eigen's threaded kernel.
    """

    indices: Int[Array, " nse"] = eqx.field(converter=index)
    indptr: Int[Array, " n_out_plus_1"] = eqx.field(converter=index)

    @classmethod
    def parts(cls, values: Stored, rows: Indices, cols: Indices, sizes: tuple[int, int]) -> dict[str, Any]:
        """See `SparseWeight.parts`."""
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=sizes[0]))])
        return {"values": values, "indices": cols, "indptr": indptr}

    def check_parts(self) -> None:
        """See `SparseWeight.check_parts`."""
        self.check_bounds(self.indptr, self.sizes[0], self.nse, "values")

    def coordinates(self, xp: Any = jnp) -> tuple[Indices, Indices]:
        """See `SparseWeight.coordinates`."""
        return run_numbers(xp.asarray(self.indptr), self.nse, xp), xp.asarray(self.indices)

    @property
    def stored(self) -> BCSR:
        """W (out, in) as a `jax.experimental.sparse.BCSR`."""
        return BCSR(
            (self.values, self.indices, self.indptr), shape=self.sizes, indices_sorted=True, unique_indices=True
        )


FORMATS["bcoo"] = BCOOWeight
FORMATS["bcsr"] = BCSRWeight
