"""The shape of a decoder: sizes, and the two ways in which published models turn queries and keys by position."""

import dataclasses
from typing import Literal, TypeAlias

from jaxprune import tree
from jaxprune.lab.models.parts import Shapes, layer, norm, table
from jaxprune.types import Params

Pairs: TypeAlias = Literal["neighbours", "halves"]
"""Which features a rotary position turns together: 2i and 2i + 1 (llama2.c, GGUF's llama), or i and i + n/2 (Hugging
Face, GGUF's qwen2)."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A Llama-like decoder: RMS norms, rotary positions, grouped queries, gated MLP.

    What the params show themselves (layers as a list or stacked, an output layer, biases) is read there when the model
    runs; here it is said for making params and for writing files.

    Attributes:
        vocabulary: number of tokens there are.
        dim: width of a token.
        layers: number of blocks.
        heads: of queries.
        kv_heads: of keys and values, one for each group of `heads / kv_heads`.
        hidden: width of the gated MLP.
        head_dim: width of a head; 0: `dim / heads`.
        length: tokens that the model was trained on at most; it takes any number.
        theta: base of the angles of rotary positions.
        epsilon: of the norms.
        pairs: see `Pairs`.
        tied: whether the embedding is the output layer too.
        qkv_bias: whether queries, keys and values have biases (Qwen2).

    Raises:
        ValueError: heads do not share the width evenly, or groups the heads, or a head has no pairs of features.
    """

    vocabulary: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    head_dim: int = 0
    length: int = 256
    theta: float = 10_000.0
    epsilon: float = 1e-5
    pairs: Pairs = "neighbours"
    tied: bool = True
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        if not self.head_dim:
            if self.dim % self.heads:
                raise ValueError(f"{self.heads} heads do not share a width of {self.dim} evenly. Say `head_dim`.")
            object.__setattr__(self, "head_dim", self.dim // self.heads)
        if self.head_dim % 2:
            raise ValueError(f"A head of {self.head_dim} features has no pairs to turn: an even number was expected.")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} heads of keys cannot serve {self.heads} heads of queries evenly.")

    def resized(self, params: Params) -> "Config":
        """The config of params that have lost layers, heads or hidden units.

        Args:
            params: of a decoder of this width, head width and vocabulary; blocks as a list, or stacked.

        Raises:
            ValueError: blocks are of different sizes, or something else than these numbers is another.
        """
        blocks = params["layers"]
        several = isinstance(blocks, list | tuple)
        sizes = [
            tuple(block[name]["kernel"].shape[-1] for name in ("query", "key", "gate"))
            for block in (blocks if several else [blocks])
        ]
        if len(set(sizes)) != 1:
            raise ValueError(
                f"Blocks have (queries, keys, hidden) of {', '.join(map(str, sizes))}; a decoder has the same in all. "
                "Remove the same fraction of each."
            )
        queries, keys, hidden = sizes[0]
        layers = len(blocks) if several else blocks["gate"]["kernel"].shape[0]
        found = dataclasses.replace(
            self, layers=layers, heads=queries // self.head_dim, kv_heads=keys // self.head_dim, hidden=hidden
        )
        shapes = tree.named_leaves({**found.shapes(), **({} if several else {"layers": []})})
        for name, leaf in tree.named_leaves(params).items():
            if name in shapes and shapes[name].shape != leaf.shape:
                raise ValueError(f"{name!r} has shape {leaf.shape}, a decoder of these sizes {shapes[name].shape}.")
        return found

    def shapes(self) -> Shapes:
        """Of the params: "embed", "layers" (a list), "norm" and, if it is not tied, "output"."""
        return {
            "embed": table(self.vocabulary, self.dim),
            "layers": [self._block() for _ in range(self.layers)],
            "norm": norm(self.dim, "scale"),
        } | ({} if self.tied else {"output": layer(self.dim, self.vocabulary, bias=False)})

    def _block(self) -> Shapes:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "norm1": norm(self.dim, "scale"),
            "query": layer(self.dim, queries, bias=self.qkv_bias),
            "key": layer(self.dim, keys, bias=self.qkv_bias),
            "value": layer(self.dim, keys, bias=self.qkv_bias),
            "out": layer(queries, self.dim, bias=False),
            "norm2": norm(self.dim, "scale"),
            "gate": layer(self.dim, self.hidden, bias=False),
            "up": layer(self.dim, self.hidden, bias=False),
            "down": layer(self.hidden, self.dim, bias=False),
        }
