"""What `prune` costs a training step that computes no masks, against the plain optimizer's step.

    python experiments/benchmarks/train_step.py [--repeats 60] [--hlo FOLDER]

About half a minute. The convolutional network of the TensorFlow tutorial (5x5x32, 5x5x64, 3136x1024, 1024x10; 3.3
million weights) in plain JAX, batch 128 of 28x28 images, Adam. Three steps take turns, each on its own donated params
and state, at a sparsity of 0.9:

- `adam`: `optax.adam(1e-3)`;
- `prune`: `jp.prune(optax.adam(1e-3), ...)` between two updates of the masks;
- `keep_params_sparse`: Adam with fixed masks behind it.

The order within a turn is drawn anew each time. The ratio is that of the medians; beside it, the quartiles of the
ratio within a turn, which do not feel a machine that gets slower over minutes. Then the same for the update alone, at
fixed gradients: small against the step, but with so little noise around it that the cost in milliseconds is plain.
Last, the arrays of bool that the compiled step copies outside the computation of masks; `--hlo` writes the programs.
"""

import argparse
import pathlib
import random
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tables import describe_machine, print_table

import jaxprune as jp
from jaxprune.sparse.tuning import timing

BATCH = 128
SHAPES = {"conv1": (5, 5, 1, 32), "conv2": (5, 5, 32, 64), "fc1": (3136, 1024), "fc2": (1024, 10)}
METHOD = jp.Method(distribution=jp.Uniform())
RARELY = jp.every(10**6)  # step 0 only, which the warm-up takes


def make_params(seed: int = 0) -> Any:
    """He-initialised kernels, zero biases."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in SHAPES.items():
        kernel = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[:-1])))
        params[name] = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(shape[-1], jnp.float32)}
    return params


def make_batch(seed: int = 1) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.random((BATCH, 28, 28, 1), np.float32))
    return images, jnp.asarray(rng.integers(0, 10, BATCH))


def conv_block(x: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
    """Convolution, ReLU, 2x2 pool."""
    y = lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = jax.nn.relu(y + layer["bias"])
    return lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    x = conv_block(conv_block(images, params["conv1"]), params["conv2"])
    x = x.reshape(x.shape[0], -1)
    x = jax.nn.relu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    logits = x @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def training_step(tx: Any) -> Callable[..., Any]:
    """Gradients and update."""

    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(loss_fn)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def update_alone(tx: Any) -> Callable[..., Any]:
    """The update, for gradients that are there."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


class Trainer:
    """One optimizer at work: params, state (both donated), executable, and the seconds of every step."""

    def __init__(self, make_step: Callable[[Any], Callable[..., Any]], tx: Any, *inputs: Any) -> None:
        self.inputs = inputs
        self.params = make_params()
        self.state = tx.init(self.params)
        self.step = jax.jit(make_step(tx), donate_argnums=(0, 1)).lower(self.params, self.state, *inputs).compile()
        self.seconds: list[float] = []

    def advance(self) -> Any:
        self.params, self.state = self.step(self.params, self.state, *self.inputs)
        return self.params, self.state

    def timed(self) -> None:
        self.seconds.append(timing.once(self.advance))


def optimizers() -> dict[str, Callable[[], Any]]:
    masks = jp.compute_masks(METHOD, make_params(), 0.9)
    return {
        "adam": lambda: optax.adam(1e-3),
        "prune": lambda: jp.prune(optax.adam(1e-3), METHOD, sparsity=0.9, update_when=RARELY),
        "keep_params_sparse": lambda: optax.chain(optax.adam(1e-3), jp.keep_params_sparse(masks)),
    }


def take_turns(make_step: Callable[[Any], Callable[..., Any]], repeats: int, *inputs: Any) -> dict[str, Trainer]:
    """All optimizers, `repeats` timed steps each, in turns."""
    trainers = {name: Trainer(make_step, make(), *inputs) for name, make in optimizers().items()}
    for trainer in trainers.values():
        for _ in range(3):
            jax.block_until_ready(trainer.advance())
    order = random.Random(0)
    for _ in range(repeats):
        for trainer in order.sample(list(trainers.values()), len(trainers)):
            trainer.timed()
    return trainers


def print_times(what: str, trainers: dict[str, Trainer]) -> None:
    print(f"\n{what}")
    print_table({n: t.seconds for n, t in trainers.items()}, "adam", "times adam", lambda base, median: median / base)
    for name, trainer in trainers.items():
        if name != "adam":
            low, median, high = np.percentile(np.divide(trainer.seconds, trainers["adam"].seconds), [25, 50, 75])
            print(f"within a turn, {name} / adam: {median:.3f} ({low:.3f} - {high:.3f})")


def copied_masks(program: str) -> list[str]:
    """Shapes of the bool copies in the program's entry computation, which is what runs at every step."""
    entry = program[program.index("\nENTRY ") :]
    return re.findall(r" = (pred\[[\d,]*\])\S* copy\(", entry)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of `prune` in a training step.")
    parser.add_argument("--repeats", type=int, default=60, help="timings of each step")
    parser.add_argument("--hlo", metavar="FOLDER", help="write the compiled steps there")
    arguments = parser.parse_args()

    trainers = take_turns(training_step, arguments.repeats, *make_batch())
    print(describe_machine())
    dead = float(jp.sparsity_of(jp.nonzero_masks(trainers["prune"].params), jp.weights))
    print(f"tf_tutorial_cnn, batch {BATCH}; weights at zero after the pruned steps: {dead:.4f}")
    print_times("the training step", trainers)
    print_times("the update alone", take_turns(update_alone, arguments.repeats, make_params(seed=2)))
    print()
    for name, trainer in trainers.items():
        program = trainer.step.as_text()
        print(f"masks copied at every step of {name}: {copied_masks(program) or 'none'}")
        if arguments.hlo:
            pathlib.Path(arguments.hlo).mkdir(parents=True, exist_ok=True)
            pathlib.Path(arguments.hlo, f"{name}.hlo").write_text(program)


if __name__ == "__main__":
    main()
