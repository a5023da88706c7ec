"""Small models, one for each way that channels are coupled: name -> (params, function, input shape)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxprune as jp


class Draw:
    """Weights of a model, drawn in order."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def noise(self, *shape):
        return self.rng.normal(size=shape) / np.sqrt(max(np.prod(shape[:-1]), 1))

    def __call__(self, *shape):
        return jnp.asarray(self.noise(*shape), jnp.float32)

    def near_one(self, size):
        return jnp.asarray(1 + self.noise(size), jnp.float32)

    def layer(self, *shape):
        return {"kernel": self(*shape), "bias": self(shape[-1])}

    def affine(self, size):
        return {"scale": self.near_one(size), "bias": self(size)}

    def norm(self, size):
        mean_and_affine = {**self.affine(size), "mean": self(size)}
        return {**mean_and_affine, "var": jnp.asarray(1 + np.abs(self.noise(size)), jnp.float32)}


def wide(vector, like):
    return jnp.expand_dims(vector, tuple(range(like.ndim - 1)))


def dense(layer, x):
    y = x @ layer["kernel"]
    return y + wide(layer["bias"], y)


def conv(layer, x, stride=1, groups=1, padding="SAME"):
    names = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        x, layer["kernel"], (stride, stride), padding, dimension_numbers=names, feature_group_count=groups
    )
    return y + wide(layer["bias"], y)


def batch_norm(norm, x):
    centred = (x - wide(norm["mean"], x)) * lax.rsqrt(wide(norm["var"], x) + 1e-5)
    return centred * wide(norm["scale"], x) + wide(norm["bias"], x)


def layer_norm(norm, x):
    mean = jnp.mean(x, -1, keepdims=True)
    centred = (x - mean) * lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5)
    return centred * wide(norm["scale"], x) + wide(norm["bias"], x)


def max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def flat(x):
    return x.reshape(x.shape[0], -1)


def mlp():
    draw = Draw()
    params = [draw.layer(6, 12), draw.layer(12, 10), draw.layer(10, 4)]

    def fn(params, x):
        for layer in params[:-1]:
            x = jax.nn.relu(dense(layer, x))
        return dense(params[-1], x)

    return params, fn, (5, 6)


def flattened():
    draw = Draw()
    params = {"a": draw.layer(3, 3, 2, 8), "n": draw.norm(8), "b": draw.layer(8 * 9, 6), "c": draw.layer(6, 3)}

    def fn(p, x):
        x = max_pool(jax.nn.relu(batch_norm(p["n"], conv(p["a"], x))))
        return dense(p["c"], jnp.tanh(dense(p["b"], flat(x))))

    return params, fn, (2, 6, 6, 2)


def residual():
    draw = Draw()
    params = {"stem": draw.layer(3, 3, 2, 8), "a": draw.layer(3, 3, 8, 6), "b": draw.layer(3, 3, 6, 8)}
    params |= {"fc": draw.layer(8, 3)}

    def fn(p, x):
        x = conv(p["stem"], x)
        x = jax.nn.relu(x + conv(p["b"], jax.nn.relu(conv(p["a"], x))))
        return dense(p["fc"], jnp.mean(x, (1, 2)))

    return params, fn, (2, 5, 5, 2)


def padded_shortcut():
    draw = Draw()
    params = {"stem": draw.layer(3, 3, 2, 4), "a": draw.layer(3, 3, 4, 8), "b": draw.layer(3, 3, 8, 8)}
    params |= {"fc": draw.layer(8, 3)}

    def fn(p, x):
        x = jax.nn.relu(conv(p["stem"], x))
        y = conv(p["b"], jax.nn.relu(conv(p["a"], x, 2)))
        x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
        return dense(p["fc"], jnp.mean(jax.nn.relu(x + y), (1, 2)))

    return params, fn, (2, 6, 6, 2)


def concatenated():
    draw = Draw()
    params = {"a": draw.layer(3, 3, 2, 6), "b": draw.layer(3, 3, 6, 4), "c": draw.layer(1, 1, 10, 6)}
    params |= {"fc": draw.layer(6, 3)}

    def fn(p, x):
        x = jax.nn.relu(conv(p["a"], x))
        x = jnp.concatenate([x, jax.nn.relu(conv(p["b"], x))], -1)
        return dense(p["fc"], jnp.max(jax.nn.relu(conv(p["c"], x)), (1, 2)))

    return params, fn, (2, 5, 5, 2)


def gated():
    draw = Draw()
    params = {"up": draw.layer(6, 16), "down": draw.layer(8, 4)}

    def fn(p, x):
        gate, value = jnp.split(dense(p["up"], x), 2, -1)
        return dense(p["down"], jax.nn.silu(gate) * value)

    return params, fn, (5, 6)


def depthwise():
    draw = Draw()
    params = {"a": draw.layer(1, 1, 2, 6), "d": draw.layer(3, 3, 1, 12), "b": draw.layer(1, 1, 12, 8)}
    params |= {"n": draw.norm(12), "fc": draw.layer(8, 3)}

    def fn(p, x):
        x = jax.nn.relu(conv(p["a"], x))
        x = jax.nn.relu(batch_norm(p["n"], conv(p["d"], x, groups=x.shape[-1])))
        return dense(p["fc"], jnp.mean(jax.nn.relu(conv(p["b"], x)), (1, 2)))

    return params, fn, (2, 5, 5, 2)


def grouped():
    draw = Draw()
    params = {"a": draw.layer(1, 1, 2, 8), "g": draw.layer(3, 3, 2, 12), "fc": draw.layer(12, 3)}

    def fn(p, x):
        x = jax.nn.relu(conv(p["g"], jax.nn.relu(conv(p["a"], x)), groups=4))
        return dense(p["fc"], jnp.mean(x, (1, 2)))

    return params, fn, (2, 5, 5, 2)


def group_norm():
    draw = Draw()
    params = {"a": draw.layer(3, 3, 2, 12), "n": draw.affine(12), "fc": draw.layer(12, 3)}

    def fn(p, x):
        x = conv(p["a"], x)
        groups = x.reshape(*x.shape[:3], 4, 3)
        mean, var = (f(groups, (1, 2, 4), keepdims=True) for f in (jnp.mean, jnp.var))
        x = ((groups - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape)
        x = jax.nn.relu(x * wide(p["n"]["scale"], x) + wide(p["n"]["bias"], x))
        return dense(p["fc"], jnp.mean(x, (1, 2)))

    return params, fn, (2, 5, 5, 2)


def channels_first():
    draw = Draw()
    params = {"a": draw(8, 2, 3, 3), "b": draw(6, 8, 3, 3), "fc": draw(4, 6 * 25)}

    def fn(p, x):
        for name in ("a", "b"):
            x = lax.conv_general_dilated(x, p[name], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
            x = jax.nn.relu(x)
        return flat(x) @ p["fc"].T

    return params, fn, (2, 2, 5, 5)


def transposed_convolution():
    draw = Draw()
    params = {"down": draw.layer(3, 3, 2, 8), "up": draw(3, 3, 8, 6), "last": draw.layer(1, 1, 6, 2)}

    def fn(p, x):
        x = jax.nn.relu(conv(p["down"], x, 2))
        x = jax.nn.relu(lax.conv_transpose(x, p["up"], (2, 2), "SAME"))
        return conv(p["last"], x)

    return params, fn, (2, 6, 6, 2)


def attention_by_reshape():
    draw = Draw()
    params = {"embed": draw(7, 6), "qkv": draw.layer(6, 3 * 12), "out": draw.layer(12, 6), "n": draw.affine(6)}
    params |= {"up": draw.layer(6, 10), "down": draw.layer(10, 6)}

    def fn(p, tokens):
        x = p["embed"][tokens]
        q, k, v = (a.reshape(*x.shape[:2], 4, 3) for a in jnp.split(dense(p["qkv"], layer_norm(p["n"], x)), 3, -1))
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(np.sqrt(3)))
        x = x + dense(p["out"], jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(*x.shape[:2], 12))
        x = x + dense(p["down"], jax.nn.gelu(dense(p["up"], layer_norm(p["n"], x))))
        return x @ p["embed"].T

    return params, fn, (2, 5)


def grouped_query_attention():
    draw = Draw()
    params = {"embed": draw(7, 6), "q": draw(6, 4, 2), "k": draw(6, 2, 2), "v": draw(6, 2, 2), "o": draw(4, 2, 6)}
    params |= {"gate": draw(6, 8), "up": draw(6, 8), "down": draw(8, 6), "norm": draw.near_one(6), "head": draw(6, 7)}

    def norm(scale, x):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * wide(scale, x)

    def rotated(x):
        angles = jnp.arange(x.shape[1], dtype=jnp.float32)[None, :, None, None]
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate(
            [a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], -1
        )

    def fn(p, tokens):
        x = p["embed"][tokens]
        h = norm(p["norm"], x)
        q, k, v = (jnp.einsum("bti,ihd->bthd", h, p[name]) for name in ("q", "k", "v"))
        q, k, v = rotated(q), *(jnp.repeat(a, 2, 2) for a in (rotated(k), v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None, None]
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(causal, scores, -1e9)), v)
        x = x + jnp.einsum("bqhd,hdo->bqo", mixed, p["o"])
        h = norm(p["norm"], x)
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
        return x @ p["head"]

    return params, fn, (2, 5)


def stacked_layers():
    draw = Draw()
    params = {"up": draw(3, 6, 10), "up_bias": draw(3, 10), "down": draw(3, 10, 6), "head": draw(6, 4)}

    def fn(p, x):
        def block(x, layer):
            up, bias, down = layer
            return x + jax.nn.relu(x @ up + wide(bias, x)) @ down, None

        x, _ = lax.scan(jax.checkpoint(block), x, (p["up"], p["up_bias"], p["down"]))
        return x @ p["head"]

    return params, fn, (5, 6)


def branches_and_loops():
    draw = Draw()
    params = {"a": draw.layer(6, 8), "b": draw.layer(8, 8), "c": draw.layer(8, 3)}

    def fn(p, x):
        x = checkpoint_name(jax.jit(jax.nn.relu)(dense(p["a"], x)), "hidden")
        x = lax.cond(x[0, 0] > 0, lambda x: jax.nn.relu(dense(p["b"], x)), lambda x: x * 2, x)
        x = lax.fori_loop(0, 3, lambda i, x: x + jnp.tanh(x), x)
        return dense(p["c"], x)

    return params, fn, (5, 6)


def folded_constants():
    draw = Draw()
    params = {"a": draw.layer(6, 12), "b": {"kernel": draw(12, 10)}, "n": draw.norm(10), "c": draw.layer(10, 4)}

    def fn(p, x):
        x = jax.nn.sigmoid(dense(p["a"], x))
        x = jax.nn.sigmoid(batch_norm(p["n"], x @ p["b"]["kernel"]))
        return dense(p["c"], x)

    return params, fn, (5, 6)


MODELS = {
    model.__name__: model
    for model in (
        mlp, flattened, residual, padded_shortcut, concatenated, gated, depthwise, grouped, group_norm, channels_first,
        transposed_convolution, attention_by_reshape, grouped_query_attention, stacked_layers, branches_and_loops,
        folded_constants,
    )
}  # fmt: skip


def make_input(shape, seed=1):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.integers(0, 7, shape)) if shape == (2, 5) else jnp.asarray(rng.normal(size=shape), jnp.float32)
    )


def couplings_of(name):
    params, fn, shape = MODELS[name]()
    return jp.couplings(fn, params, make_input(shape))
