"""Time of functions that compete: they take turns in one loop, and medians are compared.

A machine speeds up, slows down and is interrupted; whoever runs alone meets another machine than the next. So

    round 1:  B A C     round 2:  C B A     round 3:  A C B ...

in an order drawn anew each round: nobody always runs on the caches that the same rival left behind. A turn may be many
runs in a row, as a model is run that is served; then the first quarter, on the rival's caches and with threads that
sleep, is not counted.
"""

import math
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

LEAST, MOST = 5, 50
"""Rounds of `interleaved` when their number is left to it."""


class Spread(NamedTuple):
    """Median and quartiles of one contestant's runs.

    Attributes:
        median, low, high: milliseconds; low and high are the quartiles.
        runs: how many runs these are made of.
    """

    median: float
    low: float
    high: float
    runs: int


def once(fn: Callable[[], Any]) -> float:
    """Seconds until the result of one call is there."""
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def interleaved(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    repeats: int | None = None,
    seconds: float = 0.5,
    most: int = MOST,
    turn: float = 0.0,
    hopeless: float | None = None,
    always: Collection[str] = (),
) -> dict[str, list[float]]:
    """Seconds of every run of every contestant, in turns, after one run of each to warm up.

    Args:
        contestants: name -> call without arguments; its result is waited for.
        repeats: rounds; without it, as many as take `seconds` by the time of the first, from 5 to `most`.
        seconds: aim for all runs of all contestants together.
        most: upper bound of the number of rounds chosen.
        turn: seconds of a turn, which is 4 to 40 runs, the first quarter of them not counted; 0 for turns of one
            run, which counts.
        hopeless: a contestant that takes this many times the fastest, by the better of the run to warm up and the first
            run that counts, is not run again; it keeps that one run.
        always: contestants that are never hopeless.

    Returns:
        Name -> seconds of its counted runs, in the order of the rounds.

    Raises:
        ValueError: `repeats` below one.
    """
    if repeats is not None and repeats < 1:
        raise ValueError(f"`repeats` is a number of runs, 1 or more, {repeats} arrived.")
    cold = {name: once(fn) for name, fn in contestants.items()}
    taken = {name: [once(fn)] for name, fn in contestants.items()}
    first = {name: min(cold[name], runs[0]) for name, runs in taken.items()}
    bound = math.inf if hopeless is None else hopeless * min(first.values(), default=0.0)
    left = [name for name in contestants if first[name] <= bound or name in always]
    lengths = {name: _length(first[name], turn) for name in left}
    order, n = random.Random(0), repeats or rounds([lengths[name] * first[name] for name in left], seconds, most)
    if turn:
        taken |= {name: [] for name in left}
    for _ in range(n if turn else n - 1):
        for name in order.sample(left, len(left)):
            runs = [once(contestants[name]) for _ in range(lengths[name])]
            taken[name] += runs[len(runs) // 4 :]
    return taken


def _length(first: float, turn: float) -> int:
    """Runs of a turn."""
    return min(max(4, math.ceil(turn / max(first, 1e-6))), 40) if turn else 1


def rounds(first: Sequence[float], seconds: float, most: int = MOST) -> int:
    """How many rounds of contestants whose turns take `first` seconds fill `seconds`, from 5 to `most`."""
    return int(np.clip(seconds / max(sum(first), 1e-9), LEAST, max(LEAST, most)))


def spread(seconds: Sequence[float]) -> Spread:
    """Median and quartiles of runs in seconds, as milliseconds."""
    low, median, high = (float(1e3 * value) for value in np.percentile(seconds, [25, 50, 75]))
    return Spread(median, low, high, len(seconds))
