"""SparseGPT jointly with quantization beside pruning first and rounding then: perplexity, and bytes of the file.

    python experiments/benchmarks/oneshot_quantized.py MODEL --texts FOLDER --out oneshot_quantized.jsonl
        [--patterns 0.5 2:4] [--grids int8 int4 codebook4] [--order blocks] [--evaluate 100]

Model and texts are those of `oneshot_stories.py`. The rows of a pattern: "none", pruned and not rounded; "rounded",
these weights on the grid of the largest weight of each output, or of k-means over the matrix; "joint". Bytes are those
of the seven products of all blocks, saved with the smallest encoding, and every row's file gives back its very weights.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from oneshot_stories import BLOCKS, PRODUCTS, kept_texts, share_of
from tables import add_row, describe_machine

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab.models import language
from jaxprune.lab.models.language import decoder, evaluation, texts

SELECT = "*layers*kernel"


def quantized(params, masks, grid, *, exact):
    """The selected leaves in codes of a grid; exactly, where they lie on it."""
    bits = int(grid[-1])
    if grid.startswith("codebook"):
        return jp.storage.to_codebooks(params, masks, bits=bits, select=SELECT)
    return jp.storage.to_integers(params, masks, bits=bits, exact=exact, select=SELECT)


def stored_bytes(params, coded):
    """Bytes of the file of the selected leaves; it must give back those of the params."""
    leaves = {name: tree.named_leaves(coded)[name] for name in tree.selected_leaves(SELECT, params)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.jaxprune"
        jp.save(path, leaves)
        for name, leaf in jp.load(path).items():
            np.testing.assert_array_equal(leaf, tree.named_leaves(params)[name], err_msg=name)
        return path.stat().st_size


def main() -> None:
    """Measure what is asked for, one row after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"])
    parser.add_argument("--grids", nargs="*", default=["int8", "int4", "codebook4"])
    parser.add_argument("--order", choices=["blocks", "products"], default="blocks")
    parser.add_argument("--evaluate", type=int, default=100)
    options = parser.parse_args()
    model = language.read(options.model)
    evaluated = kept_texts(options.texts, model, "evaluation", 200, 0)
    calibrating = kept_texts(options.texts, model, "calibration", 128, 1)
    batches = [jnp.asarray(calibrating[i : i + 32]) for i in range(0, len(calibrating), 32)]
    forward = partial(decoder.forward, config=model.config)
    order = BLOCKS if options.order == "blocks" else PRODUCTS

    def pruned(pattern, grid):
        chosen = share_of(pattern)
        solver = jp.oneshot.SparseGPT(quantize=grid)
        return jp.oneshot.prune(forward, model.params, batches, solver, select=SELECT, **order, **chosen)

    def report(pattern, grid, how, params, coded, seconds):
        found = evaluation.compare(forward, params, model.params, evaluated[: options.evaluate])
        row = {
            "pattern": pattern, "grid": grid, "how": how, "order": options.order,
            "perplexity": round(found.perplexity, 3), "dense": round(found.dense, 3),
            "divergence": round(found.divergence, 4), "agreement": round(found.agreement, 4),
            "bytes": stored_bytes(params, coded), "seconds": round(seconds),
            "texts": [texts.digest(evaluated), texts.digest(calibrating)], "machine": describe_machine(),
        }  # fmt: skip
        add_row(options.out, row)

    for pattern in options.patterns:
        begun = time.perf_counter()
        plain, masks = pruned(pattern, None)
        seconds = time.perf_counter() - begun
        report(pattern, None, "none", plain, plain, seconds)
        for grid in options.grids:
            coded = quantized(plain, masks, grid, exact=False)
            report(pattern, grid, "rounded", jp.storage.dequantize(coded), coded, seconds)
            begun = time.perf_counter()
            params, of_grid = pruned(pattern, grid)
            coded = quantized(params, of_grid, grid, exact=True)
            report(pattern, grid, "joint", params, coded, time.perf_counter() - begun)


if __name__ == "__main__":
    main()
