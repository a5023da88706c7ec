"""A decoder of 32 layers and 7 billion parameters, traced from shapes alone: prints seconds, bytes and what was found.

Run as a program, by `test_selection.py`, so that the bytes are those of tracing.
"""

import json
import re
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

import jaxprune as jp

LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN, VOCABULARY, BATCH, LENGTH = 32, 4096, 32, 8, 14336, 32000, 1, 2048
DIM = WIDTH // HEADS


def rms_norm(x, scale):
    mean = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return x * lax.rsqrt(mean + 1e-5).astype(x.dtype) * scale


def rotary(x):
    angles = jnp.arange(LENGTH)[:, None] * 1e4 ** (-jnp.arange(0, DIM, 2) / DIM)
    cos, sin = jnp.cos(angles)[:, None].astype(x.dtype), jnp.sin(angles)[:, None].astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def layer(p, x):
    h = rms_norm(x, p["norm1"])
    qkv = jnp.split(p["qkv"], [WIDTH, WIDTH + KV_HEADS * DIM], axis=-1)
    q, k, v = ((h @ w).reshape(BATCH, LENGTH, -1, DIM) for w in qkv)
    q = rotary(q).reshape(BATCH, LENGTH, KV_HEADS, -1, DIM)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, rotary(k)) / DIM**0.5
    causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    attention = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf).astype(jnp.float32)).astype(x.dtype)
    x = x + jnp.einsum("bkgts,bskd->btkgd", attention, v).reshape(x.shape) @ p["out"]
    h = rms_norm(x, p["norm2"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def decoder(params, tokens):
    x = params["embedding"][tokens]
    if isinstance(params["layers"], list):
        for p in params["layers"]:
            x = layer(p, x)
    else:
        x = lax.scan(lambda x, p: (jax.checkpoint(layer)(p, x), None), x, params["layers"])[0]
    return rms_norm(x, params["norm"]) @ params["head"]


def shapes(*stack):
    like = lambda *shape: jax.ShapeDtypeStruct((*stack, *shape), jnp.bfloat16)  # noqa: E731
    return {
        "norm1": like(WIDTH),
        "qkv": like(WIDTH, WIDTH + 2 * KV_HEADS * DIM),
        "out": like(WIDTH, WIDTH),
        "norm2": like(WIDTH),
        "gate": like(WIDTH, HIDDEN),
        "up": like(WIDTH, HIDDEN),
        "down": like(HIDDEN, WIDTH),
    }


def peak_bytes():
    """Of this program alone: what `getrusage` tells includes the process that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024


def main(how):
    outside = {"embedding": (VOCABULARY, WIDTH), "norm": (WIDTH,), "head": (WIDTH, VOCABULARY)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in outside.items()}
    params["layers"] = shapes(LAYERS) if how == "scan" else [shapes() for _ in range(LAYERS)]
    began = time.perf_counter()
    sites = jp.trace(decoder, params, jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32), strict=True)
    weights, layout = jp.weights_of(sites), jp.layout_of(sites)
    found = {
        "seconds": time.perf_counter() - began,
        "bytes": peak_bytes(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "macs": sum(site.macs for site in sites),
        "kinds": {kind: sum(site.count for site in sites if site.kind == kind) for kind in {s.kind for s in sites}},
        "weights": len(weights.names),
        "rules": len(layout.rules),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
