"""Sparse inference: the zeros of a pruned model, made to pay.

A compressed leaf stands in the params where its dense leaf stood, and any JAX function runs on it unchanged:

    sparse_params = compress(params, format="bcsr")      # outside jit; exact zeros are dropped
    predict = jax.jit(apply(apply_fn))                   # same arguments, same result
    y = predict(sparse_params, x)

Whether that pays, and in which format, is measured: `compress(params, plan)` with `plan = tune(apply_fn, params, x)`.

What has no sparse form is refused with the leaf's name, never quietly run dense; `reference` is what all formats equal.

| format | stored per non-zero | pays, on CPU |
|---|---|---|
| "dense" | every weight | in small layers and at low sparsity, where XLA is hard to beat |
| "bcoo" | value, two int32 | in bytes from 67 % on; in time never |
| "bcsr" | value, one int32 | in bytes from 50 % on; in time only at batches of hundreds |
| "block" | blocks: every value, one int32 | not measured; in bytes for leaves pruned by `Block`, made for GPUs |
| "native" | value, one uint16 (and bounds of runs) | in time from 50 % on at batches of 16 and more |
| "native_row" | value, one uint16 | in time at a batch of one, from 70 % (4096 x 4096) or 90 % (1024 x 1024) on |

The native formats are float32 on CPU, C++ kernels called from the compiled program (`native`); the others are portable.
BUILD_NOTES.md has the measurements. Convolutions are not here yet.
"""

from jaxprune.sparse import native, reference
from jaxprune.sparse.apply import apply
from jaxprune.sparse.blocks import BlockWeight
from jaxprune.sparse.cache import USER_CACHE
from jaxprune.sparse.compress import compress, decompress, nbytes
from jaxprune.sparse.formats import FORMATS, BCOOWeight, BCSRWeight, SparseUseError, SparseWeight
from jaxprune.sparse.matmul import matmul, times, times_transposed
from jaxprune.sparse.plan import Plan
from jaxprune.sparse.tiles import NativeRowWeight, NativeWeight
from jaxprune.sparse.tune import tune

__all__ = [
    "FORMATS",
    "USER_CACHE",
    "BCOOWeight",
    "BCSRWeight",
    "BlockWeight",
    "NativeRowWeight",
    "NativeWeight",
    "Plan",
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
    "tune",
]
