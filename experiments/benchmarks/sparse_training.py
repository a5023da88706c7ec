"""A training step on compressed params against the masked dense step.

    python experiments/benchmarks/sparse_training.py [--size 4096] [--batches 256 64] [--sparsities 0.9] [--seconds 8]

Three equal layers with ReLU, mean squared error, Adam, float32, zeros at random; params and state donated, and both
steps take turns in one process:

- `masked`: dense params, `optax.adam` with `jp.keep_params_sparse` behind it, as one trains with fixed masks;
- `compressed`: `jp.sparse.trainable(jp.sparse.compress(params, "native"))`, plain `optax.adam`;
- `copy`, with `--copy`: compressed params whose gradients go through a dense copy, as those of other formats do.

Bytes are those that live through the step (params with their indices, state, inputs), and the most that the compiled
step holds at once, temporaries included, as XLA counts them.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tables import describe_machine, print_table

import jaxprune as jp
from jaxprune.sparse.tuning import timing

LAYERS = 3


def make_params(size: int, sparsity: float) -> dict[str, Any]:
    """Of the leaves (in, out) so many weights at random are zero; the rest is drawn for ReLU."""
    rng = np.random.default_rng(0)
    params = {}
    for i in range(LAYERS):
        kernel = rng.standard_normal((size, size), np.float32) * np.float32(np.sqrt(2 / size / (1 - sparsity)))
        kernel[rng.random((size, size), np.float32) < sparsity] = 0
        params[f"layer{i}"] = {"kernel": kernel, "bias": np.zeros(size, np.float32)}
    return params


def forward(params: Any, x: jax.Array) -> jax.Array:
    for i in range(LAYERS):
        x = jax.nn.relu(x @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"])
    return x


class Trainer:
    """One way to train: what it trains and the optimizer's state (donated), executable, seconds of every step."""

    def __init__(self, values: Any, rest: Any, tx: Any, x: jax.Array) -> None:
        def step(values: Any, state: Any, rest: Any, x: jax.Array) -> tuple[Any, Any]:
            def loss(values: Any) -> jax.Array:
                return jnp.mean((jp.sparse.apply(forward)(jp.sparse.join(values, rest), x) - x) ** 2)

            updates, state = tx.update(jax.grad(loss)(values), state, values)
            return optax.apply_updates(values, updates), state

        self.values, self.rest, self.x = values, rest, x
        self.state = tx.init(values)
        self.step = jax.jit(step, donate_argnums=(0, 1)).lower(self.values, self.state, rest, x).compile()
        self.seconds: list[float] = []

    def advance(self) -> Any:
        self.values, self.state = self.step(self.values, self.state, self.rest, self.x)
        return self.values, self.state

    def timed(self) -> None:
        self.seconds.append(timing.once(self.advance))

    def megabytes(self) -> tuple[float, float]:
        """Arguments of the step, and the most at once."""
        found: Any = self.step.memory_analysis()
        arguments = found.argument_size_in_bytes
        return arguments / 1e6, (
            arguments + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
        ) / 1e6


def ways(size: int, sparsity: float, with_copy: bool) -> dict[str, Callable[[jax.Array], Trainer]]:
    params = make_params(size, sparsity)
    compressed = jp.sparse.compress(params, "native", select=lambda name, leaf: leaf.ndim == 2)
    values, rest = jp.sparse.trainable(compressed)
    arrays = jax.tree.map(jnp.asarray, params)
    masks = jp.nonzero_masks(arrays)
    masks = jax.tree.map(lambda leaf, mask: mask if leaf.ndim == 2 else jnp.ones_like(mask), arrays, masks)
    fixed = optax.chain(optax.adam(1e-4), jp.keep_params_sparse(masks))
    copied = eqx.partition(compressed, eqx.is_inexact_array)
    fresh: Callable[[Any], Any] = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731, since steps are donated
    made = {
        "masked": lambda x: Trainer(fresh(arrays), jax.tree.map(lambda _: None, arrays), fixed, x),
        "compressed": lambda x: Trainer(fresh(values), rest, optax.adam(1e-4), x),
    }
    if with_copy:
        made["copy"] = lambda x: Trainer(fresh(copied[0]), copied[1], optax.adam(1e-4), x)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step on compressed params against the masked dense step.")
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of every layer")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9, 0.95, 0.99])
    parser.add_argument("--seconds", type=float, default=8, help="of timing for each batch and sparsity")
    parser.add_argument("--copy", action="store_true", help="time compressed params with dense gradients too")
    arguments = parser.parse_args()
    print(describe_machine())
    for sparsity in arguments.sparsities:
        made = ways(arguments.size, sparsity, arguments.copy)
        for batch in arguments.batches:
            x = jnp.asarray(np.random.default_rng(1).standard_normal((batch, arguments.size), np.float32))
            trainers = {name: make(x) for name, make in made.items()}
            for trainer in trainers.values():
                jax.block_until_ready(trainer.advance())
            begin = time.perf_counter()
            while time.perf_counter() - begin < arguments.seconds:
                for trainer in trainers.values():
                    trainer.timed()
            print(f"\nsize {arguments.size}, batch {batch}, sparsity {sparsity}")
            times = {name: trainer.seconds for name, trainer in trainers.items()}
            print_table(times, "masked", "times faster", lambda base, median: base / median)
            for name, trainer in trainers.items():
                print("{}: {:.0f} MB live, {:.0f} at the most".format(name, *trainer.megabytes()))


if __name__ == "__main__":
    main()
