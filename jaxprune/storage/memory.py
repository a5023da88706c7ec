"""Memory for tensors, so that JAX takes them over as they are."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Shaped

_ALIGNMENT = 64  # bytes; what begins at such a place JAX does not copy on a CPU


def zeros(count: int, dtype: Any) -> Shaped[np.ndarray, " count"]:
    """Like `np.zeros`, beginning where JAX wants it."""
    dtype = np.dtype(dtype)
    room = np.zeros(count * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + count * dtype.itemsize].view(dtype)


def on_device(array: Shaped[np.ndarray, "*axes"]) -> Shaped[Array, "*axes"] | Shaped[np.ndarray, "*axes"]:
    """A jax array, unless that would cut off bits.

    Args:
        array: one that nobody writes to any more; `jnp.asarray` would copy it, and let go of it late.
    """
    return jax.device_put(array) if jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype else array
