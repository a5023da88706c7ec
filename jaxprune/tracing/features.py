r"""A product or a convolution as one of matrices, in the order of the leaf's view.

    y = x w        x: (layers, tokens, features)        w: (layers, features, outputs), the view of `jaxprune.layout`

Features are the leaf's axes that are summed over, windows before inputs; of a convolution a token is a place of the
output, and its features are what the window covers there, padding as zeros. On its way to the operand a leaf may have
been transposed, reshaped, cut, flipped or taken apart by a scan: numbers of its features, outputs and layers are sent
along, and where they arrive says which is which.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from jaxprune.layout import Axes
from jaxprune.tracing.products import Product
from jaxprune.tracing.sites import Site


class Places(NamedTuple):
    """Which rows and columns of a leaf's view a product multiplies by.

    Attributes:
        axes: of the leaf, as this product uses them.
        order: places of the operand's features, in the order of the view.
        outputs: number of each of the operand's outputs, in the view.
        layers: number of the leaf's layer, one for all of the product's batch or one for each index of it.
        steps: for every scan that takes the leaf apart, what each of its steps adds to the number of the layer.
    """

    axes: Axes
    order: np.ndarray
    outputs: np.ndarray
    layers: np.ndarray
    steps: tuple[np.ndarray, ...]


def inputs_of(product: Product) -> Float[Array, "layers tokens features"]:
    """What the weights are multiplied by, for each of the layers of `layers_of`; float32.

    Raises:
        ValueError: see `places`.
    """
    site, found = product.site, places(product.site)
    if site.op == "dot_general":
        summed, batch = (axes[site.weight_first] for axes in dict(site.params)["dimension_numbers"])
        x = jnp.transpose(product.x, (*batch, *_others(product.x.ndim, summed, batch), *summed))
        rows = x.astype(jnp.float32).reshape(found.layers.size, -1, found.order.size)
    else:
        window = [product.weight.shape[axis] for axis in dict(site.params)["dimension_numbers"][1][2:]]
        rows = _windows(site, window, product.x.astype(jnp.float32))[None]
    return rows if _is_range(found.order) else jnp.take(rows, found.order, axis=-1)


def results_of(site: Site, weight_ndim: int, y: Shaped[Array, "..."]) -> Float[Array, "layers tokens outputs"]:
    """An array shaped like a product's result, as outputs in the operand's order, see `Places`; float32.

    Args:
        site: of the product.
        weight_ndim: number of axes of its operand.
        y: the array.
    """
    found, outputs = places(site), output_axes(site, weight_ndim, y.ndim)
    batch = range(batch_axes(site))
    rows = jnp.transpose(y, (*batch, *_others(y.ndim, batch, outputs), *outputs))
    return rows.astype(jnp.float32).reshape(found.layers.size, -1, found.outputs.size)


def output_axes(site: Site, weight_ndim: int, ndim: int) -> range:
    """Axes of a product's result along which its outputs lie.

    Args:
        site: of the product.
        weight_ndim: number of axes of its operand.
        ndim: of its result.
    """
    numbers = dict(site.params)["dimension_numbers"]
    if site.op != "dot_general":
        return range(numbers[2][1], numbers[2][1] + 1)
    kept = weight_ndim - len(numbers[0][0]) - batch_axes(site)
    first = batch_axes(site) if site.weight_first else ndim - kept
    return range(first, first + kept)


def batch_axes(site: Site) -> int:
    """How many axes of a product's result, its first, are those of a batch of weights."""
    return len(dict(site.params)["dimension_numbers"][1][0]) if site.op == "dot_general" else 0


def layers_of(product: Product) -> Int[Array, "layers"]:
    """Numbers of the leaf's layers that a product multiplies by, of which each stands once.

    Raises:
        ValueError: see `places`.
    """
    found = places(product.site)
    numbers = jnp.asarray(found.layers, jnp.int32)
    for added, step in zip(found.steps, product.layer, strict=True):
        numbers = numbers + jnp.asarray(added, jnp.int32)[step]
    return numbers


@functools.lru_cache(maxsize=4096)
def places(site: Site) -> Places:
    """Which rows and columns of the leaf's view the product of this site multiplies by.

    Raises:
        ValueError: naming the leaf: its axes are not told apart; the product takes a part of its inputs, or repeats
            them; a loop takes it apart that is no scan over it; a convolution by groups, or one with the weight on
            the left.
    """
    axes, numbers = site.axes, dict(site.params)["dimension_numbers"]
    if axes is None:
        raise _refused(site, "one of its axes is split between inputs and outputs")
    if site.op == "dot_general":
        summed, batch = (one[not site.weight_first] for one in numbers)
    else:
        _check_convolution(site)
        summed, batch = (*numbers[1][2:], numbers[1][1]), ()
    features, outputs, layers = (
        _numbers(site.leaf_shape, part) for part in ((*axes.spatial, *axes.inputs), axes.outputs, axes.layers)
    )
    (features, outputs, layers), steps, scanned = _sent(site, [features, outputs, layers])
    ndim = features.ndim
    order = (*batch, *summed, *_others(ndim, summed, batch))
    sizes = [math.prod(features.shape[a] for a in part) for part in (batch, summed, _others(ndim, summed, batch))]
    features, outputs, layers = (one.transpose(order).reshape(sizes) for one in (features, outputs, layers))
    feature, output, layer = features[0, :, 0], outputs[0, 0, :], layers[:, 0, 0]
    for found, expected in ((features, feature[:, None]), (outputs, output), (layers, layer[:, None, None])):
        if not np.array_equal(found, np.broadcast_to(expected, found.shape)):
            raise _refused(site, "its inputs and outputs are mixed on their way")
    count = math.prod(site.leaf_shape[a] for a in (*axes.spatial, *axes.inputs))
    if not np.array_equal(np.sort(feature), np.arange(count)):
        raise _refused(site, f"this product sums over {feature.size} inputs, the leaf has {count}")
    if len(np.unique(layer)) == 1:
        layer = layer[:1]
    elif len(np.unique(layer)) != layer.size:
        raise _refused(site, "some of its layers are in one product more than once")
    used = len(np.unique(output)) * count * layer.size * scanned
    if used < site.weights:
        raise _refused(site, "a loop takes it apart by an index; write it as a `scan` over the stacked leaf")
    return Places(axes, np.argsort(feature), output, layer, steps)


def share_of(site: Site) -> float:
    """Fraction of the leaf's outputs that its product has, 1 where it has all."""
    found = places(site)
    return len(np.unique(found.outputs)) / math.prod(site.leaf_shape[a] for a in found.axes.outputs)


def _check_convolution(site: Site) -> None:
    params = dict(site.params)
    groups = params["feature_group_count"], params["batch_group_count"]
    if groups != (1, 1):
        raise _refused(site, f"it is a convolution in {max(groups)} groups, each of which has inputs of its own")
    if site.weight_first:
        raise _refused(site, "it is the left operand of a convolution, as images are")


def _refused(site: Site, why: str) -> ValueError:
    return ValueError(
        f"The inputs that {site.name!r} {site.leaf_shape} meets cannot be told: {why}. Leave it out with `select`."
    )


def _others(ndim: int, *parts: Any) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in itertools.chain(*parts))


def _is_range(order: np.ndarray) -> bool:
    return bool((order == np.arange(order.size)).all())


def _numbers(shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    """A number for each index along some axes, in their order; of the whole shape."""
    sizes = [shape[a] for a in axes]
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    grid = np.arange(math.prod(sizes), dtype=np.int32).reshape(sizes).transpose(order)
    return np.broadcast_to(grid.reshape([n if a in axes else 1 for a, n in enumerate(shape)]), shape)


def _sent(site: Site, arrays: list[np.ndarray]) -> tuple[list[np.ndarray], tuple[np.ndarray, ...], int]:
    """Arrays shaped like the leaf (features, outputs, layers) as they arrive at the first step of the scans around.

    Returns:
        Them, what the steps of each scan add to the numbers of layers, and of how many steps there are in all.
    """
    steps: list[np.ndarray] = []
    for word, argument in site.weight_transforms:
        if word != "layer":
            arrays = [_moved(word, argument, one) for one in arrays]
            continue
        *same, layers = arrays
        added = (layers - layers[:1]).reshape(len(layers), -1)
        if any((one != one[:1]).any() for one in same) or (added != added[:, :1]).any():
            raise _refused(site, "a scan takes its inputs or outputs apart")
        steps.append(added[:, 0])
        arrays = [one[0] for one in arrays]
    return arrays, tuple(steps), math.prod(map(len, steps))


def _moved(word: str, argument: Any, array: np.ndarray) -> np.ndarray:
    """One step of a path, see `jaxprune.tracing.paths`, on an array of the host."""
    if word == "transpose":
        return array.transpose(argument)
    if word == "reshape":
        return array.reshape(argument)
    if word == "broadcast":
        shape, places = argument
        sizes = dict(zip(places, array.shape, strict=True))
        return np.broadcast_to(array.reshape([sizes.get(axis, 1) for axis in range(len(shape))]), shape)
    if word == "slice":
        return array[tuple(slice(*cut) for cut in argument)]
    if word == "rev":
        return np.flip(array, argument)
    return np.tile(array, argument) if word == "tile" else array


def _windows(site: Site, window: list[int], x: Float[Array, "..."]) -> Float[Array, "tokens features"]:
    """What the window of a convolution covers at every place of the output: taps, and inputs within a tap."""
    params = dict(site.params)
    lhs, _, out = params["dimension_numbers"]
    x = jnp.transpose(x, (lhs[0], *lhs[2:], lhs[1]))
    ends = zip(params["padding"], params["lhs_dilation"], strict=True)
    x = lax.pad(x, jnp.float32(0), [(0, 0, 0), *((*pads, hole - 1) for pads, hole in ends), (0, 0, 0)])
    pixels = [site.y_shape[axis] for axis in out[2:]]
    strides, dilations = params["window_strides"], params["rhs_dilation"]
    taps = []
    for tap in np.ndindex(*window):
        starts = [t * d for t, d in zip(tap, dilations, strict=True)]
        stops = [a + (n - 1) * s + 1 for a, n, s in zip(starts, pixels, strides, strict=True)]
        taps.append(lax.slice(x, (0, *starts, 0), (x.shape[0], *stops, x.shape[-1]), (1, *strides, 1)))
    return jnp.stack(taps, axis=-2).reshape(-1, math.prod(window) * x.shape[-1])
