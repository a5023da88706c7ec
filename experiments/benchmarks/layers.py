"""Sparse formats against XLA's dense product: three equal layers with ReLU in one jitted function.

    python experiments/benchmarks/layers.py [--sizes 1024 4096] [--batches 1 16 64 256] [--formats native bcsr]

About three minutes and 1 GiB. float32, weights pruned at random; all contestants of a row take turns in one process.
Prints medians and the ratio dense / sparse (above 1: sparse is faster); the answers are compared first.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from timing import describe_machine, time_once

from jaxprune import sparse

SPARSITIES = (0.5, 0.7, 0.9, 0.95, 0.99)


def three_layers(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
    for weight in weights:
        x = jax.nn.relu(x @ weight)
    return x


def make_weights(size: int, sparsity: float) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    scale = np.sqrt(2 / (size * (1 - sparsity)))
    draws = [rng.standard_normal((size, size), np.float32) * (rng.random((size, size)) >= sparsity) for _ in range(3)]
    return {f"{i}/kernel": jnp.asarray(draw * scale, jnp.float32) for i, draw in enumerate(draws)}


def check(answers: dict[str, jax.Array]) -> None:
    """All contestants give the dense answer, but for the order of sums."""
    for answer in answers.values():
        np.testing.assert_allclose(answer, answers["dense"], rtol=0, atol=1e-4 * float(answers["dense"].max()))


def measure(size: int, sparsity: float, batches: list[int], formats: list[str], repeats: int) -> None:
    dense = make_weights(size, sparsity)
    contestants = {"dense": dense} | {name: sparse.compress(dense, name) for name in formats}
    flops = 2 * sum(int(jnp.count_nonzero(weight)) for weight in dense.values())
    run = jax.jit(sparse.apply(lambda params, x: three_layers(x, list(params.values()))))
    for batch in batches:
        x = jnp.asarray(np.random.default_rng(1).standard_normal((batch, size), np.float32))
        check({name: run(params, x) for name, params in contestants.items()})
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(repeats):
            for name, params in contestants.items():
                seconds[name].append(time_once(run, params, x))
        base = float(np.median(seconds["dense"]))
        cells = [f"{base * 1e3:9.2f}"]
        for name in formats:
            low, median, high = np.percentile(seconds[name], [25, 50, 75])
            spread, rate = f"({low * 1e3:.2f}-{high * 1e3:.2f})", f"{flops * batch / median / 1e9:.0f} GFLOP/s"
            cells.append(f"{median * 1e3:9.2f} {spread:>16} {base / median:6.2f}x {rate:>12}")
        print(f"{size:>6} {batch:>5} {sparsity:>8.0%}  " + "  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sparse layers against dense ones.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--formats", nargs="+", default=["native"])
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    print(describe_machine(), "; native kernels:", sparse.native.instruction_set() or sparse.native.why_missing())
    print(
        f"{'size':>6} {'batch':>5} {'sparsity':>8}  {'dense ms':>9}  " + "  ".join(f"{f} ms" for f in arguments.formats)
    )
    for size in arguments.sizes:
        for sparsity in SPARSITIES:
            measure(size, sparsity, arguments.batches, arguments.formats, arguments.repeats)


if __name__ == "__main__":
    main()
