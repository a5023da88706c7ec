"""Distillation of a pruned language model on text that the dense one samples itself, masks kept.

    python experiments/benchmarks/oneshot_recovery.py MODEL PRUNED.jaxprune --texts FOLDER --out recovery.jsonl
        [--minutes 60]

PRUNED is what oneshot_stories.py --save wrote, or `jp.save` of the same params. A pool of texts is sampled by the dense
model, each goes into `--epochs` steps, and the next pool is sampled. The loss is the divergence from the dense model's
probabilities, those that it drew the texts by, and `--hidden` times the loss of what blocks give, see
`jp.feature_loss`. Texts and probabilities are among the `--vocabulary` tokens that the dense model thinks likeliest in
the texts of calibration, which have nearly all probability and take a fraction of the work; perplexity in the end is
over all tokens. Time counts sampling, but not compilation. The rate is warmed up, then falls to zero along a line; the
factor of the hidden states falls with it, to an eighth. The divergences that are printed are of texts never seen.
"""

import argparse
import dataclasses
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

GROUP = 64
"""Tokens that are chosen among together, by `drawn`."""
CACHED = 32
"""Tokens by which the cache grows: attention reads all of it, whether it is filled or not."""


def drawn(key: Any, logits: Any) -> Any:
    """A token for each row by its probability; one number is drawn a row, where Gumbel's way draws one a token.

    First the group of tokens that the number falls into, then the token within.
    """
    likely = jnp.exp(logits - logits.max(axis=1, keepdims=True)).reshape(len(logits), -1, GROUP)
    ends = jnp.cumsum(likely.sum(axis=2), axis=1)
    place = jax.random.uniform(key, (len(logits), 1)) * ends[:, -1:]
    group = jnp.minimum(jnp.sum(ends <= place, axis=1, keepdims=True), ends.shape[1] - 1)
    before = jnp.where(group > 0, jnp.take_along_axis(ends, jnp.maximum(group - 1, 0), axis=1), 0)
    inside = jnp.cumsum(jnp.take_along_axis(likely, group[:, :, None], axis=1)[:, 0], axis=1)
    return group[:, 0] * GROUP + jnp.minimum(jnp.sum(inside <= place - before, axis=1), GROUP - 1)


@partial(jax.jit, static_argnums=(2, 3, 4))
def sampled(key: Any, params: Any, config: Config, count: int, length: int, among: Any) -> tuple[Any, Any]:
    """Texts of the model from token 1 on, of some tokens alone, and the logits that they were drawn by."""
    params = narrowed(params, among)

    def advance(carry: Any, key: Any) -> Any:
        cache, tokens = carry
        logits, cache = decoder.step(params, cache, tokens[:, None], config)
        new = among[drawn(key, logits[:, 0])]
        return (cache, new), (new, logits[:, 0])

    def lengthened(cache: Any, size: int) -> Any:
        whole = decoder.empty_cache(config, count, size)
        return jax.tree.map(lambda new, old: new.at[:, :, : old.shape[2]].set(old) if old.ndim else old, whole, cache)

    first = jnp.ones(count, jnp.int32)
    carry, found = (decoder.empty_cache(config, count, 0), first), []
    for keys in jnp.split(jax.random.split(key, length - 1), [*range(CACHED, length - 1, CACHED)]):
        cache = lengthened(carry[0], carry[0].keys[0].shape[2] + len(keys))
        carry, new = lax.scan(advance, (cache, carry[1]), keys)
        found.append(new)
    rest, logits = (jnp.concatenate(parts).swapaxes(0, 1) for parts in zip(*found, strict=True))
    return jnp.concatenate([first[:, None], rest], axis=1), logits


def likeliest(params: Any, tokens: Any, config: Config, count: int) -> tuple[Any, float]:
    """The tokens of the largest probabilities in texts, and what they are of all."""

    def sums(text: Any) -> Any:
        return jax.nn.softmax(decoder.forward(params, text[None], config)[0]).sum(axis=0)

    mass = np.asarray(jax.jit(lambda tokens: lax.map(sums, tokens).sum(axis=0))(tokens))
    best = np.sort(np.argsort(-mass)[:count])
    return jnp.asarray(best), float(mass[best].sum() / mass.sum())


def narrowed(params: Any, tokens: Any) -> Any:
    """Params whose logits are those of some tokens."""
    return {**params, "output": {"kernel": params["embed"]["embedding"][tokens].T}}


def main() -> None:
    """Train for so many minutes, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--pool", type=int, default=64, help="texts sampled at once")
    parser.add_argument("--epochs", type=int, default=1, help="steps that each text goes into")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens that the loss looks at")
    parser.add_argument("--batch", type=int, default=8, help="texts of a step")
    parser.add_argument("--keep-embedding", action="store_true", help="train everything but the embedding")
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--hidden", type=float, default=4.0, help="factor of the loss of hidden states, at first")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--evaluate", type=int, default=100)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    model = language.read(options.model)
    dense, config = model.params, model.config
    params = decoder.stacked(jp.load(options.pruned))
    masks = jax.tree.map(lambda leaf: leaf != 0, params)
    masks = {**jax.tree.map(jnp.ones_like, masks), "layers": masks["layers"]}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.0, b2=0.99),
        jp.keep_params_sparse(masks),
    )

    key = jax.random.key(options.seed)
    among, covered = likeliest(dense, np.load(options.texts / "calibration.npy")[:32], config, options.vocabulary)

    def loss(params: Any, dense: Any, tokens: Any, teacher: Any, factor: Any) -> Any:
        if options.keep_embedding:
            params = {**params, "embed": lax.stop_gradient(params["embed"])}
        ours, theirs = (decoder.hidden(one, tokens, config) for one in (params, dense))
        logits = decoder.logits(narrowed(params, among), ours[-1], config)
        lost = jp.distillation_loss(logits[:, :-1], teacher)
        return lost + factor * jp.feature_loss(list(ours), list(theirs)), lost

    @partial(jax.jit, donate_argnums=(0, 1))
    def train(params: Any, state: Any, dense: Any, tokens: Any, teacher: Any, rate: Any, factor: Any) -> Any:
        state[1].hyperparams["learning_rate"] = rate
        (_, lost), grads = jax.value_and_grad(loss, has_aux=True)(params, dense, tokens, teacher, factor)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, lost

    state, orders = optimizer.init(params), np.random.default_rng(options.seed)
    pool, teacher = sampled(key, dense, config, options.pool, 256, among)
    zero = jnp.float32(0)
    first = pool[: options.batch], teacher[: options.batch]
    train = train.lower(params, state, dense, *first, zero, zero).compile()
    begun, share, steps, pools, lost = time.perf_counter(), 0.0, 0, 0, []
    while share < 1:
        pool, teacher = sampled(jax.random.fold_in(key, pools), dense, config, options.pool, 256, among)
        pools += 1
        order = np.concatenate([orders.permutation(options.pool) for _ in range(options.epochs)])
        for batch in order.reshape(-1, options.batch):
            share = (time.perf_counter() - begun) / (60 * options.minutes)
            if share >= 1:
                break
            rate = options.rate * min(1.0, share / 0.03) * (1 - share)
            factor = options.hidden * max(1 - share, 1 / 8)
            params, state, one = train(
                params, state, dense, pool[batch], teacher[batch], jnp.float32(rate), jnp.float32(factor)
            )
            lost.append(float(one))
            steps += 1
        print(f"{share:.1%} {steps} steps, divergence {np.mean(lost[-len(order) // options.batch :]):.4f}", flush=True)
    found = decoder.unstacked(params)
    evaluated = np.load(options.texts / "evaluation.npy")
    forward = partial(decoder.forward, config=config)
    better = evaluation.compare(forward, found, model.params, evaluated[: options.evaluate])
    row = {
        "pruned": options.pruned.name, "minutes": options.minutes, "steps": steps, "sampled": pools * options.pool,
        "epochs": options.epochs, "keep_embedding": options.keep_embedding, "covered": round(covered, 5),
        "rate": options.rate, "hidden": options.hidden, "batch": options.batch,
        "sparsity": round(float(jp.sparsity_of(masks["layers"])), 4),
        "perplexity": round(better.perplexity, 3), "dense": round(better.dense, 3),
        "divergence": round(better.divergence, 4), "agreement": round(better.agreement, 4),
        "texts": texts.digest(evaluated), "machine": describe_machine(),
    }  # fmt: skip
    add_row(options.out, row)
    if options.save is not None:
        jp.save(options.save, found, metadata={"decoder": dataclasses.asdict(config)})


if __name__ == "__main__":
    main()
