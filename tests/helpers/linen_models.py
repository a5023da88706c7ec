"""Models of the lab's list as a user of Flax Linen writes them: batches, channels last."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen


class VGG(linen.Module):
    groups: tuple[tuple[int, int], ...]
    hidden: int
    train: bool = False

    @linen.compact
    def __call__(self, x):
        for count, channels in self.groups:
            for _ in range(count):
                x = linen.Conv(channels, (3, 3))(x)
                x = linen.relu(linen.BatchNorm(use_running_average=not self.train)(x))
            x = linen.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = linen.Dropout(0.5, deterministic=not self.train)(linen.relu(linen.Dense(self.hidden)(x)))
        return linen.Dense(10)(x)


class Bottleneck(linen.Module):
    width: int
    stride: int
    norm: Any

    @linen.compact
    def __call__(self, x):
        conv = functools.partial(linen.Conv, use_bias=False)
        strides = (self.stride, self.stride)
        y = linen.relu(self.norm()(conv(self.width, (1, 1))(x)))
        y = linen.relu(self.norm()(conv(self.width, (3, 3), strides)(y)))
        y = self.norm()(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm(name="norm_proj")(conv(4 * self.width, (1, 1), strides, name="conv_proj")(x))
        return linen.relu(x + y)


class ResNet(linen.Module):
    blocks: tuple[int, ...]
    width: int
    classes: int
    train: bool = False

    @linen.compact
    def __call__(self, x):
        norm = functools.partial(linen.BatchNorm, use_running_average=not self.train, epsilon=1e-5)
        x = linen.Conv(self.width, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], use_bias=False)(x)
        x = linen.max_pool(linen.relu(norm()(x)), (3, 3), strides=(2, 2), padding="SAME")
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                x = Bottleneck(self.width * 2**stage, 2 if stage and not i else 1, norm)(x)
        return linen.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


class MobileNet(linen.Module):
    blocks: tuple[tuple[int, int], ...]
    stem: int
    classes: int
    train: bool = False

    @linen.compact
    def __call__(self, x):
        x = self.norm_relu(linen.Conv(self.stem, (3, 3), (2, 2), use_bias=False)(x))
        for channels, stride in self.blocks:
            inputs = x.shape[-1]
            depthwise = linen.Conv(inputs, (3, 3), (stride, stride), feature_group_count=inputs, use_bias=False)
            x = self.norm_relu(depthwise(x))
            x = self.norm_relu(linen.Conv(channels, (1, 1), use_bias=False)(x))
        x = linen.avg_pool(x, x.shape[1:3]).squeeze((1, 2))
        return linen.Dense(self.classes)(x)

    def norm_relu(self, x):
        return linen.relu(linen.BatchNorm(use_running_average=not self.train)(x))


def rotary(x):
    """Queries or keys (batch, length, heads, n): halves of the features turn with the position."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] / 10_000 ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class DecoderBlock(linen.Module):
    heads: int
    kv_heads: int
    hidden: int

    @linen.compact
    def __call__(self, x):
        dim = x.shape[-1]
        y, head = linen.RMSNorm()(x), dim // self.heads
        query, key, value = (
            linen.DenseGeneral((heads, head), use_bias=False, name=name)(y)
            for name, heads in (("query", self.heads), ("key", self.kv_heads), ("value", self.kv_heads))
        )
        mixed = jax.nn.dot_product_attention(rotary(query), rotary(key), value, is_causal=True)
        x = x + linen.DenseGeneral(dim, axis=(-2, -1), use_bias=False, name="out")(mixed)
        y = linen.RMSNorm()(x)
        gate, up = (linen.Dense(self.hidden, use_bias=False, name=name)(y) for name in ("gate", "up"))
        return x + linen.Dense(dim, use_bias=False, name="down")(linen.silu(gate) * up)


class Decoder(linen.Module):
    vocabulary: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int

    @linen.compact
    def __call__(self, tokens):
        embed = linen.Embed(self.vocabulary, self.dim)
        x = embed(tokens)
        for _ in range(self.layers):
            x = DecoderBlock(self.heads, self.kv_heads, self.hidden)(x)
        return embed.attend(linen.RMSNorm()(x))
