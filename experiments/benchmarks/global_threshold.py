"""The exact global threshold over 25 million weights, against sorting them.

    python experiments/benchmarks/global_threshold.py [--repeats 15] [--sort-repeats 3] [--scale 1.0]

About a minute and 1 GiB, nearly all of it the sort. Random float32 scores with the shapes of ResNet-50's 54 weights
(25.5 million), 90 % of them to be removed. Timed, compiled and in one process:

- `jnp.sort` of the same scores in one array, and the k-th largest of it: what a threshold costs when one sorts;
- `kth_largest` of that array: the threshold alone;
- `top_k_masks` of the leaves where they lie: masks with an exact count, ties told apart.

The three take turns. The ratio is that of the medians; the answers are compared before anything is timed.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np
from tables import describe_machine, print_table

from jaxprune.exact.ranking import kth_largest, top_k_masks
from jaxprune.sparse.tuning import timing

SPARSITY = 0.9
STAGES = ((64, 256, 3), (128, 512, 4), (256, 1024, 6), (512, 2048, 3))


def resnet50_shapes() -> list[tuple[int, ...]]:
    """HWIO kernels of the convolutions, and the classifier."""
    shapes: list[tuple[int, ...]] = [(7, 7, 3, 64)]
    width = 64
    for narrow, wide, blocks in STAGES:
        shapes.append((1, 1, width, wide))  # the projection of the stage's first block
        for _ in range(blocks):
            shapes += [(1, 1, width, narrow), (3, 3, narrow, narrow), (1, 1, narrow, wide)]
            width = wide
    return [*shapes, (width, 1000)]


def make_scores(scale: float) -> list[jax.Array]:
    """Absolute values of He-initialised weights; `scale` shrinks the output axes for a quick look."""
    rng = np.random.default_rng(0)
    shapes = [(*shape[:-1], max(1, round(shape[-1] * scale))) for shape in resnet50_shapes()]
    draws = [rng.standard_normal(shape, np.float32) * math.sqrt(2 / math.prod(shape[:-1])) for shape in shapes]
    return [jnp.abs(jnp.asarray(draw)) for draw in draws]


@jax.jit
def sort_threshold(flat: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest, by sorting."""
    return jnp.sort(flat)[flat.size - k]


def check(leaves: list[jax.Array], flat: jax.Array, k: jax.Array) -> None:
    """The three agree: one threshold, and exactly k survivors."""
    threshold = sort_threshold(flat, k)
    masks = top_k_masks(leaves, k)
    assert kth_largest(flat, k) == threshold
    assert sum(int(mask.sum()) for mask in masks) == int(k)
    assert all(bool(jnp.all(leaf[mask] >= threshold)) for leaf, mask in zip(leaves, masks, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact global threshold against a sort.")
    parser.add_argument("--repeats", type=int, default=15, help="timings of the two that count")
    parser.add_argument("--sort-repeats", type=int, default=3, help="timings of the sort, which is slow")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the output channels")
    arguments = parser.parse_args()

    leaves = make_scores(arguments.scale)
    flat = jnp.concatenate([leaf.ravel() for leaf in leaves])
    k = jnp.uint32(flat.size - round(flat.size * SPARSITY))
    check(leaves, flat, k)

    masks_of = jax.jit(lambda leaves, k: top_k_masks(leaves, k))
    threshold_of = jax.jit(kth_largest)
    masks_of(leaves, k), threshold_of(flat, k)
    seconds: dict[str, list[float]] = {"jnp.sort": [], "kth_largest": [], "top_k_masks": []}
    for turn in range(arguments.repeats):
        if turn < arguments.sort_repeats:
            seconds["jnp.sort"].append(timing.once(lambda: sort_threshold(flat, k)))
        seconds["kth_largest"].append(timing.once(lambda: threshold_of(flat, k)))
        seconds["top_k_masks"].append(timing.once(lambda: masks_of(leaves, k)))

    print(describe_machine())
    print(f"{flat.size / 1e6:.1f} million float32 scores in {len(leaves)} leaves, sparsity {SPARSITY}\n")
    print_table(seconds, "jnp.sort", "times faster", lambda base, median: base / median)


if __name__ == "__main__":
    main()
