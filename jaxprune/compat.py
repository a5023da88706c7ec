"""Versions of jax: the only file that knows how they differ. It asks what is there, never for a number.

No other file compares versions or imports `jax._src`. Tables of primitives by name are elsewhere, with the names of all
versions in them: what a name stands for has not changed so far.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.extend.core
import jax.numpy as jnp
from jax._src import config, core
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, JaxprEqn
from jax.sharding import NamedSharding, PartitionSpec

if TYPE_CHECKING:
    ClosedJaxpr: TypeAlias = Any  # one version's is no other's
else:
    ClosedJaxpr = getattr(jax.extend.core, "ClosedJaxpr", Jaxpr)  # a jaxpr with its constants; since 0.12 any jaxpr

_COMING = ("scan3", "remat3", "custom_jvp3", "custom_vjp3")
"""Flags of jax that make `scan`, `remat` and functions with custom derivatives other primitives."""

pvary_p = core.pvary_p
"""What makes a value vary over axes of `jax.shard_map`, so that it meets others that do."""


@contextlib.contextmanager
def present_forms() -> Iterator[None]:
    """Functions traced in here have loops, `remat` and custom derivatives in the forms that our tables know.

    Only for this thread and until the end of the block. Where jax has the coming forms alone, its primitives stay what
    they are, and are named by `primitive_name`.
    """
    with contextlib.ExitStack() as stack:
        for name in _COMING:
            if (flag := getattr(config, name, None)) is not None:
                stack.enter_context(flag(False))
        yield


def primitive_name(eqn: JaxprEqn) -> str:
    """The name of an equation's primitive; of jax's "hi" primitives, which share one, the name of their kind."""
    return kind_of(eqn.primitive, eqn.params)


def kind_of(primitive: Any, params: dict[str, Any]) -> str:
    """`primitive_name` where there is no equation yet."""
    return type(params["_prim"]).__name__ if primitive.name == "call_hi_primitive" else primitive.name


def closed(jaxpr: Jaxpr, consts: Sequence[Any]) -> ClosedJaxpr:
    """A jaxpr with constants for its `constvars`."""
    return ClosedJaxpr(jaxpr, consts)  # pyright: ignore[reportCallIssue]


def varying_axes(value: Any) -> frozenset[str]:
    """The axes of `jax.shard_map` over which a value varies from device to device; none where this is not checked."""
    kind = value if isinstance(value, ShapedArray) else jax.typeof(value)
    manual = getattr(kind, "mat", None)
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)


def type_like(shape: tuple[int, ...], dtype: Any, *others: Any) -> ShapedArray:
    """The type of an array that varies over the axes of `jax.shard_map` that one of the others varies over."""
    kinds = [other if isinstance(other, ShapedArray) else jax.typeof(other) for other in others]
    most = max(kinds, key=lambda kind: len(varying_axes(kind)))
    if not varying_axes(most):
        return ShapedArray(shape, dtype)
    whole = NamedSharding(most.sharding.mesh, PartitionSpec())
    return most.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=whole)


def scan_groups(scan: JaxprEqn) -> tuple[int, int]:
    """How many operands of a `scan` are constants, and how many are carried; the others are the layers.

    Args:
        scan: the equation.
    """
    if "ft_in" in scan.params:  # from jax 0.11 on
        consts, carry, _ = scan.params["ft_in"].unpack()
        return len(list(consts)), len(list(carry))
    return scan.params["num_consts"], scan.params["num_carry"]


def size_at(size: Any, number: Callable[[str], int]) -> int:
    """A symbolic size with numbers for its symbols.

    Args:
        size: such as `jax.export.symbolic_shape` makes.
        number: symbol -> number.
    """
    return int(size._evaluate({symbol: number(symbol) for symbol in size._get_vars()}))
