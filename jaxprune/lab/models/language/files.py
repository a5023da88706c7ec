"""What a file of a language model holds, and the leaves of our params by the names that formats have of them.

    params = gathered(read, HUGGING_FACE, config.shapes())      # read: their name -> array
    arrays = spread(params, HUGGING_FACE)                       # their name -> array

A kernel, (in, out), is a "weight" (out, in) there.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune import tree
from jaxprune.lab.models.language.config import Config
from jaxprune.lab.models.language.tokenizers import Tokenizer
from jaxprune.lab.models.parts import Shapes
from jaxprune.storage.container import FileError
from jaxprune.types import Params


class Language(NamedTuple):
    """A model from a file.

    Attributes:
        params: float32, shaped as `config.shapes()`.
        config: of the model.
        tokenizer: None where the file has none.
        metadata: what the file says besides, in the words of its format.
    """

    params: Params
    config: Config
    tokenizer: Tokenizer | None
    metadata: dict[str, Any]


HUGGING_FACE = {
    "embed": "model.embed_tokens",
    "layers": "model.layers.{}.",
    "norm1": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm": "model.norm",
    "output": "lm_head",
}
BERT = {
    "embed": "embeddings.word_embeddings",
    "position_embed": "embeddings.position_embeddings",
    "kind_embed": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "layers": "encoder.layer.{}.",
    "query_proj": "attention.self.query",
    "key_proj": "attention.self.key",
    "value_proj": "attention.self.value",
    "output_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "norm2": "output.LayerNorm",
    "pooler": "pooler.dense",
}
GGUF = {
    "embed": "token_embd",
    "layers": "blk.{}.",
    "norm1": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "out": "attn_output",
    "norm2": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "norm": "output_norm",
    "output": "output",
}


def theirs(name: str, table: Mapping[str, str]) -> str:
    """Their name of a leaf of ours: "blk.3.attn_q.weight" of "layers/3/query/kernel"."""
    *where, layer, kind = name.split("/")
    block = table["layers"].format(where[1]) if where else ""
    return f"{block}{table[layer]}.{'bias' if kind == 'bias' else 'weight'}"


def gathered(read: Callable[[str], np.ndarray], table: Mapping[str, str], shapes: Shapes) -> Params:
    """Params in float32, of these shapes.

    Args:
        read: gives an array by their name, or raises KeyError.
        table: theirs.
        shapes: of the params.

    Raises:
        FileError: an array is missing, or of another shape.
    """

    def one(name: str, leaf: Any) -> Any:
        called = theirs(name, table)
        try:
            array = read(called)
        except KeyError:
            raise FileError(f"There is no tensor {called!r}, which this model needs for {name!r}.") from None
        array = array.T if name.endswith("/kernel") else array
        if array.shape != leaf.shape:
            raise FileError(f"{called!r} should hold {name!r} {leaf.shape}, {array.shape} arrived.")
        return jnp.asarray(array, jnp.float32)

    return tree.map_named(one, shapes)


def spread(params: Params, table: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Arrays by their names, in the order of our params.

    Args:
        params: blocks as a list.
        table: theirs.
    """
    arrays = {}
    for name, leaf in tree.named_leaves(params).items():
        array = np.asarray(leaf)
        arrays[theirs(name, table)] = array.T if name.endswith("/kernel") else array
    return arrays
