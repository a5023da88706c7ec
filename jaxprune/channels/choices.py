"""Choices: along which axis channels lie, where a reshape leaves it open.

    (b, t, 72) -> (b, t, 3, 6, 4)     72 outputs may be 3, 6 or 4 channels, whose indices go together
    (3, 3, 16, 8) -> (144, 8)         144 inputs may be those of 3, 3 or 16 channels

Only what comes behind it tells: heads stay apart, a size that scores are divided by must stay. So a program is walked
with several choices, and kept is the one that leaves the most weights in channels that can be removed, and among these
the most channels. Reshapes on one line, of the same sizes, are one choice, as in layers that a loop makes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from jax.extend import source_info_util

from jaxprune.channels.union_find import AxisUnits, Ids, Units

Key = tuple[Any, ...]
Removed = Mapping[str, Sequence[Sequence[int]]]


class Choices:
    """What is chosen in one walk, and what there was to choose from.

    Attributes:
        rank: which of the axes is chosen where `made` does not say, counted from 0; the last one if there are fewer.
        made: choice -> axis.
        met: choice -> the axes that there were, in the order of the walk.
        chosen: choice -> the axis that was taken first.
        units: choice -> units along that axis, of every reshape.
    """

    def __init__(self, rank: int = 0, made: Mapping[Key, int] | None = None) -> None:
        self.rank, self.made = rank, made or {}
        self.met: dict[Key, tuple[int, ...]] = {}
        self.chosen: dict[Key, int] = {}
        self.units: dict[Key, list[Ids]] = {}

    def pick(self, eqn: Any, what: str, sizes: Sequence[int], axes: Mapping[int, tuple[bool, Ids]]) -> int:
        """One of several axes.

        Args:
            eqn: the reshape.
            what: is done with the axes.
            sizes: of them all.
            axes: those that may be chosen -> whether what is removed lies along this axis, and the units that it
                would be the axis of.
        """
        key = (what, *sizes, source_info_util.summarize(eqn.source_info))
        fitting = [axis for axis, (fits, _) in axes.items() if fits] or list(axes)
        axis = self.made.get(key, -1)
        axis = axis if axis in axes else fitting[min(self.rank, len(fitting) - 1)]
        self.met.setdefault(key, tuple(axes))
        self.chosen.setdefault(key, axis)
        self.units.setdefault(key, []).append(axes[axis][1])
        return axis


class Walked:
    """A walk with some choices.

    Attributes:
        choices: those.
        units: of the whole program.
        leaves: leaf -> units of its axes.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.units = Units()
        self.leaves: dict[str, AxisUnits] = {}


W = TypeVar("W", bound=Walked)


def best_walk(run: Callable[[Choices], W]) -> W:
    """The walk that leaves most.

    Args:
        run: walks the program with these choices.
    """

    def is_free(walk: W, key: Key | None) -> bool:
        return key is not None and not any(walk.units.fixed(ids).any() for ids in walk.choices.units[key])

    return _search(run, worth, is_free)


def fitting_walk(run: Callable[[Choices], W], removed: Removed) -> W:
    """The walk in which what is removed goes together, or nearly so.

    Args:
        run: walks the program with these choices, and knows what is removed.
        removed: leaf -> for each of its axes the indices that are gone.
    """
    return _search(run, lambda walk: -len(torn(walk, removed)), lambda walk, _: not torn(walk, removed))


def worth(walk: Walked, among: Ids | None = None) -> tuple[int, int]:
    """How many weights are in channels that can be removed, and how many channels there are.

    Args:
        walk: at its end.
        among: units that these channels are; None for all.
    """

    def free(ids: Ids) -> Any:
        roots = walk.units.roots(ids)
        free = ~walk.units.fixed(roots)
        return free if among is None else free & np.isin(roots, walk.units.roots(among))

    weights, found = 0, [np.zeros(0, np.int64)]
    for axes in walk.leaves.values():
        gone = [free(ids) for ids in axes]
        weights += math.prod(map(len, gone)) - math.prod(int((~each).sum()) for each in gone)
        found += [walk.units.roots(ids[each]) for ids, each in zip(axes, gone, strict=True)]
    return weights, len(np.unique(np.concatenate(found)))


def torn(walk: Walked, removed: Removed) -> list[tuple[str, int]]:
    """Axes of leaves some of whose indices would have to go with what is removed, and do not.

    Args:
        walk: one that knows what is removed.
        removed: leaf -> for each of its axes the indices that are gone.
    """
    gone = {(name, axis): len(indices) for name, axes in removed.items() for axis, indices in enumerate(axes)}
    axes = [((name, axis), ids) for name, axes in walk.leaves.items() for axis, ids in enumerate(axes)]
    return [place for place, ids in axes if int(walk.units.gone(ids).sum()) != gone.get(place, 0)]


def _search(run: Callable[[Choices], W], worth: Callable[[W], Any], is_done: Callable[[W, Key | None], bool]) -> W:
    """The best of several walks: with all first axes, all second and so on, the best of these, single changes of it.

    Args:
        run: walks the program with these choices.
        worth: of a walk; the largest is kept, of equal ones the first.
        is_done: whether no walk can be better, or none by another axis for this choice.
    """
    walks = [run(Choices())]
    for rank in range(1, max((len(axes) for axes in walks[0].choices.met.values()), default=0)):
        if is_done(walks[-1], None):
            return walks[-1]
        walks.append(run(Choices(rank)))
    best = max(walks, key=worth)
    mixed = _one_by_one(walks)
    if not mixed.items() <= best.choices.chosen.items():
        best = max(best, run(Choices(best.choices.rank, mixed)), key=worth)
    for key in list(best.choices.met):
        for axis in best.choices.met.get(key, ()):
            if axis != best.choices.chosen[key] and not is_done(best, key):
                made = {**best.choices.chosen, key: axis}
                best = max(best, run(Choices(best.choices.rank, made)), key=worth)
    return best


def _one_by_one(walks: Sequence[Walked]) -> dict[Key, int]:
    """For each choice the axis that leaves most of what it is about, in the walk where it does."""
    found: dict[Key, tuple[Any, int]] = {}
    for walk in walks:
        for key, units in walk.choices.units.items():
            left = worth(walk, np.concatenate(units))
            if key not in found or left > found[key][0]:
                found[key] = left, walk.choices.chosen[key]
    return {key: axis for key, (_, axis) in found.items()}
