"""Structured one-shot pruning of a small language model: hidden units, heads and layers by each importance.

    python experiments/benchmarks/oneshot_structured.py MODEL --texts FOLDER --out oneshot_structured.jsonl
        [--remove hidden=0.25 heads=1 layers=2] [--importance activations compensated] [--fits refit] [--calibrate 128]
        [--evaluate 100] [--save FOLDER]

MODEL and texts are those of `oneshot_stories.py`; of hidden units a fraction goes in each layer, of heads and layers a
number. Each row is a smaller model of the same kind, its perplexity, divergence and agreement with the dense one.
`--save` writes the last one in Hugging Face's layout.
"""

import argparse
import itertools
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from oneshot_stories import kept_texts
from tables import add_row, describe_machine

import jaxprune as jp
from jaxprune.lab.models import language
from jaxprune.lab.models.language import decoder, evaluation, hugging_face, texts


class RandomImportance:
    """Any channels: what the others are measured by."""

    looks_at_moments: ClassVar[bool] = False

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __call__(self, readers, count):
        return jnp.asarray(self.rng.random(count), jnp.float32)


IMPORTANCE = {
    "random": RandomImportance,
    "weights": jp.oneshot.WeightImportance,
    "activations": jp.oneshot.ActivationImportance,
    "activation means": partial(jp.oneshot.ActivationImportance, mean=True),
    "outputs": jp.oneshot.OutputImportance,
    "compensated": jp.oneshot.CompensatedImportance,
}
CHANNELS = {"hidden": "*/down/*", "heads": "*/out/*"}


def without_channels(model, batches, what, amount, importance, refit):
    """Params without a fraction of the hidden units, or so many heads, of every layer."""
    sparsity = amount if what == "hidden" else amount / model.config.kv_heads
    forward = partial(decoder.forward, config=model.config)
    chosen = {"importance": IMPORTANCE[importance](), "refit": refit}
    return jp.oneshot.prune_channels(forward, model.params, batches, {CHANNELS[what]: sparsity}, **chosen).params


def without_layers(model, batches, count, importance):
    """Params without so many layers, and which these are."""
    if importance == "random":
        gone = np.random.default_rng(0).choice(model.config.layers, count, replace=False)
        return jp.oneshot.without_layers(model.params, gone.tolist()), gone.tolist()

    def loss(params, tokens):
        scores = jax.nn.log_softmax(decoder.forward(params, tokens, model.config)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))

    return jp.oneshot.prune_layers(loss, model.params, batches, count)


def main() -> None:
    """Measure what is asked for, one row after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--remove", nargs="+", default=["hidden=0.25", "hidden=0.5", "heads=1", "layers=1", "layers=2"])
    parser.add_argument("--importance", nargs="+", choices=IMPORTANCE, default=list(IMPORTANCE))
    parser.add_argument("--fits", nargs="+", choices=["none", "refit"], default=["none", "refit"])
    parser.add_argument("--calibrate", type=int, default=128)
    parser.add_argument("--evaluate", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    model = language.read(options.model)
    evaluated = kept_texts(options.texts, model, "evaluation", 200, 0)
    calibrating = kept_texts(options.texts, model, "calibration", 128, 1)
    chosen = calibrating[: options.calibrate]
    batches = [jnp.asarray(chosen[i : i + options.batch]) for i in range(0, len(chosen), options.batch)]

    def forward(params, tokens):
        return decoder.forward(params, tokens, model.config.resized(params))

    for what, amount, importance, fit in jobs(options):
        begun, gone = time.perf_counter(), None
        if what == "layers":
            params, gone = without_layers(model, batches, int(amount), importance)
        else:
            params = without_channels(model, batches, what, amount, importance, fit == "refit")
        seconds = time.perf_counter() - begun
        small = model.config.resized(params)
        found = evaluation.compare(forward, params, model.params, evaluated[: options.evaluate], batch=options.batch)
        row = {
            "removed": what, "amount": amount, "importance": importance, "fit": fit, "gone": gone,
            "layers": small.layers, "heads": small.heads, "kv_heads": small.kv_heads, "hidden": small.hidden,
            "perplexity": round(found.perplexity, 3), "dense": round(found.dense, 3),
            "divergence": round(found.divergence, 4), "agreement": round(found.agreement, 4),
            "seconds": round(seconds), "calibrate": len(chosen), "evaluate": options.evaluate,
            "texts": [texts.digest(evaluated), texts.digest(calibrating)], "machine": describe_machine(),
        }  # fmt: skip
        add_row(options.out, row)
        if options.save:
            hugging_face.write(options.save, params, small)


def jobs(options):
    """(what, amount, importance, fit); layers are chosen by the loss, or at random, and nothing is fitted."""
    for word in options.remove:
        what, amount = word.split("=")
        if what == "layers":
            yield from ((what, float(amount), importance, "none") for importance in ("random", "loss"))
        else:
            yield from ((what, float(amount), *one) for one in itertools.product(options.importance, options.fits))


if __name__ == "__main__":
    main()
