"""The k largest, exactly, without sorting.

A non-negative float32 and its bit pattern, read as an integer, are in the same order. So the k-th largest score is
the largest integer that at least k patterns reach, and it is found two bits at a time by comparing and counting:
16 passes over the scores, each a plain reduction, which any sharding leaves as it is. Equal scores at the threshold
are told apart the same way, by searching for the index up to which they survive.

Counts are unsigned 32-bit integers, so a contest has at most 2**32 - 1 groups.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer, UInt32

from jaxprune import wide as words
from jaxprune.checks import is_concrete

TOP = 0xFFFFFFFF  # beyond every score's pattern, NaN's included: survives whatever k is
FIELD = 10  # bits of a packed count
FIELD_MAX = (1 << FIELD) - 1


def kth_largest(scores: Float[Array, "..."], k: Integer[Array, ""] | int) -> Float[Array, ""]:
    """The k-th largest score, exactly: `jnp.sort(scores, axis=None)[-k]`.

    Args:
        scores: non-negative float32, bfloat16 or float16, any shape; NaN counts as largest.
        k: 1 <= k <= scores.size, may be traced. 0 gives infinity.

    Returns:
        Scalar of the scores' dtype.

    Raises:
        ValueError: `k` is known and out of range.
        TypeError: the scores are not floating, or wider than 32 bits.
    """
    _check(scores, k, scores.size)
    pattern = _kth(scores, jnp.asarray(k, jnp.uint32))
    value = lax.bitcast_convert_type(jnp.minimum(pattern, jnp.uint32(0x7FFFFFFF)), jnp.float32)
    return jnp.where(jnp.asarray(k) == 0, jnp.float32(jnp.inf), value).astype(scores.dtype)


def top_k_mask(
    scores: Float[Array, "..."], k: Integer[Array, "..."] | int, axes: tuple[int, ...] | None = None
) -> Bool[Array, "..."]:
    """True at exactly k scores, the largest; of equal ones the lower index survives.

    Args:
        scores: non-negative float32, bfloat16 or float16; NaN counts as largest.
        k: 0 <= k <= number of scores in a contest, may be traced; or for each contest its own, with an axis of size 1
            for each of `axes`.
        axes: axes (negative) along which scores compete; every place on the others is a contest of its own. None: all
            axes.

    Raises:
        ValueError: `k` is known and out of range, or the contest has 2**32 groups or more.
        TypeError: the scores are not floating, or wider than 32 bits.
    """
    axes = tuple(range(-scores.ndim, 0)) if axes is None else axes
    n = 1
    for axis in axes:
        n *= scores.shape[axis]
    _check(scores, k, n)
    if scores.ndim == 0:
        return jnp.asarray(k, jnp.uint32) > 0
    return _masks((scores,), jnp.asarray(k, jnp.uint32), None, axes)[0]


def top_k_masks(
    scores: Sequence[Float[Array, "..."]],
    k: Integer[Array, ""] | int,
    safe: Sequence[Bool[Array, "..."]] | None = None,
) -> list[Bool[Array, "..."]]:
    """`top_k_mask` over several arrays as one contest; indices go on from one array to the next.

    Args:
        scores: as for `top_k_mask`.
        k: 0 <= k <= number of all scores.
        safe: True where a score survives whatever it is worth; these count towards k, and must not be more.
    """
    for array in scores:
        _check(array, 0, 0)
    _check(scores[0], k, sum(array.size for array in scores))
    return list(_masks(tuple(scores), jnp.asarray(k, jnp.uint32), tuple(safe) if safe else None, None))


def fitting_masks(
    scores: Sequence[Float[Array, "..."]], costs: Sequence[int], budget: words.Wide
) -> list[Bool[Array, "..."]]:
    """True at the largest scores of several arrays, from the top down until the next one costs more than is left.

    Of equal scores the lower index comes first; indices go on from one array to the next.

    Args:
        scores: as for `top_k_masks`.
        costs: what one score of each array costs, > 0; of all scores together below 2**64.
        budget: what the survivors may cost together; may be traced.

    Raises:
        ValueError: there are 2**32 scores or more.
        TypeError: the scores are not floating, or wider than 32 bits.
    """
    for array in scores:
        _check(array, 0, 0)
    _check(scores[0], 0, sum(array.size for array in scores))
    return list(_fitting(tuple(scores), words.wide(costs), budget))


def _check(scores: Array, k: Any, n: int) -> None:
    if not jnp.issubdtype(scores.dtype, jnp.floating) or scores.dtype.itemsize > 4:
        raise TypeError(f"Scores are float32, bfloat16 or float16; got {scores.dtype}.")
    if n > TOP:
        raise ValueError(f"A contest has at most {TOP} groups, this one {n}. Use `Uniform`, or a coarser granularity.")
    if is_concrete(k) and jnp.ndim(k) == 0 and not 0 <= int(k) <= n:
        raise ValueError(f"k = {int(k)} of {n} scores was asked for; 0 <= k <= {n}.")


def _pattern(scores: Array) -> UInt32[Array, "..."]:
    # abs makes -0.0 equal to 0.0; 16-bit floats are exact in 32.
    return lax.bitcast_convert_type(jnp.abs(scores.astype(jnp.float32)), jnp.uint32)


@jax.jit
def _kth(scores: Array, k: Array) -> UInt32[Array, ""]:
    pattern = jnp.atleast_1d(_pattern(scores))
    axes = tuple(range(-pattern.ndim, 0))
    shape = (1,) * pattern.ndim
    found = _search(lambda cuts: _count([lambda cut: pattern >= cut], [pattern], cuts, axes), k, shape)
    return found.reshape(())


@jax.jit(static_argnums=3)
def _masks(scores: tuple[Array, ...], k: Array, safe: tuple[Array, ...] | None, axes: tuple[int, ...] | None) -> Any:
    patterns = [_pattern(array) for array in scores]
    if safe is not None:
        patterns = [jnp.where(s, jnp.uint32(TOP), p) for s, p in zip(safe, patterns, strict=True)]
    wide, rank = _of_one_rank(patterns)
    axes = tuple(range(-rank, 0)) if axes is None else axes
    over = tuple(range(-rank, 0)) if len(wide) > 1 else axes
    shape = tuple(1 if axis - rank in over else size for axis, size in enumerate(wide[0].shape))

    def reach(cuts: Sequence[Array]) -> list[Array]:
        return _count([lambda cut, p=p: p >= cut for p in wide], wide, cuts, over)

    threshold = _search(reach, k, shape)
    above, at_least = reach([threshold + jnp.uint32(1), threshold])
    above = jnp.where(threshold == jnp.uint32(TOP), jnp.uint32(0), above)
    places = _places(wide, over)
    last = _last_index(wide, places, threshold, k - above, jnp.any(at_least > k), shape, over)
    kept = [(p > threshold) | ((p == threshold) & (i < last)) for p, i in zip(wide, places, strict=True)]
    return tuple(keep.reshape(array.shape) for keep, array in zip(kept, scores, strict=True))


@jax.jit
def _fitting(scores: tuple[Array, ...], costs: words.Wide, budget: words.Wide) -> Any:
    wide, rank = _of_one_rank([_pattern(array) for array in scores])
    over, shape = tuple(range(-rank, 0)), (1,) * rank
    places = _places(wide, over)

    def count(tests: Sequence[Callable[[Array], Array]], cuts: Sequence[Array]) -> Array:
        """How many of each array pass its test, (arrays, cuts, 1, ...)."""
        pairs = zip(tests, wide, strict=True)
        return jnp.stack([jnp.stack(_count([test], [p], cuts, over)) for test, p in pairs])

    def fit(counts: Array) -> UInt32[Array, "..."]:
        return words.at_most(words.dot(counts, costs), budget).astype(jnp.uint32)

    def reach(cuts: Sequence[Array]) -> Array:
        return count([lambda cut, p=p: p >= cut for p in wide], cuts)

    def within(cuts: Sequence[Array]) -> list[Array]:
        equals = [lambda cut, p=p, i=i: (p == threshold) & (i < cut) for p, i in zip(wide, places, strict=True)]
        return list(fit(above + count(equals, cuts)))

    one = jnp.uint32(1)
    threshold = _search(lambda cuts: list(one - fit(reach(cuts))), one, shape)  # too much is what reaches it
    reached = reach([threshold + one, threshold])
    above, equal = reached[:, :1], jnp.sum(reached[:, 1] - reached[:, 0], dtype=jnp.uint32)
    # Unless everything fits: the threshold is 0 then. Of equals the first ones may.
    all_fit = jnp.broadcast_to(fit(reached)[1] * jnp.uint32(TOP), shape)
    last = lax.cond(jnp.any((equal > 1) & (all_fit == 0)), lambda: _search(within, one, shape), lambda: all_fit)
    kept = [(p > threshold) | ((p == threshold) & (i < last)) for p, i in zip(wide, places, strict=True)]
    return tuple(keep.reshape(array.shape) for keep, array in zip(kept, scores, strict=True))


def _of_one_rank(patterns: Sequence[Array]) -> tuple[list[Array], int]:
    """One rank for all, so that one cut serves arrays of any shape."""
    rank = max(p.ndim for p in patterns)
    return [p.reshape((1,) * (rank - p.ndim) + p.shape) for p in patterns], rank


def _places(wide: list[Array], axes: tuple[int, ...]) -> list[UInt32[Array, "..."]]:
    """Every score's index in its contest, C order over `axes`, going on from one array to the next."""
    places, first = [], 0
    for array in wide:
        place, stride = jnp.full((1,) * array.ndim, first, jnp.uint32), 1
        for axis in reversed(axes):
            size = array.shape[axis]
            along = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(stride)
            place = place + along.reshape([size if a - array.ndim == axis else 1 for a in range(array.ndim)])
            stride *= size
        places.append(place)
        first += stride
    return places


def _last_index(
    wide: list[Array], places: list[Array], threshold: Array, need: Array, tied: Array, shape: Any, over: Any
) -> UInt32[Array, "..."]:
    """The index below which the equals of `threshold` survive: `need` of them do. Searched for only if `tied`."""

    def fewer(cuts: Sequence[Array]) -> list[Array]:
        tests = [lambda cut, p=p, i=i: (p == threshold) & (i < cut) for p, i in zip(wide, places, strict=True)]
        return [jnp.where(count <= need, need, jnp.uint32(0)) for count in _count(tests, wide, cuts, over)]

    everyone = jnp.where(need > 0, jnp.uint32(TOP), jnp.uint32(0)) * jnp.ones(shape, jnp.uint32)
    found = lax.cond(tied, lambda: _search(fewer, jnp.maximum(need, jnp.uint32(1)), shape), lambda: everyone)
    return jnp.where(need > 0, found, jnp.uint32(0))


def _search(reach: Callable[[Sequence[Array]], list[Array]], k: Array, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """The largest 32-bit integer x with reach(x) >= k, for `reach` falling in x; two bits a pass, highest first."""

    def narrow(i: Array, found: Array) -> Array:
        shift = (30 - 2 * i).astype(jnp.uint32)
        cuts = [found + (jnp.uint32(j) << shift) for j in (1, 2, 3)]
        counts = reach(cuts)
        for cut, count in zip(cuts, counts, strict=True):
            found = jnp.where(count >= k, cut, found)
        return found

    return lax.fori_loop(0, 16, narrow, jnp.zeros(shape, jnp.uint32))


def _count(
    tests: Sequence[Callable[[Array], Array]], wide: Sequence[Array], cuts: Sequence[Array], axes: tuple[int, ...]
) -> list[UInt32[Array, "..."]]:
    """How often each test holds at each cut, over `axes` (kept), summed over the arrays."""
    totals = [jnp.uint32(0)] * len(cuts)
    for test, array in zip(tests, wide, strict=True):
        hits = [test(cut).astype(jnp.uint32) << jnp.uint32(FIELD * j) for j, cut in enumerate(cuts)]
        packed = _partial_sums(functools.reduce(jnp.add, hits), array.shape, axes[-1])
        for j in range(len(cuts)):
            field = (packed >> jnp.uint32(FIELD * j)) & jnp.uint32(FIELD_MAX)
            totals[j] = totals[j] + jnp.sum(field, axis=axes, keepdims=True, dtype=jnp.uint32)
    return totals


def _partial_sums(packed: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Sums along `axis` in runs short enough for a field: three counts cost one reduction instead of three."""
    size = shape[axis]
    run = max((d for d in range(1, min(size, FIELD_MAX) + 1) if size % d == 0), default=1)
    at = len(shape) + axis
    runs = packed.reshape(*shape[:at], size // run, run, *shape[at + 1 :])
    return jnp.sum(runs, axis=at + 1, dtype=jnp.uint32)
