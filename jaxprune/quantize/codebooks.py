"""k-means of single numbers: in one dimension a cluster is a run of the sorted numbers, so sorting once is enough."""

import numpy as np
from jaxtyping import Float, Float64, UInt8


def k_means(numbers: Float64[np.ndarray, " n"], clusters: int, iterations: int) -> Float64[np.ndarray, " clusters"]:
    """Centres, ascending, of Lloyd's iterations from evenly spread ones.

    A centre without members stays where it is. Sums are taken over each cluster anew: differences of running sums would
    lose the small clusters at the ends beside the large ones in the middle.

    Args:
        numbers: in any order.
        clusters: how many centres; if there are no more different numbers than that, those are the centres, the last
            one repeated.
        iterations: at most so many.
    """
    ordered = np.sort(numbers)
    new = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    distinct = int(np.count_nonzero(new))
    if distinct <= clusters:
        return np.pad(ordered[new], (0, clusters - distinct), mode="edge" if distinct else "constant")
    centres, before = np.linspace(ordered[0], ordered[-1], clusters), np.empty(0)
    for _ in range(iterations):
        starts = np.concatenate([[0], np.searchsorted(ordered, _borders(centres), side="right")])
        if np.array_equal(starts, before):
            break
        sizes = np.diff(starts, append=len(ordered))
        filled, before = sizes > 0, starts
        centres[filled] = np.add.reduceat(ordered, starts[filled]) / sizes[filled]
    return centres


def nearest(
    centres: Float64[np.ndarray, " clusters"], numbers: Float[np.ndarray, "*shape"]
) -> UInt8[np.ndarray, "*shape"]:
    """For every number the index of the nearest centre, of two the lower one.

    Args:
        centres: ascending, at most 256.
        numbers: any.
    """
    return np.searchsorted(_borders(centres), numbers).astype(np.uint8)


def _borders(centres: Float64[np.ndarray, " clusters"]) -> Float64[np.ndarray, " borders"]:
    return centres[:-1] / 2 + centres[1:] / 2
