"""What every format must equal: decompress, then the dense product, x @ leaf or, for a leaf (out, in), x @ leaf.T."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Inexact, Num

from jaxprune.sparse.formats import SparseWeight


def matmul(x: Num[ArrayLike, "*batch n_in"], weight: SparseWeight) -> Inexact[Array, "*batch n_out"]:
    """The dense product of activations and the decompressed leaf.

    Args:
        x: activations, any number of batch axes.
        weight: a compressed leaf of any format.

    Raises:
        TypeError: the last axis of x is not the weight's inputs, or the dtypes do not promote.
    """
    leaf = weight.decompress()
    return jnp.matmul(x, leaf if weight.outputs_last else leaf.T)
