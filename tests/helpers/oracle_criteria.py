"""Scores by the papers' formulas, in NumPy and float64, weight by weight where that is plainest. Imports no `jaxprune`.

Everything is by leaf name; leaves are (*layers, spatial, in, out).
"""

import numpy as np


def magnitude(params):
    return {name: np.abs(w) for name, w in params.items()}


def squared_magnitude(params):
    return {name: w**2 for name, w in params.items()}


def taylor(params, grads):
    return {name: np.abs(w * grads[name]) for name, w in params.items()}


def taylor_squared(params, grads):
    return {name: (w * grads[name]) ** 2 for name, w in params.items()}


def joint_taylor_of_outputs(params, grads):
    """The square of the sum over each output's weights, shared out among them."""
    found = {}
    for name, w in params.items():
        n = w.shape[-3] * w.shape[-2]
        whole = (w * grads[name]).sum((-3, -2), keepdims=True) ** 2
        found[name] = np.broadcast_to(whole / n, w.shape)
    return found


def snip(params, grads):
    total = sum(np.abs(w * grads[name]).sum() for name, w in params.items())
    return {name: np.abs(w * grads[name]) / total for name, w in params.items()}


def grasp(params, hessian_grads):
    """The paper removes the largest of -w Hg: kept are the largest of w Hg."""
    flow = {name: w * hessian_grads[name] for name, w in params.items()}
    least = min(0, *(one.min() for one in flow.values()))
    return {name: one - least for name, one in flow.items()}


def synflow(params, flow_grads):
    return {name: np.abs(np.abs(w) * flow_grads[name]) for name, w in params.items()}


def fisher(params, squared_grads):
    return {name: w**2 * squared_grads[name] / 2 for name, w in params.items()}


def lamp(params):
    """Sums over all weights of the layer that are larger, or as large and not behind."""
    found = {}
    for name, w in params.items():
        layers = w.reshape(-1, *w.shape[-3:])
        scores = np.zeros_like(layers)
        for layer, out in zip(layers, scores, strict=True):
            flat = layer.reshape(-1)
            for i, one in enumerate(flat):
                before = np.arange(flat.size) <= i
                larger = (np.abs(flat) > abs(one)) | ((np.abs(flat) == abs(one)) & before)
                out.reshape(-1)[i] = one**2 / max((flat[larger] ** 2).sum(), 1e-300)
        found[name] = scores.reshape(w.shape)
    return found


def geometric_median(params):
    found = {}
    for name, w in params.items():
        layers = w.reshape(-1, *w.shape[-3:])
        scores = np.zeros_like(layers)
        for layer, out in zip(layers, scores, strict=True):
            for j in range(layer.shape[-1]):
                others = [np.linalg.norm(layer[..., i] - layer[..., j]) for i in range(layer.shape[-1])]
                out[..., j] = sum(others)
        found[name] = scores.reshape(w.shape)
    return found


def of_outputs(params, numbers):
    return {name: np.broadcast_to(np.abs(numbers[name])[..., None, None, :], w.shape) for name, w in params.items()}


def norm_scale(params, scales):
    return of_outputs(params, scales)


def activation_mean(params, output_means):
    return of_outputs(params, output_means)


def apoz(params, zero_fractions):
    return {name: 1 - one for name, one in of_outputs(params, zero_fractions).items()}


def wanda(params, input_norms):
    return {name: np.abs(w) * input_norms[name][..., None, :, None] for name, w in params.items()}
