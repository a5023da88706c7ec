"""One-shot pruning of a sentence encoder: cosines of its vectors to those of the dense model.

    python experiments/benchmarks/oneshot_minilm.py MODEL --calibrate FOLDER --evaluate FOLDER
        --out oneshot_minilm.jsonl [--methods "alternating, products, dense"] [--patterns 0.5 2:4]
        [--sentences 512]

MODEL is the folder of all-MiniLM-L6-v2. The other two hold plain texts (*.txt), of which sentences of 6 to 40 words are
taken, evenly over all files: to calibrate with, filled up to 64 tokens, and to measure on. The six products of each
layer are pruned, embeddings and norms are not.
"""

import argparse
import json
import re
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tables import describe_machine

import jaxprune as jp
from jaxprune.lab.models.language import bert, wordpiece

BLOCKS = {"order": "blocks", "fit": "own"}
PRODUCTS = {"order": "products", "fit": "dense"}
METHODS = {
    "magnitude": (jp.oneshot.Magnitude(), {"order": "layers"}),
    "wanda": (jp.oneshot.Wanda(), BLOCKS),
    "sparsegpt": (jp.oneshot.SparseGPT(), BLOCKS),
    "sparsegpt, products, dense": (jp.oneshot.SparseGPT(), PRODUCTS),
    "alternating": (jp.oneshot.AlternatingDirections(), BLOCKS),
    "alternating, products, dense": (jp.oneshot.AlternatingDirections(), PRODUCTS),
}
"""Name -> solver and order."""
LENGTH, BATCH = 64, 64


def sentences(folder: Path, count: int) -> list[str]:
    """Sentences of a folder's texts, evenly over all of them."""
    text = " ".join(path.read_text("utf-8") for path in sorted(folder.rglob("*.txt")))
    found = [one for one in re.split(r"(?<=[.!?])\s+", text) if 6 <= len(one.split()) <= 40]
    return [" ".join(found[i * len(found) // count].split()) for i in range(count)]


def main() -> None:
    """Measure what is asked for, one row after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--evaluate", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"])
    parser.add_argument("--sentences", type=int, default=512)
    options = parser.parse_args()
    tokenizer = wordpiece.read(options.model)
    params, rest = eqx.partition(bert.read(options.model), jp.tree.is_array)

    @jax.jit
    def vectors(params, batch):
        return bert.sentence_vectors(eqx.combine(params, rest), *batch)

    def batches(folder):
        tokens, seen = (jnp.asarray(x) for x in tokenizer.batch(sentences(folder, options.sentences), LENGTH))
        return [(tokens[i : i + BATCH], seen[i : i + BATCH]) for i in range(0, len(tokens), BATCH)]

    calibrating, evaluated = batches(options.calibrate), batches(options.evaluate)
    dense = [vectors(params, batch) for batch in evaluated]
    for method in options.methods:
        for pattern in options.patterns:
            solver, order = METHODS[method]
            chosen = (
                {"pattern": jp.NM(*map(int, pattern.split(":")))} if ":" in pattern else {"sparsity": float(pattern)}
            )
            begun = time.perf_counter()
            pruned, _ = jp.oneshot.prune(vectors, params, calibrating, solver, **order, **chosen)
            seconds = time.perf_counter() - begun
            ours = [vectors(pruned, batch) for batch in evaluated]
            cosines = np.concatenate([np.sum(np.asarray(a) * b, axis=-1) for a, b in zip(ours, dense, strict=True)])
            row = {
                "method": method, "pattern": pattern, "cosine": round(float(cosines.mean()), 4),
                "lowest of 20": round(float(np.quantile(cosines, 0.05)), 4), "sentences": len(cosines),
                "seconds": round(seconds), "machine": describe_machine(),
            }  # fmt: skip
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
