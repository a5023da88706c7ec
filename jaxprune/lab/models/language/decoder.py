"""The decoder as plain functions of a dict of arrays.

    logits = forward(params, tokens, config)                     # of the token after each
    logits, cache = step(params, cache, tokens, config)          # the same, for tokens that follow those in the cache

    x = x + out(attend(rotary(query(y)), rotary(key(y)), value(y))),     y = norm(x)
    x = x + down(silu(gate(y)) * up(y))

Kernels are (in, out). Blocks are a list, "layers/0/query/kernel", or stacked and scanned, "layers/query/kernel" with an
axis more; `stacked` and `unstacked` lead from one to the other. Without an "output" layer the embedding is it.

References:
    Touvron et al. 2023, arXiv:2302.13971 (the architecture); Ainslie et al. 2023, arXiv:2305.13245 (groups);
    Su et al. 2021, arXiv:2104.09864 (rotary positions); Shazeer 2020, arXiv:2002.05202 (gated MLP).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, Shaped

from jaxprune.lab.models.language.config import Config, Pairs
from jaxprune.lab.models.parts import affine, rms_norm
from jaxprune.types import Params


class Cache(NamedTuple):
    """Keys and values of the tokens so far, an array a layer, so that each is written in place and read where it lies.

    Attributes:
        keys: turned by their positions.
        values: likewise of every layer.
        position: number of tokens in it.
    """

    keys: tuple[Float[Array, "batch kv_heads size n"], ...]
    values: tuple[Float[Array, "batch kv_heads size n"], ...]
    position: Int[Array, ""]


def empty_cache(config: Config, batch: int, size: int, dtype: Any = jnp.float32) -> Cache:
    """A cache for so many texts of at most `size` tokens."""
    shape = (batch, config.kv_heads, size, config.head_dim)
    keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)) for _ in range(2))
    return Cache(keys, values, jnp.zeros((), jnp.int32))


def forward(
    params: Params, tokens: Int[Array, "batch length"], config: Config, *, remat: bool = False
) -> Float[Array, "batch length vocabulary"]:
    """Logits of the token after each.

    Args:
        params: shaped as `config.shapes()`, perhaps `stacked`.
        tokens: from 0 to below `config.vocabulary`; each text by itself, its first token at position 0.
        config: of the model.
        remat: for derivatives blocks are computed again, so that of each only what it begins with is kept; on CPUs
            jaxlib 0.10 does so for `stacked` params alone, see findings/.
    """
    x, _ = _through_blocks(params, tokens, config, remat=remat, each=lambda x: None)
    return logits(params, x, config)


def hidden(
    params: Params, tokens: Int[Array, "batch length"], config: Config
) -> Float[Array, "layers batch length dim"]:
    """The residual stream behind each block; `logits` of the last are those of `forward`. Arguments: likewise."""
    return _through_blocks(params, tokens, config, remat=False, each=lambda x: x)[1]


def logits(params: Params, x: Float[Array, "batch new dim"], config: Config) -> Float[Array, "batch new vocabulary"]:
    """Of the residual stream behind the last block."""
    x = rms_norm(params["norm"], x, config.epsilon)
    if "output" in params:
        return affine(params["output"], x)
    # Not x @ embedding.T, which takes 4 times as long for a single token with jaxlib 0.12 on a CPU: see findings/
    return jnp.einsum("...i,oi->...o", x, params["embed"]["embedding"])


def _through_blocks(
    params: Params, tokens: Int[Array, "batch length"], config: Config, *, remat: bool, each: Callable[[Array], Any]
) -> tuple[Float[Array, "batch length dim"], Any]:
    """What the last block gives, and a function of what each gives, stacked."""
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)

    def block(x: Array, weights: Params) -> tuple[Array, Any]:
        queries, keys, values = _attended(weights, x, positions, config)
        x = _rest_of_block(weights, x, _attention(queries, keys, values, positions), config)
        return x, each(x)

    x, block = _embedded(params, tokens), jax.checkpoint(block) if remat else block
    if not isinstance(params["layers"], list | tuple):
        return lax.scan(block, x, params["layers"])
    found = []
    for weights in params["layers"]:
        x, one = block(x, weights)
        found.append(one)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def step(
    params: Params, cache: Cache, tokens: Int[Array, "batch new"], config: Config
) -> tuple[Float[Array, "batch new vocabulary"], Cache]:
    """Logits of the token after each of those that follow what is in the cache, and the cache with them.

    The first call takes the prompt at once, each later one a single token. More tokens than the cache is large for
    overwrite its end: make it as large as the text will be.

    Args:
        params: see `forward`; those that are stacked are taken apart, at every step if they are its arguments.
        cache: of `empty_cache` or of the last step; donate it (`jax.jit(..., donate_argnums=1)`) to save copies.
        tokens: that follow.
        config: of the model.
    """
    positions = cache.position + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    layers = params["layers"] if isinstance(params["layers"], list | tuple) else unstacked(params)["layers"]
    zero = jnp.zeros_like(cache.position)
    x, filled = _embedded(params, tokens), []
    for weights, *old in zip(layers, cache.keys, cache.values, strict=True):
        queries, *new = _attended(weights, x, positions, config)
        keys, values = (
            lax.dynamic_update_slice(whole, one, (zero, zero, cache.position, zero))
            for whole, one in zip(old, new, strict=True)
        )
        x = _rest_of_block(weights, x, _attention(queries, keys, values, positions), config)
        filled.append((keys, values))
    keys, values = zip(*filled, strict=True)
    return logits(params, x, config), Cache(keys, values, cache.position + tokens.shape[1])


def _embedded(params: Params, tokens: Int[Array, "batch new"]) -> Float[Array, "batch new dim"]:
    return jnp.take(params["embed"]["embedding"], tokens, axis=0, mode="clip")


def _attended(
    block: Params, x: Float[Array, "batch new dim"], positions: Int[Array, "new"], config: Config
) -> tuple[Float[Array, "batch new groups heads n"], Float[Array, "batch groups new n"], Array]:
    """Queries, keys and values. Groups are counted, not named: the function takes params with fewer of them."""
    y, rows = rms_norm(block["norm1"], x, config.epsilon), x.shape[:2]
    shared = config.heads // config.kv_heads
    queries = affine(block["query"], y).reshape(*rows, -1, shared, config.head_dim)
    keys, values = (affine(block[name], y).reshape(*rows, -1, config.head_dim) for name in ("key", "value"))
    queries, keys = (rotary(one, positions, config.theta, config.pairs) for one in (queries, keys))
    return queries, keys.swapaxes(1, 2), values.swapaxes(1, 2)


def _attention(
    queries: Float[Array, "batch to groups heads n"],
    keys: Float[Array, "batch groups of n"],
    values: Float[Array, "batch groups of n"],
    positions: Int[Array, "to"],
) -> Float[Array, "batch to features"]:
    r"""$softmax(Q K^T / \sqrt{n}) V$ of the keys at positions up to each query's own; keys begin at position 0."""
    scores = jnp.einsum("btghn,bgsn->bghts", queries * queries.shape[-1] ** -0.5, keys)
    seen = jnp.expand_dims(positions, 1) >= jnp.expand_dims(jnp.arange(keys.shape[2], dtype=jnp.int32), 0)
    scores = jnp.where(jnp.expand_dims(seen, (0, 1, 2)), scores, -jnp.inf)
    mixed = jnp.einsum("bghts,bgsn->btghn", jax.nn.softmax(scores, axis=-1), values)
    return mixed.reshape(*mixed.shape[:2], -1)


def _rest_of_block(
    block: Params, x: Float[Array, "batch new dim"], attended: Float[Array, "batch new features"], config: Config
) -> Float[Array, "batch new dim"]:
    x = x + affine(block["out"], attended)
    y = rms_norm(block["norm2"], x, config.epsilon)
    return x + affine(block["down"], jax.nn.silu(affine(block["gate"], y)) * affine(block["up"], y))


def rotary(
    x: Float[Array, "batch new *heads n"], positions: Int[Array, "new"], theta: float, pairs: Pairs
) -> Float[Array, "batch new *heads n"]:
    r"""Each pair of features turned by an angle that grows with the position.

    Pair $i$ of position $p$ turns by $p \, \theta^{-2i/n}$, so that products of queries and keys know only how far
    apart they are.

    Args:
        x: queries or keys.
        positions: of the tokens.
        theta: base of the angles.
        pairs: which features are a pair.

    References:
        Su et al. 2021, arXiv:2104.09864, equation 34.
    """
    n = x.shape[-1]
    # On the host and in float64: float32 powers would be off by more than the angles' own rounding.
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    speeds = jnp.asarray(theta ** (-np.arange(0, n, 2) / n), dtype)
    angles = jnp.expand_dims(positions.astype(dtype), 1) * jnp.expand_dims(speeds, 0)
    angles = jnp.expand_dims(angles, (0, *range(2, x.ndim - 1)))
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = (x[..., ::2], x[..., 1::2]) if pairs == "neighbours" else jnp.split(x, 2, axis=-1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    return jnp.stack(turned, -1).reshape(x.shape) if pairs == "neighbours" else jnp.concatenate(turned, -1)


# ---------------------------------------------------------------- the same params in another form


def stacked(params: Params) -> Params:
    """Params whose blocks are one block with an axis of layers in front, which `forward` scans."""
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])}


def untied(params: Params) -> Params:
    """Params with an "output" layer: where there was none a copy of the embedding, its axes the other way round.

    So the layer may be compressed as all others, by formats that hold a matrix for products over its inputs.
    """
    if "output" in params:
        return params
    return {**params, "output": {"kernel": jnp.copy(params["embed"]["embedding"].T)}}


def unstacked(params: Params) -> Params:
    """Params whose blocks are a list."""
    layers = jax.tree.leaves(params["layers"])[0].shape[0]
    return {**params, "layers": [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(layers)]}


def with_pairs(params: Params, config: Config, pairs: Pairs) -> tuple[Params, Config]:
    """The same function for the other way of rotary positions: features of queries and keys in another order.

    Args:
        params: blocks as a list; arrays of jax or NumPy.
        config: of the model.
        pairs: the way that the result has.
    """
    if pairs == config.pairs:
        return params, config
    order = np.arange(config.head_dim).reshape((2, -1) if pairs == "neighbours" else (-1, 2)).T.reshape(-1)

    def reordered(leaf: Shaped[Any, "*rows features"]) -> Any:
        return leaf.reshape(*leaf.shape[:-1], -1, config.head_dim)[..., order].reshape(leaf.shape)

    layers: list[PyTree] = [
        {**block, **{name: jax.tree.map(reordered, block[name]) for name in ("query", "key")}}
        for block in params["layers"]
    ]
    return {**params, "layers": layers}, dataclasses.replace(config, pairs=pairs)
