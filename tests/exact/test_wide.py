"""Whole numbers of 64 bits in two words: against Python's."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxprune.exact import wide

NUMBERS = st.one_of(st.integers(0, 5), st.integers(0, 2**62), st.integers(0, 62).map(lambda e: 2**e))


def whole_of(number):
    return (int(number.high) << 32) + int(number.low)


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3), each=st.lists(NUMBERS, min_size=3, max_size=3)
)
def test_sums_of_products(counts, each):
    each = [e % max((2**64 - 1) // (3 * max(c, 1)), 1) for c, e in zip(counts, each, strict=True)]
    found = wide.dot(jnp.asarray(np.array(counts, np.uint32)), wide.wide(each))
    assert whole_of(found) == sum(c * e for c, e in zip(counts, each, strict=True))


@settings(max_examples=40)
@given(
    n=NUMBERS,
    share=st.one_of(st.floats(0, 1, exclude_max=True, width=32), st.integers(0, 1023).map(lambda i: i / 1024)),
)
@example(n=2**62, share=0.0)
@example(n=2**62, share=float(np.float32(0.9)))
def test_what_is_left(n, share):
    gone = max(int(Fraction(share) * 2**32) - 256, 0)
    left = whole_of(wide.left_of(n, jnp.float32(share)))
    assert left == n - -(-gone * n // 2**32)
    assert left <= (1 - Fraction(share) + Fraction(1, 2**24) + Fraction(1, 2**32)) * n


@given(a=NUMBERS, b=NUMBERS)
def test_comparisons(a, b):
    assert bool(wide.at_most(wide.wide(a), wide.wide(b))) is (a <= b)
    assert whole_of(wide.larger(wide.wide(a), wide.wide(b))) == max(a, b)
