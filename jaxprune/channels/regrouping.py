r"""Regrouping: rows put into an order in which runs of m hold on to the most, n of m in each column.

    retained(order) = sum over runs and columns of the n largest of the m scores there

Two runs exchange k of their rows. What a run then retains of a column needs no sorting, since the sums of the largest
of the rows that stay, and of those that come, are known:

    top_n(stay + come) = max over j of  top_{n-j}(stay) + top_j(come)

NumPy alone, and nothing random: the same scores give the same order.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np
from jaxtyping import Float, Int

PARTITIONS = 500
"""How many ways of parting two runs are tried: all up to m = 6; in longer runs exchanges of few rows, or one."""
AT_ONCE = 1 << 16
"""Numbers worked on at once: they stay in the second-level cache."""
HELD = 1 << 22
"""Scores whose running sums are held at once."""
NOISE = 1e-9
"""An improvement is more than this share of what the two runs retain; less is a tie, broken by rounding."""

Scores = Float[np.ndarray, "rows columns"]
Runs = Int[np.ndarray, "runs m"]
Places = Int[np.ndarray, " _"]


def regroup(scores: Scores, n: int, m: int, rounds: int) -> Int[np.ndarray, " rows"]:
    r"""An order of the rows (new place -> row) that retains at least as much as the order they have.

    Each round tries all pairs of runs of which one has changed, and lets those that gain the most exchange rows, no run
    twice. Rows that are not exchanged keep their places. With two runs and m <= 6 the result is the optimum.

    Args:
        scores: not negative.
        n: how many of a run survive in each column, 0 < n <= m.
        m: length of a run; divides the rows.
        rounds: how many at most; it ends when no pair gains anything.
    """
    runs = np.arange(len(scores)).reshape(-1, m)
    if n == m or len(runs) < 2 or not scores.any():
        return runs.reshape(-1)
    scores = (scores / scores.max()).astype(np.float32)  # so that sums stay finite
    every = _exchanges(n, m)
    # Single rows first: these are quick to try, and leave little to the others.
    for count in sorted({1, len(every)}):
        pairs, changed = _Pairs(scores, n, every[:count], len(runs)), np.arange(len(runs))
        for _ in range(rounds):
            pairs.update(runs, changed)
            runs, changed = pairs.exchange(runs)
            if not len(changed):
                break
    return runs.reshape(-1)


def retained(run: Float[np.ndarray, "m columns"], n: int) -> float:
    """Sum of the n largest of m in every column, in float64.

    Args:
        run: scores of its rows.
        n: 0 < n <= m.
    """
    return float(np.partition(run, len(run) - n, axis=0)[len(run) - n :].sum(dtype=np.float64))


@dataclasses.dataclass(frozen=True, eq=False)
class _Exchange:
    """Exchanges of k rows.

    Attributes:
        given: which k a run may give, (subsets, k).
        first: how many of these the first run of a pair tries: half of the halves, since a half and the other half part
            the rows alike.
        parts: numbers of survivors that may be among the rows that come.
    """

    given: Int[np.ndarray, "subsets k"]
    first: int
    parts: range

    def sums(self, rows: Float[np.ndarray, "runs m columns"], n: int) -> tuple[list[Any], list[Any]]:
        """For each j of `parts` top_{n-j} of the rows that stay and top_j of those given; None for top_0."""
        stay = np.stack([np.setdiff1d(np.arange(rows.shape[1]), given) for given in self.given])
        kept, gone = (np.cumsum(-np.sort(-rows[:, which], axis=2), axis=2) for which in (stay, self.given))
        return _tops(kept, [n - j for j in self.parts]), _tops(gone, self.parts)


def _tops(sums: Any, counts: Any) -> list[Any]:
    return [np.ascontiguousarray(sums[:, :, count - 1]) if count else None for count in counts]


def _exchanges(n: int, m: int) -> list[_Exchange]:
    found, tried = [], 0
    for k in range(1, m // 2 + 1):
        given = np.asarray(list(itertools.combinations(range(m), k)))
        first = len(given) // 2 if 2 * k == m else len(given)
        tried += first * len(given)
        if k > 1 and tried > PARTITIONS:
            break
        found.append(_Exchange(given, first, range(max(0, n - (m - k)), min(k, n) + 1)))
    return found


class _Pairs:
    """What every pair of runs would gain.

    Attributes:
        gain: (first run, second run); 0 where nothing, and on one side of the diagonal for each pair.
        best: the exchange that gains it, counted over all exchanges.
    """

    def __init__(self, scores: Scores, n: int, exchanges: list[_Exchange], count: int) -> None:
        self._scores, self._n, self._exchanges = scores, n, exchanges
        self.gain, self.best = np.zeros((count, count)), np.zeros((count, count), np.int64)

    def update(self, runs: Runs, changed: Places) -> None:
        """Looks at the pairs of which a run has changed."""
        new = np.isin(np.arange(len(runs)), changed)
        partners = {run: np.flatnonzero(~new | (np.arange(len(runs)) > run)) for run in map(int, changed)}
        partners = {run: second for run, second in partners.items() if len(second)}
        now = np.asarray(self._retained(runs))
        after = self._after(runs, partners)
        for run, second in partners.items():
            best = after[run].argmax(1)
            self.gain[second, run] = 0
            self.gain[run, second] = after[run][np.arange(len(second)), best] - now[run] - now[second]
            self.best[run, second] = best

    def exchange(self, runs: Runs) -> tuple[Runs, Places]:
        """The runs after the exchanges that gain the most, no run twice, and which runs have changed."""
        runs, changed = runs.copy(), np.zeros(len(runs), bool)
        places = np.flatnonzero(self.gain > 0)
        for place in places[np.argsort(-self.gain.reshape(-1)[places], kind="stable")]:
            pair = list(divmod(int(place), len(runs)))
            if not changed[pair].any():
                after = self._exchanged(runs[pair], int(self.best[*pair]))
                before, now = (sum(self._retained(rows)) for rows in (runs[pair], after))
                if now - before > NOISE * before:
                    runs[pair], changed[pair] = after, True
                else:
                    self.gain[*pair] = 0
        return runs, np.flatnonzero(changed)

    def _retained(self, runs: Runs) -> list[float]:
        return [retained(self._scores[run], self._n) for run in runs]

    def _exchanged(self, pair: Runs, best: int) -> Runs:
        """Two runs after an exchange: what comes takes the places of what goes."""
        one, two = pair.copy()
        for exchange in self._exchanges:
            if best < exchange.first * len(exchange.given):
                a, b = (exchange.given[i] for i in divmod(best, len(exchange.given)))
                one[a], two[b] = pair[1][b], pair[0][a]
                return np.stack([one, two])
            best -= exchange.first * len(exchange.given)
        raise AssertionError("no such exchange")

    def _after(self, runs: Runs, partners: dict[int, Places]) -> dict[int, Any]:
        """What each run and its partners would retain after each exchange: run -> (partners, exchanges)."""
        found = {run: [] for run in partners}
        width = max(HELD // runs.size, 1)
        for exchange in self._exchanges:
            sums: dict[int, Any] = dict.fromkeys(partners, 0)
            for start in range(0, self._scores.shape[1], width):
                stay, come = exchange.sums(self._scores[:, start : start + width][runs], self._n)
                for run, second in partners.items():
                    sums[run] = sums[run] + _both(exchange.first, stay, come, run, second)
            for run in partners:
                found[run].append(sums[run])
        return {run: np.concatenate(parts, 1) for run, parts in found.items()}


def _both(first: int, stay: list[Any], come: list[Any], run: int, second: Places) -> Float[np.ndarray, "second tries"]:
    """What a run and each of its partners retain, for the first subsets of the run and all of the partner."""
    some = next(part for part in (*stay, *come) if part is not None)
    subsets, columns = some.shape[1:]
    result = np.zeros((len(second), first, subsets), np.float32)
    step = max(AT_ONCE // (subsets * columns), 1)
    for start in range(0, len(second), step):
        few = second[start : start + step]
        theirs = [[part if part is None else part[few] for part in side] for side in (stay, come)]
        scratch = np.empty((2, len(few), subsets, columns), np.float32)
        for a in range(first):
            ours = [[part if part is None else part[run, a] for part in side] for side in (stay, come)]
            total = _most(ours[0], theirs[1], scratch) + _most(theirs[0], ours[1], scratch)
            result[start : start + step, a] = total
    return result.reshape(len(second), -1)


def _most(stay: list[Any], come: list[Any], scratch: Any) -> Float[np.ndarray, "second subsets"]:
    """Sum over columns of the largest, over j, of stay_j + come_j."""
    largest, term = scratch
    for j, (a, b) in enumerate(zip(stay, come, strict=True)):
        sums = b if a is None else a if b is None else np.add(a, b, out=term if j else largest)
        if j:
            np.maximum(largest, sums, out=largest)
        elif sums is not largest:
            largest[...] = sums
    return largest.sum(-1)
