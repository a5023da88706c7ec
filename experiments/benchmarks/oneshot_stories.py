"""One-shot pruning of a small language model on texts that it samples itself: perplexity, divergence, agreement.

    python experiments/benchmarks/oneshot_stories.py MODEL --texts FOLDER --out oneshot_stories.jsonl
        [--methods weighed] [--patterns 0.5 2:4] [--evaluate 100] [--save FOLDER]

MODEL is llama2.c's stories15M, or what else `jaxprune generate` reads. The texts are 200 of 256 tokens for evaluation
(seed 0, of which the first `--evaluate` count) and 128 for calibration (seed 1), sampled in float64 and kept in FOLDER;
their hashes stand in every row. The seven products of each block are pruned, embedding and norms are not.
"""

import argparse
import dataclasses
import resource
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tables import add_row, describe_machine

import jaxprune as jp
from jaxprune.lab.models import language
from jaxprune.lab.models.language import decoder, evaluation, texts
from jaxprune.lab.runs.machine import hand_back_freed_arrays

BLOCKS = {"order": "blocks", "fit": "own"}
PRODUCTS = {"order": "products", "fit": "dense"}
ALTERNATING = jp.oneshot.AlternatingDirections(every=5, iterations=500)
SPARSEGPT = jp.oneshot.SparseGPT()
METHODS = {
    "magnitude": (jp.oneshot.Magnitude(), {"order": "layers"}),
    "wanda": (jp.oneshot.Wanda(), BLOCKS),
    "wanda, least squares": (jp.oneshot.Wanda(refit=True), BLOCKS),
    "sparsegpt": (SPARSEGPT, BLOCKS),
    "sparsegpt, least squares": (jp.oneshot.SparseGPT(refit=True), BLOCKS),
    "sparsegpt, products, dense": (SPARSEGPT, PRODUCTS),
    "alternating": (ALTERNATING, BLOCKS),
    "alternating, products, dense": (ALTERNATING, PRODUCTS),
    "weighed": (ALTERNATING, PRODUCTS),
    "weighed, allocated": (ALTERNATING, PRODUCTS),
    "weighed, diagonal": (ALTERNATING, PRODUCTS),
    "weighed, diagonal, allocated": (ALTERNATING, PRODUCTS),
}
"""Name -> solver and order; "weighed" has errors weighed by the loss's derivatives, "diagonal" each output by itself;
"allocated" a sparsity a matrix."""


def kept_texts(folder: Path, model: language.Language, name: str, count: int, seed: int) -> np.ndarray:
    """Texts of the model, from the folder or sampled into it."""
    path = folder / f"{name}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path, texts.sampled(model.params, model.config, count, 256, seed))
    return np.load(path)


def share_of(pattern: str) -> dict[str, Any]:
    """What `prune` is asked for by "0.5" or "2:4"."""
    return {"pattern": jp.NM(*map(int, pattern.split(":")))} if ":" in pattern else {"sparsity": float(pattern)}


def measured(
    path: Path,
    method: str,
    pattern: str,
    calibrating: np.ndarray,
    evaluated: Mapping[str, np.ndarray],
    batch: int = 32,
    alternating: Any = ALTERNATING,
    weighed_by: int | None = None,
    allocating: Any = SPARSEGPT,
) -> tuple[language.Language, dict[str, Any]]:
    """The pruned model, and a row of what it is worth on texts, by name.

    Outputs are weighed by the first texts of each batch, `weighed_by` of them, or by all; sparsities are allocated by
    the errors that `allocating` makes.
    """
    model = language.read(path)
    batches = [jnp.asarray(calibrating[i : i + batch]) for i in range(0, len(calibrating), batch)]
    forward = partial(decoder.forward, config=model.config)
    solver, order = METHODS[method]
    diagonal = "diagonal" in method
    if solver is ALTERNATING:
        solver = dataclasses.replace(alternating, diagonal=diagonal)
    chosen = share_of(pattern)
    select = "*layers*kernel"

    def loss(params: Any, tokens: Any) -> Any:
        return evaluation.loss(partial(forward, remat=True), params, tokens[:weighed_by])

    weighed = {"loss": loss} if "weighed" in method else {}
    begun = time.perf_counter()
    if "allocated" in method:
        mean = chosen["sparsity"]
        chosen["sparsity"] = jp.oneshot.allocation(
            forward, model.params, batches, mean, solver=allocating, select=select, diagonal=diagonal, **weighed
        )
    params, masks = jp.oneshot.prune(
        forward, model.params, batches, solver, select=select, donate=True, **order, **chosen, **weighed
    )  # fmt: skip
    row = {"method": method, "pattern": pattern, "seconds": round(time.perf_counter() - begun)}
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000  # of the process, what came before too
    dense = language.read(path).params
    kernels = [mask for name, mask in jp.tree.named_leaves(masks).items() if "kernel" in name]
    row["sparsity"] = round(float(jp.sparsity_of(kernels)), 4)
    for name, windows in evaluated.items():
        found = evaluation.compare(forward, params, dense, windows, batch=max(1, 4096 // windows.shape[1] // 2))
        row[name] = {word: round(value, 4) for word, value in dataclasses.asdict(found).items()}
    hashes = {name: texts.digest(windows) for name, windows in evaluated.items()}
    row |= {"texts": hashes | {"calibration": texts.digest(calibrating)}, "machine": describe_machine()}
    return model._replace(params=params), row


def measure_all(options: argparse.Namespace, *given: Any, **more: Any) -> None:
    """A row for each method and pattern asked for, one after the other."""
    hand_back_freed_arrays()
    for method in options.methods:
        for pattern in options.patterns:
            pruned, row = measured(options.model, method, pattern, *given, **more)
            add_row(options.out, row)
            if options.save is not None:
                options.save.mkdir(parents=True, exist_ok=True)
                name = f"{method}_{pattern}.jaxprune".replace(", ", "_").replace(" ", "_").replace(":", "_")
                jp.save(options.save / name, pruned.params, metadata={"decoder": dataclasses.asdict(pruned.config)})


def parser_of(description: str) -> argparse.ArgumentParser:
    """What both scripts are asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.7", "2:4"])
    parser.add_argument("--save", type=Path, help="where params are kept, for oneshot_recovery.py")
    return parser


def main() -> None:
    """Measure what is asked for."""
    parser = parser_of(__doc__)
    parser.add_argument("--evaluate", type=int, default=100)
    options = parser.parse_args()
    model = language.read(options.model)
    evaluated = kept_texts(options.texts, model, "evaluation", 200, 0)[: options.evaluate]
    measure_all(options, kept_texts(options.texts, model, "calibration", 128, 1), {"own": evaluated})


if __name__ == "__main__":
    main()
