"""A row: one contestant in one case, as plain data; and what the numbers come to.

    useful FLOP = 2 sum over sites (non-zeros of the leaf x output positions)
    bytes       = weights as stored + activations into and out of the whole program
    intensity   = useful FLOP / bytes,   roof = min(peak GFLOP/s, intensity x peak GB/s)

The bytes are what must move at least once; activations between layers may stay in a cache. A dense contestant is
credited with the same useful FLOP, `dense_gflops` counts what it would have been without zeros. Rows are lines of
`bench.jsonl`; a refused one has its reason and no times.

References:
    Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785 (the roof).
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import sparse, tracing, tree
from jaxprune.lab.bench.contest import Entry, Result, stored_slots
from jaxprune.lab.report.results import Row
from jaxprune.sparse.tuning import timing
from jaxprune.tracing.sites import PRODUCTS
from jaxprune.types import Params


class Peak(NamedTuple):
    """What a machine can do at best: of a few runs of a large product and of two large streams.

    Attributes:
        gflops: GFLOP/s of a float32 product in XLA, an addition and a multiplication counted as two.
        gbytes: GB/s of memory, read and written.
        how: in words.
    """

    gflops: float
    gbytes: float
    how: str


def measure_peak(size: int = 4096, mebibytes: int = 512, repeats: int = 5) -> Peak:
    """The peak of JAX's default device, in a few seconds.

    Args:
        size: of the square matrices that are multiplied.
        mebibytes: of the array that is streamed; several times the last cache.
        repeats: runs, of which the best counts.
    """
    square = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    stream = jnp.ones((mebibytes, 2**18), jnp.float32)
    bump = jax.jit(lambda a: a + 1, donate_argnums=0)  # in place, so that no fresh pages are touched
    total = jax.jit(lambda a: jnp.sum(a, axis=1))

    def bumped() -> jax.Array:
        nonlocal stream
        stream = bump(stream)
        return stream

    runs = timing.interleaved({"product": lambda: product(square), "add": bumped}, repeats=repeats)
    sums = timing.interleaved({"sum": lambda: total(stream)}, repeats=repeats)
    rates = {"x + 1 in place": 2 * stream.nbytes / min(runs["add"]), "sum": stream.nbytes / min(sums["sum"])}
    told = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates.items())
    return Peak(
        gflops=2 * size**3 / min(runs["product"]) / 1e9,
        gbytes=max(rates.values()) / 1e9,
        how=f"best of {repeats} runs in XLA: {size} x {size} float32 product; of {mebibytes} MiB: {told}",
    )


class Work(NamedTuple):
    """What a model asks for in one call.

    Attributes:
        macs: multiply-adds with living weights.
        dense_macs: multiply-adds with all weights.
        nnz: living weights of the matrices and kernels.
        weights: all of them.
        activations: bytes into and out of the program.
    """

    macs: int
    dense_macs: int
    nnz: int
    weights: int
    activations: int


def work_of(fn: Any, params: Params, x: Any) -> Work:
    """Count the multiply-adds, weights and bytes of `fn(params, x)`; what is no matrix or kernel does not count.

    Args:
        fn: the model.
        params: dense, zeros included.
        x: activations.
    """
    leaves = tree.selected_leaves(tree.weights, params)
    living = {name: int(jnp.count_nonzero(leaf)) for name, leaf in leaves.items()}
    sites = [site for site in tracing.trace(fn, params, x) if site.name in leaves and site.kind in PRODUCTS]
    # A product over all weights and positions has nnz / weights of its multiply-adds left: exact, where every weight
    # meets equally many positions.
    macs = sum(site.macs * living[site.name] // leaves[site.name].size for site in sites)
    y = jax.eval_shape(fn, params, x)
    moved = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((x, y)))
    dense = sum(site.macs for site in sites)
    return Work(macs, dense, sum(living.values()), sum(leaf.size for leaf in leaves.values()), moved)


def measured(case: Row, name: str, entry: Entry, result: Result, work: Work, base: float, peak: Peak) -> Row:
    """The row of one contestant.

    Args:
        case: at least the keys of `jaxprune.lab.report.results.CASE`.
        name: the contestant.
        entry: the model as it stored it.
        result: what became of it.
        work: of the model.
        base: median seconds of dense.
        peak: of the machine.
    """
    if result.refused:
        return {**case, "contestant": name, "refused": result.refused}
    slots, compressed = stored_slots(entry.params)
    return {
        **case,
        "contestant": name,
        "refused": "",
        "lower_s": result.lower,
        "compile_s": result.compile,
        "custom_calls": dict(result.custom_calls),
        "compressed_leaves": compressed,
        "dense_leaves": {why: list(names) for why, names in entry.stayed.items()},
        **rates(result.runs, sparse.nbytes(entry.params), slots, work, base, peak),
        "error": result.error,
    }


def rates(runs: Sequence[float], size: int, nse: int, work: Work, base: float, peak: Peak) -> Row:
    """The part of a row that comes from its times.

    Args:
        runs: seconds.
        size: bytes of the weights as stored.
        nse: weights stored.
        work: of the model.
        base: median seconds of dense.
        peak: of the machine.
    """
    median, low, high, n = timing.spread(runs)
    seconds, moved = median / 1e3, size + work.activations
    gflops, gbytes = 2 * work.macs / seconds / 1e9, moved / seconds / 1e9
    intensity = 2 * work.macs / moved
    return {
        "median_ms": median,
        "low_ms": low,
        "high_ms": high,
        "runs": n,
        "seconds": list(runs),
        "ratio": base / seconds,
        "bytes": size,
        "nse": nse,
        "nnz": work.nnz,
        "weights": work.weights,
        "effective_sparsity": 1 - work.nnz / work.weights,
        "macs": work.macs,
        "dense_macs": work.dense_macs,
        "gflops": gflops,
        "dense_gflops": 2 * work.dense_macs / seconds / 1e9,
        "gbytes": gbytes,
        "intensity": intensity,
        "of_peak_gflops": gflops / peak.gflops,
        "of_peak_gbytes": gbytes / peak.gbytes,
        "of_roof": gflops / min(peak.gflops, intensity * peak.gbytes),
        "error": 0.0,
    }


def break_even(points: Iterable[tuple[float, float]]) -> tuple[str, float | None]:
    """From which sparsity on a format beats dense, at all higher sparsities measured.

    Args:
        points: (sparsity, times faster than dense), any order. Between two of them the ratio is taken as linear.

    Returns:
        "at" and the sparsity; "below" and the lowest sparsity measured, if it wins there already; "none" and None, if
        it loses at the highest.
    """
    ordered = sorted(points)
    losing = [i for i, (_, ratio) in enumerate(ordered) if ratio <= 1]
    if not ordered or (losing and losing[-1] == len(ordered) - 1):
        return "none", None
    if not losing:
        return "below", ordered[0][0]
    (low, lost), (high, won) = ordered[losing[-1]], ordered[losing[-1] + 1]
    return "at", low + (high - low) * (1 - lost) / (won - lost)


def break_evens(rows: Sequence[Row]) -> dict[tuple[str, int, str], tuple[str, float | None]]:
    """(model, batch, contestant) -> `break_even`, where a contestant ran at two sparsities or more."""
    groups: dict[tuple[str, int, str], dict[float, float]] = {}
    for row in rows:
        if not row["refused"] and row["contestant"] != "dense" and isinstance(row["sparsity"], float):
            points = groups.setdefault((row["model"], row["batch"], row["contestant"]), {})
            points[row["sparsity"]] = row["ratio"]
    return {key: break_even(points.items()) for key, points in groups.items() if len(points) > 1}


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a file of JSON lines, making its folder; what is there stays, measurements are dear."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
