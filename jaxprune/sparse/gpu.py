"""GPU: the block-sparse product as a Pallas kernel, and cuSPARSE for the portable formats.

W (out, in) in blocks of `tall` inputs x `wide` outputs, the blocks of output block o at bounds[o] ... bounds[o + 1]:

    Y[o] (wide, n) = sum over its blocks k of  values[k] (wide, tall) @ X[index[k]] (tall, n)

One program makes one output block for a panel of columns: it walks its own run of blocks, keeps the sum in float32
registers, and writes once. What is not stored is not read, neither weight nor activation, and nothing is scattered.
The kernel is lowered by Pallas's Triton backend: a `pallas_call` for its Mosaic backend is deprecated, and would need a
kernel of its own.

cuSPARSE: JAX's BCOO and BCSR products reach it only under `jax_bcoo_cusparse_lowering`, which is read when a program
is *lowered*, for a user's `jit` long after our call returned, and is not part of jit's cache key. So no context around
the call could set it. `jax.experimental.sparse.csr_matmat` is lowered to the same cuSPARSE call without any flag.

Which branch runs is decided when a program is lowered, so one traced program is right on every platform. No program
of this file has run on a GPU yet; on CPU the kernel is interpreted in the tests, and lowered for CUDA.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.sparse import CSR, csr_matmat
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array, Float, Int32

# Powers of two, at least the smallest tile of a tensor core; a bigger block would not stay in registers.
TILES = (16, 32, 64)
KERNEL_DTYPES = ("float32", "bfloat16", "float16")
CUSPARSE_DTYPES = ("float32", "float64")
_PANEL = 64  # columns a program makes; with blocks of 64 its sums are 32 registers a thread
_GRID_Y = 65535  # CUDA's limit; output blocks lie along x, whose limit is 2**31 - 1


def on_cuda(name: str, product: Callable[..., Array], elsewhere: Callable[..., Array]) -> Callable[..., Array]:
    """A product that is `product` in programs lowered for CUDA, and `elsewhere` in all others.

    `lax.platform_dependent` would do it too, but traces both at every call, leaves a conditional in every program,
    and lowers the branch of CUDA for all platforms of a program for several.

    Args:
        name: of the primitive.
        product: (values, index, bounds, x, *, n_out, **sizes) -> W @ x, for x (in, n); sizes are static.
        elsewhere: the same function of the same arguments.

    Returns:
        A function of the same arguments, without derivatives: for `primitives.columns_product`.
    """
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda *args, n_out, **_: ShapedArray((n_out, args[-1].shape[1]), args[-1].dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(elsewhere, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(product, multiple_results=False), platform="cuda")
    return primitive.bind


def block_suits(block: tuple[int, int], sizes: tuple[int, int, int], dtype: Any) -> bool:
    """Whether `block_times` can do it, from what is known while tracing.

    Args:
        block: (inputs, outputs) of a block.
        sizes: (out, in, n), of W and of the columns.
        dtype: of values and x.
    """
    n_out, n_in, n = sizes
    small = n * max(n_in, n_out) < 2**31 and n <= _PANEL * _GRID_Y  # Triton counts elements in 32 bits
    return set(block) <= set(TILES) and jnp.dtype(dtype) in map(jnp.dtype, KERNEL_DTYPES) and small


def block_times(
    values: Float[Array, " nse"],
    index: Int32[Array, " n_blocks"],
    bounds: Int32[Array, " n_out_blocks_plus_1"],
    x: Float[Array, "n_in n"],
    *,
    n_out: int,
    block: tuple[int, int],
    interpret: bool = False,
) -> Float[Array, "n_out n"]:
    """W @ x for a block-sparse W, on an NVIDIA GPU; see the top of this file.

    Products of float32 are of the precision that `jax_default_matmul_precision` names, TF32 if none; products of
    16-bit floats are exact. Sums are float32, rounded once at the end. Has no derivative of its own.

    Args:
        values: blocks one after the other, each (outputs, inputs).
        index: input block of every block, increasing along a run.
        bounds: where the run of each output block begins and ends.
        x: activations, at least one column, of the dtype of the values.
        n_out: outputs, a multiple of those of a block.
        block: (inputs, outputs) of a block, both in `TILES`.
        interpret: run it on any platform, slowly, to test it.

    Raises:
        ValueError: `block_suits` says no.
    """
    if not block_suits(block, (n_out, x.shape[0], x.shape[1]), x.dtype) or values.dtype != x.dtype:
        raise ValueError(
            f"The block kernel takes blocks with sides of {TILES} and one of {KERNEL_DTYPES}, but blocks {block} of "
            f"{values.dtype} and x {x.dtype}{x.shape} arrived. Use the portable product of `sparse.blocks`."
        )
    from jax.experimental.pallas import triton  # not part of every jaxlib

    tall, wide = block
    n = x.shape[1]
    panel = min(max(pl.next_power_of_2(n), TILES[0]), _PANEL)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)  # which blocks are read is known inside the kernel only
    kernel = pl.pallas_call(
        functools.partial(_kernel, tall=tall, wide=wide, n=n, panel=panel),
        out_shape=jax.ShapeDtypeStruct((n_out, n), x.dtype),
        grid=(n_out // wide, pl.cdiv(n, panel)),
        in_specs=[anywhere] * 4,
        out_specs=anywhere,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),  # not tuned yet
        interpret=interpret,
        name="jaxprune_block_times",
    )
    return kernel(values.reshape(-1, wide, tall), index, bounds, x)


def _kernel(values: Any, index: Any, bounds: Any, x: Any, y: Any, *, tall: int, wide: int, n: int, panel: int) -> None:
    from jax.experimental.pallas import triton

    out_block, columns = pl.program_id(0), pl.ds(pl.program_id(1) * panel, panel)
    inside = (pl.program_id(1) * panel + jnp.arange(panel, dtype=jnp.int32) < n)[None]  # the last panel may stick out

    def add_block(k: Array, total: Array) -> Array:
        there = x.at[pl.ds(index[k] * tall, tall), columns]
        rows = triton.load(there, mask=jnp.broadcast_to(inside, (tall, panel)), other=0.0)
        return total + jnp.dot(values[k], rows, preferred_element_type=jnp.float32)

    total = lax.fori_loop(bounds[out_block], bounds[out_block + 1], add_block, jnp.zeros((wide, panel), jnp.float32))
    there = y.at[pl.ds(out_block * wide, wide), columns]
    triton.store(there, total.astype(y.dtype), mask=jnp.broadcast_to(inside, (wide, panel)))


def cusparse_is_here() -> bool:
    """Whether this process has a CUDA device: cuSPARSE itself is asked for the size of its buffer while lowering."""
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def csr_product(name: str, portable: Callable[..., Array]) -> Callable[..., Array]:
    """A product (values, index, bounds, x, *, n_out) of a W in compressed outputs, cuSPARSE's on CUDA.

    For float32 and float64. A program lowered for CUDA on a machine without it has the portable product, with a
    warning. `index` must be sorted along every run, each once, and `bounds` end at the number of values.

    Args:
        name: of the primitive.
        portable: the same product for everything else.
    """
    return on_cuda(name, functools.partial(_cusparse, portable, lambda bounds, n_out: bounds), portable)


def coo_product(name: str, portable: Callable[..., Array]) -> Callable[..., Array]:
    """A product (values, cols, rows, x, *, n_out) of a W in coordinates sorted by output, likewise.

    Where each output's run begins is counted first: cuSPARSE's own product of coordinates has been wrong in some
    releases, and one routine is easier to trust than two.

    Args:
        name: of the primitive.
        portable: the same product for everything else.
    """
    return on_cuda(name, functools.partial(_cusparse, portable, _run_bounds), portable)


def _run_bounds(rows: Array, n_out: int) -> Array:
    return jnp.searchsorted(rows, jnp.arange(n_out + 1, dtype=jnp.int32)).astype(jnp.int32)


def _cusparse(
    portable: Callable[..., Array],
    bounds_of: Callable[[Array, int], Array],
    values: Array,
    index: Array,
    outputs: Array,
    x: Array,
    *,
    n_out: int,
) -> Array:
    if x.dtype not in CUSPARSE_DTYPES:
        return portable(values, index, outputs, x, n_out=n_out)
    if not cusparse_is_here():
        warnings.warn(
            "This program is lowered for CUDA where there is no GPU, and cuSPARSE must be there while lowering: its "
            "sparse products are gathers and scatter-additions, many times slower. Lower it on the GPU's machine.",
            stacklevel=2,
        )
        return portable(values, index, outputs, x, n_out=n_out)
    return csr_matmat(CSR((values, index, bounds_of(outputs, n_out)), shape=(n_out, x.shape[0])), x)
