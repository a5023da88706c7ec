"""BERT as a module of Equinox, its files in the layout of Hugging Face's transformers, and vectors of sentences.

    model = read("all-MiniLM-L6-v2")
    vectors = sentence_vectors(model, *wordpiece.read("all-MiniLM-L6-v2").batch(["A sentence."]))

    x = norm1(x + attention(x)),     x = norm2(x + fc2(gelu(fc1(x))))

Normalisation comes last in both ("post-norm"). Weights are (out, in), as in the files.

References:
    Devlin et al. 2018, arXiv:1810.04805; vectors: Reimers and Gurevych 2019, arXiv:1908.10084.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxprune import tree
from jaxprune.lab.models.language.files import BERT, gathered, spread
from jaxprune.lab.models.language.hugging_face import CONFIG, read_json, reader, write_arrays
from jaxprune.storage.container import FileError

_FIELDS = {
    "vocabulary": "vocab_size",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "length": "max_position_embeddings",
    "kinds": "type_vocab_size",
    "epsilon": "layer_norm_eps",
}
_ONLY = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
"""What this module is; another value is refused."""


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT.

    Attributes:
        vocabulary: number of tokens there are.
        dim: width of a token.
        layers: number of blocks.
        heads: of attention, which share the width.
        hidden: width of fc1.
        length: most tokens of a text.
        kinds: of tokens; all are of the first kind here.
        epsilon: of the norms.

    Raises:
        ValueError: heads do not share the width evenly.
    """

    vocabulary: int
    dim: int
    layers: int
    heads: int
    hidden: int
    length: int = 512
    kinds: int = 2
    epsilon: float = 1e-12

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"{self.heads} heads do not share a width of {self.dim}: it has to be a multiple.")


class Block(eqx.Module):
    """A layer."""

    attention: eqx.nn.MultiheadAttention
    norm1: eqx.nn.LayerNorm
    fc1: eqx.nn.Linear
    fc2: eqx.nn.Linear
    norm2: eqx.nn.LayerNorm

    def __init__(self, config: BertConfig, *, key: Key[Array, ""]) -> None:
        keys = jax.random.split(key, 3)
        biases: Any = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.attention = eqx.nn.MultiheadAttention(config.heads, config.dim, **biases, key=keys[0])
        self.norm1, self.norm2 = (eqx.nn.LayerNorm(config.dim, config.epsilon) for _ in range(2))
        self.fc1 = eqx.nn.Linear(config.dim, config.hidden, key=keys[1])
        self.fc2 = eqx.nn.Linear(config.hidden, config.dim, key=keys[2])

    def __call__(self, x: Float[Array, "length dim"], seen: Bool[Array, "length"]) -> Float[Array, "length dim"]:
        """The text behind this layer."""
        to_all = jnp.broadcast_to(jnp.expand_dims(seen, 0), (len(seen), len(seen)))
        x = jax.vmap(self.norm1)(x + self.attention(x, x, x, to_all))
        y = jax.nn.gelu(jax.vmap(self.fc1)(x), approximate=False)
        return jax.vmap(self.norm2)(x + jax.vmap(self.fc2)(y))


class Bert(eqx.Module):
    """An encoder of texts.

    Args:
        config: sizes.
        key: draws weights to begin training with.
        pooler: whether there is the layer that BERT was trained with behind the first token; nothing here uses it.
    """

    embed: eqx.nn.Embedding
    position_embed: eqx.nn.Embedding
    kind_embed: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    layers: list[Block]
    pooler: eqx.nn.Linear | None
    config: BertConfig = eqx.field(static=True)

    def __init__(self, config: BertConfig, *, key: Key[Array, ""], pooler: bool = False) -> None:
        keys = iter(jax.random.split(key, 4 + config.layers))
        self.embed = eqx.nn.Embedding(config.vocabulary, config.dim, key=next(keys))
        self.position_embed = eqx.nn.Embedding(config.length, config.dim, key=next(keys))
        self.kind_embed = eqx.nn.Embedding(config.kinds, config.dim, key=next(keys))
        self.norm = eqx.nn.LayerNorm(config.dim, config.epsilon)
        self.pooler = eqx.nn.Linear(config.dim, config.dim, key=next(keys)) if pooler else None
        self.layers = [Block(config, key=next(keys)) for _ in range(config.layers)]
        self.config = config

    def __call__(self, tokens: Int[Array, "length"], seen: Bool[Array, "length"]) -> Float[Array, "length dim"]:
        """The last layer's output for every token.

        Args:
            tokens: of one text.
            seen: which of them others attend to; not those that only fill up.
        """
        x = jax.vmap(self.embed)(tokens) + self.position_embed.weight[: len(tokens)] + self.kind_embed.weight[:1]
        x = jax.vmap(self.norm)(x)
        for layer in self.layers:
            x = layer(x, seen)
        return x


def sentence_vectors(
    model: Bert, tokens: Int[Array | np.ndarray, "batch length"], seen: Bool[Array | np.ndarray, "batch length"]
) -> Float[Array, "batch dim"]:
    """Means over the seen tokens of each text, of length 1."""
    states = jax.vmap(model)(jnp.asarray(tokens), jnp.asarray(seen))
    sums = jnp.sum(states * jnp.expand_dims(seen, -1).astype(states.dtype), axis=1)
    return sums / jnp.linalg.norm(sums, axis=-1, keepdims=True)


def read(folder: str | os.PathLike[str]) -> Bert:
    """The model of a folder with config.json and safetensors.

    Raises:
        FileError: another kind of model, or files that are damaged or missing.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    config, array = _config(folder), reader(folder)
    try:
        array("pooler.dense.weight")
        pooler = True
    except KeyError:
        pooler = False
    empty = eqx.filter_eval_shape(Bert, config, key=jax.random.key(0), pooler=pooler)
    shapes, rest = eqx.partition(empty, tree.is_array)
    try:
        return eqx.combine(gathered(array, BERT, shapes), rest)
    except FileError as error:
        raise FileError(f"{folder}: {error}") from None


def write(folder: str | os.PathLike[str], model: Bert) -> None:
    """A folder that `transformers` opens as a BertModel: config.json and the weights, in float32."""
    about = {theirs: getattr(model.config, ours) for ours, theirs in _FIELDS.items()}
    arrays = spread(eqx.filter(model, tree.is_array), BERT)
    write_arrays(Path(folder), arrays, {**_ONLY, "architectures": ["BertModel"], **about})


def _config(folder: Path) -> BertConfig:
    said = read_json(folder / CONFIG)
    for name, only in _ONLY.items():
        if said.get(name, only) != only:
            raise FileError(f"{folder / CONFIG}: {name} is {said[name]!r}, this encoder has {only!r}.")
    try:
        return BertConfig(**{ours: said[theirs] for ours, theirs in _FIELDS.items() if theirs in said})
    except (TypeError, ValueError) as error:
        raise FileError(f"{folder / CONFIG}: its sizes are not those of a BERT: {error}.") from None
