"""Operations by kind: those that work element by element, those that change nothing, and what a reshape merges."""

import math
from collections.abc import Sequence

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
