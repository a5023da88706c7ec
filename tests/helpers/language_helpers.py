"""A small language model, and the same computed in NumPy, one head and one position after the other."""

import jax
import numpy as np

from jaxprune.lab.models import parts
from jaxprune.lab.models.language.config import Config

SMALL = Config(50, 24, 3, 4, 2, 40, length=32)
QWEN = Config(50, 24, 2, 4, 2, 40, head_dim=8, length=32, theta=1e4, pairs="halves", tied=False, qkv_bias=True)


def small(config=SMALL, seed=0):
    """Random params."""
    return parts.random_params(config.shapes(), jax.random.key(seed))


def tokens(config=SMALL, shape=(2, 9), seed=0):
    return np.random.default_rng(seed).integers(0, config.vocabulary, shape, dtype=np.int32)


def logits(params, text, config):
    """Of one text, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = params["embed"]["embedding"][text]
    for block in params["layers"]:
        y = _norm(block["norm1"], x, config)
        queries, keys, values = (_affine(block[name], y) for name in ("query", "key", "value"))
        mixed = []
        for head in range(config.heads):
            n, of = config.head_dim, head // (config.heads // config.kv_heads)
            query = _turned(queries[:, head * n : (head + 1) * n], config)
            key = _turned(keys[:, of * n : (of + 1) * n], config)
            rows = []
            for at in range(len(text)):
                scores = np.exp(query[at] @ key[: at + 1].T / np.sqrt(n))
                rows.append(scores / scores.sum() @ values[: at + 1, of * n : (of + 1) * n])
            mixed.append(rows)
        x = x + _affine(block["out"], np.concatenate(mixed, axis=1))
        y = _norm(block["norm2"], x, config)
        gate = _affine(block["gate"], y)
        x = x + _affine(block["down"], gate / (1 + np.exp(-gate)) * _affine(block["up"], y))
    x = _norm(params["norm"], x, config)
    return _affine(params["output"], x) if "output" in params else x @ params["embed"]["embedding"].T


def _norm(layer, x, config):
    return x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + config.epsilon) * layer["scale"]


def _affine(layer, x):
    return x @ layer["kernel"] + layer.get("bias", 0)


def _turned(rows, config):
    """Pairs as complex numbers, turned by multiplication."""
    n, neighbours = config.head_dim, config.pairs == "neighbours"
    first, second = (rows[:, ::2], rows[:, 1::2]) if neighbours else np.split(rows, 2, axis=1)
    angles = np.outer(np.arange(len(rows)), config.theta ** (-np.arange(0, n, 2) / n))
    turned = (first + 1j * second) * np.exp(1j * angles)
    if neighbours:
        return np.stack([turned.real, turned.imag], axis=-1).reshape(rows.shape)
    return np.concatenate([turned.real, turned.imag], axis=1)
