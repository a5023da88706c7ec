"""Networks put together at random from everything that couples channels, and a count of their multiply-adds.

A step makes (params, function of (ops, params, x), channels of its result, side of its images), from the channels and
the side that it meets, 0 for vectors, and a width; None where it does not apply. `ops` multiplies, and counts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from compact_models import Draw, batch_norm, conv, dense, flat, layer_norm, max_pool, wide
from jax import lax


class Counted:
    """Layers that add up their multiply-adds."""

    def __init__(self):
        self.macs = 0

    def __call__(self, layer, x, groups=1):
        """A matrix product of vectors, or a convolution of images."""
        y = conv(layer, x, groups=groups) if layer["kernel"].ndim == 4 else dense(layer, x)
        self.macs += y.size * layer["kernel"].size // layer["kernel"].shape[-1]
        return y


def shape(side, *sizes):
    return (*((3, 3) if side else ()), *sizes)


def layer(draw, size, side, width):
    return draw.layer(*shape(side, size, width)), lambda ops, p, x: ops(p, x), width, side


def residual(draw, size, side, width):
    params = draw.layer(*shape(side, size, width)), draw.layer(*shape(side, width, size))
    return params, lambda ops, p, x: x + ops(p[1], jax.nn.relu(ops(p[0], x))), size, side


def dense_block(draw, size, side, width):
    fn = lambda ops, p, x: jnp.concatenate([x, ops(p, x)], -1)  # noqa: E731
    return draw.layer(*shape(side, size, width)), fn, size + width, side


def gate(draw, size, side, width):
    def fn(ops, p, x):
        a, b = jnp.split(ops(p, x), 2, -1)
        return a * jax.nn.sigmoid(b)

    return draw.layer(*shape(side, size, 2 * width)), fn, width, side


def depthwise(draw, size, side, width):
    if not side:
        return None
    return draw.layer(3, 3, 1, 2 * size), lambda ops, p, x: ops(p, x, groups=x.shape[-1]), 2 * size, side


def grouped(draw, size, side, width):
    if not side or size % 2:
        return None
    # As many groups as the smaller kernel says, so that the function takes it.
    fn = lambda ops, p, x: ops(p, x, groups=x.shape[-1] // p["kernel"].shape[2])  # noqa: E731
    return draw.layer(3, 3, 2, size // 2 * width), fn, size // 2 * width, side


def group_norm(draw, size, side, width):
    if size % 2:
        return None

    def fn(ops, p, x):
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        over = tuple(a for a in range(1, pairs.ndim) if a != pairs.ndim - 2)
        mean, var = (of(pairs, over, keepdims=True) for of in (jnp.mean, jnp.var))
        x = ((pairs - mean) * lax.rsqrt(var + 1e-2)).reshape(x.shape)
        return x * wide(p["scale"], x) + wide(p["bias"], x)

    return draw.affine(size), fn, size, side


def attention(draw, size, side, width):
    """Two heads of queries that share one of keys and values; pixels are tokens, and of a vector each image is one."""
    params = {name: draw.layer(size, heads * width) for name, heads in (("q", 2), ("k", 1), ("v", 1))}
    params["out"] = draw.layer(2 * width, size)

    def fn(ops, p, x):
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = (ops(p[name], tokens).reshape(*tokens.shape[:2], -1, width) for name in "qkv")
        k, v = (jnp.repeat(a, 2, 2) for a in (k, v))
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(np.sqrt(width)))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
        return x + ops(p["out"], mixed.reshape(*mixed.shape[:2], -1)).reshape(x.shape)

    return params, fn, size, side


def fused_attention(draw, size, side, width):
    """Two heads whose queries, keys and values come from one matrix, (3, heads, width); see `attention`."""
    params = draw.layer(size, 3 * 2 * width), draw.layer(2 * width, size)

    def fn(ops, p, x):
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = jnp.moveaxis(ops(p[0], tokens).reshape(*tokens.shape[:2], 3, -1, width), 2, 0)
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(np.sqrt(width)))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
        return x + ops(p[1], mixed.reshape(*mixed.shape[:2], -1)).reshape(x.shape)

    return params, fn, size, side


def shuffle(draw, size, side, width):
    """Channels become pixels, as TensorFlow orders them, of which the largest of four stay."""
    if not side:
        return None

    def fn(ops, p, x):
        x = ops(p, x).reshape(-1, side, side, 2, 2, width)
        return max_pool(jnp.swapaxes(x, 2, 3).reshape(-1, 2 * side, 2 * side, width))

    return draw.layer(*shape(side, size, 4 * width)), fn, width, side


def stacked(draw, size, side, width):
    """Two residual layers in a scan; over pixels where there are some."""
    params = {"up": draw(2, size, width), "down": draw(2, width, size)}

    def fn(ops, p, x):
        ops.macs += 2 * 2 * x.size * p["up"].shape[-1]
        return lax.scan(lambda x, p: (x + jax.nn.relu(x @ p["up"]) @ p["down"], None), x, p)[0]

    return params, fn, size, side


def tied(draw, size, side, width):
    """One matrix there and back."""

    def fn(ops, p, x):
        ops.macs += 2 * x.size * p.shape[-1]
        return x + jnp.tanh(x @ p) @ p.T

    return draw(size, width), fn, size, side


def branch(draw, size, side, width):
    """One of two layers, as the input says."""
    params = [draw.layer(*shape(side, size, width)) for _ in range(2)]

    def fn(ops, p, x):
        return lax.cond(jnp.sum(x) > 0, lambda x: jax.nn.relu(ops(p[0], x)), lambda x: ops(p[1], x), x)

    return params, fn, width, side


def pool(draw, size, side, width):
    return ((), lambda ops, p, x: max_pool(x), size, side // 2) if side > 1 else None


def flatten(draw, size, side, width):
    return ((), lambda ops, p, x: flat(x), size * side * side, 0) if side else None


def elementwise(fn, params=lambda draw, size: ()):
    return lambda draw, size, side, width: (params(draw, size), lambda ops, p, x: fn(p, x), size, side)


STEPS = {
    **{step.__name__: step for step in (layer, residual, dense_block, gate, depthwise, grouped, group_norm)},
    **{step.__name__: step for step in (attention, fused_attention, shuffle, stacked, tied, branch, pool, flatten)},
    "relu": elementwise(lambda p, x: jax.nn.relu(x)),
    "tanh": elementwise(lambda p, x: jnp.tanh(x)),
    "gelu": elementwise(lambda p, x: jax.nn.gelu(x)),
    "scale": elementwise(lambda p, x: x * wide(p, x), lambda draw, size: draw(size)),
    "batch norm": elementwise(batch_norm, lambda draw, size: draw.norm(size)),
    "layer norm": elementwise(layer_norm, lambda draw, size: draw.affine(size)),
}


def random_net(steps, seed, side=8):
    """Params and function of a network of these (step, width) pairs, those left out that do not apply.

    The function gives three numbers an image, and its multiply-adds are those of its last call, `fn.ops.macs`.
    """
    draw, size, made = Draw(seed), 2, []
    for name, width in steps:
        step = STEPS[name](draw, size, side, width)
        if step is not None:
            params, fn, size, side = step
            made.append((params, fn))
    ops = Counted()

    def apply(params, x):
        ops.macs = 0
        for p, (_, fn) in zip(params["steps"], made, strict=True):
            x = fn(ops, p, x)
        return ops(params["last"], x if x.ndim == 2 else jnp.mean(x, (1, 2)))

    return {"steps": [params for params, _ in made], "last": draw.layer(size, 3)}, apply, ops
