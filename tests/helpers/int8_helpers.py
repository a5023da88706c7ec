"""INT8 by NumPy, and what its tests share."""

import numpy as np

RANGE = (-51.0, 204.0)  # a scale of exactly 1, and the code of 0 is -77


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def on_codes(x, w, low, high):
    """x @ w on codes, for any scales."""
    one = np.float32(1)
    x_scale = np.float32(high) / np.float32(255) - np.float32(low) / np.float32(255)
    zero = -128 - np.round(np.float32(low) * (one / x_scale))
    w_scale = np.abs(w).max(axis=0) * np.float32(1 / 127)
    x_codes = np.clip(np.round(x * (one / x_scale)) + zero, -128, 127).astype(np.int64) - int(zero)
    return (x_codes @ np.round(w * (one / w_scale)).astype(np.int64)).astype(np.float32) * (w_scale * x_scale)
