"""The decoder as a module of Flax NNX: the same arrays under the same names, the same function.

model = of_params(params, config);    logits = model(tokens);    params = params_of(model)
"""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.lab.models.language.config import Config
from jaxprune.lab.models.language.decoder import forward
from jaxprune.types import Params


class Block(nnx.Module):
    """The layers of a block; `Decoder` says what it does with them."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        def linear(n_in: int, n_out: int, bias: bool = False) -> nnx.Linear:
            return nnx.Linear(n_in, n_out, use_bias=bias, rngs=rngs)

        keys, queries = config.kv_heads * config.head_dim, config.heads * config.head_dim
        self.norm1 = nnx.RMSNorm(config.dim, epsilon=config.epsilon, rngs=rngs)
        self.query = linear(config.dim, queries, config.qkv_bias)
        self.key = linear(config.dim, keys, config.qkv_bias)
        self.value = linear(config.dim, keys, config.qkv_bias)
        self.out = linear(queries, config.dim)
        self.norm2 = nnx.RMSNorm(config.dim, epsilon=config.epsilon, rngs=rngs)
        self.gate = linear(config.dim, config.hidden)
        self.up = linear(config.dim, config.hidden)
        self.down = linear(config.hidden, config.dim)


class Decoder(nnx.Module):
    """A decoder, with the names of leaves that `config.shapes()` has.

    Args:
        config: of the model.
        rngs: draws weights to begin training with.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = nnx.Embed(config.vocabulary, config.dim, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.dim, epsilon=config.epsilon, rngs=rngs)
        if not config.tied:
            self.output = nnx.Linear(config.dim, config.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length vocabulary"]:
        """Logits of the token after each; see `jaxprune.lab.models.language.decoder.forward`."""
        return forward(params_of(self), tokens, self.config)


def params_of(model: Decoder) -> Params:
    """The arrays of a module as plain params, blocks as a list; tracers within `nnx.jit` and the like."""
    found: dict[str, Any] = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return {**found, "layers": [block for _, block in sorted(found["layers"].items())]}


def of_params(params: Params, config: Config) -> Decoder:
    """A module of these arrays.

    Args:
        params: shaped as `config.shapes()`, blocks as a list.
        config: of the model.

    Raises:
        ValueError: the params are of another model.
    """
    structures = [jax.tree.structure(tree) for tree in (params, config.shapes())]
    if structures[0] != structures[1]:
        raise ValueError(f"Params of the structure {structures[1]} were expected, {structures[0]} arrived.")
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, {**params, "layers": dict(enumerate(params["layers"]))})
    return nnx.merge(graph, state)
