"""One-shot pruning of a small language model on texts that it samples itself: perplexity, divergence, agreement.

    python experiments/benchmarks/oneshot_stories.py MODEL --texts FOLDER --out oneshot_stories.jsonl
        [--methods weighed] [--patterns 0.5 2:4] [--evaluate 100]

MODEL is llama2.c's stories15M, or what else `jaxprune generate` reads. The texts are 200 of 256 tokens for evaluation
(seed 0, of which the first `--evaluate` count) and 128 for calibration (seed 1), sampled in float64 and kept in FOLDER;
their hashes stand in every row. The seven products of each block are pruned, embedding and norms are not.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tables import describe_machine

import jaxprune as jp
from jaxprune.lab.models import language
from jaxprune.lab.models.language import decoder, evaluation, texts

BLOCKS = {"order": "blocks", "fit": "own"}
PRODUCTS = {"order": "products", "fit": "dense"}
ALTERNATING = jp.oneshot.AlternatingDirections(every=5, iterations=500)
METHODS = {
    "magnitude": (jp.oneshot.Magnitude(), {"order": "layers"}),
    "wanda": (jp.oneshot.Wanda(), BLOCKS),
    "wanda, least squares": (jp.oneshot.Wanda(refit=True), BLOCKS),
    "sparsegpt": (jp.oneshot.SparseGPT(), BLOCKS),
    "sparsegpt, least squares": (jp.oneshot.SparseGPT(refit=True), BLOCKS),
    "sparsegpt, products, dense": (jp.oneshot.SparseGPT(), PRODUCTS),
    "alternating": (ALTERNATING, BLOCKS),
    "alternating, products, dense": (ALTERNATING, PRODUCTS),
    "weighed": (ALTERNATING, PRODUCTS),
}
"""Name -> solver and order; "weighed" has the errors of outputs weighed by the loss's derivatives."""


def kept_texts(folder: Path, model: language.Language, name: str, count: int, seed: int) -> np.ndarray:
    """Texts of the model, from the folder or sampled into it."""
    path = folder / f"{name}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path, texts.sampled(model.params, model.config, count, 256, seed))
    return np.load(path)


def main() -> None:
    """Measure what is asked for, one row after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.7", "2:4"])
    parser.add_argument("--evaluate", type=int, default=100)
    options = parser.parse_args()
    model = language.read(options.model)
    evaluated = kept_texts(options.texts, model, "evaluation", 200, 0)
    calibrating = kept_texts(options.texts, model, "calibration", 128, 1)
    batches = [jnp.asarray(calibrating[i : i + 32]) for i in range(0, len(calibrating), 32)]
    forward = partial(decoder.forward, config=model.config)

    def loss(params, tokens):
        scores = jax.nn.log_softmax(forward(params, tokens)[:, :-1])
        return -jnp.sum(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))

    for method in options.methods:
        for pattern in options.patterns:
            solver, order = METHODS[method]
            chosen = (
                {"pattern": jp.NM(*map(int, pattern.split(":")))} if ":" in pattern else {"sparsity": float(pattern)}
            )
            begun = time.perf_counter()
            params, _ = jp.oneshot.prune(
                forward, model.params, batches, solver, select="*layers*kernel", **order, **chosen,
                loss=loss if method == "weighed" else None,
            )  # fmt: skip
            seconds = time.perf_counter() - begun
            found = evaluation.compare(forward, params, model.params, evaluated[: options.evaluate])
            row = {
                "method": method, "pattern": pattern, "perplexity": round(found.perplexity, 3),
                "dense": round(found.dense, 3), "divergence": round(found.divergence, 4),
                "agreement": round(found.agreement, 4), "seconds": round(seconds),
                "texts": [texts.digest(evaluated), texts.digest(calibrating)], "machine": describe_machine(),
            }  # fmt: skip
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
