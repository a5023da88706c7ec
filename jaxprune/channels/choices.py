"""Choices: along which axis channels lie, where a reshape leaves it open.

    (b, t, 72) -> (b, t, 3, 6, 4)     72 outputs may be 3, 6 or 4 channels, whose indices go together
    (3, 3, 16, 8) -> (144, 8)         144 inputs may be those of 3, 3 or 16 channels

Only what comes behind it tells: heads stay apart, a size that scores are divided by must stay. So a program is walked
with several choices, and kept is the one that leaves the most weights in channels that can be removed, and among these
the most channels. Reshapes on one line, of the same sizes, are one choice, as in layers that a loop makes.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from jaxprune import tree
from jaxprune.channels.union_find import Ids
from jaxprune.channels.walk import Choices, Key, Removed, Walk, walk_with
from jaxprune.compat import ClosedJaxpr
from jaxprune.tracing.symbolic import at_numbers
from jaxprune.types import Leaves


def walk(jaxpr: ClosedJaxpr, params: Leaves, removed: Removed | None = None) -> Walk:
    """The units of a program that `jaxpr_of` and `inlined` made with these params.

    Args:
        jaxpr: of the model, without calls.
        params: the same pytree.
        removed: leaf -> for each of its axes the indices that are gone, if any are, and these together.

    Raises:
        ValueError: see `jaxprune.trace`; what is removed does not go together.
    """
    leaves = {name: leaf for name, leaf in tree.named_leaves(params).items() if tree.is_array(leaf)}
    run = partial(walk_with, *at_numbers(jaxpr), leaves, removed or {})
    if removed is None:
        return _search(run, _worth, _is_free)
    found = _search(run, lambda walk: -len(_torn(walk, removed)), lambda walk, _: not _torn(walk, removed))
    for name, axis in _torn(found, removed):
        raise ValueError(
            f"What is removed of leaf {name!r} along axis {axis} does not go together with the rest of what is "
            "removed: other indices would have to go with it. Was it found for this function, and arguments of these "
            "kinds?"
        )
    return found


def _is_free(walk: Walk, key: Key | None) -> bool:
    """Whether all that a choice is about can be removed."""
    return key is not None and not any(walk.units.fixed(ids).any() for ids in walk.choices.units[key])


def _worth(walk: Walk, among: Ids | None = None) -> tuple[int, int]:
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


def _torn(walk: Walk, removed: Removed) -> list[tuple[str, int]]:
    """Axes of leaves some of whose indices would have to go with what is removed, and do not.

    Args:
        walk: one that knows what is removed.
        removed: leaf -> for each of its axes the indices that are gone.
    """
    gone = {(name, axis): len(indices) for name, axes in removed.items() for axis, indices in enumerate(axes)}
    axes = [((name, axis), ids) for name, axes in walk.leaves.items() for axis, ids in enumerate(axes)]
    return [place for place, ids in axes if int(walk.units.gone(ids).sum()) != gone.get(place, 0)]


def _search(
    run: Callable[[Choices], Walk], worth: Callable[[Walk], Any], is_done: Callable[[Walk, Key | None], bool]
) -> Walk:
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


def _one_by_one(walks: Sequence[Walk]) -> dict[Key, int]:
    """For each choice the axis that leaves most of what it is about, in the walk where it does."""
    found: dict[Key, tuple[Any, int]] = {}
    for walk in walks:
        for key, units in walk.choices.units.items():
            left = _worth(walk, np.concatenate(units))
            if key not in found or left > found[key][0]:
                found[key] = left, walk.choices.chosen[key]
    return {key: axis for key, (_, axis) in found.items()}
