r"""Grids: the few values that the weights of one matrix may have, fitted before the weights are chosen.

    "int8", "int4"               w = c s,  |c| <= 2^(bits-1) - 1      a scale for each output
    "codebook1" to "codebook8"   w = v_c,  c < 2^bits                 values for the matrix

A scale here has seven binary digits. Its products with the integers are then exact in float32, and weights that lie on
such a grid tell its scale, even if they were rounded to bfloat16: see `jaxprune.quantize.scales.scale_of`.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxprune.quantize.scales import TINY, short, symmetric_scale

SHRINKS = np.linspace(1, 0.3, 29, dtype=np.float32)
"""Scales that are tried, as shares of the one that reaches to the largest weight."""

Rounding = Callable[[Float[Array, "rows outputs"]], Float[Array, "rows outputs"]]
"""Weights -> the nearest of the grid."""


def bits_of(grid: str) -> int:
    """Bits of a code.

    Raises:
        ValueError: no such grid.
    """
    if not re.fullmatch("int[48]|codebook[1-8]", grid):
        raise ValueError(f"There is no grid {grid!r}: take 'int8', 'int4', or 'codebook1' to 'codebook8'.")
    return int(grid[-1])


def rounding(grid: str, weights: Float[Array, "inputs outputs"], worth: Float[Array, "inputs outputs"]) -> Rounding:
    """The grid with the least sum of worth x squared error over these weights, as far as the search goes; traced.

    Args:
        grid: see above.
        weights: that the grid is for, float32.
        worth: of each weight, not negative; 0 where the weight is not on the grid.
    """
    bits = bits_of(grid)
    if grid.startswith("int"):
        scale = searched_scale(weights, worth, bits)
        return lambda rows: nearest_multiple(rows, scale, bits)
    values = shared_values(weights, worth, bits)
    return lambda rows: values[_nearest(values, rows)]


def nearest_multiple(
    weights: Float[Array, "rows outputs"], scale: Float[Array, "1 outputs"], bits: int
) -> Float[Array, "rows outputs"]:
    """Weights on the grid of a scale; what is outside goes to its end, and -0 is 0."""
    limit = 2 ** (bits - 1) - 1
    codes = jnp.clip(jnp.round(weights / scale), -limit, limit)
    return jnp.where(codes == 0, 0.0, codes * scale)


def searched_scale(
    weights: Float[Array, "inputs outputs"], worth: Float[Array, "inputs outputs"], bits: int
) -> Float[Array, "1 outputs"]:
    """For every output the scale, of `SHRINKS` of the one that reaches to its largest weight, with the least error."""
    peak = jnp.max(jnp.where(worth > 0, jnp.abs(weights), 0.0), axis=0, keepdims=True)

    def tried(shrink: Float[Array, ""]) -> tuple[Array, Array]:
        scale = short(symmetric_scale(shrink * peak, bits))
        # In units of the largest weight, whose square may be no float32.
        off = (nearest_multiple(weights, scale, bits) - weights) / jnp.maximum(peak, TINY)
        return scale, jnp.sum(worth * jnp.square(off), axis=0, keepdims=True)

    scales, errors = lax.map(tried, jnp.asarray(SHRINKS))
    return jnp.take_along_axis(scales, jnp.argmin(errors, axis=0, keepdims=True), axis=0)[0]


def shared_values(
    weights: Float[Array, "inputs outputs"], worth: Float[Array, "inputs outputs"], bits: int, iterations: int = 50
) -> Float[Array, " values"]:
    """Centres of k-means with 2^bits clusters, ascending: Lloyd's iterations from evenly spread ones.

    Like `jaxprune.quantize.codebooks.k_means`, but traced, in float32, and with a worth for every weight.
    """
    low = jnp.min(jnp.where(worth > 0, weights, jnp.inf))
    high = jnp.max(jnp.where(worth > 0, weights, -jnp.inf))
    some = jnp.isfinite(low) & jnp.isfinite(high)
    low, high = jnp.where(some, low, 0.0), jnp.where(some, high, 0.0)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        i, centres, _ = carry
        codes = _nearest(centres, weights).ravel()
        total, members = (jax.ops.segment_sum(each.ravel(), codes, 2**bits) for each in (worth * weights, worth))
        moved = jnp.where(members > 0, total / jnp.where(members > 0, members, 1.0), centres)
        return i + 1, moved, jnp.any(moved != centres)

    first = (jnp.int32(0), jnp.linspace(low, high, 2**bits, dtype=jnp.float32), jnp.bool_(True))
    return lax.while_loop(lambda carry: carry[2] & (carry[0] < iterations), step, first)[1]


def _nearest(values: Float[Array, " values"], weights: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    return jnp.searchsorted(values[:-1] / 2 + values[1:] / 2, weights)
