"""Decoder: a transformer that gives each token the logits of the next one.

    x = x + out(attend(rotary(query(y)), rotary(key(y)), value(y))),     y = norm(x)
    x = x + down(silu(gate(y)) * up(y))

Heads of queries share the keys and values of their group; positions are turns of pairs of features; norms have no mean
and layers no bias. Blocks follow one another in Python (params "layers/0/...", "layers/1/...") or are stacked and
scanned (params "layers/...", one more axis in front).

References:
    Touvron et al. 2023, arXiv:2302.13971 (the architecture); Ainslie et al. 2023, arXiv:2305.13245 (groups);
    Su et al. 2021, arXiv:2104.09864 (rotary positions); Shazeer 2020, arXiv:2002.05202 (gated MLP).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxprune.lab.models.parts import Shapes, affine, attend, layer, norm, rms_norm, table
from jaxprune.types import Params


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder-only language model.

    Attributes:
        vocabulary: number of tokens there are.
        dim: width of a token, all heads together.
        layers: number of blocks.
        heads: of queries.
        kv_heads: of keys and values, one for each group of `heads / kv_heads`.
        hidden: width of the gated MLP.
        tied: whether the embedding is the output layer too.
        scan: whether blocks are stacked.
        length: tokens of a sample; the model takes any number.
        theta: the slowest turn takes about this many positions.
        epsilon: of the norms.

    Raises:
        ValueError: heads do not share the width evenly, or groups the heads.
    """

    vocabulary: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    tied: bool = False
    scan: bool = False
    length: int = 256
    theta: float = 10_000.0
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"{self.heads} heads do not share a width of {self.dim} in pairs of features: it has to be a multiple "
                f"of {2 * self.heads}."
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} heads of keys cannot serve {self.heads} heads of queries evenly.")

    @property
    def sample(self) -> jax.ShapeDtypeStruct:
        """One text."""
        return jax.ShapeDtypeStruct((self.length,), jnp.int32)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.heads

    def shapes(self) -> Shapes:
        """Of the params: "embed", "layers" (a list, or stacked), "norm" and, if it is not tied, "output"."""
        block = self._block_shapes()
        stacked = jax.tree.map(lambda leaf: leaf.update(shape=(self.layers, *leaf.shape)), block)
        return {
            "embed": table(self.vocabulary, self.dim),
            "layers": stacked if self.scan else [block] * self.layers,
            "norm": norm(self.dim, "scale"),
        } | ({} if self.tied else {"output": layer(self.dim, self.vocabulary, bias=False)})

    def _block_shapes(self) -> Shapes:
        return {
            "norm1": norm(self.dim, "scale"),
            "query": layer(self.dim, self.heads * self.head_dim, bias=False),
            "key": layer(self.dim, self.kv_heads * self.head_dim, bias=False),
            "value": layer(self.dim, self.kv_heads * self.head_dim, bias=False),
            "out": layer(self.heads * self.head_dim, self.dim, bias=False),
            "norm2": norm(self.dim, "scale"),
            "gate": layer(self.dim, self.hidden, bias=False),
            "up": layer(self.dim, self.hidden, bias=False),
            "down": layer(self.hidden, self.dim, bias=False),
        }

    def apply(self, params: Params, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length vocabulary"]:
        """Logits of the token after each; a token is from 0 to below `vocabulary`."""
        embedding = params["embed"]["embedding"]
        x = jnp.take(embedding, tokens, axis=0, mode="clip")
        if self.scan:
            x, _ = lax.scan(lambda x, block: (self._block(block, x), None), x, params["layers"])
        else:
            for block in params["layers"]:
                x = self._block(block, x)
        x = rms_norm(params["norm"], x, self.epsilon)
        return x @ embedding.T if self.tied else affine(params["output"], x)

    def _block(self, block: Params, x: Float[Array, "batch length dim"]) -> Float[Array, "batch length dim"]:
        y = rms_norm(block["norm1"], x, self.epsilon)
        # Groups are counted, not named, so that the function takes params with fewer of them.
        shape = (*x.shape[:2], -1, self.heads // self.kv_heads, self.head_dim)
        queries = rotary(affine(block["query"], y).reshape(shape), self.theta)
        keys, values = (affine(block[name], y).reshape(*x.shape[:2], -1, self.head_dim) for name in ("key", "value"))
        x = x + affine(block["out"], attend(queries, rotary(keys, self.theta), values, causal=True))
        y = rms_norm(block["norm2"], x, self.epsilon)
        return x + affine(block["down"], jax.nn.silu(affine(block["gate"], y)) * affine(block["up"], y))


def rotary(x: Float[Array, "batch length *heads n"], theta: float) -> Float[Array, "batch length *heads n"]:
    r"""Each pair of neighbouring features turned by an angle that grows with the position.

    Features $2i$ and $2i+1$ of position $p$ turn by $p \, \theta^{-2i/n}$, so that products of queries and keys know
    only how far apart they are.

    Args:
        x: queries or keys.
        theta: base of the angles.

    References:
        Su et al. 2021, arXiv:2104.09864, equation 34.
    """
    n = x.shape[-1]
    speeds = theta ** (-jnp.arange(0, n, 2, dtype=jnp.float32) / n)
    positions = jnp.arange(x.shape[1], dtype=jnp.float32)
    angles = jnp.expand_dims(positions, 1) * jnp.expand_dims(speeds, 0)
    angles = jnp.expand_dims(angles, (0, *range(2, x.ndim - 1)))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
