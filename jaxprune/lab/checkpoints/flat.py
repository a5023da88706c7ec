"""Any pytree as a flat dict of plain NumPy arrays, and back, bit for bit.

    arrays = to_arrays(tree)            # {"0007.params.layers.0.kernel": array}
    tree = from_arrays(arrays, like)    # `like`: a tree with the same leaves, of any values

A leaf is known by its position and its name, so reading needs none of the tree's classes, only a template. NumPy's own
dtypes stay as they are; those of ml_dtypes (bfloat16, float8, int4) become unsigned integers of the same width, and
typed PRNG keys their words, because few file formats know them. Arrays without elements are left out: their shape
and dtype, which `leaves` tells, are all there is to them.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.tree import leaf_name


class Leaf(NamedTuple):
    """A leaf without its values; `dtype` is the name of a NumPy dtype, or "key<fry>" and the like for PRNG keys."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype}{list(self.shape)}"


def leaves(tree: Any) -> list[Leaf]:
    """The leaves of a tree, described in its order.

    Raises:
        TypeError: a leaf that is neither a numeric array, nor a typed PRNG key, nor a Python number.
    """
    return [_describe(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def keys(described: list[Leaf]) -> list[str | None]:
    """Where each leaf is in the flat dict; None for arrays without elements, which are not there.

    A key is fit to be a file name, too.
    """
    words = [re.sub(r"[^0-9A-Za-z_-]+", ".", leaf.name) for leaf in described]
    return [
        None if 0 in leaf.shape else f"{i:04d}.{word}"[:120]
        for i, (leaf, word) in enumerate(zip(described, words, strict=True))
    ]


def to_arrays(tree: Any) -> dict[str, np.ndarray]:
    """The flat dict of a tree, copied to the host at once.

    Raises:
        TypeError: as `leaves`.
    """
    names = keys(leaves(tree))
    arrays = [np.asarray(array) for array in jax.device_get([_bare(leaf) for leaf in jax.tree.leaves(tree)])]
    return {name: _storable(array) for name, array in zip(names, arrays, strict=True) if name}


def from_arrays(arrays: dict[str, np.ndarray], like: Any) -> Any:
    """The tree that `to_arrays` took apart, in the structure of a template.

    Args:
        arrays: the flat dict.
        like: template with the same leaves. Each comes back as what the template has there: NumPy array or scalar,
            JAX array (with its sharding, if committed), PRNG key, Python number; an array for `jax.ShapeDtypeStruct`.

    Raises:
        KeyError: a leaf of the template is not in `arrays`.
    """
    found = [arrays[name] if name else None for name in keys(leaves(like))]
    like_leaves, structure = jax.tree.flatten(like)
    return structure.unflatten([_as(leaf, array) for leaf, array in zip(like_leaves, found, strict=True)])


def by_name(arrays: dict[str, np.ndarray], described: list[Leaf]) -> dict[str, np.ndarray]:
    """Leaf name -> array, without a template: PRNG keys as their words, Python numbers as arrays.

    Args:
        arrays: the flat dict.
        described: what `leaves` said of the tree.
    """
    found = {}
    for leaf, key in zip(described, keys(described), strict=True):
        is_key = leaf.dtype.startswith("key<")
        array = arrays[key] if key else np.zeros(leaf.shape, "uint32" if is_key else leaf.dtype)
        found[leaf.name] = array if is_key else array.view(leaf.dtype)
    return found


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _bare(leaf: Any) -> Any:
    """A leaf as an array of numbers (or its `jax.ShapeDtypeStruct`)."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return np.asarray(leaf) if isinstance(leaf, bool | int | float | complex) else leaf


def _describe(name: str, leaf: Any) -> Leaf:
    if _is_key(leaf):
        return Leaf(name, leaf.shape, str(leaf.dtype))
    bare = _bare(leaf)
    dtype = getattr(bare, "dtype", None)
    if dtype is None or not (dtype == np.bool_ or jnp.issubdtype(dtype, np.number)):
        found = type(leaf).__name__ if dtype is None else f"{type(leaf).__name__} of {dtype}"
        raise TypeError(
            f"Leaf {name!r} is a {found}, a numeric array was expected. Keep other things out of the state."
        )
    return Leaf(name, tuple(bare.shape), np.dtype(dtype).name)


def _storable(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "V":
        return array.view(f"u{array.itemsize}")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _as(like: Any, array: np.ndarray | None) -> Any:
    """The stored bits as what the template's leaf is; None stands for an array without elements."""
    bare = _bare(like)
    dtype = np.dtype(bare.dtype).newbyteorder("=") if np.dtype(bare.dtype).kind != "V" else np.dtype(bare.dtype)
    array = np.zeros(bare.shape, dtype) if array is None else array
    array = array.view(dtype) if dtype.kind == "V" else array
    if array.shape != bare.shape or array.dtype != dtype:
        raise ValueError(f"{array.dtype}{list(array.shape)} was stored, {dtype}{list(bare.shape)} expected")
    if _is_key(like):
        key = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
        return jax.device_put(key, like.sharding) if like.committed else key
    if isinstance(like, jax.Array):
        return _to_device(array, like)
    if isinstance(like, jax.ShapeDtypeStruct):
        return jax.device_put(array, like.sharding)
    if isinstance(like, np.generic):
        return array[()]
    return array if isinstance(like, np.ndarray) else type(like)(array.item())


def _to_device(array: np.ndarray, like: jax.Array) -> jax.Array:
    if like.weak_type and not array.ndim:
        # A weak scalar that came back strong would promote bfloat16 to float32 from here on.
        weak = jnp.asarray(array.item())
        if weak.dtype == array.dtype and np.asarray(weak).tobytes() == array.tobytes():
            return weak
    # An uncommitted array stays one: committing it would bind whatever it meets to its device, and recompile.
    return jax.device_put(array, like.sharding) if like.committed else jax.device_put(array)
