"""A mask update of 25 million weights in 50 leaves, by distribution and granularity, against one sort of them.

    python experiments/benchmarks/mask_update.py [--repeats 9] [--sort-repeats 3] [--scale 1.0]

Two minutes and 2 GiB. `compute_masks` as a whole (scores, contest, masks), compiled, 90 % removed (of NM(2, 4) half),
against `jnp.sort` of the same weights in one array. All take turns. Then what `prune` keeps and needs: bytes of its
state beyond the inner optimizer's, and the temporaries of the compiled step.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tables import describe_machine, print_table

import jaxprune as jp
from jaxprune.sparse.tuning import timing

LEAVES, SIDE = 50, (512, 1000)
METHODS = {
    "Global": jp.Method(distribution=jp.Global()),
    "Uniform": jp.Method(distribution=jp.Uniform()),
    "NM(2, 4)": jp.Method(distribution=jp.NM(2, 4)),
    "Block(4, 4), Global": jp.Method(granularity=jp.Block(4, 4), distribution=jp.Global()),
    "Block(4, 4), Uniform": jp.Method(granularity=jp.Block(4, 4), distribution=jp.Uniform()),
    "ERK": jp.Method(distribution=jp.ERK()),
    "PerOutput": jp.Method(distribution=jp.PerOutput()),
    "Budget": jp.Method(distribution=jp.distributions.Budget()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Mask updates against a sort.")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sort-repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the inputs of each leaf")
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    shape = (max(4, round(SIDE[0] * arguments.scale) // 4 * 4), SIDE[1])
    params = {f"layer_{i:02}": jnp.asarray(rng.standard_normal(shape, np.float32)) for i in range(LEAVES)}
    flat = jnp.concatenate([leaf.ravel() for leaf in params.values()])

    def update(method: jp.Method):
        sparsity = None if isinstance(method.distribution, jp.NM) else jnp.float32(0.9)
        run = jax.jit(lambda params: jp.compute_masks(method, params, sparsity)).lower(params).compile()
        return lambda: run(params)

    sort = jax.jit(jnp.sort).lower(flat).compile()
    calls = {name: update(method) for name, method in METHODS.items()}
    seconds: dict[str, list[float]] = {"jnp.sort": [], **{name: [] for name in calls}}
    for turn in range(arguments.repeats):
        if turn < arguments.sort_repeats:
            seconds["jnp.sort"].append(timing.once(lambda: sort(flat)))
        for name, call in calls.items():
            seconds[name].append(timing.once(call))
    print(describe_machine())
    print(f"{flat.size / 1e6:.1f} million float32 weights in {LEAVES} leaves\n")
    print_table(seconds, "jnp.sort", "times faster", lambda base, median: base / median)
    print()
    memory(params, flat.size)


def memory(params: dict[str, jax.Array], n: int) -> None:
    """Bytes a weight of states, and of the temporaries of one compiled update."""
    inner = optax.adam(1e-3)
    kept = {"adam": inner}
    for packed in (False, True):
        name = "prune(adam), packed" if packed else "prune(adam)"
        kept[name] = jp.prune(inner, METHODS["Global"], sparsity=0.9, update_when=jp.every(100), packed=packed)
    print(f"{'bytes a weight':<24}{'state':>8}{'temporaries':>14}")
    for name, tx in kept.items():
        state = tx.init(params)

        def step(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        print(f"{name:<24}{size / n:>8.3f}{compiled.memory_analysis().temp_size_in_bytes / n:>14.3f}")


if __name__ == "__main__":
    main()
