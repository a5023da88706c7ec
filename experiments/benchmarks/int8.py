"""What INT8 costs in accuracy: weights and activations in 8 bits, simulated exactly; MNIST and ResNet-50.

    for name in lenet_5 tf_tutorial_cnn; do
      jaxprune run experiments/quickstart.toml --out runs/$name --data '{ name = "mnist", validation = 0.0 }' \
        --model "{ name = \"$name\" }" --train.duration "6 epochs" --prune.duration "4 epochs" \
        --prune.update_every "100 steps" --finetune.duration "2 epochs"
    done
    python experiments/benchmarks/int8.py runs/lenet_5 runs/tf_tutorial_cnn [--resnet50 FOLDER] [--percentile 100]

About a minute for each run, and for ResNet-50. Of a finished run on MNIST the dense and the pruned model of the first
seed are taken as they are; ranges are found on 512 training images, and all 10,000 test images are classified: in
floating point, with weights alone in 8 bits, and with weights and activations.

FOLDER holds ResNet-50's published weights and 20 photographs from ImageNet, as for the tests: resnet50/ and
imagenet_samples/. There is no training data with them, so the ranges come from the first four photographs; the other
16 are counted apart. It also runs on integers (format "int8"), and its logits are held against the simulated ones.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import photographs
from tables import describe_machine

from jaxprune import nonzero_masks, sparse, sparsity_of
from jaxprune.lab.bench.whole import of_run
from jaxprune.lab.checkpoints import checkpoint
from jaxprune.lab.data import sets
from jaxprune.lab.recipe import build
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.runs import stages, train
from jaxprune.quantize.codes import dequantize, to_integers
from jaxprune.quantize.int8 import calibrate, int8
from jaxprune.tree import weights

CALIBRATION = 512
PHOTOGRAPHS = 4


def models_of(folder: Path, config: cfg.Config) -> Iterator[tuple[Callable[..., Any], Any]]:
    """Function and params of the dense model, then of the pruned and fine-tuned one."""
    network = of_run(folder)
    started = train.start(network.params, build.optimizer(config.train, 1))
    dense, _ = checkpoint.restore_latest(folder / f"seed_{config.seeds[0]}" / "train", started)
    if dense is None:
        raise SystemExit(f"{folder} has no checkpoint of its dense training. Run its command again.")
    yield network.apply, jax.tree.map(jnp.asarray, dense.state.params)
    yield network.apply, network.params


def compare(folder: Path, percentile: float) -> None:
    """Two rows of the table."""
    config = cfg.load(folder / "config.toml")
    dataset = sets.load(config.data.name, config.data.data_dir or None)
    test = stages.samples_of(dataset.test_images, dataset.test_labels, dataset.scale)
    images = train.scaled(test, jnp.asarray(dataset.train_images[:CALIBRATION]))
    for apply, params in models_of(folder, config):

        def accuracy(function: Callable[..., Any], params: Any) -> float:
            return 100 * train.accuracy(train.predict(jax.jit(function), params, test), test)

        ranges = calibrate(apply, params, [images], percentile=percentile)
        shares = (
            accuracy(apply, params),
            accuracy(apply, dequantize(to_integers(params))),
            accuracy(int8(apply, ranges), params),
        )
        sparsity = float(sparsity_of(nonzero_masks(params), weights))
        print_row(f"{config.model.name}, {sparsity:.0%}", shares, "points")


def of_photographs(folder: Path, percentile: float) -> None:
    """The row of ResNet-50."""
    model, params, images, truth = photographs.load(folder)
    ranges = calibrate(model.apply, params, [images[:PHOTOGRAPHS]], percentile=percentile)
    simulated, real = int8(model.apply, ranges), sparse.apply(model.apply)
    scores = [
        np.asarray(jax.jit(function)(given, images))
        for function, given in (
            (model.apply, params),
            (model.apply, dequantize(to_integers(params))),
            (simulated, params),
            (real, sparse.compress(params, "int8", ranges=ranges)),
        )
    ]
    found = [one.argmax(-1) for one in scores]
    print_row(f"resnet50, {len(truth)} photographs", [100 * np.mean(guess == truth) for guess in found[:3]], "points")
    kept = found[2] == found[0]
    print(
        f"  top-1 kept on {kept.sum()} of {len(truth)}, on {kept[PHOTOGRAPHS:].sum()} of the others than the first four"
    )
    differ = (scores[2] != scores[3]).sum()
    print(f"  of {scores[2].size} logits {differ} differ between the simulation and the kernels of integers")


def print_row(name: str, shares: Any, unit: str) -> None:
    plain, weights_alone, both = shares
    print(f"{name:<28}{plain:>9.2f} %{weights_alone:>11.2f} %{both:>11.2f} %{both - plain:>+9.2f} {unit}", flush=True)


def main() -> None:
    """The table asked for."""
    parser = argparse.ArgumentParser(description="Accuracy of INT8 weights and activations.")
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs")
    parser.add_argument("--resnet50", type=Path, help="folder of the published weights and the photographs")
    parser.add_argument("--percentile", type=float, default=100.0, help="of activations; less cuts both ends off")
    arguments = parser.parse_args()
    print(describe_machine())
    print(f"{'model, weights removed':<28}{'float32':>11}{'int8 weights':>13}{'and activ.':>13}{'change':>9}")
    for folder in arguments.runs:
        compare(folder, arguments.percentile)
    if arguments.resnet50:
        of_photographs(arguments.resnet50, arguments.percentile)


if __name__ == "__main__":
    main()
