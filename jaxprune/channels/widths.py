"""Widths: what a size that a model had is called in the smaller one.

    kernel (64, 8, 16) -> (64, 5, 16)      8 becomes 5, (8, 16) becomes (5, 16), 128 becomes 80, 64 and 16 stay

A module keeps such sizes in attributes. Which of them an attribute means cannot be seen in the number alone, so that
there are candidates, likeliest first: a size along a leaf; a size along an array that the model makes of the leaf's
channels (heads, groups), or how many groups of channels a leaf has; a product of neighbouring sizes; the same number,
which comes first if some size of a leaf was and is this.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxprune.channels.union_find import Ids
from jaxprune.channels.walk import Walk

Number = int | tuple[int, ...]
Pair = tuple[int, int]
"""A size before and after."""


class Widths:
    """Sizes before and after, of the arrays that have to do with some leaves.

    Attributes:
        shapes: of each leaf before and after, the sizes side by side.
        made: of other arrays whose channels are all among those of the leaves, and numbers of groups.
    """

    def __init__(
        self, walk: Walk, live: Bool[np.ndarray, " units"], made: Sequence[Ids], leaves: Sequence[str]
    ) -> None:
        axes = [[walk.units.roots(ids) for ids in walk.leaves[name]] for name in leaves]
        self.shapes: list[list[Pair]] = [[(len(ids), int(live[ids].sum())) for ids in roots] for roots in axes]
        ours = np.zeros(walk.units.count, bool)
        for ids in itertools.chain.from_iterable(axes):
            ours[ids] = True
        ours[0] = False
        inside = [ids for ids in made if ours[ids].all()]
        groups = [np.unique(ids) for roots in axes for ids in roots]
        self.made: list[Pair] = list(dict.fromkeys((len(ids), int(live[ids].sum())) for ids in inside + groups))

    def of(self, number: Number) -> list[Number]:
        """What a number may have become, likeliest first; itself among them.

        Args:
            number: a size, or several.
        """
        return list(dict.fromkeys(self._of_one(number) if isinstance(number, int) else self._of_several(number)))

    def _of_one(self, number: int) -> Iterable[int]:
        along = [pair for shape in self.shapes for pair in shape]
        if (number, number) in along:
            yield number
        yield from (new for old, new in along if old == number != new)
        yield from (new for old, new in self.made if old == number != new)
        for run in self._runs():
            old, new = (math.prod(sizes) for sizes in zip(*run, strict=True))
            if old == number != new and len(run) > 1:
                yield new
        yield number

    def _of_several(self, numbers: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
        runs = [tuple(zip(*run, strict=True)) for run in self._runs()]
        yield from (new for old, new in runs if old == numbers != new)
        if (numbers, numbers) not in runs:
            yield from itertools.islice(itertools.product(*map(self._of_one, numbers)), 8)
        yield numbers

    def _runs(self) -> Iterable[Sequence[Pair]]:
        """Sizes side by side in one leaf, however many."""
        for shape in self.shapes:
            for start, stop in itertools.combinations(range(len(shape) + 1), 2):
                yield shape[start:stop]


def axes_made(walk: Walk) -> list[Ids]:
    """Roots along every axis of channels of every array that a program makes, each once; for `Widths`.

    Args:
        walk: of the program.
    """
    found: dict[Any, Ids] = {}
    for axes in walk.axes.values():
        for ids in axes:
            if len(ids) and ids[0]:
                roots = walk.units.roots(ids)
                found.setdefault(roots.tobytes(), roots)
    return list(found.values())
