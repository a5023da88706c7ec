"""Models of the lab's list as a user of  writes them: (one sample, state) -> (logits, state), channels first."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp


class ConvNorm(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm

    def __init__(self, inputs, outputs, size, stride=1, groups=1, *, key):
        self.conv = eqx.nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, use_bias=False, key=key)
        self.norm = eqx.nn.BatchNorm(outputs, axis_name="batch", mode="batch")

    def __call__(self, x, state):
        return self.norm(self.conv(x), state)


class VGG(eqx.Module):
    convs: list[list[ConvNorm]]
    pool: eqx.nn.MaxPool2d
    dense: list[eqx.nn.Linear]
    dropout: eqx.nn.Dropout

    def __init__(self, groups, hidden, side, *, key):
        keys = iter(jax.random.split(key, 3 + sum(count for count, _ in groups)))
        inputs, self.convs = 3, []
        for count, channels in groups:
            self.convs.append([])
            for _ in range(count):
                self.convs[-1].append(ConvNorm(inputs, channels, 3, key=next(keys)))
                inputs = channels
        self.pool = eqx.nn.MaxPool2d(2, 2)
        sizes = (inputs * (side // 2 ** len(groups)) ** 2, hidden, hidden, 10)
        self.dense = [eqx.nn.Linear(a, b, key=next(keys)) for a, b in itertools.pairwise(sizes)]
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, x, state):
        for group in self.convs:
            for conv in group:
                x, state = conv(x, state)
                x = jax.nn.relu(x)
            x = self.pool(x)
        x = x.reshape(-1)
        for dense in self.dense[:-1]:
            x = self.dropout(jax.nn.relu(dense(x)))
        return self.dense[-1](x), state


class Block(eqx.Module):
    conv1: ConvNorm
    conv2: ConvNorm
    stride: int = eqx.field(static=True)

    def __init__(self, inputs, outputs, stride, *, key):
        a, b = jax.random.split(key)
        self.conv1 = ConvNorm(inputs, outputs, 3, stride, key=a)
        self.conv2 = ConvNorm(outputs, outputs, 3, key=b)
        self.stride = stride

    def __call__(self, x, state):
        y, state = self.conv1(x, state)
        y, state = self.conv2(jax.nn.relu(y), state)
        new = (y.shape[0] - x.shape[0]) // 2  # a shortcut without weights: every second pixel, zeros for new channels
        x = jnp.pad(x[:, :: self.stride, :: self.stride], ((new, new), (0, 0), (0, 0)))
        return jax.nn.relu(x + y), state


class ResNet(eqx.Module):
    stem: ConvNorm
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, blocks, width, *, key):
        keys = iter(jax.random.split(key, 2 + sum(blocks)))
        self.stem = ConvNorm(3, width, 3, key=next(keys))
        inputs, self.blocks = width, []
        for stage, count in enumerate(blocks):
            for i in range(count):
                outputs, stride = width * 2**stage, 2 if stage and not i else 1
                self.blocks.append(Block(inputs, outputs, stride, key=next(keys)))
                inputs = outputs
        self.head = eqx.nn.Linear(inputs, 10, key=next(keys))

    def __call__(self, x, state):
        x, state = self.stem(x, state)
        x = jax.nn.relu(x)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(jnp.mean(x, axis=(1, 2))), state


class MobileNet(eqx.Module):
    stem: ConvNorm
    blocks: list[tuple[ConvNorm, ConvNorm]]
    pool: eqx.nn.AdaptiveAvgPool2d
    head: eqx.nn.Linear

    def __init__(self, blocks, stem, classes, *, key):
        keys = iter(jax.random.split(key, 2 + 2 * len(blocks)))
        self.stem = ConvNorm(3, stem, 3, 2, key=next(keys))
        inputs, self.blocks = stem, []
        for channels, stride in blocks:
            depthwise = ConvNorm(inputs, inputs, 3, stride, groups=inputs, key=next(keys))
            self.blocks.append((depthwise, ConvNorm(inputs, channels, 1, key=next(keys))))
            inputs = channels
        self.pool = eqx.nn.AdaptiveAvgPool2d(1)
        self.head = eqx.nn.Linear(inputs, classes, key=next(keys))

    def __call__(self, x, state):
        for conv in (self.stem, *(conv for block in self.blocks for conv in block)):
            x, state = conv(x, state)
            x = jax.nn.relu(x)
        return self.head(self.pool(x).reshape(-1)), state


class ViTBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, dim, heads, hidden, *, key):
        a, b = jax.random.split(key)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(dim), eqx.nn.LayerNorm(dim)
        biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.attention = eqx.nn.MultiheadAttention(heads, dim, **biases, key=a)
        self.mlp = eqx.nn.MLP(dim, dim, hidden, depth=1, activation=jax.nn.gelu, key=b)

    def __call__(self, x):
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class ViT(eqx.Module):
    patch: eqx.nn.Conv2d
    token: jax.Array
    position: jax.Array
    blocks: list[ViTBlock]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, dim, layers, heads, hidden, patch, side, classes, *, key):
        keys = iter(jax.random.split(key, 4 + layers))
        self.patch = eqx.nn.Conv2d(3, dim, patch, patch, key=next(keys))
        self.token = jax.random.normal(next(keys), (1, dim))
        self.position = jax.random.normal(next(keys), (1 + (side // patch) ** 2, dim))
        self.blocks = [ViTBlock(dim, heads, hidden, key=next(keys)) for _ in range(layers)]
        self.norm, self.head = eqx.nn.LayerNorm(dim), eqx.nn.Linear(dim, classes, key=next(keys))

    def __call__(self, x, state):
        x = self.patch(x)
        x = jnp.concatenate([self.token, x.reshape(x.shape[0], -1).T]) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[0])), state
