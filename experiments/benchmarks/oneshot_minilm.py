"""One-shot pruning of a sentence encoder: cosines of its vectors to those of the dense model.

    python experiments/benchmarks/oneshot_minilm.py MODEL --calibrate FOLDER --evaluate FOLDER
        --out oneshot_minilm.jsonl [--methods "alternating, products, dense"] [--patterns 0.5 2:4]
        [--windows 256] [--sentences 256]

MODEL is the folder of all-MiniLM-L6-v2. The other two hold plain texts (*.txt), of which sentences of 6 to 40 words are
taken, evenly over all files. Those to calibrate with are put one behind the other and cut into windows of 64 tokens, so
that no product is fitted to what only fills up; those to measure on stand alone. The six products of each layer are
pruned, embeddings and norms are not.
"""

import argparse
import dataclasses
import re
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from oneshot_stories import BLOCKS, PRODUCTS, share_of
from tables import add_row, describe_machine

import jaxprune as jp
from jaxprune.lab.models.encoders import bert, wordpiece

ALTERNATING = jp.oneshot.AlternatingDirections(iterations=120)
METHODS = {
    "magnitude": (jp.oneshot.Magnitude(), {"order": "layers"}),
    "wanda": (jp.oneshot.Wanda(), BLOCKS),
    "sparsegpt": (jp.oneshot.SparseGPT(), BLOCKS),
    "sparsegpt, products, dense": (jp.oneshot.SparseGPT(), PRODUCTS),
    "alternating, products, dense": (ALTERNATING, PRODUCTS),
    "weighed": (ALTERNATING, PRODUCTS),
    "weighed, diagonal": (dataclasses.replace(ALTERNATING, diagonal=True), PRODUCTS),
}
"""Name -> solver and order; "weighed" has the errors of outputs weighed by what they do to the vectors."""
LENGTH, BATCH = 64, 32


def sentences(folder: Path, count: int) -> list[str]:
    """Sentences of a folder's texts, evenly over all of them."""
    text = " ".join(path.read_text("utf-8") for path in sorted(folder.rglob("*.txt")))
    found = [one for one in re.split(r"(?<=[.!?])\s+", text) if 6 <= len(one.split()) <= 40]
    return [" ".join(found[i * len(found) // count].split()) for i in range(count)]


def windows(tokenizer: wordpiece.WordPiece, texts: list[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of texts behind one another, cut into windows; and that all of them are seen."""
    encoded = [tokenizer.encode(text) for text in texts]
    (first, *_, last), inside = encoded[0], np.concatenate([one[1:-1] for one in encoded])
    rows = inside[: count * (LENGTH - 2)].reshape(count, -1)
    tokens = np.pad(rows, ((0, 0), (1, 1)), constant_values=((0, 0), (first, last)))
    return tokens, np.ones(tokens.shape, bool)


def main() -> None:
    """Measure what is asked for, one row after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--evaluate", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"])
    parser.add_argument("--windows", type=int, default=256, help="to calibrate with")
    parser.add_argument("--sentences", type=int, default=256, help="to measure on")
    options = parser.parse_args()
    tokenizer = wordpiece.read(options.model)
    params, rest = eqx.partition(bert.read(options.model), jp.tree.is_array)

    @jax.jit
    def vectors(params, batch):
        return bert.sentence_vectors(eqx.combine(params, rest), *batch)

    def along(params, batch):
        """Vectors along random directions, whose derivatives have the second moments of the vectors' own."""
        found = vectors(params, batch)
        return jnp.sum(found * jax.random.normal(jax.random.key(jnp.sum(batch[0])), found.shape))

    def batches(tokens, seen):
        pairs = zip(*(np.split(one, range(BATCH, len(one), BATCH)) for one in (tokens, seen)), strict=True)
        return [tuple(map(jnp.asarray, pair)) for pair in pairs]

    texts = sentences(options.calibrate, 4 * options.windows)
    calibrating = batches(*windows(tokenizer, texts, options.windows))
    evaluated = batches(*tokenizer.batch(sentences(options.evaluate, options.sentences), LENGTH))
    dense = [vectors(params, batch) for batch in evaluated]
    for method in options.methods:
        for pattern in options.patterns:
            solver, order = METHODS[method]
            chosen = share_of(pattern)
            begun = time.perf_counter()
            loss = along if "weighed" in method else None
            pruned, _ = jp.oneshot.prune(vectors, params, calibrating, solver, loss=loss, **order, **chosen)
            seconds = time.perf_counter() - begun
            ours = [vectors(pruned, batch) for batch in evaluated]
            cosines = np.concatenate([np.sum(np.asarray(a) * b, axis=-1) for a, b in zip(ours, dense, strict=True)])
            row = {
                "method": method, "pattern": pattern, "cosine": round(float(cosines.mean()), 4),
                "lowest of 20": round(float(np.quantile(cosines, 0.05)), 4), "sentences": len(cosines),
                "windows": options.windows, "seconds": round(seconds), "machine": describe_machine(),
            }  # fmt: skip
            add_row(options.out, row)


if __name__ == "__main__":
    main()
