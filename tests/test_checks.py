"""Questions to input: one for numbers in an interval, and hints at what was meant."""

import math

import jax
import jax.numpy as jnp
import pytest

from jaxprune.checks import check_number, did_you_mean, percentage

INSIDE = {
    "[)": ([0.0, 0.5, jnp.float32(0.25)], [1.0, -0.1, 90, math.nan]),
    "[]": ([0, 1, 0.5], [1.5, -1e-9, math.inf]),
    "()": ([0.5], [0, 1.0]),
    "(]": ([1.0, 0.5], [0.0, 2]),
}


@pytest.mark.parametrize("ends", INSIDE)
def test_a_number_is_in_its_interval_or_refused(ends):
    inside, outside = INSIDE[ends]
    for value in inside:
        check_number(value, "`f` needs a share,", high=1, ends=ends)
    for value in outside:
        with pytest.raises(ValueError, match=f"^`f` needs a share, got {value}\\."):
            check_number(value, "`f` needs a share,", high=1, ends=ends)


def test_without_an_end_every_number_from_zero_on_will_do():
    check_number(1e30, "a number")
    for value in (math.inf, -1, math.nan):
        with pytest.raises(ValueError, match=f"^a number got {value}\\.$"):
            check_number(value, "a number")


def test_one_number_is_asked_for_and_a_traced_one_passes():
    with pytest.raises(ValueError, match=r"^a share got an array of shape \(2,\)"):
        check_number(jnp.ones(2), "a share")

    @jax.jit
    def traced(value):
        check_number(value, "a share", high=1)
        check_number(jnp.float32(0.5), "a share", high=1)  # known, while something else is traced
        return value

    assert traced(jnp.float32(7)) == 7


def test_a_percentage_is_recognised_where_a_fraction_is_meant():
    assert [percentage(value) for value in (90, 0.5, 1, 100, -3)] == [" Did you mean 0.9?", "", "", "", ""]
    with pytest.raises(ValueError, match=r"got 2\.5\. Did you mean 0\.025\?$"):
        check_number(2.5, "a share", high=1)


def test_the_nearest_word_is_named():
    assert did_you_mean("magnitud", ["wanda", "magnitude"]) == ", did you mean 'magnitude'?"
    assert did_you_mean("x", {"wanda": 1}) == did_you_mean("x", iter(())) == ""
