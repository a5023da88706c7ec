"""CPU kernels in C++, called from compiled programs as XLA custom calls.

Built with the package where a C++ compiler is found; where none was, everything else works, and `why_missing` says so.
The loops exist for several instruction sets; which one runs is decided when the first product does, by the processor,
or by the environment variable JAXPRUNE_ISA ("portable", "avx2", "avx512").
"""

import ctypes
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt16

# Beside this file; or, where the sources are used in place, where the package was installed.
_BESIDE = Path(__file__).parent / "_kernels.so"
_INSTALLED = [Path(entry) / "jaxprune" / "sparse" / "native" / "_kernels.so" for entry in sys.path]
LIBRARY = next((path for path in (_BESIDE, *_INSTALLED) if path.exists()), _BESIDE)
TARGET = "jaxprune_product"


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded kernels, their calls known to XLA; or the reason why there are none."""
    if not LIBRARY.exists():
        return (
            "The native kernels were not built, for want of a C++ compiler when jaxprune was installed. Install one "
            "(such as g++), then `pip install --force-reinstall --no-deps` jaxprune; or use another format."
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"The native kernels cannot be loaded: {error}. Reinstall jaxprune on this machine."
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.jaxprune_product), platform="cpu")
    return library


def why_missing() -> str:
    """Why there are no native kernels here, with the way out; "" where there are."""
    library = _library()
    return library if isinstance(library, str) else ""


def instruction_set() -> str:
    """Name of the loops that run here: "avx512", "avx2" or "portable"; "" without native kernels."""
    library = _library()
    if isinstance(library, str):
        return ""
    library.jaxprune_isa.restype = ctypes.c_char_p
    return library.jaxprune_isa().decode()


def product(
    values: Float32[Array, " nse"],
    index: UInt16[Array, " nse"],
    bounds: Int32[Array, " tiles_times_n_out_plus_1"],
    x: Float32[Array, "n_in n"],
    *,
    n_out: int,
    tile: int,
) -> Float32[Array, "n_out n"]:
    """W @ x on this processor, for W stored in tiles as `jaxprune.sparse.tiles` says.

    Args:
        values: non-zeros, tile by tile.
        index: their inputs, counted from the tile's first.
        bounds: where each output's run begins, tile by tile, n_out + 1 a tile; trusted, as `index` is.
        x: columns.
        n_out: outputs.
        tile: inputs of a tile.
    """
    shape = jax.ShapeDtypeStruct((n_out, x.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call(TARGET, shape, vmap_method="sequential")
    return call(values, index, bounds, x, tile=np.int64(tile))
