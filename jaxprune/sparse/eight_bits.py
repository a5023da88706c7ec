"""Values of 8 bits, for formats whose kernels multiply sums by a scale for every output."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jaxtyping import Array, Float, Float32

from jaxprune.compat import type_like
from jaxprune.sparse.formats import Indices, SparseWeight, Stored


class EightBits(SparseWeight):
    """Rounds the weights of the format behind it: W = scale * values with a scale for every output.

    Activations stay as they are. Symmetric, scale = max |W| / 127 of the output: an error of at most scale / 2 a
    weight.

    Attributes:
        scale: of every output.
        leaf_dtype: dtype of the leaf this stands for.
    """

    lossy: ClassVar[bool] = True
    stored_dtype: ClassVar[Any] = jnp.int8

    scale: Float32[Array, " n_out"] = eqx.field(converter=jnp.asarray)
    leaf_dtype: str = eqx.field(static=True, kw_only=True, default="float32")

    @classmethod
    def parts(cls, values: Stored, rows: Indices, cols: Indices, sizes: tuple[int, int]) -> dict[str, Any]:
        """See `SparseWeight.parts`; rounds."""
        exact, largest = values.astype(np.float32), np.zeros(sizes[0], np.float32)
        np.maximum.at(largest, rows, np.abs(exact))
        scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        own = super().parts(np.rint(exact / scale[rows]).astype(np.int8), rows, cols, sizes)
        return own | {"scale": scale, "leaf_dtype": values.dtype.name}

    def output_scale(self) -> Float32[Array, " n_out_or_0"]:
        """See `NativeWeight.output_scale`."""
        return self.scale

    def aval(self) -> ShapedArray:
        """See `SparseWeight.aval`."""
        return type_like(self.leaf_shape, self.leaf_dtype, self.values)

    def astype(self, dtype: Any) -> SparseWeight:
        """See `SparseWeight.astype`; the stored values stay."""
        return self.replace(leaf_dtype=jnp.dtype(dtype).name)

    def matrix(self) -> Float[Array, "n_out n_in"]:
        """See `SparseWeight.matrix`."""
        rows, cols = self.coordinates()
        scaled = self.values.astype(jnp.float32) * self.scale[rows]
        return jnp.zeros(self.sizes, self.leaf_dtype).at[rows, cols].set(scaled.astype(self.leaf_dtype))
