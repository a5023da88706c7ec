"""Vision transformer: an image cut into patches, each a token; every token attends to all.

    x = x + out(attend(q, k, v)),     q, k, v = qkv(norm1(x))                   qkv: one kernel (in, 3 x heads x n)
    x = x + fc2(gelu(fc1(norm2(x))))

Normalisation comes first in both ("pre-norm"). The logits are read from a class token, or from the mean of all tokens.

References:
    Dosovitskiy et al. 2020, arXiv:2010.11929; without class token: Zhai et al. 2021, arXiv:2106.04560.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.lab.models.parts import OfImages, Shapes, affine, attend, conv, layer, layer_norm, norm, table
from jaxprune.types import Params

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class ViT(OfImages):
    """A vision transformer; the default is "tiny", DeiT-Ti's (Touvron et al. 2020, arXiv:2012.12877).

    Attributes:
        dim: width of a token, all heads together.
        layers: number of blocks.
        heads: of attention.
        hidden: width of fc1.
        patch: side of a patch in pixels.
        class_token: whether a token of its own is read at the end, or the mean of the patches.
        classes: number of logits.
        image: (h, w, c).

    Raises:
        ValueError: the image does not part into patches, or the width into heads.
    """

    dim: int = 192
    layers: int = 12
    heads: int = 3
    hidden: int = 768
    patch: int = 16
    class_token: bool = True
    classes: int = 1000
    image: tuple[int, int, int] = (224, 224, 3)

    def __post_init__(self) -> None:
        if self.image[0] % self.patch or self.image[1] % self.patch:
            raise ValueError(
                f"Patches of {self.patch} x {self.patch} pixels do not fill images of {self.image[0]} x "
                f"{self.image[1]}: give sides that are multiples of {self.patch}."
            )
        if self.dim % self.heads:
            raise ValueError(f"{self.heads} heads do not share a width of {self.dim}: it has to be a multiple.")

    def shapes(self) -> Shapes:
        """Of the params: "patch", "position", "blocks" (a list), "norm", "head", perhaps "token"."""
        tokens = (self.image[0] // self.patch) * (self.image[1] // self.patch) + self.class_token
        return {
            "patch": layer(self.patch, self.patch, self.image[-1], self.dim),
            "position": table(tokens, self.dim),
            "blocks": [self._block_shapes() for _ in range(self.layers)],
            "norm": norm(self.dim, "scale", "bias"),
            "head": layer(self.dim, self.classes),
        } | ({"token": table(1, self.dim)} if self.class_token else {})

    def _block_shapes(self) -> Shapes:
        return {
            "norm1": norm(self.dim, "scale", "bias"),
            "qkv": layer(self.dim, 3 * self.dim),
            "out": layer(self.dim, self.dim),
            "norm2": norm(self.dim, "scale", "bias"),
            "fc1": layer(self.dim, self.hidden),
            "fc2": layer(self.hidden, self.dim),
        }

    def apply(self, params: Params, images: Float[Array, "batch h w c"]) -> Float[Array, "batch classes"]:
        """Logits of images."""
        x = conv(params["patch"], images, self.patch, padding=0)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.class_token:
            token = jnp.expand_dims(params["token"]["embedding"], 0)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], *token.shape[1:])), x], axis=1)
        x = x + jnp.expand_dims(params["position"]["embedding"], 0)
        for block in params["blocks"]:
            x = self._block(block, x)
        x = layer_norm(params["norm"], x, EPSILON)
        return affine(params["head"], x[:, 0] if self.class_token else jnp.mean(x, axis=1))

    def _block(self, block: Params, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        qkv = affine(block["qkv"], layer_norm(block["norm1"], x, EPSILON))
        # Heads are counted, not named, so that the function takes params with fewer of them.
        shape = (*x.shape[:2], -1, self.dim // self.heads)
        queries, keys, values = (part.reshape(shape) for part in jnp.split(qkv, 3, axis=-1))
        x = x + affine(block["out"], attend(jnp.expand_dims(queries, 3), keys, values))
        y = jax.nn.gelu(affine(block["fc1"], layer_norm(block["norm2"], x, EPSILON)), approximate=False)
        return x + affine(block["fc2"], y)
