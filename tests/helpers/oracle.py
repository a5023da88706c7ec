"""What the library promises, once more in NumPy and float64, straight from the formulas and by sorting.

Nothing here is fast and nothing imports `jaxprune`. Views are (*layers, spatial, in, out), as everywhere.
"""

import math
from fractions import Fraction

import numpy as np


def rounded(n: int, share: float) -> int:
    """round(n * share), half to even, of the exact product."""
    return round(n * Fraction(share))


def top_k(scores, k):
    """True at the k largest; of equal ones the lower index survives: a stable sort."""
    flat = np.asarray(scores, np.float64).ravel()
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:k]] = True
    return mask.reshape(np.shape(scores))


def contests(scores, axes, k):
    """`top_k` along `axes` (negative), in every place on the others."""
    scores = np.asarray(scores, np.float64)
    kept = np.moveaxis(scores, axes, range(-len(axes), 0))
    shape = kept.shape
    kept = kept.reshape(-1, math.prod(shape[-len(axes) :]))
    kept = np.stack([top_k(row, k) for row in kept]).reshape(shape)
    return np.moveaxis(kept, range(-len(axes), 0), axes)


def view(leaf, layers, spatial, inputs, outputs):
    """(*layers, spatial, in, out)."""
    leaf = np.asarray(leaf)
    parts = [math.prod(leaf.shape[a] for a in part) for part in (spatial, inputs, outputs)]
    return leaf.transpose(*layers, *spatial, *inputs, *outputs).reshape(*(leaf.shape[a] for a in layers), *parts)


def pool(scores, rows, cols, spatial=False):
    """Mean of each tile of rows x cols (None: the whole axis), and over the window where `spatial`."""
    scores = np.asarray(scores, np.float64)
    *lead, taps, n_in, n_out = scores.shape
    rows, cols = rows or max(n_in, 1), cols or max(n_out, 1)
    if spatial:
        scores, taps = scores.mean(-3, keepdims=True), 1
    groups = np.zeros((*lead, taps, -(-n_in // rows), -(-n_out // cols)))
    for i in range(groups.shape[-2]):
        for j in range(groups.shape[-1]):
            tile = scores[..., i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
            groups[..., i, j] = tile.mean((-2, -1))
    return groups


def expand(kept, rows, cols, shape):
    """Each tile's verdict over its weights."""
    index = np.indices(shape[-2:])
    i, j = index[0] // (rows or max(shape[-2], 1)), index[1] // (cols or max(shape[-1], 1))
    return np.broadcast_to(kept[..., i, j], shape)


def erk(sizes, groups, sparsity):
    """Densities min(1, eps * sum(sizes) / prod(sizes)): leaves fill up in the order of their raw density."""
    raw = np.array([sum(s) / math.prod(s) for s in sizes])
    groups = np.asarray(groups, np.float64)
    order = np.argsort(-raw)
    for full in range(len(raw) + 1):
        dense, rest = order[:full], order[full:]
        left = (1 - sparsity) * groups.sum() - groups[dense].sum()
        eps = left / max((groups[rest] * raw[rest]).sum(), 1e-300)
        if not len(rest) or eps * raw[rest].max() <= 1:
            break
    return np.minimum(1, np.where(np.isin(np.arange(len(raw)), dense), 1, eps * raw))


def owl(groups, sparsity, m, lam):
    """Yin et al. 2023: leaf -> sparsity of each layer; the mean counts weights."""
    layers = {name: g.reshape(-1, *g.shape[-3:]) for name, g in groups.items()}
    ratios = {name: np.array([(one > m * one.mean()).mean() for one in g]) for name, g in layers.items()}
    least, most = (f([f(one) for one in ratios.values()]) for f in (min, max))
    scaled = {name: (one - least) / max(most - least, 1e-300) * 2 * lam for name, one in ratios.items()}
    total = sum(g.size for g in groups.values())
    mean = sum(one.sum() * layers[name][0].size for name, one in scaled.items()) / total
    return {name: np.clip(sparsity - one + mean, 0, 1) for name, one in scaled.items()}


def cubic(step, final, begin, end, initial=0.0):
    """Zhu and Gupta 2017, eq. 1."""
    if step < begin:
        return 0.0
    if step >= end:
        return final
    return final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3


def rounds(step, final, count, length, begin=0):
    """Round r of n has removed 1 - (1 - final) ** (r / n)."""
    done = min(max((step - begin) // length + 1, 0), count)
    return 1 - (1 - final) ** (done / count)


def same_padding(sizes, kernel, strides, dilation):
    """(before, after) of every axis, so that the result has ceil(size / stride) pixels; an odd one comes after."""
    numbers = zip(sizes, kernel, strides, dilation, strict=True)
    totals = [max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in numbers]
    return [(total // 2, total - total // 2) for total in totals]


def convolution(x, kernel, strides, padding, dilation):
    """y[n, h, ..., o] = sum of x[n, h * stride - before + i * dilation, ..., c] kernel[i, ..., c, o], zero outside."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    kernel = np.asarray(kernel, np.float64)
    numbers = list(zip(x.shape[1:-1], kernel.shape[:-2], strides, dilation, strict=True))
    sides = [max((n - (k - 1) * d - 1) // s + 1, 0) for n, k, s, d in numbers]
    y = np.zeros((x.shape[0], *sides, kernel.shape[-1]))
    for place in np.ndindex(kernel.shape[:-2]):
        seen = [np.arange(n) * s + i * d for i, n, (_, _, s, d) in zip(place, sides, numbers, strict=True)]
        y += x[(slice(None), *np.ix_(*seen))] @ kernel[place]
    return y


def rounded_to_8_bits(matrix):
    """(scale, q) in float32: W (out, in) = scale * q, q in -127 ... 127, scale = max |W| / 127 of the output."""
    matrix = np.asarray(matrix, np.float32)
    largest = np.abs(matrix).max(axis=1, initial=0)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    return scale, np.rint(matrix / scale[:, None])
