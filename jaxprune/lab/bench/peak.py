"""What this machine can do at best, measured: the two roofs that every row is held against.

    attainable GFLOP/s = min(peak GFLOP/s, FLOP per byte x peak GB/s)

References:
    Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.sparse.tuning import timing


class Peak(NamedTuple):
    """The best of a few runs of a large product and of two large streams.

    Attributes:
        gflops: GFLOP/s of a float32 product in XLA, an addition and a multiplication counted as two.
        gbytes: GB/s of memory, read and written.
        how: in words.
    """

    gflops: float
    gbytes: float
    how: str


def measure(size: int = 4096, mebibytes: int = 512, repeats: int = 5) -> Peak:
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
    best = max(rates, key=lambda name: rates[name])
    return Peak(
        gflops=2 * size**3 / min(runs["product"]) / 1e9,
        gbytes=rates[best] / 1e9,
        how=f"best of {repeats} runs in XLA: {size} x {size} float32 product; {best} of {mebibytes} MiB",
    )
