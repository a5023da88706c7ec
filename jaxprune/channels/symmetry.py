"""Channels alike: those that a function treats the same, so that they may change places.

    a, b = split(x);  y = concatenate(relu(a), tanh(b))      those of a are alike, those of b, but not one with another

Channels that can be removed need not be alike. Here every index along an axis is (unit, slot), slots counting the
indices of its unit there. An operation that moves indices treats two units the same if it moves the same slots to the
same slots; one that goes index by index treats all the same. Numbers in the function (an `iota`, a constant vector)
tell units apart that meet other numbers.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import Int

from jaxprune.channels.union_find import AxisUnits, Ids, Units
from jaxprune.checks import is_concrete
from jaxprune.tracing.operations import merged_axes

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
        rule = _RULES.get(eqn.primitive.name)
        if rule is not None:
            rule(self, eqn, given, results)

    def moved(self, before: Ids, after: Ids, source: Ids) -> None:
        """An axis whose indices come from another.

        Args:
            before: units of that other axis.
            after: units of the axis.
            source: for each index where it comes from; -1 from nowhere.
        """
        slots = np.append(self.slots(before), -1)
        self.part(after, np.stack([self.slots(after), slots[source]], 1))


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


def _iota(alike: Symmetry, eqn: JaxprEqn, given: list[AxisUnits], results: list[AxisUnits]) -> None:
    ids = results[0][eqn.params["dimension"]]
    alike.part(ids, np.arange(len(ids))[:, None])


def _slice(alike: Symmetry, eqn: JaxprEqn, given: list[AxisUnits], results: list[AxisUnits]) -> None:
    start, stop, step = (eqn.params[word] for word in ("start_indices", "limit_indices", "strides"))
    for axis, (before, after) in enumerate(zip(given[0], results[0], strict=True)):
        alike.moved(before, after, np.arange(start[axis], stop[axis], step[axis] if step else 1))


def _split(alike: Symmetry, eqn: JaxprEqn, given: list[AxisUnits], results: list[AxisUnits]) -> None:
    axis, start = eqn.params["axis"], 0
    for part in results:
        alike.moved(given[0][axis], part[axis], start + np.arange(len(part[axis])))
        start += len(part[axis])


def _tile(alike: Symmetry, eqn: JaxprEqn, given: list[AxisUnits], results: list[AxisUnits]) -> None:
    for before, after in zip(given[0], results[0], strict=True):
        alike.moved(before, after, np.arange(len(after)) % max(len(before), 1))


def _concatenate(alike: Symmetry, eqn: JaxprEqn, given: list[AxisUnits], results: list[AxisUnits]) -> None:
    axis, start = eqn.params["dimension"], 0
    for axes in given:
        before, after = axes[axis], results[0][axis]
        source = np.arange(len(after)) - start
        alike.moved(before, after, np.where((source >= 0) & (source < len(before)), source, -1))
        start += len(before)


def _pad(alike: Symmetry, eqn: JaxprEqn, given: list[AxisUnits], results: list[AxisUnits]) -> None:
    for axis, (before, after) in enumerate(zip(given[0], results[0], strict=True)):
        source = np.arange(len(after)) - eqn.params["padding_config"][axis][0]
        alike.moved(before, after, np.where((source >= 0) & (source < len(before)), source, -1))


def _rev(alike: Symmetry, eqn: JaxprEqn, given: list[AxisUnits], results: list[AxisUnits]) -> None:
    for axis in eqn.params["dimensions"]:
        alike.moved(given[0][axis], results[0][axis], np.arange(len(given[0][axis]))[::-1])


def _reshape(alike: Symmetry, eqn: JaxprEqn, given: list[AxisUnits], results: list[AxisUnits]) -> None:
    """Every place is (slot, place on the other axes) before and after."""
    old, new = (tuple(map(len, axes)) for axes in (given[0], results[0]))
    if eqn.params["dimensions"] is not None or 0 in old:
        return
    for olds, news in merged_axes(old, new):
        if len(olds) > 1 or len(news) > 1:
            before, facts = alike.places(tuple(given[0][axis] for axis in olds))
            after, more = alike.places(tuple(results[0][axis] for axis in news))
            for ids in (before, after):
                alike.part(ids, np.concatenate([facts, more], 1))


def _gather(alike: Symmetry, eqn: JaxprEqn, given: list[AxisUnits], results: list[AxisUnits]) -> None:
    for axis in eqn.params["dimension_numbers"].start_indices_batching_dims:
        alike.part(given[1][axis], np.arange(len(given[1][axis]))[:, None])  # their rows of the table stay


_RULES: Mapping[str, Callable[[Symmetry, JaxprEqn, list[AxisUnits], list[AxisUnits]], None]] = {
    "iota": _iota, "slice": _slice, "split": _split, "tile": _tile, "concatenate": _concatenate, "pad": _pad,
    "rev": _rev, "reshape": _reshape, "gather": _gather,
}  # fmt: skip
