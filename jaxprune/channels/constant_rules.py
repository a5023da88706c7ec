"""What an operation makes of what is known of its operands.

    rule : (equation, what is known of its operands) -> what is known of its results, or None for nothing

Arrays are kept small: an axis along which nothing changes has size 1. Zero times anything is zero here, infinities and
NaN left aside.
"""

import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Shaped

from jaxprune import tree
from jaxprune.tracing.inlined import bind
from jaxprune.tracing.operations import MOVES, Sources, merged_axes, moves


class Known(NamedTuple):
    """What is known of an array: every axis is as long as the array's, or 1 where all is the same along it.

    Attributes:
        value: the numbers, anything where they are not known.
        known: whether they are, of the same shape.
    """

    value: Shaped[np.ndarray, "..."]
    known: Bool[np.ndarray, "..."]

    @property
    def zero(self) -> Bool[np.ndarray, "..."]:
        """Where it is known to be zero."""
        return np.asarray(self.known & (self.value == 0))


def nothing(aval: Any) -> Known:
    """An array, of this shape, of which nothing is known."""
    ones = (1,) * len(aval.shape)
    return Known(np.zeros(ones, np.float32 if tree.is_key(aval) else aval.dtype), np.zeros(ones, bool))


def all_of(value: Any) -> Known:
    """An array that is known; nothing of keys, which are no numbers."""
    if tree.is_key(value):
        return nothing(value)
    return Known(np.asarray(value), np.ones(np.shape(value), bool))


def exact(array: Any) -> Any:
    """The same numbers in a dtype of their kind that NumPy sums well in: whole numbers in 64 bits, as they wrap."""
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(np.int64)
    wide = array.dtype.itemsize > (8 if jnp.issubdtype(array.dtype, jnp.complexfloating) else 4)
    kind = np.complex64 if jnp.issubdtype(array.dtype, jnp.complexfloating) else np.float32
    return array if wide else array.astype(kind)


def in_all(several: Sequence[Known]) -> Known:
    """What is known, and the same, in all."""
    first, *others = several
    for other in others:
        value, more = np.broadcast_arrays(first.value, other.value)
        known, also = np.broadcast_arrays(first.known, other.known)
        first = Known(value, known & also & (value == more))
    return first


def elementwise(eqn: Any, given: list[Known]) -> Known:
    """Corresponding numbers, known where all operands are, or where a product has a zero."""
    rank = len(eqn.outvars[0].aval.shape)
    dtypes = [atom.aval.dtype for atom in eqn.invars]
    if not any(one.known.any() for one in given) or any(map(tree.is_key, (atom.aval for atom in eqn.invars))):
        return nothing(eqn.outvars[0].aval)
    shape = np.broadcast_shapes((1,) * rank, *(one.value.shape for one in given))
    full = [Known(*(np.broadcast_to(part, shape) for part in one)) for one in given]
    values = [one.value.astype(dtype) for one, dtype in zip(full, dtypes, strict=True)]
    name = eqn.primitive.name
    with np.errstate(all="ignore"):  # where nothing is known anything may stand
        if name in _IN_NUMPY:
            value = _IN_NUMPY[name](*values)
        else:
            value = np.asarray(bind(eqn, list(map(jnp.asarray, values)), dict(eqn.params))[0])
    known = np.logical_and.reduce([one.known for one in full])
    zero = np.zeros(shape, bool)
    if name in ("mul", "and"):
        zero = np.logical_or.reduce([one.zero for one in full])
    elif name == "div":
        zero = full[0].zero
    return Known(np.where(zero, np.zeros((), value.dtype), value), np.asarray(known | zero))


def _along(array: Any, axis: int, size: int) -> Any:
    """The array with its full size along one axis."""
    shape = list(array.shape)
    shape[axis] = size
    return np.broadcast_to(array, shape)


def _mapped(of_array: Callable[[Any, Any], Any]) -> Any:
    """A rule for what moves numbers, and treats values and what is known of them alike."""
    return lambda eqn, given: [Known(*(of_array(eqn, part) for part in given[0]))]


def _reshape(eqn: Any, array: Any) -> Any:
    """Runs of axes along which nothing changes stay of size one."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if 0 in old:
        return np.broadcast_to(array, old).reshape(new)
    result = [1] * len(new)
    for olds, news in merged_axes(old, new):
        if any(array.shape[axis] != 1 for axis in olds):
            for axis in olds:
                array = _along(array, axis, old[axis])
            for axis in news:
                result[axis] = new[axis]
    return array.reshape(result)


def _broadcast(eqn: Any, array: Any) -> Any:
    shape = [1] * len(eqn.params["shape"])
    for axis, size in zip(eqn.params["broadcast_dimensions"], array.shape, strict=True):
        shape[axis] = size
    return array.reshape(shape)


def _dynamic_slice(eqn: Any, given: list[Known]) -> list[Known] | None:
    whole = eqn.invars[0].aval.shape
    cut = [a for a, (size, left) in enumerate(zip(whole, eqn.params["slice_sizes"], strict=True)) if size != left]
    return [given[0]] if all(given[0].value.shape[axis] == 1 for axis in cut) else None


def _concatenate(eqn: Any, given: list[Known]) -> list[Known]:
    axis = eqn.params["dimension"]
    shape = np.broadcast_shapes(*(tuple(np.delete(one.value.shape, axis)) for one in given))
    shapes = [(*shape[:axis], atom.aval.shape[axis], *shape[axis:]) for atom in eqn.invars]
    parts = zip(*given, strict=True)
    return [Known(*(np.concatenate(list(map(np.broadcast_to, part, shapes)), axis) for part in parts))]


def _move(eqn: Any, given: list[Known]) -> list[Known]:
    """Indices where they go; an axis along which nothing changes stays of size one, if nothing else comes there."""
    filler = given[1] if eqn.primitive.name == "pad" else (0, False)
    results = []
    for moved in moves(eqn):
        one = given[0]
        for axis, sources in moved.items():
            if one.value.shape[axis] != 1 or (sources < 0).any():
                size = eqn.invars[0].aval.shape[axis]
                parts = zip(one, filler, strict=True)
                one = Known(*(_taken(_along(part, axis, size), axis, sources, fill) for part, fill in parts))
        results.append(one)
    return results


def _taken(array: Any, axis: int, sources: Sources, fill: Any) -> Any:
    shape = [1 if a == axis else size for a, size in enumerate(array.shape)]
    return np.concatenate([array, np.full(shape, fill, array.dtype)], axis).take(sources, axis)


def _gather(eqn: Any, given: list[Known]) -> list[Known] | None:
    """Rows looked up in a table, known where all rows are the same."""
    numbers, table = eqn.params["dimension_numbers"], given[0]
    sizes = eqn.params["slice_sizes"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    for axis, (size, whole) in enumerate(zip(sizes, eqn.invars[0].aval.shape, strict=True)):
        if size != whole or axis in gone:
            along = np.moveaxis(table.value, axis, 0), np.moveaxis(table.known, axis, 0)
            one = in_all([Known(v, k) for v, k in zip(*along, strict=True)])
            table = Known(np.expand_dims(one.value, axis), np.expand_dims(one.known, axis))
    shape = [1] * len(eqn.outvars[0].aval.shape)
    kept = [size for axis, size in enumerate(table.value.shape) if axis not in gone]
    for axis, size in zip(numbers.offset_dims, kept, strict=True):
        shape[axis] = size
    return [Known(table.value.reshape(shape), table.known.reshape(shape))]


def _reduce(eqn: Any, given: list[Known]) -> list[Known]:
    (value, known), gone = given[0], tuple(eqn.params["axes"])
    if eqn.primitive.name == "reduce_sum":
        times = math.prod(eqn.invars[0].aval.shape[axis] for axis in gone if value.shape[axis] == 1)
        value = (value * np.asarray(times, value.dtype)).sum(gone, dtype=value.dtype)
    else:
        value = (np.max if eqn.primitive.name == "reduce_max" else np.min)(value, gone)
    return [Known(value, np.asarray(known.all(gone)))]


def _window(eqn: Any, given: list[Known]) -> list[Known] | None:
    """Pools of pixels that are all the same."""
    value, known = given[0]
    sizes = eqn.params["window_dimensions"]
    if any(n != 1 and size != 1 for n, size in zip(value.shape, sizes, strict=True)):
        return None
    if eqn.primitive.name == "reduce_window_sum":
        if any(map(any, eqn.params["padding"])):  # windows at the border see fewer pixels
            known = known & (value == 0)
        value = value * np.asarray(math.prod(sizes), value.dtype)
    return [Known(value, known)]


def _dot_general(eqn: Any, given: list[Known]) -> list[Known]:
    (l_sum, r_sum), (l_batch, r_batch) = eqn.params["dimension_numbers"]
    lhs, rhs = given
    for a, b in zip((*l_sum, *l_batch), (*r_sum, *r_batch), strict=True):
        size = eqn.invars[0].aval.shape[a] if a in l_sum else max(lhs.value.shape[a], rhs.value.shape[b])
        lhs = Known(*(_along(part, a, size) for part in lhs))
        rhs = Known(*(_along(part, b, size) for part in rhs))
    left = [*string.ascii_lowercase[: lhs.value.ndim]]
    right = [*string.ascii_uppercase[: rhs.value.ndim]]
    for a, b in zip((*l_sum, *l_batch), (*r_sum, *r_batch), strict=True):
        right[b] = left[a]
    out = [left[a] for a in l_batch]
    out += [x for a, x in enumerate(left) if a not in (*l_sum, *l_batch)]
    out += [x for b, x in enumerate(right) if b not in (*r_sum, *r_batch)]
    return [_product(lhs, rhs, f"{''.join(left)},{''.join(right)}->{''.join(out)}", eqn.outvars[0].aval.dtype)]


def _product(lhs: Known, rhs: Known, sums: str, dtype: Any, *, zeros_alone: bool = False) -> Known:
    """Sums of products, known where every product is: both factors are, or one is zero.

    Args:
        lhs: one factor.
        rhs: the other.
        sums: what is summed, as `numpy.einsum` takes it.
        dtype: of the result.
        zeros_alone: whether only products that are zero count as known.
    """

    def total(a: Any, b: Any) -> Any:
        return np.einsum(sums, exact(a), exact(b), optimize=True)

    if not (lhs.known.any() or rhs.known.any()):
        shape = total(lhs.known, rhs.known).shape
        return Known(np.zeros(shape, dtype), np.zeros(shape, bool))
    l_other, r_other = ~lhs.zero, ~rhs.zero
    unsure = total(l_other, r_other) if zeros_alone else total(l_other, ~rhs.known) + total(~lhs.known, r_other)
    value = total(np.where(lhs.known, lhs.value, 0), np.where(rhs.known, rhs.value, 0))
    return Known(value.astype(dtype), unsure == 0)


def _conv(eqn: Any, given: list[Known]) -> list[Known] | None:
    """Of images whose pixels are all the same; where there is padding, borders see other sums unless all are zero."""
    params, groups = eqn.params, eqn.params["feature_group_count"]
    l_spec, r_spec, y_spec = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        return None
    x, w = (
        Known(*(np.transpose(part, spec) for part in one)) for one, spec in zip(given, (l_spec, r_spec), strict=True)
    )
    if any(size != 1 for size in x.value.shape[2:]):
        return None
    channels = eqn.invars[0].aval.shape[l_spec[1]]
    x = Known(*(_along(part, 1, channels).reshape(part.shape[0], groups, -1) for part in x))
    w = Known(*(np.broadcast_to(part, [eqn.invars[1].aval.shape[a] for a in r_spec]) for part in w))
    w = Known(*(part.reshape(groups, -1, part.shape[1], math.prod(part.shape[2:])) for part in w))
    borders = any(map(any, params["padding"])) or any(dilation != 1 for dilation in params["lhs_dilation"])
    y = _product(x, w, "ngi,goik->ngo", eqn.outvars[0].aval.dtype, zeros_alone=borders)
    shape = [1] * len(y_spec)
    shape[y_spec[0]], shape[y_spec[1]] = y.value.shape[0], y.value.shape[1] * y.value.shape[2]
    if y_spec[0] > y_spec[1]:
        y = Known(*(np.moveaxis(part, 0, -1) for part in y))
    return [Known(*(part.reshape(shape) for part in y))]


_IN_NUMPY: Mapping[str, Callable[..., Any]] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "exp": np.exp,
    "tanh": np.tanh,
    "square": np.square,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.reciprocal(np.sqrt(x)),
    "logistic": lambda x: np.reciprocal(1 + np.exp(-x)),
}
"""Operations that NumPy does alike, at once; in JAX each is a program to compile for every shape."""

CONSTANT_RULES: Mapping[str, Callable[[Any, list[Known]], list[Known] | None]] = {
    "reshape": _mapped(_reshape),
    "broadcast_in_dim": _mapped(_broadcast),
    "transpose": _mapped(lambda eqn, array: np.transpose(array, eqn.params["permutation"])),
    "squeeze": _mapped(lambda eqn, array: np.squeeze(array, tuple(eqn.params["dimensions"]))),
    **dict.fromkeys(MOVES, _move),
    "dynamic_slice": _dynamic_slice,
    "concatenate": _concatenate,
    "gather": _gather,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduce),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
}
