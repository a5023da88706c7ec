"""Operations by kind: element by element, changing nothing, moving indices; and what a reshape merges."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

_WORDS = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    convert_element_type cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow
    is_finite le lgamma log log1p log2 logistic lt max min mul ne neg nextafter not one_minus_square or
    polynomial population_count pow real reduce_precision rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor
"""
ELEMENTWISE = frozenset(_WORDS.split())
"""Operations on corresponding elements; scalars go with any shape, and axes of size one with any size."""

IDENTITIES = frozenset(
    {"copy", "copy_p", "stop_gradient", "name", "optimization_barrier"}
    | {"device_put", "sharding_constraint", "reshard", "mesh_cast", "pvary", "pcast"}
)
"""Operations that hand every operand on as it is."""


def merged_axes(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes before and after a reshape in the shortest runs of equal product; axes of size one are left out.

    Example:
        >>> merged_axes((2, 3, 4), (6, 2, 2))
        [([0, 1], [0]), ([2], [1, 2])]
    """
    a, b = ([axis for axis, size in enumerate(shape) if size != 1] for shape in (old, new))
    found = []
    while a and b:
        olds, news = [a.pop(0)], [b.pop(0)]
        while (before := math.prod(old[i] for i in olds)) != (after := math.prod(new[i] for i in news)):
            (olds if before < after else news).append((a if before < after else b).pop(0))
        found.append((olds, news))
    return found


MOVES = frozenset({"slice", "split", "tile", "rev", "concatenate", "pad"})
"""Operations that move indices along axes, see `moves`."""

Sources = Int[np.ndarray, " indices"]
"""For each index along an axis of a result the one that comes there, -1 where none does."""


def moves(eqn: Any) -> list[dict[int, Sources]]:
    """What one of `MOVES` does: for each result axis -> sources. Axes that are not named stay as they are.

    Of several operands the sources count the indices of all, side by side; the filler of a pad is none of them.
    """
    name, params, shape = eqn.primitive.name, eqn.params, eqn.invars[0].aval.shape
    if name == "slice":
        steps = params["strides"] or (1,) * len(shape)
        cuts = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
        return [{axis: np.arange(*cut) for axis, cut in enumerate(cuts)}]
    if name == "split":
        ends = np.cumsum(params["sizes"])[:-1]
        return [{params["axis"]: part} for part in np.split(np.arange(shape[params["axis"]]), ends)]
    if name == "tile":
        sizes = zip(shape, params["reps"], strict=True)
        return [{axis: np.tile(np.arange(size), times) for axis, (size, times) in enumerate(sizes)}]
    if name == "rev":
        return [{axis: np.arange(shape[axis])[::-1] for axis in params["dimensions"]}]
    if name == "concatenate":
        return [{params["dimension"]: np.arange(eqn.outvars[0].aval.shape[params["dimension"]])}]
    found = {}
    for axis, (low, high, inside) in enumerate(params["padding_config"]):
        if low or high or inside:
            size = eqn.outvars[0].aval.shape[axis]
            places = low + np.arange(shape[axis]) * (1 + inside)
            within = (places >= 0) & (places < size)
            found[axis] = np.full(size, -1)
            found[axis][places[within]] = np.flatnonzero(within)
    return [found]
