"""Meshes: where arrays lie is part of their type, and arithmetic here is kept out of it.

On a mesh with explicit axes, what `jax.make_mesh` gives, jax refuses an operation whose result could lie in several
ways: reshapes, uneven slices, gathers. Where masks lie is known, as the weights do, so what is in between is left to
the compiler, as on a mesh with automatic axes:

    @lying_like("params")
    def masks_of(params): ...

Inside `jax.shard_map` the type says over which axes an array varies from device to device.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from jaxprune import tree
from jaxprune.checks import is_concrete
from jaxprune.compat import varying_axes

F = TypeVar("F", bound=Callable[..., Any])


def lying_like(argument: str) -> Callable[[F], F]:
    """The function as it is; of arrays on explicit axes, inside of it these are automatic.

    Args:
        argument: name of the one whose leaves say where those of the result lie, by name. A leaf of another shape is
            whole on every device; one of a single axis is cut along it by the devices of its namesake, if they divide
            it.

    Returns:
        A decorator.
    """

    def decorate(fn: F) -> F:
        signature = inspect.signature(fn)

        @functools.wraps(fn)
        def on_any_mesh(*args: Any, **kwargs: Any) -> Any:
            mesh = _explicit_mesh((args, kwargs))
            if mesh is None:
                return fn(*args, **kwargs)
            with jax.sharding.use_abstract_mesh(_automatic(mesh)):
                inside, inside_by_name = jax.tree.map(_left_to_the_compiler, (args, kwargs))
                result = fn(*inside, **inside_by_name)
            like = tree.named_leaves(signature.bind(*args, **kwargs).arguments[argument])
            return tree.map_named(lambda name, leaf: _lain(leaf, like.get(name), mesh), result)

        return on_any_mesh  # pyright: ignore[reportReturnType]

    return decorate


def lying_as_dense(
    sparse: Callable[..., Any], dense: Callable[[Any], Any], weight: Any, x: Shaped[Array, "..."]
) -> Shaped[Array, "..."]:
    """sparse(weight, x), which lies where dense(x) would on explicit axes; inside of `sparse` these are automatic.

    Args:
        sparse: (weight, x) -> result.
        dense: x -> result of the same shape, only traced.
        weight: a pytree of arrays, whole on every device.
        x: an array.
    """
    mesh = _explicit_mesh((weight, x))
    if mesh is None:
        return sparse(weight, x)
    sharding = jax.eval_shape(dense, x).sharding
    with jax.sharding.use_abstract_mesh(_automatic(mesh)):
        result = sparse(*jax.tree.map(_left_to_the_compiler, (weight, x)))
    return jax.sharding.reshard(result, sharding or NamedSharding(mesh, PartitionSpec()))


def placed(mask: Shaped[Array, "..."], leaf: Any) -> Shaped[Array, "..."]:
    """A mask, or another array, laid out over devices as its leaf is; under jit that is the compiler's to decide."""
    if is_concrete(mask) and is_concrete(leaf) and isinstance(leaf, jax.Array) and mask.sharding != leaf.sharding:
        return jax.device_put(mask, leaf.sharding)
    return mask


def varying_like(value: Shaped[Array, "..."], *others: Any) -> Shaped[Array, "..."]:
    """The value, varying over each axis of `jax.shard_map` that one of the others varies over."""
    axes = frozenset().union(*map(varying_axes, others)) - varying_axes(value)
    return jax.lax.pcast(value, tuple(sorted(axes)), to="varying") if axes else value


def _explicit_mesh(values: Any) -> Any:
    """The mesh with explicit axes that arrays among these leaves lie on, or None."""
    arrays = (leaf for leaf in jax.tree.leaves(values) if isinstance(leaf, jax.Array))
    meshes = (jax.typeof(array).sharding.mesh for array in arrays)
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def _automatic(mesh: Any) -> Any:
    """The mesh with its explicit axes automatic."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return mesh.update_axis_types({name: AxisType.Auto for name, kind in kinds if kind is AxisType.Explicit})


def _left_to_the_compiler(leaf: Any) -> Any:
    return jax.sharding.reshard(leaf, PartitionSpec()) if isinstance(leaf, jax.Array) else leaf


def _lain(leaf: Any, like: Any, mesh: Any) -> Any:
    """A leaf of a result where its namesake lies."""
    if not isinstance(leaf, jax.Array):
        return leaf
    sharding = jax.typeof(like).sharding if isinstance(like, jax.Array) else getattr(like, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return placed(jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec())), like)
    if like.shape != leaf.shape:
        sharding = NamedSharding(sharding.mesh, _cut(leaf, sharding))
    return jax.sharding.reshard(leaf, sharding)


def _cut(leaf: Array, sharding: NamedSharding) -> PartitionSpec:
    """Over the axes of another sharding, where the leaf has one axis that they divide; over none otherwise."""
    names = [name for part in sharding.spec if part for name in ((part,) if isinstance(part, str) else part)]
    fits = names and leaf.ndim == 1 and leaf.size % math.prod(sharding.mesh.shape[name] for name in names) == 0
    return PartitionSpec(tuple(names)) if fits else PartitionSpec()
