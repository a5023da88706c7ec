"""Schedules against their formulas, before, between and after, for traced steps too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxprune import Method, prune
from jaxprune.schedules import (
    alternating,
    as_update_when,
    at,
    constant,
    cosine,
    cubic,
    every,
    exponential,
    linear,
    one_shot,
    rounds,
)

FINALS = [0.5, 0.9, 0.98]
F32 = {f: float(np.float32(f)) for f in FINALS}


def at_steps(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(steps, jnp.int32)))


@pytest.mark.parametrize("initial", [0.0, 0.3])
@pytest.mark.parametrize(("begin", "end"), [(0, 10), (7, 8), (500, 5000), (3, 3)])
def test_cubic_is_the_papers_formula(begin, end, initial):
    steps = sorted({0, begin - 1, begin, begin + 1, (begin + end) // 2, end - 1, end, end + 1, 10**6} - {-1})
    got = at_steps(cubic(0.9, begin=begin, end=end, initial=initial), steps)
    want = [oracle.cubic(step, 0.9, begin, end, initial) for step in steps]
    np.testing.assert_allclose(got, want, atol=2e-7)


RAMPS = {
    linear: lambda p, i, f: i + (f - i) * p,
    cosine: lambda p, i, f: f + (i - f) * (1 + np.cos(np.pi * p)) / 2,
    exponential: lambda p, i, f: 1 - (1 - i) ** (1 - p) * (1 - f) ** p,
    cubic: lambda p, i, f: f + (i - f) * (1 - p) ** 3,
}


@pytest.mark.parametrize("initial", [0.0, 0.3])
@pytest.mark.parametrize("ramp", RAMPS)
def test_ramps_are_their_formulas(ramp, initial):
    steps = np.arange(30)
    got = at_steps(ramp(0.9, begin=5, end=21, initial=initial), steps)
    want = RAMPS[ramp](np.clip((steps - 5) / 16, 0, 1), initial, 0.9)
    np.testing.assert_allclose(got, np.where(steps < 5, 0, want), atol=3e-7)


@pytest.mark.parametrize("final", FINALS)
@pytest.mark.parametrize("ramp", RAMPS)
def test_ramps_end_at_their_end_to_the_bit(ramp, final):
    schedule = ramp(final, begin=1, end=8)
    assert float(schedule(8)) == float(schedule(10**9)) == F32[final]
    assert float(schedule(0)) == float(schedule(1)) == 0


@pytest.mark.parametrize("ramp", RAMPS)
def test_ramps_never_fall(ramp):
    got = at_steps(ramp(0.9, begin=10, end=300), range(400))
    assert (np.diff(got) >= 0).all()
    assert got.max() == F32[0.9]


def test_alternating_is_dense_and_sparse_in_turn():
    got = at_steps(alternating(0.5, dense=2, sparse=3, begin=4, end=15), range(20))
    want = 4 * [0] + 3 * [0.5] + 2 * [0] + 3 * [0.5] + 2 * [0] + 6 * [0.5]
    np.testing.assert_array_equal(got, want)
    cut_short = at_steps(alternating(0.5, dense=4, sparse=1, begin=0, end=3), range(6))
    np.testing.assert_array_equal(cut_short, [0.5, 0, 0, 0.5, 0.5, 0.5])


@pytest.mark.parametrize(("count", "length", "begin"), [(1, 1, 0), (4, 10, 0), (5, 3, 7)])
def test_rounds_keep_the_same_share_every_time(count, length, begin):
    steps = range(begin + (count + 2) * length)
    got = at_steps(rounds(0.9, count=count, length=length, begin=begin), steps)
    np.testing.assert_allclose(got, [oracle.rounds(s, 0.9, count, length, begin) for s in steps], atol=1e-7)
    assert got[-1] == F32[0.9]
    assert len(np.unique(got)) == count + (begin > 0)


def test_rounds_take_unsigned_steps():
    """Flax NNX counts its steps so, and step - begin must not wrap around."""
    schedule = rounds(0.9, count=3, length=2, begin=5)
    assert float(schedule(jnp.uint32(0))) == 0
    assert float(schedule(jnp.uint32(9))) == F32[0.9]


def test_lottery_tickets_rounds():
    """Frankle and Carbin keep 0.8 a round: after three, 0.512 are left."""
    np.testing.assert_allclose(
        at_steps(rounds(1 - 0.8**3, count=3, length=1), [0, 1, 2]), [0.2, 0.36, 0.488], atol=1e-7
    )
    kept, steps = rounds(keep=0.8, count=3, length=1), [0, 1, 2, 9]
    np.testing.assert_array_equal(at_steps(kept, steps), at_steps(rounds(1 - 0.8**3, count=3, length=1), steps))


def test_constant_and_one_shot():
    np.testing.assert_array_equal(at_steps(constant(0.5), [0, 9]), [0.5, 0.5])
    np.testing.assert_array_equal(at_steps(one_shot(0.5), [0, 9]), [0.5, 0.5])
    np.testing.assert_array_equal(at_steps(one_shot(0.5, step=3), [0, 2, 3, 4]), [0, 0, 0.5, 0.5])


@pytest.mark.parametrize(
    "schedule", [constant(0.5), one_shot(0.5), cubic(0.5, begin=0, end=3), rounds(0.5, count=2, length=1)]
)
def test_sparsity_is_a_float32_scalar_and_is_traced_once(schedule):
    traces = []

    @jax.jit
    def run(step):
        traces.append(step)
        return schedule(step)

    for step in (0, 1, 100):
        got = run(jnp.int32(step))
        assert got.dtype == jnp.float32
        assert got.shape == ()
        assert got == schedule(step)
    assert len(traces) == 1


@given(steps=st.integers(1, 20), begin=st.integers(0, 30), length=st.none() | st.integers(0, 40))
@example(steps=3, begin=5, length=6)  # the end itself is due
@example(steps=1, begin=0, length=None)
def test_every(steps, begin, length):
    end = None if length is None else begin + length
    due = every(steps, begin=begin, end=end)
    want = [t >= begin and (t - begin) % steps == 0 and (end is None or t <= end) for t in range(60)]
    got = np.asarray(due(jnp.arange(60)[0]))
    assert got == want[0]
    np.testing.assert_array_equal(np.asarray(jax.vmap(due)(jnp.arange(60))), want)


def test_at():
    due = at(3, 7)
    assert [t for t in range(10) if due(t)] == [3, 7]
    assert not at()(0)


@pytest.mark.parametrize("sparsity", [90, 1.0, -0.1, float("nan")])
@pytest.mark.parametrize(
    "make",
    [
        constant,
        one_shot,
        lambda s: cubic(s, begin=0, end=1),
        lambda s: cubic(0.9, begin=0, end=1, initial=s),
        lambda s: rounds(s, count=1, length=1),
        lambda s: exponential(s, begin=0, end=1),
        lambda s: alternating(s, dense=1, sparse=1, begin=0, end=1),
    ],
)
def test_a_sparsity_that_is_no_fraction_is_refused(make, sparsity):
    hint = r"\. Did you mean 0\.9\?" if sparsity == 90 else r"\.$"
    with pytest.raises(ValueError, match=rf"`\w+` is the fraction removed, in \[0, 1\); got {sparsity:g}{hint}"):
        make(sparsity)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cubic(0.9, begin=5, end=4), "`cubic` needs 0 <= begin <= end, got begin=5, end=4"),
        (lambda: cubic(0.9, begin=-1, end=4), "got begin=-1, end=4"),
        (lambda: rounds(0.9, count=0, length=1), "`rounds` needs count >= 1, length >= 1, begin >= 0; got 0, 1, 0"),
        (lambda: rounds(0.9, count=1, length=0), "got 1, 0, 0"),
        (lambda: rounds(0.9, count=1, length=1, begin=-1), "got 1, 1, -1"),
        (lambda: rounds(count=1, length=1), "either the final sparsity or `keep`"),
        (lambda: rounds(0.5, keep=0.5, count=1, length=1), "either the final sparsity or `keep`"),
        (lambda: rounds(keep=0.0, count=1, length=1), r"a share in \(0, 1\], got 0"),
        (lambda: linear(0.9, begin=5, end=4), "`linear` needs 0 <= begin <= end, got begin=5, end=4"),
        (lambda: alternating(0.9, dense=0, sparse=1, begin=0, end=1), "got 0, 1, 0, 1"),
        (lambda: alternating(0.9, dense=1, sparse=1, begin=2, end=1), "got 1, 1, 2, 1"),
        (lambda: every(0), "`every` needs at least 1 step, got 0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


FOLLOWED = {
    "one shot": (one_shot(0.9, step=7), [7]),
    "a ramp of 3 steps": (cubic(0.9, begin=2, end=4), [2, 3, 4]),
    "a ramp of a step": (linear(0.9, begin=5, end=5), [5]),
    "a ramp whose end no period meets": (cosine(0.9, begin=10, end=75), [*range(10, 75, 6), 75]),
    "a long ramp": (exponential(0.9, begin=50, end=1230), [*range(50, 1230, 100), 1230]),
    "rounds": (rounds(0.9, count=3, length=20, begin=4), [4, 24, 44]),
    "phases": (alternating(0.9, dense=10, sparse=20, begin=5, end=60), [5, 25, 35, 55, 60]),
    "a function": (lambda step: jnp.float32(0.5), [*range(0, 1500, 100)]),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_masks_follow_a_schedule_up_to_its_end(name):
    schedule, due = FOLLOWED[name]
    when = as_update_when(None, schedule)
    assert np.flatnonzero(at_steps(when, np.arange(1500))).tolist() == due


def test_a_ramp_ends_where_it_says():
    """With masks every 100 steps, as they were unless said, a ramp of 250 steps ended at 0.893."""
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(20, 50)), jnp.float32)}
    tx = prune(optax.sgd(0.0), Method(), sparsity=cubic(0.9, begin=0, end=250))

    def step(state, _):
        _, state = tx.update(params, state, params)
        return state, jnp.sum(state.masks["kernel"])

    _, alive = jax.jit(lambda state: jax.lax.scan(step, state, None, length=300))(tx.init(params))
    assert alive[-1] == 100
    assert np.flatnonzero(np.diff(alive))[-1] == 249
