"""Convolution with a compressed kernel.

    y[n, h, w, :] = W (out, (kh, kw, c)) times x[n, h * stride - padding + kh * dilation, ..., c]

x and y have whatever axis order the layer has; the kernels take NHWC, so others are turned before and after. One
spatial axis is a window of height 1. Grouped and depthwise convolutions, dilated inputs (transposed convolutions),
negative padding and three spatial axes have no sparse form here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from jaxprune.exact.meshes import lying_as_dense
from jaxprune.sparse.formats import SparseWeight
from jaxprune.sparse.native_product import native_product
from jaxprune.sparse.tiles import NativeWeight


@quax.register(lax.conv_general_dilated_p)
def _convolution(x: ArrayLike, weight: SparseWeight, **params: Any) -> Any:
    if not isinstance(weight, NativeWeight) or not _has_sparse_form(weight, params):
        return SparseWeight.default(lax.conv_general_dilated_p, (x, weight), params)
    x = jnp.asarray(x)
    like = jax.ShapeDtypeStruct(weight.leaf_shape, weight.dtype)
    result = jax.eval_shape(lambda x, w: lax.conv_general_dilated_p.bind(x, w, **params), x, like)

    def dense(x: Array) -> Array:
        return lax.conv_general_dilated_p.bind(x, jnp.zeros(weight.leaf_shape, weight.dtype), **params)

    def sparse(weight: NativeWeight, x: Array) -> Array:
        return _of_any_layout(weight, x, result, params)

    return lying_as_dense(sparse, dense, weight, x)


def _of_any_layout(weight: NativeWeight, x: Array, result: Any, params: dict[str, Any]) -> Array:
    """The convolution whose result has this shape and dtype; axes in whatever order the layer has them."""
    x_axes, _, y_axes = params["dimension_numbers"]
    y_shape = tuple(result.shape[axis] for axis in _channels_last(y_axes))
    x = jnp.transpose(x, _channels_last(x_axes))
    if weight.nse and 0 not in x.shape and 0 not in y_shape:
        y = _convolve(weight, x, y_shape, params, result.dtype)
    else:
        y = jnp.zeros(y_shape, result.dtype)
    back = _channels_last(y_axes)
    return jnp.transpose(y, tuple(back.index(axis) for axis in range(len(back))))


def _has_sparse_form(weight: NativeWeight, params: dict[str, Any]) -> bool:
    n = len(weight.leaf_shape)
    own = (n - 1, n - 2, *range(n - 2)) if weight.outputs_last else tuple(range(n))
    return (
        params["feature_group_count"] == params["batch_group_count"] == 1
        and tuple(params["dimension_numbers"].rhs_spec) == own
        and n in (3, 4)
        and all(dilation == 1 for dilation in params["lhs_dilation"])
        and all(before >= 0 for before, _ in params["padding"])
    )


def _channels_last(axes: tuple[int, ...]) -> tuple[int, ...]:
    """(batch, channels, *spatial) as (batch, *spatial, channels)."""
    batch, channels, *spatial = axes
    return (batch, *spatial, channels)


def _convolve(
    weight: NativeWeight, x: Float[Array, "n *pixels c"], y_shape: tuple[int, ...], params: dict[str, Any], dtype: Any
) -> Float[Array, "n *new_pixels out"]:
    flat = len(y_shape) == 3  # one spatial axis
    if flat:
        x = x[:, None]
    first = 0 if weight.outputs_last else 2
    window = weight.leaf_shape[first : first + len(y_shape) - 2]
    numbers = (window, params["window_strides"], [before for before, _ in params["padding"]], params["rhs_dilation"])
    ones = (1, 1, 0, 1) if flat else ()
    pairs = [(*ones[i : i + 1], *map(int, pair)) for i, pair in enumerate(numbers)]
    pixels = (*ones[:1], *y_shape[1:-1])
    y = native_product(weight, x, dtype, sum(pairs, ()), pixels)
    return y[:, 0] if flat else y
