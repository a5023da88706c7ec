"""What an operation does with units: which axes of its operands and results have the same, and which must stay.

    rule : (units, equation, units of its operands' axes) -> units of its results' axes

One rule for each kind of operation; an operation without a rule is a barrier (`jaxprune.channels.coupling`). Axes that
an operation merely passes on keep their units, those that it looks along (a maximum, a window, a sort) are fixed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from jaxprune.channels.union_find import AxisUnits, Ids, Units, fixed_axes, without
from jaxprune.tracing.operations import ELEMENTWISE, IDENTITIES, MOVES, moves

Rule = Callable[[Units, JaxprEqn, list[AxisUnits]], list[AxisUnits]]


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(var.aval.shape)


def elementwise(units: Units, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
    """Corresponding indices of all operands are the same."""
    return [_united(units, eqn.primitive.name, given, _shape(eqn.outvars[0]))] * len(eqn.outvars)


def _united(units: Units, name: str, given: list[AxisUnits], shape: tuple[int, ...]) -> AxisUnits:
    result: list[Ids | None] = [None] * len(shape)
    for axes in (axes for axes in given if len(axes) == len(shape)):
        without(units, axes, [axis for axis, size in enumerate(shape) if size != len(axes[axis])])
        for axis, ids in enumerate(axes):
            so_far = result[axis]
            if len(ids) == shape[axis]:
                reason = f"{name} with an array whose channels must stay"
                result[axis] = ids if so_far is None else units.unite(so_far, ids, reason)
    return tuple(units.fresh(size) if ids is None else ids for ids, size in zip(result, shape, strict=True))


def _broadcast_in_dim(units: Units, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    source = dict(zip(places, given[0], strict=True))
    without(units, given[0], [i for i, axis in enumerate(places) if len(given[0][i]) != shape[axis]])
    return [
        tuple(
            source[axis] if axis in source and len(source[axis]) == size else units.fresh(size)
            for axis, size in enumerate(shape)
        )
    ]


def _dot_general(units: Units, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
    (l_sum, r_sum), (l_batch, r_batch) = eqn.params["dimension_numbers"]
    lhs, rhs = given
    for a, b in zip(l_sum, r_sum, strict=True):
        units.unite(lhs[a], rhs[b], "a product sums over channels that must stay")
    batch = [
        units.unite(lhs[a], rhs[b], "a product over channels that must stay")
        for a, b in zip(l_batch, r_batch, strict=True)
    ]
    rest = [ids for axis, ids in enumerate(lhs) if axis not in (*l_sum, *l_batch)]
    rest += [ids for axis, ids in enumerate(rhs) if axis not in (*r_sum, *r_batch)]
    return [(*batch, *rest)]


def _conv(units: Units, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    lhs, rhs = given
    if eqn.params["batch_group_count"] != 1:
        return barrier(units, eqn, given)
    (l_batch, l_in, *l_pixels), (r_out, r_in, *r_pixels) = numbers.lhs_spec, numbers.rhs_spec
    for ids in [*(lhs[axis] for axis in l_pixels), *(rhs[axis] for axis in r_pixels)]:
        units.fix(ids, "it is an axis of pixels")
    outputs = rhs[r_out]
    if groups == 1:
        units.unite(lhs[l_in], rhs[r_in], "a convolution reads channels that must stay")
    else:  # a group goes as one, all it reads and all it makes
        inputs, outputs = lhs[l_in].reshape(groups, -1), outputs.reshape(groups, -1)
        units.fix(rhs[r_in], "the groups of a convolution are of equal size")
        reason = "a convolution in groups reads channels that must stay"
        first = inputs[:, 0]
        for column in (*inputs.T[1:], *outputs.T):
            units.unite(first, column, reason)
        outputs = outputs.reshape(-1)
    y_axes = numbers.out_spec
    result = list(fixed_axes(_shape(eqn.outvars[0])))
    result[y_axes[0]], result[y_axes[1]] = lhs[l_batch], outputs
    return [tuple(result)]


def _reduce(units: Units, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
    """Reduced axes must stay: a sum is often a mean, which divides by their size."""
    gone = set(eqn.params["axes"])
    for axis in gone:
        units.fix(given[0][axis], f"{eqn.primitive.name} over channels")
    return [tuple(ids for axis, ids in enumerate(given[0]) if axis not in gone)] * len(eqn.outvars)


def _along(parameter: str) -> Rule:
    """A rule for what looks along one axis and keeps all shapes."""

    def rule(units: Units, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
        for axes in given:
            units.fix(axes[eqn.params[parameter]], f"{eqn.primitive.name} along channels")
        return elementwise(units, eqn, given)

    return rule


def _window(units: Units, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
    result = list(given[0])
    for axis, size in enumerate(_shape(eqn.outvars[0])):
        if eqn.params["window_dimensions"][axis] != 1 or size != len(result[axis]):
            units.fix(result[axis], f"{eqn.primitive.name} over an axis of pixels")
            result[axis] = np.zeros(size, np.int64)
    return [tuple(result)]


def _stack(units: Units, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
    result = _united(units, "stack", given, _shape(eqn.invars[0]))
    axis = eqn.params["axis"]
    return [(*result[:axis], np.zeros(len(given), np.int64), *result[axis:])]


def _unstack(units: Units, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
    axis = eqn.params["axis"]
    units.fix(given[0][axis], "it is taken apart")
    return [tuple(ids for a, ids in enumerate(given[0]) if a != axis)] * len(eqn.outvars)


def _move(units: Units, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
    """Operands side by side along one axis, if there are several; then their indices where they go."""
    whole = list(given[0])
    if eqn.primitive.name == "concatenate":
        along = eqn.params["dimension"]
        for axes in given[1:]:
            for axis, ids in enumerate(axes):
                if axis != along:
                    whole[axis] = units.unite(whole[axis], ids, "concatenated with an array whose channels must stay")
        whole[along] = np.concatenate([axes[along] for axes in given])
    results = []
    for moved in moves(eqn):
        result = list(whole)
        for axis, sources in moved.items():
            low, high, inside = eqn.params["padding_config"][axis] if eqn.primitive.name == "pad" else (0, 0, 0)
            if min(low, high) < 0 or inside:
                units.fix(whole[axis], "padding between channels, or less than none")
                result[axis] = np.zeros(len(sources), np.int64)
            else:
                result[axis] = np.append(whole[axis], 0)[sources]
                result[axis][sources < 0] = np.concatenate([units.fresh(int(low)), units.fresh(int(high))])
        results.append(tuple(result))
    return results


def _cut(units: Units, eqn: JaxprEqn, axes: AxisUnits, sizes: Sequence[int]) -> AxisUnits:
    """Axes of which a part is taken, nobody knows which."""
    result = list(axes)
    for axis, size in enumerate(sizes):
        if size != len(axes[axis]):
            units.fix(axes[axis], f"{eqn.primitive.name} takes some of its channels")
            result[axis] = np.zeros(size, np.int64)
    return tuple(result)


def _dynamic_update_slice(units: Units, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
    whole, part = given[:2]
    result = list(whole)
    for axis, (a, b) in enumerate(zip(whole, part, strict=True)):
        if len(a) == len(b):
            result[axis] = units.unite(a, b, "written over an array whose channels must stay")
        else:
            units.fix(a, "written over in part")
            units.fix(b, "written over a part")
    return [tuple(result)]


def _gather(units: Units, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table, indices = given
    units.fix(indices[-1], "it is an axis of indices")
    kept = _cut(units, eqn, table, sizes)
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    for axis in gone:
        units.fix(table[axis], "its rows are looked up by index")
    offsets = iter(ids for axis, ids in enumerate(kept) if axis not in gone)
    batch = iter(indices[:-1])
    rank = len(_shape(eqn.outvars[0]))
    return [tuple(next(offsets) if axis in numbers.offset_dims else next(batch) for axis in range(rank))]


def barrier(units: Units, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
    """Everything that goes in must stay, and nothing is known of what comes out."""
    for ids in (ids for axes in given for ids in axes):
        units.fix(ids, f"{eqn.primitive.name} cannot be followed")
    return [fixed_axes(_shape(var)) for var in eqn.outvars]


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(IDENTITIES, lambda units, eqn, given: given),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")),
    "sort": _along("dimension"),
    **{f"reduce_window{kind}": _window for kind in ("", "_sum", "_max", "_min")},
    "transpose": lambda units, eqn, given: [tuple(given[0][axis] for axis in eqn.params["permutation"])],
    "squeeze": lambda units, eqn, given: [without(units, given[0], eqn.params["dimensions"])],
    "broadcast_in_dim": _broadcast_in_dim,
    "iota": lambda units, eqn, given: [tuple(map(units.fresh, _shape(eqn.outvars[0])))],
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    **dict.fromkeys(MOVES, _move),
    "stack": _stack,
    "unstack": _unstack,
    "dynamic_slice": lambda units, eqn, given: [_cut(units, eqn, given[0], eqn.params["slice_sizes"])],
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    **dict.fromkeys(("random_bits", "random_seed", "random_wrap", "random_unwrap", "random_fold_in"), barrier),
    **dict.fromkeys(("random_split", "rng_bit_generator", "threefry2x32", "dim_as_value"), barrier),
}
"""Operations whose effect on channels is known, besides loops, branches and reshapes; all others are named barriers."""
