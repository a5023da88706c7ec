"""What compaction brings: ResNet-50 without half of the channels of every layer, against itself, and every other model.

    python experiments/benchmarks/compact.py [--models resnet50] [--batch 8] [--sparsity 0.5] [--keep conv1] [--seconds]

Channels are masked by mean magnitude, `Channels` with `Uniform`, all but those of the leaves to keep; then `compact`
removes them. For every model: seconds for the couplings and for compacting, weights and multiply-adds before and after,
and the largest difference between compacted and masked results relative to the largest result. With `--seconds`, dense
and compacted models take turns in this process; the ratio is that of the medians. Weights are random, since neither
speed nor exactness depends on them.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tables import describe_machine, print_table

import jaxprune as jp
from jaxprune.lab.models import zoo
from jaxprune.sparse.tuning import timing


def make_input(sample: jax.ShapeDtypeStruct, batch: int) -> jax.Array:
    """Tokens or pixels."""
    rng = np.random.default_rng(0)
    shape = (batch, *sample.shape)
    if jnp.issubdtype(sample.dtype, jnp.integer):
        return jnp.asarray(rng.integers(0, 100, shape), sample.dtype)
    return jnp.asarray(rng.standard_normal(shape), sample.dtype)


def compare(name: str, batch: int, sparsity: float, keep: list[str], seconds: float) -> None:
    """Print what becomes of one model."""
    network = zoo.build(name, jax.random.key(0))
    x = make_input(network.sample, batch)
    start = time.perf_counter()
    channels = jp.Channels(jp.couplings(network.apply, network.params, x))
    coupled = time.perf_counter() - start
    rules = {**{f"{kept}/*": 0.0 for kept in keep}, "*": sparsity}
    method = jp.Method(granularity=channels, distribution=jp.distributions.ByRule(rules))
    masks = jax.jit(lambda params: jp.compute_masks(method, params, sparsity))(network.params)
    start = time.perf_counter()
    small = jp.compact(network.apply, network.params, masks, x)
    compacted = time.perf_counter() - start
    dense, compact = jax.jit(network.apply), jax.jit(small.apply)
    want = dense(jp.apply_masks(network.params, masks), x)
    error = float(jnp.abs(compact(small.params, x) - want).max() / jnp.abs(want).max())
    before, after = (costs_of(fn, params, x) for fn, params in ((dense, network.params), (compact, small.params)))
    print(
        f"{name:<16}{sparsity:>6.0%}{before[0]:>14,} -> {after[0]:>12,}{before[1] / batch / 1e6:>10.1f} -> "
        f"{after[1] / batch / 1e6:>8.1f} MMACs{error:>10.1e}{coupled:>7.1f} s{compacted:>7.1f} s   {small.refusal}"
    )
    if seconds:
        contestants = {"dense": lambda: dense(network.params, x), "compacted": lambda: compact(small.params, x)}
        print_table(
            timing.interleaved(contestants, seconds=seconds), "dense", "times faster", lambda base, own: base / own
        )


def costs_of(fn: Any, params: Any, x: jax.Array) -> tuple[int, int]:
    """Weights and multiply-adds."""
    sites = jp.trace(fn, params, x)
    return sum(leaf.size for leaf in jax.tree.leaves(params)), sum(site.macs for site in sites)


def main() -> None:
    """Compare the models asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["resnet50"], choices=zoo.NAMES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--keep", nargs="*", default=[], help="layers whose outputs are left whole")
    parser.add_argument("--seconds", type=float, default=0.0)
    arguments = parser.parse_args()
    print(describe_machine())
    print(f"{'model':<16}{'masked':>6}{'weights':>14}{'':>28}{'':>6}{'error':>20}{'couple':>9}{'compact':>9}")
    for name in arguments.models:
        compare(name, arguments.batch, arguments.sparsity, arguments.keep, arguments.seconds)


if __name__ == "__main__":
    main()
