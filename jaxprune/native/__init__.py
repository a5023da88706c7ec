"""CPU kernels in C++, called from compiled programs as XLA custom calls.

Built with the package where a C++ compiler is found; where none was, everything else works, and `why_missing` says so.
XLA registers a custom call built for another jaxlib without a word and fails when it runs, so `why_missing` makes one.
The loops exist for several instruction sets; which one runs is decided when the first product does, by the processor,
or by the environment variable JAXPRUNE_ISA ("portable", "avx2", "avx512", "avx512_vnni").
"""

import contextlib
import ctypes
import functools
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, Int32, Shaped, UInt8, UInt16

from jaxprune.exact.meshes import varying_like

# Beside this file; or, where the sources are used in place, where the package was installed.
_BESIDE = Path(__file__).parent / "_kernels.so"
_INSTALLED = [Path(entry) / "jaxprune" / "native" / "_kernels.so" for entry in sys.path]
LIBRARY = next((path for path in (_BESIDE, *_INSTALLED) if path.exists()), _BESIDE)
TARGET = "jaxprune_product"
TRANSPOSED = "jaxprune_transposed"
CODES = "jaxprune_codes"
SAMPLED = "jaxprune_sampled"
PERMUTED = "jaxprune_permuted"
INTERFACE = 9  # as in product.cc
LARGEST_POOL = 8  # likewise


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded kernels; or the reason why there are none."""
    if not LIBRARY.exists():
        return (
            "The native kernels were not built, for want of a C++ compiler when jaxprune was installed. Install one "
            "(such as g++), then `pip install --force-reinstall --no-deps` jaxprune; or use another format."
        )
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"The native kernels cannot be loaded: {error}. Reinstall jaxprune on this machine."
    if getattr(loaded, "jaxprune_interface", int)() != INTERFACE:
        return f"The native kernels {LIBRARY} are those of another version of jaxprune. Reinstall it."
    return loaded


def library() -> ctypes.CDLL:
    """The loaded kernels.

    Raises:
        RuntimeError: there are none; see `why_not_loaded`.
    """
    loaded = _library()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def why_not_loaded() -> str:
    """Why there is no library here, with the way out; "" where there is, which is enough for the codecs."""
    loaded = _library()
    return loaded if isinstance(loaded, str) else ""


def why_missing() -> str:
    """Why no native kernels run here, with the way out; "" where they do.

    The first time it makes one call, which takes some milliseconds, from wherever it is asked: inside of any
    transformation, and under any of jax's contexts.
    """
    return why_not_loaded() or _why_not_called()


@functools.cache
def _why_not_called() -> str:
    """What is wrong with one real call of the loaded kernels, "" if nothing."""
    reasons = []
    # Traces and contexts (meshes, guards, devices) belong to a thread; in one of its own there are none.
    thread = threading.Thread(target=lambda: reasons.append(_called()), name="jaxprune-first-call")
    thread.start()
    thread.join()
    return reasons[0]


def _register() -> None:
    loaded = library()
    handlers = {
        TARGET: loaded.jaxprune_product,
        TRANSPOSED: loaded.jaxprune_transposed,
        CODES: loaded.jaxprune_codes,
        SAMPLED: loaded.jaxprune_sampled,
        PERMUTED: loaded.jaxprune_permuted,
    }
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")


def _called() -> str:
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        return f"The native kernels run on CPU, which JAX was told to leave out. Add it to `jax_platforms`. ({error})"
    none = np.zeros(0, np.float32)
    parts = (np.full(1, 2, np.float32), np.zeros(1, np.uint8), np.array([0, 1], np.int32), none, none, none)
    try:
        _register()
        with jax.transfer_guard("allow"):  # one of the whole process would hold here too
            operands = jax.device_put((*parts, np.full((1, 1), 3, np.float32)), device)
            call = jax.jit(lambda *operands: product(*operands, shape=(1, 1), dtype=np.float32, tile=1))
            y = float(np.asarray(call(*operands))[0, 0])
    except Exception as error:  # whatever XLA, or jax before it, has against these kernels
        says = next(iter(str(error).splitlines()), type(error).__name__)
        return (
            "The native kernels fail when they are called, as those built for another jaxlib do: reinstall jaxprune, "
            f"in the newest version, or use another format. (The error: {says})"
        )
    return "" if y == 6 else f"The native kernels say that 2 x 3 is {y}. Reinstall jaxprune, or use another format."


def instruction_set() -> str:
    """Name of the loops that run here: "avx512_vnni", "avx512", "avx2" or "portable"; "" without native kernels."""
    if why_missing():
        return ""
    name = library().jaxprune_isa
    name.restype = ctypes.c_char_p
    return name().decode()


def product(
    values: Shaped[Array, " nse"],
    index: UInt8[Array, " nse_by_group"] | UInt16[Array, " nse_by_group"],
    bounds: Int32[Array, " tiles_times_groups_plus_1"],
    scale: Float32[Array, " n_out_or_0"],
    bias: Float32[Array, " n_out_or_none"],
    residual: Float[Array, "..."],
    x: Float[Array, "*batch_and_window channels"],
    *,
    shape: tuple[int, ...],
    dtype: Any,
    tile: int,
    group: int = 1,
    window: tuple[int, ...] = (),
    relu: bool = False,
) -> Float[Array, "..."]:
    """relu(pool(scale * W x) + bias + residual) on this processor, for W in tiles as `jaxprune.sparse.tiles` says.

    Everything but W x may be left out, an empty array then. Indices and bounds that lead outside are found in the call,
    before they are used.

    Args:
        values: non-zeros, tile by tile: float32, bfloat16, or int8 with a scale for every output.
        index: their inputs, counted from the tile's first; or, where `tile` is 0, the words of `jaxprune.sparse.bits`.
        bounds: where each output's run begins and the last one ends, tile by tile, n_out + 1 a tile.
        scale: of every output.
        bias: of every output.
        residual: what is added, shaped as the result and of its dtype.
        x: (n, in), or images (n, height, width, channels) where there is a window; float32 or bfloat16.
        shape: of the result, (n, out) or (n, height, width, out).
        dtype: of the result, float32 or bfloat16; sums are float32.
        tile: inputs of a tile; 0 for bits.
        group: outputs that share their inputs, 1 or 4; there are as many values for each of `index`, and bounds for
            each group instead of each output.
        window: of a convolution, two numbers each: kernel, stride, padding before, dilation, and the pool of whose
            pixels each of the result is the largest, (1, 1) for none. Inputs are then (window, channels).
        relu: whether negative results become 0.

    Raises:
        XlaRuntimeError: when the call runs: an operand that does not fit, by name.
    """
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(shape, dtype))
    attributes = {
        "tile": np.int64(tile),
        "group": np.int64(group),
        "window": np.asarray(window, np.int64),
        "relu": bool(relu),
    }
    operands = (values, index, bounds, scale, bias, residual, x)
    return call(*(varying_like(operand, *operands) for operand in operands), **attributes)


def transposed(
    values: Shaped[Array, " nse"],
    index: UInt8[Array, " bytes"],
    bounds: Int32[Array, " n_out_plus_1"],
    scale: Float32[Array, " n_out_or_0"],
    x: Float32[Array, "n n_out"],
    *,
    n_in: int,
) -> Float32[Array, "n n_in"]:
    """x W on this processor, for W of bits as `jaxprune.sparse.bits` says, the way round that `product` does not go.

    Args:
        values: see `product`; float16 too.
        index: the words.
        bounds: where each output's values begin, and the last one's end.
        scale: of every output, or nothing.
        x: (n, out).
        n_in: inputs of W, columns of the result.

    Raises:
        XlaRuntimeError: when the call runs: an operand that does not fit, by name.
    """
    call = jax.ffi.ffi_call(TRANSPOSED, jax.ShapeDtypeStruct((x.shape[0], n_in), np.float32))
    operands = (values, index, bounds, scale, x)
    return call(*(varying_like(operand, *operands) for operand in operands))


def product_of_codes(
    values: Int8[Array, " four_times_runs"],
    index: UInt8[Array, " runs"] | UInt16[Array, " runs"],
    bounds: Int32[Array, " tiles_times_outputs_plus_1"],
    scale: Float32[Array, " n_out"],
    totals: Int32[Array, " n_out"],
    bias: Float32[Array, " n_out_or_none"],
    residual: Float[Array, "..."],
    x: Shaped[Array, "*batch_and_window channels"],
    *,
    grid: tuple[float, ...],
    grid_of_y: tuple[float, ...] = (),
    keep: bool = True,
    shape: tuple[int, ...],
    dtype: Any,
    tile: int,
    window: tuple[int, ...] = (),
    relu: bool = False,
) -> tuple[Float[Array, "..."], UInt8[Array, "..."]]:
    """`product` on integers of 8 bits: x is rounded to codes, if it is none, and sums over codes are exact.

    The result of the product is rounded to float32 before anything is added. The call makes the codes of x besides, as
    another result, which is dropped.

    Args:
        values: codes, four inputs of one output at a time, tile by tile.
        index: which four of their tile's; the channels of each tap of a window make whole runs of four.
        bounds: where each output's runs begin and the last one ends, tile by tile, n_out + 1 a tile.
        scale: of the codes of every output.
        totals: sum of the codes of every output.
        bias: see `product`; likewise all that follows.
        residual: what is added.
        x: activations; or codes of them, uint8 and counted from 0 on, with channels in whole runs of four.
        grid: scale of the codes of x, and which code is 0, as `jaxprune.quantize.scales.asymmetric_grid` says.
        grid_of_y: that of the codes of the result; nothing if they are not wanted.
        keep: whether the result itself is wanted; else it has no outputs.
        shape: of the result.
        dtype: of the result.
        tile: runs of a tile.
        window: of a convolution.
        relu: whether negative results become 0.

    Returns:
        The result, and its codes as x has them, or nothing.

    Raises:
        XlaRuntimeError: when the call runs: an operand that does not fit, by name.
    """
    of_y = _codes(shape) if grid_of_y else (0,)
    of_x = (0,) if x.dtype == np.uint8 else _codes(x.shape)
    results = jax.ShapeDtypeStruct(shape if keep else (*shape[:-1], 0), dtype)
    call = jax.ffi.ffi_call(CODES, (results, *(jax.ShapeDtypeStruct(size, np.uint8) for size in (of_y, of_x))))
    attributes = {"tile": np.int64(tile), "window": np.asarray(window, np.int64), "relu": bool(relu)}
    grids = (jnp.asarray(numbers, jnp.float32) for numbers in (grid, grid_of_y))
    operands = (values, index, bounds, scale, totals, *grids, bias, residual, x)
    y, codes, _ = call(*(varying_like(operand, *operands) for operand in operands), **attributes)
    return y, codes


def _codes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same with channels in whole runs of four."""
    return (*shape[:-1], -(-shape[-1] // 4) * 4)


def sampled(
    index: UInt8[Array, " nse"] | UInt16[Array, " nse"],
    bounds: Int32[Array, " tiles_times_outputs_plus_1"],
    x: Float[Array, "n n_in"],
    y: Float[Array, "n n_out"],
    *,
    tile: int,
) -> Float32[Array, " nse"]:
    """For each non-zero (o, i) of W the sum over n of x[n, i] y[n, o], on this processor; sums are float32.

    Args:
        index: see `product`; likewise the bounds, which leave nothing out.
        bounds: of the runs.
        x: float32 or bfloat16.
        y: likewise.
        tile: inputs of a tile.

    Raises:
        XlaRuntimeError: when the call runs: an operand that does not fit, by name.
    """
    call = jax.ffi.ffi_call(SAMPLED, jax.ShapeDtypeStruct(index.shape, np.float32))
    operands = (index, bounds, x, y)
    return call(*(varying_like(operand, *operands) for operand in operands), tile=np.int64(tile))


def permuted(values: Float[Array, " n"], order: Int32[Array, " m"]) -> Float[Array, " m"]:
    """values[order], float32 or bfloat16, on this processor's threads.

    Raises:
        XlaRuntimeError: when the call runs: an operand that does not fit, by name; an order that leads outside.
    """
    call = jax.ffi.ffi_call(PERMUTED, jax.ShapeDtypeStruct(order.shape, values.dtype))
    return call(varying_like(values, values, order), varying_like(order, values, order))


# With the import, so that an exported program finds its kernels in a process that does nothing else; it starts no
# backend. What is wrong with it, if anything, `why_missing` says.
if not why_not_loaded():
    with contextlib.suppress(Exception):
        _register()
