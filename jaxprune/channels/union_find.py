"""Units: indices along axes that live or die together, kept apart by union-find.

Every axis of every array in a model has one number per index, its unit:

    kernel (3, 3, 16, 32)  ->  units of (0, 0, 0), (0, 0, 0), (41 ... 56), (57 ... 88)

Two indices of one unit are removed together or not at all. `unite` says that two are the same, `fix` that one must
stay, with the reason. Unit 0 is for what nobody thinks of removing: batches, pixels, positions in a text.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

Ids = Int[np.ndarray, " _"]
AxisUnits = tuple[Ids, ...]
"""Units of every axis of an array."""
OF_LEAF, GONE = np.uint8(1), np.uint8(2)


class Units:
    """A growing set of units, all of them apart at first.

    Attributes:
        axes: first unit and size of every axis that units were made for.

    Reference:
        Tarjan 1975, Efficiency of a good but not linear set union algorithm; here over whole axes at once.
    """

    def __init__(self) -> None:
        self.axes: list[tuple[int, int]] = []
        self._parent = np.zeros(1, np.int64)
        self._why = np.ones(1, np.int32)  # of a root: which of `_reasons` keeps it, 0 for none
        self._marks = np.zeros(1, np.uint8)  # of a root: whether it is of a leaf, and whether it is removed
        self._reasons = ["", "it is no axis of channels"]
        self._count = 1

    @property
    def count(self) -> int:
        """How many units were made; they are numbered below."""
        return self._count

    def fresh(self, size: int, *, of_leaf: bool = False, gone: Sequence[int] = ()) -> Ids:
        """Units of a new axis.

        Args:
            size: of the axis.
            of_leaf: whether it is the axis of a leaf, and not one that an operation made.
            gone: indices that are known to be removed.
        """
        self.axes.append((self._count, size))
        ids = np.arange(self._count, self._count + size)
        self._count += size
        while self._count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), 2 * len(self._parent))])
            self._why = np.concatenate([self._why, np.zeros_like(self._why)])
            self._marks = np.concatenate([self._marks, np.zeros_like(self._marks)])
        self._marks[ids] = OF_LEAF * of_leaf
        self._marks[ids[list(gone)]] |= GONE
        return ids

    def roots(self, ids: Ids) -> Ids:
        """The same number for all indices of one unit."""
        while True:
            above = self._parent[ids]
            if np.array_equal(above, ids):
                return ids
            ids = self._parent[above]

    def unite(self, a: Ids, b: Ids, reason: str) -> Ids:
        """Makes a[i] and b[i] one unit; where either is 0 the other must stay, for this reason.

        Returns:
            Units of the axis that both are now.
        """
        if a is b:
            return a
        self.fix(np.where(a == 0, b, 0), reason)
        self.fix(np.where(b == 0, a, 0), reason)
        both = (a != 0) & (b != 0)
        a_both, b_both = a[both], b[both]
        while True:
            low, high = self.roots(a_both), self.roots(b_both)
            low, high = np.minimum(low, high), np.maximum(low, high)
            apart = low != high
            if not apart.any():
                return np.where(a == 0, 0, np.where(b == 0, 0, a))
            a_both, b_both, low, high = a_both[apart], b_both[apart], low[apart], high[apart]
            np.minimum.at(self._parent, high, low)
            # A root that lost its place hands on what is known of it, wherever its new root lies by now.
            now = self.roots(high)
            np.bitwise_or.at(self._marks, now, self._marks[high])
            free = self._why[now] == 0
            np.maximum.at(self._why, now[free], self._why[high[free]])

    def fix(self, ids: Ids, reason: str) -> None:
        """Has these units stay; the first reason counts."""
        roots = self.roots(ids)
        roots = roots[self._why[roots] == 0]
        if len(roots):
            if reason not in self._reasons:
                self._reasons.append(reason)
            self._why[roots] = self._reasons.index(reason)

    def fixed(self, ids: Ids) -> Bool[np.ndarray, " _"]:
        """Which of these must stay."""
        return self._why[self.roots(ids)] != 0

    def all_fixed(self) -> Bool[np.ndarray, " units"]:
        """For every unit whether it must stay, told at roots alone."""
        return self._why[: self._count] != 0

    def of_leaf(self, ids: Ids) -> Bool[np.ndarray, " _"]:
        """Which of these are indices of some leaf."""
        return (self._marks[self.roots(ids)] & OF_LEAF) != 0

    def gone(self, ids: Ids) -> Bool[np.ndarray, " _"]:
        """Which of these are known to be removed."""
        return (self._marks[self.roots(ids)] & GONE) != 0

    def why(self, unit: int) -> str:
        """Why this one must stay; "" if it need not."""
        return self._reasons[self._why[self.roots(np.asarray([unit]))[0]]]


def fixed_axes(shape: Sequence[int]) -> AxisUnits:
    """Axes that nobody thinks of removing anything from."""
    return tuple(np.zeros(size, np.int64) for size in shape)


def without(units: Units, axes: AxisUnits, gone: Sequence[int]) -> AxisUnits:
    """The axes but for some of size one, whose only index must stay then."""
    for axis in gone:
        units.fix(axes[axis], "it is the only channel")
    return tuple(ids for axis, ids in enumerate(axes) if axis not in gone)
