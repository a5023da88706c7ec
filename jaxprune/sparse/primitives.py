"""Products with a sparse W as primitives of their own: kernels that jax can neither differentiate nor batch well.

    y = product(values, *pattern, x)      linear in `values`, linear in x

A derivative in x is the same product of a tangent; the transposes are dense, since on CPU the dense product and a
gather are many times faster than short sums over the non-zeros; what has kernels for these too is `multilinear`
(`jaxprune.sparse.derivatives`). `vmap` over x adds rows, or columns, to one call of the kernel, where JAX's own rules
would call it one by one, or leave it without a word.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from jaxprune.compat import type_like


def sparse_product(
    name: str,
    product: Callable[..., Array],
    to_matrix: Callable[..., Array],
    dense_product: Callable[..., Array],
    *,
    batch_axis: int,
) -> Primitive:
    """A sparse product with derivatives, forward and reverse, in `values` and x, and with `vmap`.

    Args:
        name: of the primitive.
        product: (values, *pattern, x, **sizes) -> y, the kernel; sizes are static and hashable.
        to_matrix: (values, *pattern, x, **sizes) -> W dense, linear in `values`; of x only the shape is looked at.
        dense_product: (W, x, **sizes) -> y, the same y.
        batch_axis: axis of x and of y along which independent rows, columns or images lie.

    Returns:
        The primitive; `bind` takes the arguments of `product`.
    """

    def of_values(ct: Array, values: Any, *pattern_and_x: Any, **sizes: Any) -> Array:
        *pattern, x = pattern_and_x
        dense = lambda v: dense_product(to_matrix(v, *pattern, x, **sizes), x, **sizes)  # noqa: E731
        return jax.linear_transpose(dense, values.aval)(ct)[0]

    def of_x(ct: Array, *weight_and_x: Any, **sizes: Any) -> Array:
        *weight, x = weight_and_x
        matrix = to_matrix(*weight, x.aval, **sizes)
        return jax.linear_transpose(lambda x: dense_product(matrix, x, **sizes), x.aval)(ct)[0]

    return multilinear(name, product, {0: of_values, -1: of_x}, batch_axis=batch_axis)


def multilinear(
    name: str, product: Callable[..., Array], transposes: dict[int, Callable[..., Array]], *, batch_axis: int | None
) -> Primitive:
    """A kernel that is linear in some of its arguments, as a primitive with derivatives and with `vmap`.

    Args:
        name: of the primitive.
        product: (*args, **sizes) -> y, the kernel; sizes are static and hashable.
        transposes: place of each argument that it is linear in, -1 the last -> (ct of y, *args, **sizes) -> its ct,
            where this argument is one of `ad.is_undefined_primal`.
        batch_axis: axis of the last argument and of y along which independent rows lie; None if there are none.

    Returns:
        The primitive; `bind` takes the arguments of `product`.
    """
    primitive = Primitive(name)

    def transpose(ct: Array, *args: Any, **sizes: Any) -> list[Any]:
        place = next(place for place in transposes if ad.is_undefined_primal(args[place]))
        cts: list[Any] = [None] * len(args)
        cts[place] = transposes[place](ct, *args, **sizes)
        return cts

    def batch(args: tuple[Array, ...], axes: tuple[Any, ...], **sizes: Any) -> tuple[Array, int]:
        *weight, x = args
        if batch_axis is None or any(axis is not None for axis in axes[:-1]):
            return _one_by_one(primitive, args, axes, sizes), 0
        x = jnp.moveaxis(x, axes[-1], batch_axis)
        before, (size, rows), after = x.shape[:batch_axis], x.shape[batch_axis:][:2], x.shape[batch_axis + 2 :]
        y = primitive.bind(*weight, x.reshape(*before, size * rows, *after), **sizes)
        return y.reshape(*y.shape[:batch_axis], size, rows, *y.shape[batch_axis + 1 :]), batch_axis

    def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...], **sizes: Any) -> tuple[Any, Any]:
        dots = []
        for place in transposes:
            if type(tangents[place]) is not ad.Zero:
                args = list(primals)
                args[place] = ad.instantiate_zeros(tangents[place])
                dots.append(primitive.bind(*args, **sizes))
        y = primitive.bind(*primals, **sizes)
        return y, sum(dots[1:], dots[0]) if dots else ad.Zero(jax.typeof(y).to_tangent_aval())

    def abstract(*args: Any, **sizes: Any) -> ShapedArray:
        y = jax.eval_shape(lambda *args: product(*args, **sizes), *args)
        return type_like(y.shape, y.dtype, *args)

    eager = jax.jit(lambda sizes, *args: product(*args, **dict(sizes)), static_argnums=0)
    primitive.def_impl(lambda *args, **sizes: eager(tuple(sizes.items()), *args))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(product, multiple_results=False))
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    return primitive


def columns_product(
    name: str, product: Callable[..., Array], coordinates: Callable[..., tuple[Array, Array]]
) -> Callable[..., Array]:
    """`sparse_product` for W @ x with x (in, n).

    Args:
        name: of the primitive.
        product: (values, *pattern, x, *, n_out, **sizes) -> W @ x.
        coordinates: (*pattern, n_out, **sizes) -> output and input index of every value.

    Returns:
        A function with the arguments of `product`.
    """

    def to_matrix(values: Array, *pattern_and_x: Any, n_out: int, **sizes: Any) -> Array:
        *pattern, x = pattern_and_x
        rows, cols = coordinates(*pattern, n_out=n_out, **sizes)
        return jnp.zeros((n_out, x.shape[0]), values.dtype).at[rows, cols].add(values, unique_indices=True)

    return sparse_product(name, product, to_matrix, lambda matrix, x, **_: matrix @ x, batch_axis=1).bind


def _one_by_one(primitive: Primitive, args: tuple[Array, ...], axes: tuple[Any, ...], sizes: dict[str, Any]) -> Array:
    size = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)
    stacked = tuple(
        jnp.broadcast_to(arg, (size, *arg.shape)) if axis is None else jnp.moveaxis(arg, axis, 0)
        for arg, axis in zip(args, axes, strict=True)
    )
    return lax.map(lambda one: primitive.bind(*one, **sizes), stacked)
