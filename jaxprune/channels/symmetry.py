"""Channels alike: those that a function treats the same, so that they may change places.

    a, b = split(x);  y = concatenate(relu(a), tanh(b))      those of a are alike, those of b, but not one with another

Channels that can be removed need not be alike. Here every index along an axis is (unit, slot), slots counting the
indices of its unit there. An operation that moves indices treats two units the same if it moves the same slots to the
same slots; one that goes index by index treats all the same. Numbers in the function (an `iota`, a constant vector)
tell units apart that meet other numbers.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import Int

from jaxprune.channels.union_find import AxisUnits, Ids, Units
from jaxprune.checks import is_concrete
from jaxprune.tracing.operations import MOVES, Sources, merged_axes, moves

Facts = Int[np.ndarray, "indices facts"]


class Symmetry:
    """Units parted by all that tells them apart.

    Attributes:
        classes: of each unit, told at roots alone; units of one class are alike so far.
    """

    def __init__(self, units: Units) -> None:
        self._units = units
        self.classes = np.zeros(units.count, np.int64)
        self._next = 1

    def part(self, ids: Ids, facts: Facts) -> None:
        """Tells units apart by what is known of their indices along an axis, in the order of the axis.

        Args:
            ids: units of the axis.
            facts: of each index.
        """
        free = np.flatnonzero(~self._units.fixed(ids))
        roots = self._units.roots(ids[free])
        order = np.argsort(roots, kind="stable")
        found, first = np.unique(roots[order], return_index=True)
        told = facts[free[order]]
        if len(found) < len(free):
            told = _numbers(each.tobytes() for each in np.split(told, first[1:]))[:, None]
        if len(found):
            known = np.concatenate([self.classes[found][:, None], told], 1)
            kinds, kind = np.unique(known, axis=0, return_inverse=True)
            self.classes[found] = self._next + kind.reshape(-1)
            self._next += len(kinds)

    def slots(self, ids: Ids) -> Ids:
        """For each index how many of its unit come before it."""
        return slots(self._units.roots(ids))

    def places(self, axes: AxisUnits) -> tuple[Ids, Facts]:
        """Axes merged to one, of which one at most has units that need not stay: its units, and the index along each.

        Args:
            axes: before they are merged.
        """
        shape = tuple(map(len, axes))
        live = [axis for axis, ids in enumerate(axes) if not self._units.fixed(ids).all()]
        if not live:
            return np.zeros(int(np.prod(shape)), np.int64), np.zeros((int(np.prod(shape)), 0), np.int64)
        facts = np.indices(shape).reshape(len(shape), -1).T.copy()
        units = axes[live[0]][facts[:, live[0]]]
        facts[:, live[0]] = self.slots(axes[live[0]])[facts[:, live[0]]]
        return units, facts

    def axis(self, ids: Ids) -> None:
        """An axis made out of nothing, which tells units apart by how often they are in it."""
        self.part(ids, np.zeros((len(ids), 1), np.int64))

    def constant(self, axes: AxisUnits, value: Any) -> None:
        """An array that the function holds: units that meet other numbers are not alike."""
        for axis, ids in enumerate(axes):
            self.part(ids, _numbered(value, axis, len(ids))[:, None])

    def step(self, eqn: JaxprEqn, given: list[AxisUnits], results: list[AxisUnits]) -> None:
        """An operation, if it does not go index by index.

        Args:
            eqn: the operation.
            given: units of its operands' axes.
            results: units of its results' axes.
        """
        name, params = eqn.primitive.name, eqn.params
        if name in MOVES:
            for result, moved in zip(results, moves(eqn), strict=True):
                operands = [axes for axes in given if len(axes) == len(result)]
                for axis, sources in moved.items():
                    self._moved([axes[axis] for axes in operands], result[axis], sources)
        elif name == "reshape" and params["dimensions"] is None:
            self._reshaped(given[0], results[0])
        elif name == "iota":
            ids = results[0][params["dimension"]]
            self.part(ids, np.arange(len(ids))[:, None])
        elif name == "gather":
            for axis in params["dimension_numbers"].start_indices_batching_dims:
                self.part(given[1][axis], np.arange(len(given[1][axis]))[:, None])  # their rows of the table stay

    def _moved(self, operands: list[Ids], after: Ids, sources: Sources) -> None:
        """An axis whose indices come from those of other axes, side by side."""
        start = 0
        for before in operands:
            here = (sources >= start) & (sources < start + len(before))
            slots = np.append(self.slots(before), -1)[np.where(here, sources - start, -1)]
            self.part(after, np.stack([self.slots(after), slots], 1))
            start += len(before)

    def _reshaped(self, given: AxisUnits, result: AxisUnits) -> None:
        """Every place is (slot, place on the other axes) before and after."""
        old, new = tuple(map(len, given)), tuple(map(len, result))
        for olds, news in merged_axes(old, new) if 0 not in old else ():
            if len(olds) > 1 or len(news) > 1:
                before, facts = self.places(tuple(given[axis] for axis in olds))
                after, more = self.places(tuple(result[axis] for axis in news))
                for ids in (before, after):
                    self.part(ids, np.concatenate([facts, more], 1))


def slots(ids: Ids) -> Ids:
    """For each index how many of equal number come before it.

    Args:
        ids: numbers along an axis.
    """
    order = np.argsort(ids, kind="stable")
    _, first, sizes = np.unique(ids[order], return_index=True, return_counts=True)
    found = np.empty(len(ids), np.int64)
    found[order] = np.arange(len(ids)) - np.repeat(first, sizes)
    return found


def _numbers(keys: Iterable[bytes]) -> Ids:
    """Equal numbers for equal keys."""
    found: dict[bytes, int] = {}
    return np.asarray([found.setdefault(key, len(found)) for key in keys], np.int64)


def _numbered(value: Any, axis: int, size: int) -> Ids:
    """Equal numbers for equal slices; all apart where the values are not known."""
    if not is_concrete(value) or jnp.issubdtype(value.dtype, jax.dtypes.extended) or not value.size:
        return np.arange(size)
    return _numbers(each.tobytes() for each in np.moveaxis(np.asarray(value), axis, 0))
