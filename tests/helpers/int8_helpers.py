"""INT8 by NumPy, and what its tests share."""

import itertools

import jax
import numpy as np
from sparse_helpers import LAYOUTS

from jaxprune import sparse
from jaxprune.quantize.int8 import int8

TINY = np.finfo(np.float32).tiny
RANGE = (-51.0, 204.0)  # a scale of exactly 1, and the code of 0 is -77


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def on_codes(x, w, low, high):
    """x @ w on codes, for any scales."""
    one = np.float32(1)
    x_scale = np.maximum(np.float32(high) / np.float32(255) - np.float32(low) / np.float32(255), TINY)
    zero = -128 - np.round(np.float32(low) * (one / x_scale))
    w_scale = np.maximum(np.abs(w).max(axis=0, initial=0), 127 * TINY) * np.float32(1 / 127)
    x_codes = np.clip(np.round(x * (one / x_scale)) + zero, -128, 127).astype(np.int64) - int(zero)
    return (x_codes @ np.round(w * (one / w_scale)).astype(np.int64)).astype(np.float32) * (w_scale * x_scale)


def convolved(x, w, stride=(1, 1), padding=((0, 0), (0, 0)), hole=(1, 1), dilation=(1, 1), groups=1):
    """x NHWC with a window HWIO, by the definition; `hole` is the dilation of x."""
    sizes = [(n - 1) * h + 1 for n, h in zip(x.shape[1:3], hole, strict=True)]
    spread = np.zeros((len(x), *sizes, x.shape[3]), x.dtype)
    spread[:, :: hole[0], :: hole[1]] = x
    spread = np.pad(spread, ((0, 0), *((max(a, 0), max(b, 0)) for a, b in padding), (0, 0)))
    cuts = (slice(max(-a, 0), n - max(-b, 0)) for n, (a, b) in zip(spread.shape[1:3], padding, strict=True))
    spread = spread[:, *cuts]
    reach = [(n - 1) * d + 1 for n, d in zip(w.shape[:2], dilation, strict=True)]
    rows, cols = ((n - r) // s + 1 for n, r, s in zip(spread.shape[1:3], reach, stride, strict=True))
    y = np.zeros((len(x), rows, cols, w.shape[3]), x.dtype)
    inputs, outputs = w.shape[2], w.shape[3] // groups
    for i, j, g in itertools.product(range(rows), range(cols), range(groups)):
        patch = spread[:, i * stride[0] :, j * stride[1] :, g * inputs : (g + 1) * inputs]
        patch = patch[:, : reach[0] : dilation[0], : reach[1] : dilation[1]]
        these = slice(g * outputs, (g + 1) * outputs)
        y[:, i, j, these] = np.einsum("bhwi,hwio->bo", patch, w[..., these])
    return y


def assert_simulated(fn, params, ranges, x, layout="in_out"):
    """`fn` on the compressed params is what `int8` makes of it; the result."""
    selected = {"select": lambda name, _: name in ranges, "layout": LAYOUTS[layout]}
    small = sparse.compress(params, "int8", ranges=ranges, **selected)
    got = jax.jit(sparse.apply(fn))(small, x)
    want = jax.jit(int8(fn, ranges))(params, x)
    assert got.dtype == want.dtype
    assert np.asarray(got + 0).tobytes() == np.asarray(want + 0).tobytes()  # a 0 has no sign
    return np.asarray(got)
