"""Timing in turns, and whether an answer is the dense one."""

import time

import jax.numpy as jnp
import pytest

from jaxprune.sparse.tuning import race, timing


def test_interleaved_takes_turns():
    order = []
    runs = timing.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, repeats=4)
    assert {name: len(taken) for name, taken in runs.items()} == {"a": 4, "b": 4, "c": 4}
    assert order[:6] == list("abcabc")
    assert all(sorted(order[i : i + 3]) == list("abc") for i in range(0, len(order), 3))
    order.clear()
    runs = timing.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, repeats=2, turn=1e-9)
    assert {name: len(taken) for name, taken in runs.items()} == dict.fromkeys("abc", 6)  # three of each turn of four
    assert [len(set(order[i : i + 4])) for i in range(6, 30, 4)] == [1] * 6
    assert timing._length(0.01, 0.1) == 10
    with pytest.raises(ValueError, match="0 arrived"):
        timing.interleaved({}, repeats=0)
    assert timing.interleaved({}) == {}


def test_the_hopeless_run_twice():
    calls = {"fast": lambda: None, "slow": lambda: time.sleep(0.02)}
    assert len(timing.interleaved(calls, repeats=6, hopeless=3)["slow"]) == 1
    assert len(timing.interleaved(calls, repeats=6, hopeless=3, always=["slow"])["slow"]) == 6
    assert len(timing.interleaved(calls, repeats=6)["slow"]) == 6


@pytest.mark.parametrize(("first", "rounds"), [([1e-6], 50), ([0.01, 0.01], 25), ([3.0], 5), ([], 50)])
def test_rounds_fill_the_time(first, rounds):
    assert timing.rounds(first, 0.5) == rounds


def test_outputs_are_compared_by_the_digits_of_their_dtype():
    want = {"y": jnp.asarray([1.0, -100.0]), "index": jnp.asarray([1])}
    assert race.differs(want | {"index": jnp.asarray([2])}, want) == ""
    assert race.differs(want | {"y": jnp.asarray([1.1, -100.0])}, want) == ""
    assert "off by 1.0e-02" in race.differs(want | {"y": jnp.asarray([2.0, -100.0])}, want)
    assert race.differs(want | {"y": jnp.asarray([2.0, -100.0])}, want, loose=True) == ""
    assert "off by" in race.differs(want | {"y": jnp.asarray([jnp.nan, -100.0])}, want)
    assert "gives bfloat16[2]" in race.differs(jnp.ones(2, jnp.bfloat16), jnp.ones(2))
    assert race.differs(jnp.zeros((0, 2)), jnp.zeros((0, 2))) == ""
