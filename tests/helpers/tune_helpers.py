"""A small model, and a clock that says what the test wants; shared by the tests of the measured choice."""

import jax
import jax.numpy as jnp
from sparse_helpers import make_leaf, make_x

from jaxprune import sparse
from jaxprune.sparse.tuning import race, timing, whole

PARAMS = {"a": {"kernel": make_leaf((32, 48), 0.2, "float32")}, "b": {"kernel": make_leaf((48, 16), 0.2, "float32", 1)}}
X = make_x((6, 32))
SLOW = 1.0


def mlp(params, x):
    return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


def tune(fn=mlp, params=PARAMS, x=X, **options):
    return sparse.tune(fn, params, x, **({"cache": None, "formats": ["bcoo", "bcsr"]} | options))


class Clock:
    """Instead of `timing.interleaved`: contestants take what the test says, SLOW unless named, and are never run."""

    def __init__(self, **seconds):
        self.seconds = seconds
        self.races = []

    def __call__(self, contestants, **_):
        self.races.append(list(contestants))
        return {name: [self.seconds.get(name, SLOW)] * 9 for name in contestants}


def traced_only(fn, *arguments):
    """Instead of `contest.compiled`: traced, so that refusals are raised, but not compiled; the answer is zeros."""
    shapes = jax.eval_shape(fn, *arguments)
    return race.Program(lambda: jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes), 1.0)


def install_clock(monkeypatch, compiling=False, **seconds):
    fake = Clock(**seconds)
    monkeypatch.setattr(timing, "interleaved", fake)
    if not compiling:
        monkeypatch.setattr(race, "compiled", traced_only)
        monkeypatch.setattr(whole, "compiled", traced_only)
    return fake


def timings_of(leaf):
    return {timing.format: timing for timing in leaf.sites[0].timings}
