"""GPU: cuSPARSE for the portable formats.

JAX's BCOO and BCSR products reach cuSPARSE only under `jax_bcoo_cusparse_lowering`, which is read when a program
is *lowered*, for a user's `jit` long after our call returned, and is not part of jit's cache key. So no context around
the call could set it. `jax.experimental.sparse.csr_matmat` is lowered to the same cuSPARSE call without any flag.

Which branch runs is decided when a program is lowered, so one traced program is right on every platform. No program
of this file has run on a GPU yet; in the tests they are lowered for CUDA.
"""

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.sparse import CSR, csr_matmat
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array

from jaxprune.compat import type_like

CUSPARSE_DTYPES = ("float32", "float64")


def _on_cuda(name: str, product: Callable[..., Array], elsewhere: Callable[..., Array]) -> Callable[..., Array]:
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
    primitive.def_abstract_eval(lambda *args, n_out, **_: type_like((n_out, args[-1].shape[1]), args[-1].dtype, *args))
    mlir.register_lowering(primitive, mlir.lower_fun(elsewhere, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(product, multiple_results=False), platform="cuda")
    return primitive.bind


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
    return _on_cuda(name, functools.partial(_cusparse, portable, lambda bounds, n_out: bounds), portable)


def coo_product(name: str, portable: Callable[..., Array]) -> Callable[..., Array]:
    """A product (values, cols, rows, x, *, n_out) of a W in coordinates sorted by output, likewise.

    Where each output's run begins is counted first: cuSPARSE's own product of coordinates has been wrong in some
    releases, and one routine is easier to trust than two.

    Args:
        name: of the primitive.
        portable: the same product for everything else.
    """
    return _on_cuda(name, functools.partial(_cusparse, portable, _run_bounds), portable)


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
