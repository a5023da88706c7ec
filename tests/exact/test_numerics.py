"""Sums that do not depend on who does them."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxprune.exact.numerics import multiply, ordered_sum, rounded_share

WORDS = st.integers(0, 2**32 - 1)
COUNTS = st.one_of(st.integers(0, 100), WORDS, st.integers(0, 16).map(lambda e: 2**e))
SHARES = st.one_of(st.floats(2**-8, 1, exclude_max=True, width=32), st.integers(0, 2**10 - 1).map(lambda i: i / 2**10))


@given(n=COUNTS, share=SHARES)
@example(n=5, share=0.5)  # 2.5 -> 2
@example(n=7, share=0.5)  # 3.5 -> 4
@example(n=2**32 - 1, share=float(np.float32(0.9)))
@example(n=2**24 + 1, share=0.5)  # beyond float32's integers
@example(n=3, share=float(1 - 2.0**-24))
def test_rounded_share_of_an_array_is_exact(n, share):
    got = rounded_share(n, jnp.float32(share))
    assert got.dtype == jnp.uint32
    assert int(got) == oracle.rounded(n, share)


@given(n=st.integers(0, 2**28), share=SHARES)
def test_rounded_share_of_a_float_is_that_of_the_same_array(n, share):
    """Known before jit or not, the same number of weights goes."""
    assert rounded_share(n, share) == oracle.rounded(n, share) == int(rounded_share(n, jnp.float32(share)))


@given(n=st.integers(1, 2**20), share=st.floats(0, 1, exclude_max=True))
def test_rounded_share_of_a_python_float_is_pythons_round(n, share):
    got = rounded_share(n, share)
    assert isinstance(got, int)
    assert got == round(n * share)


@pytest.mark.parametrize("n", [0, 1, 10, 10**9])
def test_rounded_share_under_jit(n):
    share = jax.jit(lambda s: rounded_share(n, s))
    for s in (0.0, 0.25, 0.9, 0.999):
        assert int(share(jnp.float32(s))) == oracle.rounded(n, float(np.float32(s)))


@pytest.mark.parametrize(
    ("share", "kept"), [(1.0, 1), (-1.0, 10), (float(np.nextafter(np.float32(1), np.float32(0))), 1)]
)
def test_rounded_share_outside_its_range_stays_in_the_count(share, kept):
    """A schedule that rounds to 1 in float32 must not wrap around."""
    assert 10 - int(jax.jit(lambda s: rounded_share(10, s))(jnp.float32(share))) in (kept, kept - 1)


@given(a=WORDS, b=WORDS)
@example(a=2**32 - 1, b=2**32 - 1)
def testmultiply_is_the_64_bit_product(a, b):
    high, low = multiply(jnp.uint32(a), jnp.uint32(b))
    assert (int(high) << 32) + int(low) == a * b


@pytest.mark.parametrize("axes", [(-1,), (-3, -1), (-3, -2)])
@pytest.mark.parametrize("shape", [(2, 1, 5, 3), (3, 4, 7), (1, 0, 3)])
def test_ordered_sum_is_the_sum(shape, axes):
    values = np.random.default_rng(0).integers(-9, 9, shape)  # small integers: no rounding
    got = ordered_sum(jnp.asarray(values, jnp.float32), axes)
    np.testing.assert_array_equal(got, values.sum(axes, keepdims=True))


def test_ordered_sum_is_as_exact_as_pairwise_sums_are():
    values = np.random.default_rng(0).random((1, 1, 10_000)).astype(np.float32)
    got = ordered_sum(jnp.asarray(values), (-1,))
    np.testing.assert_allclose(got, values.sum(-1, keepdims=True, dtype=np.float64), rtol=3e-7)


@pytest.mark.parametrize("n", [1000, 1024])
def test_ordered_sum_is_the_same_over_eight_devices(n):
    """A plain sum is not: devices add first, and the last bit moves."""
    values = jnp.asarray(np.random.default_rng(1).random((n, 8)), jnp.float32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    want = np.asarray(ordered_sum(values, (-2,)))
    for spec in (("d",), (None, "d")):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        sharded = jax.device_put(values, sharding)
        np.testing.assert_array_equal(ordered_sum(sharded, (-2,)), want)
        np.testing.assert_array_equal(jax.jit(lambda v: ordered_sum(v, (-2,)))(sharded), want)
