"""What every distribution is made of: groups, verdicts, and a contest of known size."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float

from jaxprune.checks import check_sparsity, is_concrete
from jaxprune.exact.numerics import rounded_share
from jaxprune.exact.ranking import top_k_mask
from jaxprune.types import Sparsity

Groups = Mapping[str, Float[Array, "*layers g_spatial g_in g_out"]]
Kept = dict[str, Bool[Array, "*layers g_spatial g_in g_out"]]
Dims = Mapping[str, tuple[int, ...]]
LAYER = (-3, -2, -1)


@runtime_checkable
class Distribution(Protocol):
    """Group scores -> verdicts.

    Optional attributes say what else it is, each False if it is not there: `looks_at_axes`, it matters which axes are
    inputs and outputs; `spans_axes`, contests reach along a whole axis, so that layers of a stack must be known as
    such; `is_pattern`, runs of groups have a number of survivors of their own; `is_priced`, groups cost something.
    """

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """True where the group survives, shaped like `groups`."""
        ...


def required(sparsity: Sparsity | None, distribution: Any) -> Sparsity:
    """A sparsity that was given, as a float where it is known.

    Raises:
        ValueError: None, or no fraction.
    """
    if sparsity is None:
        raise ValueError(f"`{type(distribution).__name__}` needs a sparsity: the fraction to remove, in [0, 1).")
    check_sparsity(sparsity)
    return float(sparsity) if is_concrete(sparsity) else sparsity


def refuse(sparsity: Sparsity | None, distribution: Any) -> None:
    """Raises ValueError if a sparsity was given to a distribution that decides by itself."""
    if sparsity is not None:
        raise ValueError(
            f"`{type(distribution).__name__}` decides by itself how many weights go: leave `sparsity` out (None)."
        )


def count(scores: Float[Array, "..."], axes: tuple[int, ...] = LAYER) -> int:
    """Groups of a contest along these axes."""
    return math.prod(scores.shape[axis] for axis in axes)


def contest(scores: Float[Array, "..."], sparsity: Sparsity, axes: tuple[int, ...] = LAYER) -> Bool[Array, "..."]:
    """True at the best: of n groups round(n * sparsity) go.

    Args:
        scores: of groups.
        sparsity: one, or for each contest its own, with an axis of size 1 for each of `axes`.
        axes: along which groups compete; each place on the others is a contest.
    """
    n = count(scores, axes)
    return top_k_mask(scores, n - rounded_share(n, sparsity), axes)


def check_several(name: str, groups: Groups) -> None:
    """Refuse groups of which an output has one.

    Raises:
        ValueError: a leaf has one group for each output.
    """
    for leaf, scores in groups.items():
        if count(scores, (-3, -2)) == 1:
            raise ValueError(
                f"`{name}` needs several groups for every output, {leaf!r} has one: it would remove all or none. "
                "Use `Uniform` or `Global` with this granularity."
            )
