"""Sparse inference: the zeros of a pruned model, made to pay.

A compressed leaf stands in the params where its dense leaf stood, and any JAX function runs on it unchanged:

    sparse_params = compress(params, format="bcsr")      # outside jit; exact zeros are dropped
    predict = jax.jit(apply(apply_fn))                   # same arguments, same result
    y = predict(sparse_params, x)

What has no sparse form is refused with the leaf's name, never quietly run dense; `reference` is what all formats equal.

| format | stored per non-zero | pays |
|---|---|---|
| "dense" | every weight | at small batches and small layers, where XLA is hard to beat |
| "bcoo" | value, two int32 | in bytes from 67 % on; in time never on CPU: 2-4x slower at batch 1, 25x at 256 |
| "bcsr" | value, one int32 | in bytes from 50 % on; in time at batch 256, 0.3-0.6x of dense, not at 1: 8-20x slower |

Times are those of CPU at 90 % sparsity in float32 against XLA's dense product, measured on 2 AVX-512 cores with jax
0.10.2. Fast CPU kernels, convolutions and a measured choice of format are not here yet.
"""

from jaxprune.sparse import native, reference
from jaxprune.sparse.apply import apply
from jaxprune.sparse.compress import compress, decompress, nbytes
from jaxprune.sparse.formats import FORMATS, BCOOWeight, BCSRWeight, SparseUseError, SparseWeight
from jaxprune.sparse.matmul import matmul, times, times_transposed
from jaxprune.sparse.tiles import NativeRowWeight, NativeWeight

__all__ = [
    "FORMATS",
    "BCOOWeight",
    "BCSRWeight",
    "NativeRowWeight",
    "NativeWeight",
    "SparseUseError",
    "SparseWeight",
    "apply",
    "compress",
    "decompress",
    "matmul",
    "native",
    "nbytes",
    "reference",
    "times",
    "times_transposed",
]
