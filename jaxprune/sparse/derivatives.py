"""Products with W and their derivatives, all of them sparse: three kernels, closed under differentiation.

The form  t(values, x, y) = sum over non-zeros (o, i) and rows n of  values[o, i] x[n, i] y[n, o]  is linear in each of
its three, and its derivatives in them are

    trained_product_p      d t / d y      = x W.T      (n, out)     panels, as ever
    trained_transposed_p   d t / d x      = y W        (n, in)      the same panels over the transposed pattern
    trained_sampled_p      d t / d values              (nse,)       sums over the batch, only where W has a value

so that the transpose of each in each of its arguments is one of the other two, and derivatives of any order are these.
Operands are values, index and bounds of W, then index, bounds and order of W.T (`trained.TrainableWeight`), then what
is multiplied.
"""

from typing import Any, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxprune import native
from jaxprune.sparse.native_product import only_on_cpu, operands
from jaxprune.sparse.primitives import multilinear
from jaxprune.sparse.products import project, project_transposed
from jaxprune.sparse.trained import TrainableWeight

Sizes: TypeAlias = tuple[int, int]
"""(outputs, inputs) of W, or the tiles of W and of W.T."""


def _panels(values: Array, index: Array, bounds: Array, x: Array, n_out: int, tile: int, dtype: Any) -> Array:
    none, nothing = jnp.zeros(0, jnp.float32), jnp.zeros(0, dtype)
    shape = (x.shape[0], n_out)
    return native.product(values, index, bounds, none, none, nothing, x, shape=shape, dtype=dtype, tile=tile)


def _product(
    values: Array, index: Array, bounds: Array, *others: Array, sizes: Sizes, tiles: Sizes, dtype: Any
) -> Array:
    return _panels(values, index, bounds, others[-1], sizes[0], tiles[0], dtype)


def _transposed(
    values: Array, _index: Array, _bounds: Array, *others: Array, sizes: Sizes, tiles: Sizes, dtype: Any
) -> Array:
    index, bounds, order, y = others
    return _panels(native.permuted(values, order), index, bounds, y, sizes[1], tiles[1], dtype)


def _sampled(index: Array, bounds: Array, *others: Array, sizes: Sizes, tiles: Sizes, dtype: Any) -> Array:
    *_, x, y = others
    return native.sampled(index, bounds, x, y, tile=tiles[0]).astype(dtype)


def _bind(primitive: Any, *args: Any, like: Any, **static: Any) -> Array:
    """What is the derivative in an argument, of its dtype."""
    return primitive.bind(*args, **{**static, "dtype": like.aval.dtype})


trained_product_p = multilinear(
    "trained_product",
    _product,
    {
        0: lambda ct, values, *args, **static: _bind(trained_sampled_p, *args, ct, like=values, **static),
        -1: lambda ct, *args, **static: _bind(trained_transposed_p, *args[:-1], ct, like=args[-1], **static),
    },
    batch_axis=0,
)
trained_transposed_p = multilinear(
    "trained_transposed",
    _transposed,
    {
        0: lambda ct, values, *args, **static: _bind(
            trained_sampled_p, *args[:-1], ct, args[-1], like=values, **static
        ),
        -1: lambda ct, *args, **static: _bind(trained_product_p, *args[:-1], ct, like=args[-1], **static),
    },
    batch_axis=0,
)
trained_sampled_p = multilinear(
    "trained_sampled",
    _sampled,
    {
        -2: lambda ct, *args, **static: _bind(trained_transposed_p, ct, *args[:-2], args[-1], like=args[-2], **static),
        -1: lambda ct, *args, **static: _bind(trained_product_p, ct, *args[:-1], like=args[-1], **static),
    },
    batch_axis=None,
)
only_on_cpu(trained_product_p, trained_transposed_p, trained_sampled_p)


@project.register(TrainableWeight)
def _project(weight: TrainableWeight, x: Num[Array, "n n_in"], dtype: Any) -> Float[Array, "n n_out"]:
    return _of_weight(trained_product_p, weight, x, dtype)


@project_transposed.register(TrainableWeight)
def _project_transposed(weight: TrainableWeight, y: Num[Array, "n n_out"], dtype: Any) -> Float[Array, "n n_in"]:
    return _of_weight(trained_transposed_p, weight, y, dtype)


def _of_weight(primitive: Any, weight: TrainableWeight, x: Array, dtype: Any) -> Array:
    values, index, bounds, _, x = operands(weight, x, dtype)
    pattern = (index, bounds, weight.index_across, weight.bounds_across, weight.order)
    static = {"sizes": weight.sizes, "tiles": (weight.tile, weight.tile_across)}
    in_kernel = jnp.dtype(jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32)
    return primitive.bind(values, *pattern, x, **static, dtype=in_kernel).astype(dtype)
