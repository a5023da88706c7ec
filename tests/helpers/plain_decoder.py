"""A Llama-like decoder as a plain function of a dict, its layers a list or stacked for a scan; stories15m's weights."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def rms_norm(x, scale):
    normal = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + jnp.float32(1e-5))
    return normal * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def rotary(x):
    length, dim = x.shape[1], x.shape[-1]
    angles = np.arange(length)[:, None] * 1e4 ** (-np.arange(0, dim, 2) / dim)
    cos, sin = (jnp.asarray(one, jnp.float32)[None, :, None] for one in (np.cos(angles), np.sin(angles)))
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


def layer(p, x, heads):
    h = rms_norm(x, p["norm1"])
    q, k, v = ((h @ p[name]).reshape(*x.shape[:2], heads, -1) for name in ("q", "k", "v"))
    scores = jnp.einsum("bthd,bshd->bhts", rotary(q), rotary(k)) * jnp.float32(q.shape[-1] ** -0.5)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones(2 * (x.shape[1],), bool)), scores.shape)
    attention = jax.nn.softmax(jnp.where(causal, scores, jnp.float32(-1e9)))
    x = x + jnp.einsum("bhts,bshd->bthd", attention, v).reshape(x.shape) @ p["o"]
    h = rms_norm(x, p["norm2"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def decoder(heads):
    """(params, tokens) -> logits; of tied embeddings."""

    def apply(params, tokens):
        x = params["embed"][tokens]
        if isinstance(params["layers"], list):
            for p in params["layers"]:
                x = layer(p, x, heads)
        else:
            x = lax.scan(
                lambda x, p: (jax.checkpoint(layer, static_argnums=2)(p, x, heads), None), x, params["layers"]
            )[0]
        return rms_norm(x, params["norm"]) @ params["embed"].T

    return apply


def stacked(params):
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])
    return params | {"layers": layers}


def drawn(layers=3, vocabulary=13, dim=12, hidden=20, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * shape[0] ** -0.5, jnp.float32)  # noqa: E731
    shapes = {**dict.fromkeys("qkvo", (dim, dim)), "gate": (dim, hidden), "up": (dim, hidden), "down": (hidden, dim)}
    one = lambda: {  # noqa: E731
        **{name: draw(*shape) for name, shape in shapes.items()},
        "norm1": 1 + draw(dim),
        "norm2": 1 + draw(dim),
    }
    return {"embed": draw(vocabulary, dim) * 3, "norm": 1 + draw(dim), "layers": [one() for _ in range(layers)]}


def stories():
    """stories15m, 6 heads."""
    raw = np.fromfile(Path(os.environ["JAXPRUNE_DATA"]) / "stories15m" / "llama2.data", np.float32, offset=28)
    at = 0

    def take(*shape):
        nonlocal at
        at += (size := int(np.prod(shape)))
        return raw[at - size : at].reshape(shape)

    params = {"embed": jnp.asarray(take(32000, 288))}
    shapes = {"norm1": (288,), **dict.fromkeys("qkvo", (288, 288)), "norm2": (288,), "gate": (768, 288)}
    shapes |= {"down": (288, 768), "up": (768, 288)}
    stacks = {name: take(6, *shape) for name, shape in shapes.items()}
    params["norm"] = jnp.asarray(take(288))
    params["layers"] = [
        {name: jnp.asarray(stack[i].T if stack.ndim == 3 else stack[i]) for name, stack in stacks.items()}
        for i in range(6)
    ]
    return params
