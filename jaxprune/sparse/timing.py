"""Time of functions that compete: they take turns in one loop, and medians are compared.

A machine speeds up, slows down and is interrupted; whoever runs alone meets another machine than the next. So

    round 1:  B A C     round 2:  C B A     round 3:  A C B ...

in an order drawn anew each round: nobody always runs on the caches that the same rival left behind. A turn may be
several runs in a row, as a model is run that is served; then the first, on the rival's caches, is not counted.
"""

import math
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

LEAST, MOST = 5, 50
"""Runs of `interleaved` when their number is left to it."""


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
    turn: int = 1,
    hopeless: float | None = None,
    always: Collection[str] = (),
) -> dict[str, list[float]]:
    """Seconds of every run of every contestant, in turns, after one run of each to warm up.

    Args:
        contestants: name -> call without arguments; its result is waited for.
        repeats: runs that count; without it, as many as take `seconds` by the time of the first, from 5 to `most`.
        seconds: aim for all runs of all contestants together.
        most: upper bound of the number of runs chosen.
        turn: runs in a row; if more than one, the first of them is not counted.
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
    second = {name: once(fn) for name, fn in contestants.items()}
    first = {name: min(cold[name], second[name]) for name in contestants}
    bound = math.inf if hopeless is None else hopeless * min(first.values(), default=0.0)
    left = [name for name in contestants if first[name] <= bound or name in always]
    taken = {name: [] if name in left and turn > 1 else [seconds] for name, seconds in second.items()}
    order, a_turn = random.Random(0), max(1, turn - 1)
    n = repeats or rounds([turn / a_turn * first[name] for name in left], seconds, most)
    for _ in range(math.ceil((n if turn > 1 else n - 1) / a_turn)):
        for name in order.sample(left, len(left)):
            taken[name] += [once(contestants[name]) for _ in range(turn)][-a_turn:]
    return {name: runs[:n] for name, runs in taken.items()}


def rounds(first: Sequence[float], seconds: float, most: int = MOST) -> int:
    """How many runs of contestants that took `first` seconds each fill `seconds`, from 5 to `most`."""
    return int(np.clip(seconds / max(sum(first), 1e-9), LEAST, max(LEAST, most)))


def spread(seconds: Sequence[float]) -> Spread:
    """Median and quartiles of runs in seconds, as milliseconds."""
    low, median, high = (float(1e3 * value) for value in np.percentile(seconds, [25, 50, 75]))
    return Spread(median, low, high, len(seconds))
