"""The product of activations and a compressed weight, and what else may be done with such a weight.

Everything reduces to one of two products of W (out, in), the stored matrix, with dense columns,

    times(W, X) = W @ X       (in, n)  -> (out, n)      y = x W.T by Y = W X, X = x.T
    times_transposed(W, Y) = W.T @ Y   (out, n) -> (in, n)

and a format is fast by registering its own `times`. The rest of this file turns each `dot_general` that XLA would
have run into one of them, and lets through what only renames the weight: casts, transposes, copies.

On CPU `times` of a BCSR weight compiles to the custom call `cpu_csr_sparse_dense_ffi`, Eigen's threaded kernel, for
every batch of at least one, also under `jax.vmap`; float16 and bfloat16 values are cast to float32 on the way,
inside the program. On CUDA `times` of BCOO and BCSR weights is cuSPARSE's (`jaxprune.sparse.gpu`). Native and block
formats bring kernels of their own (`jaxprune.sparse.tiles`, `blocks`). Nothing else has a kernel: `times_transposed`,
and BCOO and BCSR elsewhere, are gathers and scatter-additions, and gradients with respect to the activations go
through a dense copy of W. A weight that is not stored meets nothing:
an infinity or NaN in x, which a dense product turns into a NaN even under a zero weight, stays out of the sum.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.core import ShapedArray
from jax.experimental.sparse import BCOO, BCSR, bcoo_dot_general, bcsr_dot_general
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, ArrayLike, Inexact, Num

from jaxprune.sparse import gpu
from jaxprune.sparse.formats import BCOOWeight, BCSRWeight, SparseWeight


def matmul(x: Num[ArrayLike, "*batch n_in"], weight: SparseWeight) -> Inexact[Array, "*batch n_out"]:
    """x @ W.T, what a linear layer does, without the zeros.

    Equal to `jnp.matmul(x, leaf)` for a leaf (in, out) and to `jnp.matmul(x, leaf.T)` for a leaf (out, in), dtype
    promotion included; sums of 16-bit values are kept in float32 and rounded once.

    Args:
        x: activations, any number of batch axes, none and empty ones included.
        weight: a compressed leaf; `weight.sizes` are (out, in).

    Returns:
        Activations of the outputs. Differentiable, forward and reverse, in x and in `weight.values`.

    Raises:
        ValueError: the last axis of x is not the weight's inputs.
        TypeError: the dtypes do not promote (`jax_numpy_dtype_promotion="strict"`).
    """
    x = jnp.asarray(x)
    n_out, n_in = weight.sizes
    if x.ndim == 0 or x.shape[-1] != n_in:
        raise ValueError(f"Leaf {weight.name!r} needs x of shape (*batch, {n_in}), {x.shape} arrived.")
    like = jax.ShapeDtypeStruct((n_in, n_out), weight.dtype)
    dtype = jax.eval_shape(jnp.matmul, x, like).dtype
    return _contract(x, x.ndim - 1, weight, weight.inputs_axis, dtype, weight_first=False)


def _contract(
    x: Num[Array, "..."], x_axis: int, weight: SparseWeight, weight_axis: int, dtype: Any, *, weight_first: bool
) -> Inexact[Array, "..."]:
    """Sum over `x_axis` of x and `weight_axis` of the leaf; the leaf's other axis comes first or last."""
    columns = jnp.moveaxis(x, x_axis, 0)
    rest = columns.shape[1:]
    product = times if weight_axis == weight.inputs_axis else times_transposed
    n_new = weight.leaf_shape[1 - weight_axis]
    if not weight.nse or 0 in columns.shape:
        y = jnp.zeros((n_new, *rest), dtype)
    else:
        # 16-bit sums would round at every addition, and no kernel takes 16-bit values.
        compute = jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype
        weight = weight.with_values(weight.values.astype(compute))
        y = product(weight, columns.reshape(columns.shape[0], -1).astype(compute))
        y = y.astype(dtype).reshape(n_new, *rest)
    return y if weight_first else jnp.moveaxis(y, 0, -1)


@functools.singledispatch
def times(weight: SparseWeight, x: Inexact[Array, "n_in n"]) -> Inexact[Array, "n_out n"]:
    """W @ x, for x of the dtype of the values and nse > 0; by gather and scatter unless the format has its own."""
    return _gather_scatter(weight, x, axis=1)


@functools.singledispatch
def times_transposed(weight: SparseWeight, y: Inexact[Array, "n_out n"]) -> Inexact[Array, "n_in n"]:
    """W.T @ y, for y of the dtype of the values and nse > 0; by gather and scatter unless the format has its own."""
    return _gather_scatter(weight, y, axis=0)


@times.register(BCSRWeight)
def _times_bcsr(weight: BCSRWeight, x: Inexact[Array, "n_in n"]) -> Inexact[Array, "n_out n"]:
    return csr_times(weight.values, weight.indices, weight.indptr, x, n_out=weight.sizes[0])


def _gather_scatter(weight: SparseWeight, x: Inexact[Array, "contracted n"], axis: int) -> Inexact[Array, "kept n"]:
    indices = jnp.stack(weight.coordinates(), axis=-1)
    matrix = BCOO((weight.values, indices), shape=weight.sizes, indices_sorted=True, unique_indices=True)
    return jnp.asarray(bcoo_dot_general(matrix, x, dimension_numbers=(((axis,), (0,)), ((), ()))))


def linear_product(
    name: str, product: Callable[..., Array], coordinates: Callable[..., tuple[Array, Array]]
) -> Callable[..., Array]:
    """W @ x as a primitive of its own, for a product that jax cannot differentiate or batch well.

    Derivatives are taken in the values and in x, forward and reverse; `vmap` over x adds columns, where JAX's own rules
    would call the kernel column by column, or leave it for gather and scatter without a word.

    Args:
        name: of the primitive.
        product: (values, index, bounds, x, *, n_out, **sizes) -> W @ x, for x (in, n); sizes are static.
        coordinates: (index, bounds, *, n_out, **sizes) -> output and input index of every value.

    Returns:
        A function with the arguments of `product`.
    """
    primitive = Primitive(name)

    def transpose(ct: Array, values: Any, index: Array, bounds: Array, x: Any, **sizes: int) -> tuple[Any, ...]:
        rows, cols = coordinates(index, bounds, **sizes)
        if ad.is_undefined_primal(values):
            # The dense product of the two and a gather: many times faster on CPU than nse short sums.
            return (ct @ x.T)[rows, cols], None, None, None
        # Likewise, than gathering and scattering whole rows of ct.
        dense = jnp.zeros((sizes["n_out"], x.aval.shape[0]), values.dtype)
        return None, None, None, dense.at[rows, cols].set(values, unique_indices=True).T @ ct

    def batch(args: tuple[Array, ...], axes: tuple[Any, ...], **sizes: int) -> tuple[Array, int]:
        *weight, x = args
        if axes[:-1] != (None, None, None):
            size = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)
            stacked = tuple(
                jnp.broadcast_to(arg, (size, *arg.shape)) if axis is None else jnp.moveaxis(arg, axis, 0)
                for arg, axis in zip(args, axes, strict=True)
            )
            return lax.map(lambda one: primitive.bind(*one, **sizes), stacked), 0
        x = jnp.moveaxis(x, axes[-1], -1)
        y = primitive.bind(*weight, x.reshape(x.shape[0], -1), **sizes)
        return y.reshape(y.shape[0], *x.shape[1:]), 2

    eager = jax.jit(lambda sizes, *args: product(*args, **dict(sizes)), static_argnums=0)
    primitive.def_impl(lambda *args, **sizes: eager(tuple(sizes.items()), *args))
    primitive.def_abstract_eval(lambda *args, n_out, **_: ShapedArray((n_out, args[-1].shape[1]), args[-1].dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(product, multiple_results=False))
    ad.defjvp(
        primitive,
        lambda dot, values, index, bounds, x, **sizes: primitive.bind(dot, index, bounds, x, **sizes),
        None,
        None,
        lambda dot, values, index, bounds, x, **sizes: primitive.bind(values, index, bounds, dot, **sizes),
    )
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    return primitive.bind


def _csr_product(values: Array, index: Array, bounds: Array, x: Array, *, n_out: int) -> Array:
    matrix = BCSR((values, index, bounds), shape=(n_out, x.shape[0]))
    return bcsr_dot_general(matrix, x, dimension_numbers=(((1,), (0,)), ((), ())))


def _csr_coordinates(index: Array, bounds: Array, *, n_out: int) -> tuple[Array, Array]:
    outputs = jnp.arange(n_out, dtype=jnp.int32)
    return jnp.repeat(outputs, jnp.diff(bounds), total_repeat_length=index.shape[0]), index


csr_times = linear_product("csr_times", gpu.csr_product("csr_product", _csr_product), _csr_coordinates)


def _coo_product(values: Array, cols: Array, rows: Array, x: Array, *, n_out: int) -> Array:
    matrix = BCOO((values, jnp.stack([rows, cols], axis=-1)), shape=(n_out, x.shape[0]), indices_sorted=True)
    return jnp.asarray(bcoo_dot_general(matrix, x, dimension_numbers=(((1,), (0,)), ((), ()))))


def _coo_coordinates(cols: Array, rows: Array, *, n_out: int) -> tuple[Array, Array]:
    return rows, cols


coo_times = linear_product("coo_times", gpu.coo_product("coo_product", _coo_product), _coo_coordinates)


@times.register(BCOOWeight)
def _times_bcoo(weight: BCOOWeight, x: Inexact[Array, "n_in n"]) -> Inexact[Array, "n_out n"]:
    rows, cols = weight.coordinates()
    return coo_times(weight.values, cols, rows, x, n_out=weight.sizes[0])


@quax.register(lax.dot_general_p)
def _weight_dot_x(weight: SparseWeight, x: ArrayLike, **params: Any) -> Any:
    return _dot_general(weight, x, params, weight_first=True)


@quax.register(lax.dot_general_p)
def _x_dot_weight(x: ArrayLike, weight: SparseWeight, **params: Any) -> Any:
    return _dot_general(weight, x, params, weight_first=False)


def _dot_general(weight: SparseWeight, x: Any, params: dict[str, Any], *, weight_first: bool) -> Any:
    operands = (weight, x) if weight_first else (x, weight)
    (contracted, batch) = params["dimension_numbers"]
    weight_axes, x_axes = contracted if weight_first else contracted[::-1]
    if len(weight_axes) != 1 or batch[0] or params.get("out_sharding") is not None:
        return SparseWeight.default(lax.dot_general_p, operands, params)
    shapes = (jax.ShapeDtypeStruct(jnp.shape(operand), jnp.result_type(operand)) for operand in operands)
    dtype = jax.eval_shape(functools.partial(lax.dot_general_p.bind, **params), *shapes).dtype
    return _contract(jnp.asarray(x), x_axes[0], weight, weight_axes[0], dtype, weight_first=weight_first)


@quax.register(lax.convert_element_type_p)
def _cast(weight: SparseWeight, **params: Any) -> Any:
    if not jnp.issubdtype(params["new_dtype"], jnp.floating):
        return SparseWeight.default(lax.convert_element_type_p, (weight,), params)
    return weight.with_values(weight.values.astype(params["new_dtype"]))


@quax.register(lax.transpose_p)
def _transpose(weight: SparseWeight, *, permutation: tuple[int, ...]) -> SparseWeight:
    if tuple(permutation) == (0, 1):
        return weight
    return weight.replace(leaf_shape=weight.leaf_shape[::-1], outputs_last=not weight.outputs_last)


@quax.register(lax.reshape_p)
def _reshape(weight: SparseWeight, **params: Any) -> Any:
    if tuple(params["new_sizes"]) == weight.leaf_shape and params["dimensions"] is None:
        return weight
    return SparseWeight.default(lax.reshape_p, (weight,), params)


@quax.register(lax.copy_p)
def _copy(weight: SparseWeight, **_: Any) -> SparseWeight:
    return weight


@quax.register(lax.stop_gradient_p)
def _stop_gradient(weight: SparseWeight, **_: Any) -> SparseWeight:
    return weight.with_values(lax.stop_gradient(weight.values))
