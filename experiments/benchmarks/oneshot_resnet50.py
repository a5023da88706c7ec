"""One-shot pruning of ResNet-50, calibrated on crops of a few photographs: top-1, and divergence from dense.

    python experiments/benchmarks/oneshot_resnet50.py FOLDER --out oneshot_resnet50.jsonl
        [--methods "sparsegpt, products, dense"] [--sparsity 0.5] [--folds 0 1 2 3 4] [--crops 4]

FOLDER holds ResNet-50's published weights and 20 photographs from ImageNet, as for the tests: resnet50/ and
imagenet_samples/. Of five folds each holds four photographs out; the model is calibrated on `--crops` random crops of
each of the other 16, every second one mirrored. All convolutions and the last layer are pruned, batch norms are not,
nor are their statistics gathered anew. A row counts photographs (their middle, as usual) called right and called what
the dense model calls them, of the 16 and of the four held out, and has the mean KL divergence from dense in nats.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import photographs
from oneshot_stories import BLOCKS, PRODUCTS
from tables import add_row, describe_machine

import jaxprune as jp

METHODS = {
    "magnitude": (jp.oneshot.Magnitude(), {"order": "layers"}),
    "wanda": (jp.oneshot.Wanda(), BLOCKS),
    "sparsegpt": (jp.oneshot.SparseGPT(), BLOCKS),
    "sparsegpt, products, dense": (jp.oneshot.SparseGPT(), PRODUCTS),
    "alternating, products, dense": (jp.oneshot.AlternatingDirections(iterations=60), PRODUCTS),
}
"""Name -> solver and order."""
BATCH = 8


def compared(logits, dense, truth, held):
    """How many photographs are called right, and as by the dense model, of those calibrated on and those held out."""
    ours, theirs = jax.nn.log_softmax(logits), jax.nn.log_softmax(dense)
    apart = np.asarray(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))
    guess, of_dense = np.asarray(logits.argmax(-1)), np.asarray(dense.argmax(-1))
    return {
        name: {
            "photographs": int(some.sum()),
            "right": int((guess == truth)[some].sum()),
            "dense right": int((of_dense == truth)[some].sum()),
            "as dense": int((guess == of_dense)[some].sum()),
            "divergence": round(float(apart[some].mean()), 4),
        }
        for name, some in (("calibrated", ~held), ("held", held))
    }


def main() -> None:
    """Measure what is asked for, one row after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--folds", nargs="+", type=int, choices=range(5), default=[4])
    parser.add_argument("--crops", type=int, default=4, help="of each photograph")
    options = parser.parse_args()
    model, params, images, truth = photographs.load(options.folder)
    forward = jax.jit(model.apply)
    dense = forward(params, images)
    for fold in options.folds:
        held = np.arange(len(truth)) // 4 == fold
        crops = photographs.crops(options.folder, np.flatnonzero(~held), options.crops, seed=fold)
        batches = [crops[i : i + BATCH] for i in range(0, len(crops), BATCH)]
        for method in options.methods:
            solver, order = METHODS[method]
            begun = time.perf_counter()
            pruned, masks = jp.oneshot.prune(model.apply, params, batches, solver, options.sparsity, **order)
            seconds = time.perf_counter() - begun
            row = {
                "method": method, "sparsity": round(float(jp.sparsity_of(masks, jp.weights)), 4), "fold": fold,
                "crops": len(crops), **compared(forward(pruned, images), dense, truth, held),
                "seconds": round(seconds), "machine": describe_machine(),
            }  # fmt: skip
            add_row(options.out, row)


if __name__ == "__main__":
    main()
