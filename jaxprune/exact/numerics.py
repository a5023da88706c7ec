"""Arithmetic that must not depend on who does it: on how an array is sharded, or on float32's 24 bits."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jaxprune.types import Sparsity


@jax.jit(static_argnums=1)
def ordered_sum(values: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """Sum over `axes` (kept, with size 1) whose order of additions is fixed: halves are added until one is left.

    A reduction over a sharded axis adds per device first, so that its last bit depends on the number of devices, and
    with it which of two nearly equal groups survives. Additions of slices are the same everywhere.
    """
    for axis in axes:
        values = _halve(jnp.moveaxis(values, axis, 0), axis)
    return values


def _halve(values: Array, axis: int) -> Array:
    rest = jnp.zeros((1, *values.shape[1:]), values.dtype)
    values = values if values.shape[0] else rest
    while (size := values.shape[0]) > 1:
        half = size // 2
        if size % 2:
            rest = rest + values[2 * half :]
        values = values[:half] + values[half : 2 * half]
    return jnp.moveaxis(values + rest, 0, axis)


def at_least_float32(*dtypes: Any) -> Any:
    """The widest of these floating dtypes and float32; `jnp.promote_types` has no answer under strict promotion."""
    return max((jnp.dtype(jnp.float32), *dtypes), key=lambda dtype: dtype.itemsize)


def settled(product: Float[Array, "..."]) -> Float[Array, "..."]:
    """The product, rounded by itself, infinities as the largest number.

    A compiler may otherwise round a product and the sum that it goes into at once, here and not there.
    """
    most = jnp.finfo(product.dtype).max
    return jnp.clip(product, -most, most)


def rounded(product: Float[Array, "..."]) -> Float[Array, "..."]:
    """`settled`, but that infinities stay, for the check of the scores to find."""
    return jnp.where(jnp.isinf(product), product, settled(product))


def rounded_share(n: int, share: Sparsity) -> UInt32[Array, "..."] | int:
    r"""$\mathrm{round}(n \cdot s)$, half to even, exact for concrete and for traced `share` in [0, 1).

    A traced float32 share is brought to 32 binary places (exact from $2^{-8}$ on) and multiplied in 64 bits, made of
    32-bit words: n * share in float32 would be off by one from 16 million weights on.

    Args:
        n: a count, below 2**32.
        share: Python float, or float32 array, each number of which is a share.
    """
    if isinstance(share, float | int):
        return round(n * share)
    fixed = jnp.minimum(jnp.asarray(share, jnp.float32), jnp.float32(1 - 2**-24)) * jnp.float32(2.0**32)
    high, low = multiply(jnp.uint32(n), jnp.maximum(fixed, 0.0).astype(jnp.uint32))
    half = jnp.uint32(1 << 31)
    up = (low > half) | ((low == half) & (high % 2 == 1))
    return high + up.astype(jnp.uint32)


def multiply(a: UInt32[Array, "..."], b: UInt32[Array, "..."]) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """The 64-bit product of two 32-bit words, as (high, low) words."""
    mask, shift = jnp.uint32(0xFFFF), jnp.uint32(16)
    a1, a0, b1, b0 = a >> shift, a & mask, b >> shift, b & mask
    middle = a1 * b0 + ((a0 * b0) >> shift)
    middle_low = (middle & mask) + a0 * b1
    return a1 * b1 + (middle >> shift) + (middle_low >> shift), a * b
