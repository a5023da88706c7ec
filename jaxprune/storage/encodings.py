"""Encodings by name, and the smallest of them for one tensor.

pattern_of("gaps5")                     smallest(alive, bits=32)  ->  the pattern with the fewest bytes
"""

import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool

from jaxprune.storage.bits import packed_size
from jaxprune.storage.container import Problem
from jaxprune.storage.patterns import RUN, Bitmask, Dense, Pattern
from jaxprune.storage.positions import CSR, Gaps, gaps_of
from jaxprune.storage.structured import NM, Block

TILES = ((4, 4), (8, 8), (16, 16), (1, 8), (1, 16), (8, 1), (16, 1))
RUNS = ((1, 4), (2, 8))  # 2 of every 4 take as many bytes as a bitmask, 4 of every 8 more


def pattern_of(name: str) -> Pattern:
    """The pattern with this name: "dense", "bitmask", "csr16", "csr32", "gaps5", "nm2:4@0", "block4x8".

    Raises:
        Problem: there is none.
    """
    if name in ("dense", "bitmask"):
        return Dense() if name == "dense" else Bitmask()
    shape = re.sub("[0-9]+", "0", name)
    numbers = [int(digits[:9]) for digits in re.findall("[0-9]+", name)]  # more digits are too many anyway
    if name in ("csr16", "csr32"):
        return CSR(*numbers)
    if shape == "gaps0" and 2 <= numbers[0] <= 16:
        return Gaps(*numbers)
    if shape == "nm0:0@0" and 1 <= numbers[0] <= numbers[1] and 2 <= numbers[1] <= 256:
        return NM(*numbers)
    if shape == "block0x0" and 0 < numbers[0] * numbers[1] <= RUN:
        return Block(*numbers)
    raise Problem(
        f"There is no encoding {name!r}. There are: auto, dense, bitmask, csr16, csr32, gaps2 to gaps16, and, with "
        'numbers of your own, "nm2:4@0" (2 of every 4 along axis 0) and "block4x8" (at most 32,768 weights).'
    )


def stored_bytes(pattern: Pattern, alive: Bool[np.ndarray, "..."], bits: int) -> int:
    """Bytes of a tensor in this pattern, with values of so many bits side by side.

    Args:
        pattern: one that these weights have, see `Pattern.why_not`.
        alive: the mask.
        bits: of a value.
    """
    return pattern.bytes_of(alive) + packed_size(pattern.slots(alive), bits)


def smallest(alive: Bool[np.ndarray, "..."], bits: int, *, exact: bool) -> Pattern:
    """The pattern with the fewest bytes; the simplest of equals.

    Args:
        alive: the mask.
        bits: of a value.
        exact: only patterns that store the living weights and no others.
    """
    chances = (one for one in candidates(alive) if not exact or stores_just(one, alive))
    return min(chances, key=lambda one: stored_bytes(one, alive, bits))


def stores_just(pattern: Pattern, alive: Bool[np.ndarray, "..."]) -> bool:
    """Whether the pattern stores the living weights and no others, so that it is the mask."""
    return pattern.slots(alive) == int(np.count_nonzero(alive))


def candidates(alive: Bool[np.ndarray, "..."]) -> Iterator[Pattern]:
    """Patterns that these weights have and that could be the smallest, the simplest first."""
    yield Dense()
    yield Bitmask()
    gaps = gaps_of(alive)
    yield min((Gaps(width) for width in range(2, 17)), key=lambda one: one.size_of(gaps))
    structured = [CSR(16), CSR(32), *(Block(*tile) for tile in TILES)]
    structured += [NM(n, m, axis) for axis in range(alive.ndim) for n, m in RUNS]
    # A structured pattern stores at least the living weights; most masks have far too many in some run or tile.
    yield from (one for one in structured if not one.why_not(alive))
