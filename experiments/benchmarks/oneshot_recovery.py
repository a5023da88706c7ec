"""Distillation of a pruned language model on text that the dense one samples itself, masks kept.

    python experiments/benchmarks/oneshot_recovery.py MODEL PRUNED.jaxprune --texts FOLDER --out recovery.jsonl
        [--minutes 60]

PRUNED is what oneshot_stories.py --save wrote, or `jp.save` of the same params. Nothing is trained twice: a pool of
texts is sampled by the dense model, each goes into one step, and the next pool is sampled. The loss is the divergence
from the dense model's probabilities. Time counts sampling, but not compilation; the rate is warmed up, then falls to
zero along a cosine.
"""

import argparse
import dataclasses
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tables import add_row, describe_machine

import jaxprune as jp
from jaxprune.lab.models import language
from jaxprune.lab.models.language import decoder, evaluation, texts
from jaxprune.lab.models.language.config import Config


@partial(jax.jit, static_argnums=(2, 3, 4))
def sampled(key: Any, params: Any, config: Config, count: int, length: int) -> Any:
    """Texts of the model from token 1 on, in one program and in the precision of the params."""

    def advance(carry: Any, key: Any) -> Any:
        cache, tokens = carry
        logits, cache = decoder.step(params, cache, tokens[:, None], config)
        new = jax.random.categorical(key, logits[:, 0]).astype(jnp.int32)
        return (cache, new), new

    first = jnp.ones(count, jnp.int32)
    cache = decoder.empty_cache(config, count, length)
    _, rest = lax.scan(advance, (cache, first), jax.random.split(key, length - 1))
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def main() -> None:
    """Train for so many minutes, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--pool", type=int, default=128, help="texts sampled at once")
    parser.add_argument("--batch", type=int, default=8, help="texts of a step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--evaluate", type=int, default=100)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    model = language.read(options.model)
    dense, config = decoder.stacked(model.params), model.config
    params = decoder.stacked(jp.load(options.pruned))
    masks = jax.tree.map(lambda leaf: leaf != 0, params)
    masks = {**jax.tree.map(jnp.ones_like, masks), "layers": masks["layers"]}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.0, b2=0.99),
        jp.keep_params_sparse(masks),
    )

    def loss(params: Any, tokens: Any) -> Any:
        ours, theirs = (decoder.forward(each, tokens, config)[:, :-1] for each in (params, dense))
        return jp.distillation_loss(ours, theirs)

    @partial(jax.jit, donate_argnums=(0, 1))
    def train(params: Any, state: Any, tokens: Any, rate: Any) -> Any:
        state[1].hyperparams["learning_rate"] = rate
        lost, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, lost

    state, key = optimizer.init(params), jax.random.key(options.seed)
    some = sampled(key, dense, config, options.pool, 256)
    jax.block_until_ready(some)
    train = train.lower(params, state, some[: options.batch], jnp.float32(0)).compile()
    begun, share, steps, pools, lost = time.perf_counter(), 0.0, 0, 0, []
    while share < 1:
        pool = sampled(jax.random.fold_in(key, pools), dense, config, options.pool, 256)
        pools += 1
        for i in range(0, options.pool, options.batch):
            share = (time.perf_counter() - begun) / (60 * options.minutes)
            if share >= 1:
                break
            rate = options.rate * min(1.0, share / 0.1) * 0.5 * (1 + math.cos(math.pi * share))
            params, state, one = train(params, state, pool[i : i + options.batch], jnp.float32(rate))
            lost.append(float(one))
            steps += 1
        print(
            f"{share:.1%} {steps} steps, divergence {np.mean(lost[-options.pool // options.batch :]):.4f}", flush=True
        )
    found = decoder.unstacked(params)
    evaluated = np.load(options.texts / "evaluation.npy")
    forward = partial(decoder.forward, config=config)
    better = evaluation.compare(forward, found, model.params, evaluated[: options.evaluate])
    row = {
        "pruned": options.pruned.name, "minutes": options.minutes, "steps": steps, "sampled": pools * options.pool,
        "rate": options.rate, "batch": options.batch, "sparsity": round(float(jp.sparsity_of(masks["layers"])), 4),
        "perplexity": round(better.perplexity, 3), "dense": round(better.dense, 3),
        "divergence": round(better.divergence, 4), "agreement": round(better.agreement, 4),
        "texts": texts.digest(evaluated), "machine": describe_machine(),
    }  # fmt: skip
    add_row(options.out, row)
    if options.save is not None:
        jp.save(options.save, found, metadata={"decoder": dataclasses.asdict(config)})


if __name__ == "__main__":
    main()
