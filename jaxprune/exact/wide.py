"""Whole numbers below 2**64 as two words of 32 bits: JAX has none wider unless it is told to.

Sums of whole numbers are the same in any order, hence on any number of devices.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

from jaxprune.exact.numerics import multiply
from jaxprune.types import Sparsity

WORD = 32
SLACK = 1 << (WORD - 24)  # of 2**32: the rounding of a float32 next to 1


class Wide(NamedTuple):
    """high * 2**32 + low."""

    high: UInt32[Array, "..."]
    low: UInt32[Array, "..."]


def wide(numbers: int | Sequence[int]) -> Wide:
    """Known numbers, 0 <= number < 2**64: a scalar, or one after the other."""
    several = [numbers] if isinstance(numbers, int) else numbers
    high, low = np.array([divmod(number, 1 << WORD) for number in several], np.uint32).T
    return Wide(*(jnp.asarray(word[0] if isinstance(numbers, int) else word) for word in (high, low)))


def dot(counts: UInt32[Array, "n *rest"], each: Wide) -> Wide:
    r"""$\sum_i c_i e_i$, exactly, where it is below $2^{64}$; at most $2^{15}$ terms.

    Args:
        counts: c, terms along the first axis.
        each: e, n numbers.
    """
    each = Wide(*(word.reshape(-1, *(1,) * (counts.ndim - 1)) for word in each))
    high, low = multiply(counts, each.low)
    high = jnp.sum(high + counts * each.high, axis=0, dtype=jnp.uint32)
    # Halves of words, so that their sums still fit into one.
    half, mask = jnp.uint32(WORD // 2), jnp.uint32(0xFFFF)
    first = jnp.sum(low & mask, axis=0, dtype=jnp.uint32)
    second = jnp.sum(low >> half, axis=0, dtype=jnp.uint32) + (first >> half)
    return Wide(high + (second >> half), (second << half) | (first & mask))


def left_of(whole: int, share: Sparsity) -> Wide:
    r"""$\lfloor (1 - s + 2^{-24}) n \rfloor$, at most n: what is left of n, s being no more exact than a float32 is.

    Args:
        whole: n, known, below 2**63.
        share: s, a float32 in [0, 1) or several; may be traced.
    """
    fixed = (jnp.clip(jnp.float32(share), 0.0, 1 - 2.0**-24) * jnp.float32(2.0**WORD)).astype(jnp.uint32)
    fixed = jnp.maximum(fixed, jnp.uint32(SLACK)) - jnp.uint32(SLACK)
    n = wide(whole)
    carried, rest = multiply(fixed, n.low)
    high, low = multiply(fixed, n.high)
    gone = _plus(Wide(high, low), carried)
    gone = _plus(gone, (rest > 0).astype(jnp.uint32))  # rounded up, so that what is left is rounded down
    borrow = (n.low < gone.low).astype(jnp.uint32)
    return Wide(n.high - gone.high - borrow, n.low - gone.low)


def at_most(a: Wide, b: Wide) -> Bool[Array, "..."]:
    """a <= b."""
    return (a.high < b.high) | ((a.high == b.high) & (a.low <= b.low))


def larger(a: Wide, b: Wide) -> Wide:
    """The larger of the two."""
    return Wide(*(jnp.where(at_most(a, b), y, x) for x, y in zip(a, b, strict=True)))


def _plus(a: Wide, word: Array) -> Wide:
    low = a.low + word
    return Wide(a.high + (low < word).astype(jnp.uint32), low)
