"""The product of activations and a compressed weight, and what else may be done with such a weight.

Everything reduces to one of two products of W (out, in), the stored matrix, with dense columns,

    times(W, X) = W @ X       (in, n)  -> (out, n)      y = x W.T by Y = W X, X = x.T
    times_transposed(W, Y) = W.T @ Y   (out, n) -> (in, n)

and a format is fast by registering its own `times`, or its own `project`, which works on rows as they come; the same of
`times_transposed` and `project_transposed`. The rest of this file turns each `dot_general` that XLA would have run into
one of them, and lets through what only renames the weight: casts, transposes, copies.

On CPU `times` of a BCSR weight compiles to the custom call `cpu_csr_sparse_dense_ffi`, Eigen's threaded kernel, for
every batch of at least one, also under `jax.vmap`; float16 and bfloat16 values are cast to float32 on the way,
inside the program. On CUDA `times` of BCOO and BCSR weights is cuSPARSE's (`jaxprune.sparse.gpu`). Native formats bring
kernels of their own (`jaxprune.sparse.native_product`, `conv`), blocks are dense products (`blocks`). Nothing else has
a kernel: `times_transposed`, and BCOO and BCSR elsewhere, are gathers and scatter-additions, and gradients with respect
to the activations go through a dense copy of W, but for weights that are to be trained (`trained`). A weight that is
not stored meets nothing: an infinity or NaN in x, which a dense product turns into a NaN even under a zero weight,
stays out of the sum.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.experimental.sparse import BCOO, BCSR, bcoo_dot_general, bcsr_dot_general
from jax.extend.core.primitives import name_p, sharding_constraint_p
from jaxtyping import Array, ArrayLike, Inexact, Num

from jaxprune.compat import pvary_p
from jaxprune.exact.meshes import lying_as_dense
from jaxprune.sparse import gpu
from jaxprune.sparse.formats import SparseWeight
from jaxprune.sparse.portable import BCOOWeight, BCSRWeight, run_numbers
from jaxprune.sparse.primitives import columns_product


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
    rows = jnp.moveaxis(x, x_axis, -1)
    *rest, contracted = rows.shape
    n_new = weight.leaf_shape[1 - weight_axis]
    if not weight.nse or 0 in rows.shape:
        y = jnp.zeros((*rest, n_new), dtype)
    elif weight_axis == weight.inputs_axis:
        y = project(weight, rows.reshape(-1, contracted), dtype).reshape(*rest, n_new)
    else:
        y = project_transposed(weight, rows.reshape(-1, contracted), dtype).reshape(*rest, n_new)
    return jnp.moveaxis(y, -1, 0) if weight_first else y


@functools.singledispatch
def project(weight: SparseWeight, x: Num[Array, "n n_in"], dtype: Any) -> Inexact[Array, "n n_out"]:
    """x @ W.T of this dtype, for nse > 0 and n > 0; by `times` unless the format works on rows."""
    return _columns(times, weight, x, dtype)


@functools.singledispatch
def project_transposed(weight: SparseWeight, x: Num[Array, "n n_out"], dtype: Any) -> Inexact[Array, "n n_in"]:
    """x @ W of this dtype, likewise; by `times_transposed`."""
    return _columns(times_transposed, weight, x, dtype)


def _columns(product: Callable[..., Array], weight: SparseWeight, x: Array, dtype: Any) -> Array:
    # 16-bit sums would round at every addition, and these products take no 16-bit values.
    compute = jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype
    weight = weight.with_values(weight.values.astype(compute))
    return product(weight, x.T.astype(compute)).T.astype(dtype)


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
    # As `bcoo_dot_general` has it on CPU, whose result is of no type that `jax.shard_map` takes.
    indices, there = weight.coordinates(), "promise_in_bounds"
    products = weight.values[:, None] * x.at[indices[axis]].get(mode=there)
    return jnp.zeros((weight.sizes[1 - axis], x.shape[1]), x.dtype).at[indices[1 - axis]].add(products, mode=there)


def _csr_product(values: Array, index: Array, bounds: Array, x: Array, *, n_out: int) -> Array:
    matrix = BCSR((values, index, bounds), shape=(n_out, x.shape[0]))
    return bcsr_dot_general(matrix, x, dimension_numbers=(((1,), (0,)), ((), ())))


def _csr_coordinates(index: Array, bounds: Array, *, n_out: int) -> tuple[Array, Array]:
    return run_numbers(bounds, index.shape[0]), index


csr_times = columns_product("csr_times", gpu.csr_product("csr_product", _csr_product), _csr_coordinates)


def _coo_product(values: Array, cols: Array, rows: Array, x: Array, *, n_out: int) -> Array:
    matrix = BCOO((values, jnp.stack([rows, cols], axis=-1)), shape=(n_out, x.shape[0]), indices_sorted=True)
    return jnp.asarray(bcoo_dot_general(matrix, x, dimension_numbers=(((1,), (0,)), ((), ()))))


def _coo_coordinates(cols: Array, rows: Array, *, n_out: int) -> tuple[Array, Array]:
    return rows, cols


coo_times = columns_product("coo_times", gpu.coo_product("coo_product", _coo_product), _coo_coordinates)


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
    if len(weight_axes) != 1 or len(weight.leaf_shape) != 2 or batch[0] or params.get("out_sharding") is not None:
        return SparseWeight.default(lax.dot_general_p, operands, params)
    shapes = (jax.ShapeDtypeStruct(jnp.shape(operand), jnp.result_type(operand)) for operand in operands)
    dtype = jax.eval_shape(functools.partial(lax.dot_general_p.bind, **params), *shapes).dtype

    def dense(x: Array) -> Array:
        leaf = jnp.zeros(weight.leaf_shape, weight.dtype)
        return lax.dot_general_p.bind(*((leaf, x) if weight_first else (x, leaf)), **params)

    def sparse(weight: SparseWeight, x: Array) -> Array:
        return _contract(x, x_axes[0], weight, weight_axes[0], dtype, weight_first=weight_first)

    return lying_as_dense(sparse, dense, weight, jnp.asarray(x))


@quax.register(lax.convert_element_type_p)
def _cast(weight: SparseWeight, **params: Any) -> Any:
    if not jnp.issubdtype(params["new_dtype"], jnp.floating):
        return SparseWeight.default(lax.convert_element_type_p, (weight,), params)
    return weight.astype(params["new_dtype"])


@quax.register(lax.transpose_p)
def _transpose(weight: SparseWeight, *, permutation: tuple[int, ...]) -> Any:
    if tuple(permutation) == tuple(range(len(weight.leaf_shape))):
        return weight
    if len(weight.leaf_shape) > 2:
        return SparseWeight.default(lax.transpose_p, (weight,), {"permutation": permutation})
    return weight.replace(leaf_shape=weight.leaf_shape[::-1], outputs_last=not weight.outputs_last)


@quax.register(lax.reshape_p)
def _reshape(weight: SparseWeight, **params: Any) -> Any:
    new_shape = tuple(params["new_sizes"])
    if params["dimensions"] is None and new_shape == weight.leaf_shape:
        return weight
    if params["dimensions"] is None and weight.outputs_last and new_shape == weight.sizes[::-1]:
        return weight.replace(leaf_shape=new_shape)  # a kernel (*window, in, out) as a matrix
    return SparseWeight.default(lax.reshape_p, (weight,), params)


@quax.register(pvary_p)
def _vary(weight: SparseWeight, **params: Any) -> SparseWeight:
    """Inside of `jax.shard_map`, before a product with activations that vary over devices."""
    return jax.tree.map(lambda part: pvary_p.bind(part, **params), weight)


@quax.register(name_p)
@quax.register(sharding_constraint_p)
@quax.register(lax.copy_p)
def _copy(weight: SparseWeight, **_: Any) -> SparseWeight:
    return weight


@quax.register(lax.stop_gradient_p)
def _stop_gradient(weight: SparseWeight, **_: Any) -> SparseWeight:
    return weight.with_values(lax.stop_gradient(weight.values))
