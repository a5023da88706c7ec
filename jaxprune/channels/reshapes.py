"""Reshapes: how channels are merged with other axes and cut out of them again.

(n, h, w, c) -> (n, h * w * c)      a channel becomes a run of inputs
(n, t, heads * dim) -> (n, t, heads, dim)      a head is a run of channels, which go together
(n, t, 3 * heads * dim) -> (n, t, 3, heads, dim)      a head is three runs, here the channels are along the second axis
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune.channels.union_find import AxisUnits, Ids, Units, fixed_axes, without
from jaxprune.tracing.operations import merged_axes

Choose = Callable[[str, Sequence[int], Mapping[int, tuple[bool, Ids]]], int]


def reshape(units: Units, eqn: Any, given: list[AxisUnits], choose: Choose) -> list[AxisUnits]:
    """Units of an array of another shape; those of a merged axis are those of one of its parts.

    Args:
        units: of the program.
        eqn: the reshape.
        given: units of its operand's axes.
        choose: says along which axis channels lie, see `jaxprune.channels.choices.Choices.pick`.
    """
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.params["dimensions"] is not None or 0 in old:
        for ids in given[0]:
            units.fix(ids, "a reshape that cannot be followed")
        return [fixed_axes(new)]
    result = list(fixed_axes(new))
    without(units, given[0], [axis for axis, size in enumerate(old) if size == 1])
    for olds, news in merged_axes(old, new):
        merged = _merged(units, [given[0][axis] for axis in olds], choose)
        for axis, ids in zip(news, _parted(units, merged, [new[axis] for axis in news], choose), strict=True):
            result[axis] = ids
    return [tuple(result)]


def _merged(units: Units, axes: list[Ids], choose: Choose) -> Ids:
    """Units of one axis made of several: those of one that belong to leaves; the others must stay."""
    if len(axes) == 1:
        return axes[0]
    shape = [len(ids) for ids in axes]
    live = [i for i, ids in enumerate(axes) if (units.of_leaf(ids) & ~units.fixed(ids)).any()]
    if len(live) > 1:
        gone = {i for i in live if units.gone(axes[i]).any()}
        live = [choose("merged", shape, {i: (gone <= {i}, axes[i]) for i in live})]
    for i, ids in enumerate(axes):
        if i not in live:
            units.fix(ids, "merged with another axis of channels")
    if not live:
        return np.zeros(math.prod(shape), np.int64)
    place = [1] * len(shape)
    place[live[0]] = -1
    return np.broadcast_to(axes[live[0]].reshape(place), shape).reshape(-1)


def _parted(units: Units, merged: Ids, shape: list[int], choose: Choose) -> list[Ids]:
    """Units of the axes that one is cut into: of the one along which they differ; else the rows of one go whole."""
    if len(shape) == 1:
        return [merged]
    result = list(fixed_axes(shape))
    whole = units.roots(merged).reshape(shape)
    for axis in range(len(shape)):
        along = np.moveaxis(whole, axis, 0).reshape(shape[axis], -1)
        if np.all(along == along[:, :1]):
            result[axis] = np.moveaxis(merged.reshape(shape), axis, 0).reshape(shape[axis], -1)[:, 0]
            return result
    rows = [np.moveaxis(merged.reshape(shape), axis, 0).reshape(size, -1) for axis, size in enumerate(shape)]
    free = [axis for axis, of_axis in enumerate(rows) if (~_of_each(units.fixed, of_axis)).all(1).any()]
    axis = free[0] if free else 0
    if len(free) > 1:
        gone = {axis: _of_each(units.gone, rows[axis]) for axis in free}
        axis = choose("cut", shape, {a: (bool((each == each[:, :1]).all()), merged) for a, each in gone.items()})
    first, others = rows[axis][:, :1], rows[axis][:, 1:]
    units.unite(
        np.broadcast_to(first, others.shape).reshape(-1), others.reshape(-1), "cut into rows one of which must stay"
    )
    result[axis] = first[:, 0]
    return result


def _of_each(ask: Callable[[Ids], Any], rows: Any) -> Any:
    return ask(rows.reshape(-1)).reshape(rows.shape)
