"""The k largest, exactly, without sorting.

A non-negative float32 and its bit pattern, read as an integer, are in the same order. So the k-th largest score is
the largest integer that at least k patterns reach, and it is found two bits at a time by comparing and counting:
16 passes over the scores, each a plain reduction, which any sharding leaves as it is. Equal scores at the threshold
are told apart the same way, by searching for the index up to which they survive.

Counts are unsigned 32-bit integers, so a contest has at most 2**32 - 1 groups.
"""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer, UInt32

from jaxprune.checks import is_concrete
from jaxprune.compat import present_forms
from jaxprune.exact import wide as words
from jaxprune.exact.meshes import lying_like, varying_like

TOP = 0xFFFFFFFF  # beyond every score's pattern, NaN's included: survives whatever k is
FIELD = 10  # bits of a packed count
FIELD_MAX = (1 << FIELD) - 1
CUTS = 3  # compared with in one pass
SHORT = 32  # a sum over at most as many is one loop on XLA:CPU
VECTOR = 8  # numbers in a vector register, at least; a run that is shorter saves little
DEVICES = 16  # over so many an axis stays where it is


@lying_like("scores")
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


@lying_like("scores")
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
    _check(scores, k, math.prod(scores.shape[axis] for axis in axes))
    if scores.ndim == 0:
        return jnp.asarray(k, jnp.uint32) > 0
    return _masks((scores,), jnp.asarray(k, jnp.uint32), None, axes)[0]


@lying_like("scores")
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


@lying_like("scores")
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
    enough = partial(_several, jnp.broadcast_to(k, (1,) * (pattern.ndim + 1)))
    found = _search(partial(_reaching, [pattern], axes), enough, [pattern], axes, k)
    return found.cut.reshape(())


@jax.jit(static_argnums=3)
def _masks(scores: tuple[Array, ...], k: Array, safe: tuple[Array, ...] | None, axes: tuple[int, ...] | None) -> Any:
    patterns = [_pattern(array) for array in scores]
    if safe is not None:
        patterns = [jnp.where(s, jnp.uint32(TOP), p) for s, p in zip(safe, patterns, strict=True)]
    wide, rank = _of_one_rank(patterns)
    axes = tuple(range(-rank, 0)) if axes is None or len(wide) > 1 else axes
    k = jnp.broadcast_to(k, (1, *_contests(wide[0], axes)))
    found = _search(partial(_reaching, wide, axes), partial(_several, k), wide, axes, k)
    # Of equals the first arrays' survive, as many as there is room for; in the one where it ends, the first places'.
    need = k - _total(found.above)
    equal = found.counts - found.above
    before = jnp.cumsum(equal, axis=0, dtype=jnp.uint32) - equal
    room = jnp.minimum(need - jnp.minimum(need, before), equal)
    whole, split = room == equal, (room > 0) & (room < equal)
    room_there = _total(jnp.where(split, room, jnp.uint32(0)))

    def enough(counts: Array) -> Bool[Array, "..."]:
        return _total(jnp.where(split[:, None], counts, jnp.uint32(0)))[0] <= room_there

    return _kept(scores, wide, found.cut, whole, split, enough, axes)


@jax.jit
def _fitting(scores: tuple[Array, ...], costs: words.Wide, budget: words.Wide) -> Any:
    wide, rank = _of_one_rank([_pattern(array) for array in scores])
    axes = tuple(range(-rank, 0))

    def fit(counts: Array) -> Bool[Array, "..."]:
        return words.at_most(words.dot(counts, costs), budget)

    found = _search(partial(_reaching, wide, axes), lambda counts: ~fit(counts), wide, axes, budget)
    # What reaches the cut costs too much, unless everything fits: the cut is 0 then.
    equal = found.counts - found.above
    order = jnp.arange(len(wide), dtype=jnp.int32)
    upto = (order[:, None] <= order[None]).reshape(len(wide), len(wide), *(1,) * rank)
    whole = fit(found.above[:, None] + jnp.where(upto, equal[:, None], jnp.uint32(0)))
    first = jnp.sum(whole, axis=0, keepdims=True, dtype=jnp.int32)
    split = order.reshape(-1, *(1,) * rank) == first
    before = found.above + jnp.where(whole, equal, jnp.uint32(0))

    def enough(counts: Array) -> Bool[Array, "..."]:
        return fit(before[:, None] + jnp.where(split[:, None], counts, jnp.uint32(0)))

    return _kept(scores, wide, found.cut, whole, split & (equal > 1), enough, axes)


def _of_one_rank(patterns: Sequence[Array]) -> tuple[list[Array], int]:
    """One rank for all, so that one cut serves arrays of any shape."""
    rank = max(p.ndim for p in patterns)
    return [p.reshape((1,) * (rank - p.ndim) + p.shape) for p in patterns], rank


class _Found(NamedTuple):
    """Where a search ends: the largest cut that is low enough, and what each array counts there and just above.

    counts and above are (arrays, *contests), axes within a contest having size 1.
    """

    cut: UInt32[Array, "..."]
    counts: UInt32[Array, "..."]
    above: UInt32[Array, "..."]


def _search(
    count: Callable[[Sequence[Array]], Array], enough: Callable[[Array], Array], wide: Sequence[Array], axes: Any,
    goal: Any,
) -> _Found:  # fmt: skip
    """The largest 32-bit cut at which there is enough; two bits a pass, highest first.

    Args:
        count: cuts -> (arrays, cuts, *contests), falling as the cut rises or rising.
        enough: counts -> (cuts, *contests), true up to some cut.
        wide: the arrays; at cut 0 there is enough, or the cut found is 0.
        axes: of a contest.
        goal: what else `enough` or `count` look at; inside of `jax.shard_map` it may vary where the arrays do not.
    """
    shape = _contests(wide[0], axes)
    sizes = [math.prod(array.shape[axis] for axis in axes) for array in wide]
    all_of = jnp.asarray(sizes, jnp.uint32).reshape(-1, *(1,) * len(shape)) * jnp.ones((1, *shape), jnp.uint32)

    def narrow(i: Array, found: _Found) -> _Found:
        shift = (30 - 2 * i).astype(jnp.uint32)
        # The sort changes nothing. Without one jaxlib 0.12 makes a single function of a loop on CPU, of any size: it
        # compiles in the square of the arrays' number.
        steps = jnp.sort(jnp.arange(1, CUTS + 1, dtype=jnp.uint32) << shift)
        counts = count([found.cut + step for step in steps])
        passed = _total(enough(counts))
        at, above = found.counts, found.above
        for j in reversed(range(CUTS)):
            above = jnp.where(passed > j, above, counts[:, j])
        for j in range(CUTS):
            at = jnp.where(passed > j, counts[:, j], at)
        return _Found(found.cut + (passed[0] << shift), at, above)

    start = _Found(jnp.zeros(shape, jnp.uint32), all_of, jnp.zeros_like(all_of))
    start = jax.tree.map(lambda value: varying_like(value, *wide, *jax.tree.leaves(goal)), start)
    with present_forms():
        return lax.fori_loop(0, 16, narrow, start)


def _several(k: Array, counts: Array) -> Bool[Array, "..."]:
    """Whether k or more are counted, of all arrays together."""
    return _total(counts)[0] >= k


def _total(counts: Array) -> UInt32[Array, "1 ..."]:
    return jnp.sum(counts, axis=0, keepdims=True, dtype=jnp.uint32)


def _contests(array: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Its shape with contests reduced to a place each."""
    return tuple(1 if axis - array.ndim in axes else size for axis, size in enumerate(array.shape))


def _reaching(wide: Sequence[Array], axes: tuple[int, ...], cuts: Sequence[Array]) -> UInt32[Array, "..."]:
    """How many of each array reach each cut."""
    return jnp.stack([_count([p >= cut for cut in cuts], axes) for p in wide])


def _kept(
    scores: Sequence[Array], wide: Sequence[Array], threshold: Array, whole: Array, split: Array, enough: Any, axes: Any
) -> tuple[Bool[Array, "..."], ...]:
    """True above the threshold; of its equals in the arrays that are `whole`, and the first places of the one `split`.

    Args:
        scores: the arrays as they came.
        wide: their patterns, of one rank.
        threshold: one a contest.
        whole: (arrays, *contests).
        split: the same; at most one array of a contest.
        enough: (arrays, cuts, *contests) of equals below each cut -> whether these may survive, (cuts, *contests).
        axes: of a contest.
    """
    places = [_places(array.shape, axes) for array in wide]

    def below(cuts: Sequence[Array]) -> UInt32[Array, "..."]:
        pairs = zip(wide, places, strict=True)
        return jnp.stack([_count([(p == threshold) & (i < cut) for cut in cuts], axes) for p, i in pairs])

    def ends(last: Array) -> tuple[Array, ...]:
        all_of = jnp.where(whole, jnp.uint32(TOP), jnp.where(split, last[None], jnp.uint32(0)))
        return tuple(all_of[i] for i in range(len(wide)))

    # As results of a conditional they are arguments of what follows, so that arrays of one shape share a program.
    search = partial(_search, below, enough, wide, axes, threshold)
    last = lax.cond(jnp.any(split), lambda: ends(search().cut), lambda: ends(jnp.zeros_like(threshold)))
    kept = [(p > threshold) | ((p == threshold) & (i < end)) for p, i, end in zip(wide, places, last, strict=True)]
    return tuple(keep.reshape(array.shape) for keep, array in zip(kept, scores, strict=True))


def _places(shape: tuple[int, ...], axes: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Every score's index in its contest, C order over `axes`."""
    place, stride = jnp.zeros((1,) * len(shape), jnp.uint32), 1
    for axis in reversed(axes):
        size = shape[axis]
        along = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(stride)
        place = place + along.reshape([size if a - len(shape) == axis else 1 for a in range(len(shape))])
        stride *= size
    return place


def _count(hits: Sequence[Array], axes: tuple[int, ...]) -> UInt32[Array, "..."]:
    """How often each of three is true, over `axes` (kept): (3, *contests)."""
    words_of = [hit.astype(jnp.uint32) << jnp.uint32(FIELD * j) for j, hit in enumerate(hits)]
    packed = _partial_sums(functools.reduce(jnp.add, words_of), axes)
    shifts = jnp.arange(0, FIELD * CUTS, FIELD, dtype=jnp.uint32).reshape(-1, *(1,) * packed.ndim)
    fields = (packed[None] >> shifts) & jnp.uint32(FIELD_MAX)
    return jnp.sum(fields, axis=axes, keepdims=True, dtype=jnp.uint32)


def _partial_sums(packed: Array, axes: tuple[int, ...]) -> Array:
    """Sums along one of the axes in runs short enough for a field: three counts cost one reduction instead of three."""
    axis, run, part = _runs(packed.shape, axes)
    at = packed.ndim + axis
    before, after = packed.shape[:at], packed.shape[at + 1 :]
    runs = packed.reshape(*before, packed.shape[at] // (run * part), run, part, *after)
    return jnp.sum(runs, axis=(at + 1, at + 2), dtype=jnp.uint32)


@functools.cache
def _runs(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, int, int]:
    """An axis, and a run that divides it in two factors, since XLA:CPU cuts a sum over more than 32 into passes.

    Sums over the last axis want to be of whole vectors, others to have these beside them. An axis over several devices
    stays where it is if the number of its runs is a multiple of theirs, so that should have factors of two, up to 16.
    """

    def worth(axis: int, run: int, part: int) -> tuple[int, ...]:
        whole = part % VECTOR == 0 if axis == -1 else shape[-1] >= VECTOR
        length = run * part
        return min(length, VECTOR), whole, math.gcd(shape[axis] // length, DEVICES), min(length, SHORT)

    splits = [(axis, run, part) for axis in axes for run, part in _factors(shape[axis])]
    return max(splits, key=lambda split: (*worth(*split), split[0], split[1] * split[2], split[2]))


def _factors(size: int) -> list[tuple[int, int]]:
    """Pairs of factors, at most `SHORT`, of the runs that divide an axis; the longest run alone where all are tiny."""
    runs = [d for d in range(1, FIELD_MAX + 1) if size and size % d == 0] or [1]
    pairs = [(d // b, b) for d in runs for b in range(1, SHORT + 1) if d % b == 0 and d // b <= SHORT]
    return pairs if max(map(math.prod, pairs)) >= min(VECTOR, runs[-1]) else [(runs[-1], 1)]
