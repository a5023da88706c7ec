"""The native product and convolution as jax primitives: plain, and with what follows in a layer.

    native_product_p(values, index, bounds, scale, x)                    W x
    int8_product_p(values, index, bounds, scale, totals, x)              the same on integers (`jaxprune.sparse.int8`)
    fused_product_p(*either, *added)                               relu(pool(W x) + bias + residual), each if wanted

x is (n, in), or images (n, height, width, channels) where there is a window; of integers it may be codes, and a fused
product may give those of its result, with it or alone. Derivatives of the fused product are those of its parts, one
after the other, and so is what `vmap` makes of it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Num, Shaped

from jaxprune import native
from jaxprune.compat import ClosedJaxpr, type_like
from jaxprune.sparse import bits, tiles
from jaxprune.sparse.int8 import Int8Weight, codes_of
from jaxprune.sparse.primitives import sparse_product
from jaxprune.sparse.products import project, project_transposed, times_transposed
from jaxprune.sparse.tiles import NativeWeight

_ON_CPU = 'They run on CPU: use the format "bcoo", "bcsr" or "block" on other devices.'


class Sizes(NamedTuple):
    """What is static of a product.

    Attributes:
        n_out: outputs.
        n_in: inputs, those of the window counted.
        tile: inputs of a tile; 0 for bits.
        group: outputs that share a run.
        dtype: of the result.
        window: of a convolution, two numbers each: kernel, stride, padding before, dilation; empty for a matrix.
        pixels: height and width of the result of a convolution.
        grid: of the codes of x (`Int8Weight`), where operands are those of `int8_product_p`; else empty.
    """

    n_out: int
    n_in: int
    tile: int
    group: int
    dtype: str
    window: tuple[int, ...] = ()
    pixels: tuple[int, ...] = ()
    grid: tuple[float, ...] = ()


class Steps(NamedTuple):
    """What is done to a product's result, in this order.

    Attributes:
        bias: whether there is an operand of n_out numbers to add to every row.
        residual: whether there is an operand as large as the result to add.
        relu: whether negative results become 0.
        shape: of the result in the end.
        pool: height and width of the pools of a convolution's pixels of which only the largest is kept, output by
            output, before anything is added; pixels that fill no pool are left out.
        grid: of the codes of the result, the second one then; empty if they are not wanted.
        keep: whether the result itself is wanted.
    """

    bias: bool
    residual: bool
    relu: bool
    shape: tuple[int, ...]
    pool: tuple[int, ...] = (1, 1)
    grid: tuple[float, ...] = ()
    keep: bool = True

    def results(self, y: Any, codes: Any) -> list[Any]:
        """What is wanted of the two."""
        return [y] * self.keep + [codes] * bool(self.grid)


def _kernel(*operands: Array, sizes: Sizes) -> Array:
    shape = (operands[-1].shape[0], *sizes.pixels, sizes.n_out)
    return _fused_kernel(*operands, steps=Steps(False, False, False, shape), sizes=sizes)[0]


def _fused_kernel(*operands: Array, steps: Steps, sizes: Sizes, apart: ClosedJaxpr | None = None) -> list[Array]:
    n_parts = 5 if sizes.grid else 4
    x, added = operands[n_parts], list(operands[n_parts + 1 :])
    pixels = (n // pool for n, pool in zip(sizes.pixels, steps.pool, strict=False))
    shape, dtype = (x.shape[0], *pixels, sizes.n_out), jnp.dtype(sizes.dtype)
    bias = added.pop(0).reshape(-1).astype(jnp.float32) if steps.bias else jnp.zeros(0, jnp.float32)
    residual = added.pop(0).reshape(shape) if steps.residual else jnp.zeros(0, dtype)
    window = sizes.window and (*sizes.window, *steps.pool)
    every = [*operands[:n_parts], bias, residual, x]
    attributes = {"shape": shape, "dtype": dtype, "tile": sizes.tile, "window": window, "relu": steps.relu}
    if not sizes.grid:
        return [native.product(*every, group=sizes.group, **attributes).reshape(steps.shape)]
    grids = {"grid": sizes.grid, "grid_of_y": steps.grid, "keep": steps.keep}
    y, codes = native.product_of_codes(*every, **grids, **attributes)
    y = y.reshape(steps.shape) if steps.keep else None
    return steps.results(y, codes.reshape(*steps.shape[:-1], codes.shape[-1]) if steps.grid else None)


def _matrix(values: Array, index: Array, bounds: Array, scale: Array, x: Any, *, sizes: Sizes) -> Array:
    if sizes.tile == bits.BITMAP:
        known = {"n_in": sizes.n_in, "nse": values.shape[0]}
        rows, cols = bits.coordinates(index, bounds, n_out=sizes.n_out, **known)
    else:
        rows, cols = tiles.coordinates(index, bounds, n_out=sizes.n_out, tile=sizes.tile, group=sizes.group)
    values = values.astype(jnp.float32)
    matrix = jnp.zeros((sizes.n_out, sizes.n_in)).at[rows, cols].add(values, unique_indices=True)
    return matrix * scale[:, None] if scale.size else matrix


def _dense(matrix: Array, x: Array, *, sizes: Sizes) -> Array:
    x = x.astype(jnp.float32)
    if not sizes.window:
        return (x @ matrix.T).astype(sizes.dtype)
    kernel, stride, before, dilation = (sizes.window[i : i + 2] for i in range(0, 8, 2))
    # What the shape of the result says; negative where the last pixels are not looked at.
    after = [
        (n - 1) * s + (k - 1) * d + 1 - size - p
        for n, s, k, d, size, p in zip(sizes.pixels, stride, kernel, dilation, x.shape[1:3], before, strict=True)
    ]
    kernels = matrix.reshape(-1, *kernel, x.shape[3])
    padding = list(zip(before, after, strict=True))
    names = ("NHWC", "OHWI", "NHWC")
    y = lax.conv_general_dilated(x, kernels, stride, padding, rhs_dilation=dilation, dimension_numbers=names)
    return y.astype(sizes.dtype)


native_product_p = sparse_product("native_product", _kernel, _matrix, _dense, batch_axis=0)
int8_product_p = sparse_product("int8_product", _kernel, _matrix, _dense, batch_axis=0)


def _no_derivative(*_: Any, **__: Any) -> Any:
    raise TypeError(
        'A weight in the format "int8" has no derivative: its products round the activations, so that they are '
        "constant nearly everywhere. Differentiate with the params as they were before `compress`."
    )


ad.primitive_jvps[int8_product_p] = _no_derivative


def _fused_primitive() -> Primitive:
    """Derivatives and batches are those of the steps apart, as the user's function has them."""
    primitive = Primitive("native_fused_product")

    def jvp(primals: Any, tangents: Any, *, apart: ClosedJaxpr, **_: Any) -> Any:
        tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
        return jax.jvp(jaxpr_as_fun(apart), primals, tangents)

    def batch(args: Any, axes: Any, *, apart: ClosedJaxpr, steps: Steps, **_: Any) -> Any:
        (y,) = jax.vmap(jaxpr_as_fun(apart), axes)(*args)
        results = steps.results(y, codes_of(y, steps.grid) if steps.grid else None)
        return results, [0] * len(results)

    def abstract(*args: Any, steps: Steps, sizes: Sizes, **_: Any) -> Any:
        kinds = jax.eval_shape(partial(_fused_kernel, steps=steps, sizes=sizes), *args)
        return [type_like(kind.shape, kind.dtype, *args) for kind in kinds]

    primitive.multiple_results = True
    primitive.def_impl(jax.jit(_fused_kernel, static_argnames=("steps", "sizes", "apart")))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(_fused_kernel, multiple_results=True))
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    return primitive


fused_product_p = _fused_primitive()


def only_on_cpu(*primitives: Primitive) -> None:
    """Refuses to compile these primitives for other platforms, by name."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise TypeError(f"A weight is stored for the native kernels. {_ON_CPU}")

    for platform in ("cuda", "rocm", "tpu"):
        for primitive in primitives:
            mlir.register_lowering(primitive, refuse, platform=platform)


def operands(weight: NativeWeight, x: Num[Array, "*batch channels"], dtype: Any) -> tuple[Shaped[Array, "..."], ...]:
    """What `native_product` takes, for a weight, x and a result of `dtype` that the kernels can run.

    Integers and float16 are cast to float32, but for the values of formats that have them.

    Raises:
        TypeError: they cannot: another platform, numbers of 64 bits, no kernels here.
    """
    if reason := _refusal(weight, x, dtype):
        raise TypeError(f"Leaf {weight.name!r} is stored for the native kernels. {reason}")
    as_it_is = jnp.issubdtype(weight.values.dtype, jnp.integer) or weight.tile == bits.BITMAP
    values = weight.values if as_it_is else _as_taken(weight.values)
    return values, weight.index, weight.bounds, weight.output_scale(), *weight.of_activations(), _as_taken(x)


def _as_taken(array: Array) -> Array:
    return array if array.dtype in (jnp.float32, jnp.bfloat16) else array.astype(jnp.float32)


def _refusal(weight: NativeWeight, x: Array, result: Any) -> str:
    for what, dtype in (("weights", weight.dtype), ("activations", x.dtype), ("results", jnp.dtype(result))):
        if dtype == jnp.float64 or jnp.issubdtype(dtype, jnp.complexfloating):
            return f"They take up to float32, here {dtype} {what}: cast, or use another format."
    return native.why_missing() if jax.default_backend() == "cpu" else _ON_CPU


@project.register(NativeWeight)
def _project_native(weight: NativeWeight, x: Num[Array, "n n_in"], dtype: Any) -> Float[Array, "n n_out"]:
    return native_product(weight, x, dtype)


def native_product(
    weight: NativeWeight,
    x: Num[Array, "*batch channels"],
    dtype: Any,
    window: tuple[int, ...] = (),
    pixels: tuple[int, ...] = (),
) -> Float[Array, "..."]:
    """The product, or convolution, of a weight and x.

    Args:
        weight: in a native format.
        x: (n, in), or images (n, height, width, channels).
        dtype: of the result.
        window: see `Sizes`.
        pixels: likewise.

    Raises:
        TypeError: see `operands`.
    """
    in_kernel = "bfloat16" if dtype == jnp.bfloat16 else "float32"
    sizes = Sizes(*weight.sizes, weight.tile, weight.group, in_kernel, window, pixels, weight.grid_of_activations())
    primitive = int8_product_p if weight.calibrated else native_product_p
    return primitive.bind(*operands(weight, x, dtype), sizes=sizes).astype(dtype)


def _transposed_matrix(values: Array, index: Array, bounds: Array, scale: Array, x: Any, *, n_in: int) -> Array:
    sizes = Sizes(x.shape[1], n_in, bits.BITMAP, 1, "float32")
    return _matrix(values, index, bounds, scale, x, sizes=sizes)


native_transposed_p = sparse_product(
    "native_transposed", native.transposed, _transposed_matrix, lambda matrix, x, **_: x @ matrix, batch_axis=0
)


@project_transposed.register(bits.NativeBitsWeight)
def _project_transposed_bits(
    weight: bits.NativeBitsWeight, x: Num[Array, "n n_out"], dtype: Any
) -> Float[Array, "n n_in"]:
    *parts, x = operands(weight, x, dtype)
    return native_transposed_p.bind(*parts, x.astype(jnp.float32), n_in=weight.sizes[1]).astype(dtype)


@project_transposed.register(Int8Weight)
def _project_transposed_int8(weight: Int8Weight, x: Num[Array, "n n_out"], dtype: Any) -> Float[Array, "n n_in"]:
    leaf = weight.dense_for("a product over its outputs, whose codes would be others")
    return jnp.matmul(x.astype(dtype), leaf.astype(dtype).T if weight.outputs_last else leaf.astype(dtype))


@times_transposed.register(NativeWeight)
def _times_transposed_native(weight: NativeWeight, y: Float[Array, "n_out n"]) -> Float[Array, "n_in n"]:
    # No kernel of its own; the dense product is many times faster on CPU than a gather and a scatter.
    return jnp.matmul(weight.matrix().T, y)


only_on_cpu(native_product_p, int8_product_p, fused_product_p, native_transposed_p)
