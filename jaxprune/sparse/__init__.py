"""Sparse inference: the zeros of a pruned model, made to pay.

A compressed leaf stands in the params where its dense leaf stood, and any JAX function runs on it unchanged:

    sparse_params = compress(params)                     # outside jit; exact zeros are dropped
    predict = jax.jit(apply(apply_fn))                   # same arguments, same result
    y = predict(sparse_params, x)

Whether that pays, and in which format, is measured: `compress(params, plan)` with `plan = tune(apply_fn, params, x)`,
which also finds in the function which leaves are weights, and which of their axes are summed over. Without a plan,
names tell the axes (`BY_NAME`), or a `layout`; and without a format each leaf takes its platform's:

| where the leaf is | format | stays dense |
|---|---|---|
| a CPU, with the native kernels, up to 32 bits | "native" | stacked layers; where it takes no fewer bytes |
| a CPU otherwise | "bcsr" | convolutions, stacked layers; where it takes no fewer bytes |
| elsewhere | "bcoo" | convolutions, stacked layers; where it takes no fewer bytes |

What has no sparse form is refused with the leaf's name, never quietly run dense; `reference` is what all formats equal.

| format | stored per non-zero | made for |
|---|---|---|
| "dense" | every weight | small layers and low sparsity, where XLA is hard to beat |
| "bcoo" | value, two int32 | any platform, GPUs; on a CPU never faster than dense |
| "bcsr" | value, one int32 | any platform, GPUs; on a CPU faster at batches of hundreds alone |
| "block" | value, zeros of a block too; one int32 a block | leaves pruned by `Block`, on GPUs |
| "native" | value, one byte (two at high sparsity), bounds of runs | batches, convolutions |
| "native_row" | value, two bytes | a batch of one, from 90 % on |
| "native_bits" | value; a bit for every weight, stored or not | a batch of one to four at 40 to 80 % |
| "native_bits_int8" | one byte; a bit for every weight | the same, rounded to 8 bits; only when named |
| "native_block" | four values, one byte | leaves pruned by `Block(rows, 4 n)` |
| "native_nm" | value, one byte | a batch of one, leaves pruned by `NM(2, 4)` and the like |
| "native_int8" | one byte for the value, one for the index | where bytes count; rounds the weights |
| "int8" | a byte each for four inputs and their index | products of integers; rounds activations too (`int8`) |

What is compressed goes through `jax.export` as it is (`exports`). It can be trained as it is, too, at the cost of its
non-zeros: `values, rest = trainable(params)` (`trained`).

The native formats are C++ kernels for CPUs, called from the compiled program (`native`), float32 and bfloat16, products
and (but for bits) convolutions, with bias, residual and ReLU in the kernel (`fuse`). Products over the outputs, as of a
tied embedding, have kernels for bits alone; of the other native formats they are dense. The others are portable, and
run both ways. BUILD_NOTES.md has the measurements.
"""

from jaxprune import native
from jaxprune.sparse import exports, reference
from jaxprune.sparse.bits import NativeBitsInt8Weight, NativeBitsWeight
from jaxprune.sparse.blocks import BlockWeight
from jaxprune.sparse.compression import compress, decompress, nbytes
from jaxprune.sparse.dispatch import apply
from jaxprune.sparse.formats import FORMATS, SparseUseError, SparseWeight
from jaxprune.sparse.int8 import Int8Weight
from jaxprune.sparse.portable import BCOOWeight, BCSRWeight
from jaxprune.sparse.products import matmul, times, times_transposed
from jaxprune.sparse.tiles import (
    NativeBlockWeight,
    NativeInt8Weight,
    NativeNMWeight,
    NativeRowWeight,
    NativeWeight,
)
from jaxprune.sparse.trained import TrainableWeight, join, trainable
from jaxprune.sparse.tuning.cache import user_cache
from jaxprune.sparse.tuning.plan import Plan
from jaxprune.sparse.tuning.tune import tune

__all__ = [
    "FORMATS",
    "BCOOWeight",
    "BCSRWeight",
    "BlockWeight",
    "Int8Weight",
    "NativeBitsInt8Weight",
    "NativeBitsWeight",
    "NativeBlockWeight",
    "NativeInt8Weight",
    "NativeNMWeight",
    "NativeRowWeight",
    "NativeWeight",
    "Plan",
    "SparseUseError",
    "SparseWeight",
    "TrainableWeight",
    "apply",
    "compress",
    "decompress",
    "exports",
    "join",
    "matmul",
    "native",
    "nbytes",
    "reference",
    "times",
    "times_transposed",
    "trainable",
    "tune",
    "user_cache",
]
