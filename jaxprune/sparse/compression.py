"""Between dense and compressed trees: `compress`, `decompress`, and what either weighs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune import native, tree
from jaxprune.layout import BY_NAME, Layout
from jaxprune.quantize.int8 import Ranges
from jaxprune.sparse.formats import FORMATS, SparseWeight, Unsupported, check_format, check_unsupported, matrix_of
from jaxprune.sparse.int8 import check_ranges, grid_of
from jaxprune.sparse.tuning.plan import Plan
from jaxprune.types import Params


def compress(
    params: Params,
    format: str | Plan | None = None,
    *,
    select: tree.Select = tree.weights,
    layout: Layout = BY_NAME,
    unsupported: Unsupported = "refuse",
    ranges: Ranges | None = None,
) -> Params:
    """The same tree, with the non-zeros of its matrices in place of the matrices.

    Exact zeros are dropped, whoever put them there, so params and masks need not both be kept. Runs outside jit, since
    how many non-zeros there are decides shapes; the result is an argument of jitted functions, see `apply`. Weights
    of another pattern with as many non-zeros recompile nothing, blocks if their longest run is about as long, too.

    Without a format every selected leaf takes that of `default_format`: "native" on a CPU, where the kernels are, else
    "bcsr", and "bcoo" on everything else. It stays dense if it has no such form (as no convolution has in "bcoo" and
    "bcsr", and stacked layers in none), or would take no fewer bytes in it than dense. What is fastest is measured by
    `tune`; this is the guess.

    Args:
        params: any pytree of arrays (NNX State, Linen or Haiku dict, a filtered Equinox module).
        format: a name in `FORMATS`, or "dense", which leaves everything as it is; or a plan of `tune`, which says
            which leaf gets which format, and by which layout, instead of `select` and `layout`; or None, see above.
        select: which leaves, as a function (name, leaf) -> bool or name rules.
        layout: which axis of a matrix is summed over: told by the leaf's name, see `BY_NAME`; `FLAX`, (in, out); or
            `TORCH`, (out, in), also Equinox's; or `layout_of(sites)`, as the model's function uses them.
        unsupported: what becomes of a selected leaf that has no form in the named format, such as a convolution kernel
            or stacked layers, or whose name does not tell its layout: "refuse", or "dense" to leave it as it is.
        ranges: of the activations that meet each leaf, as `jaxprune.storage.calibrate` finds them; for the format
            "int8", which rounds activations too, and for no other.

    Raises:
        ValueError: an unknown format, or a plan for other params; a selected leaf is no matrix or holds a NaN, or may
            be stacked layers as well as a convolution; its name does not tell its layout; nothing is selected;
            `ranges` that are missing, or of no use, or that do not have one range for a leaf.
        TypeError: a leaf is traced, compressed already, no array, or not floating.
    """
    check_unsupported(unsupported)
    if isinstance(format, str):
        check_format(format)
    if not isinstance(format, Plan):
        check_ranges(format, ranges)
    for weight in filter(_is_sparse, jax.tree.leaves(params, is_leaf=_is_sparse)):
        raise TypeError(f"Leaf {weight.name!r} is compressed already. Call `decompress(params)` first.")
    if format == "dense":
        return params
    if isinstance(format, Plan):
        asked, layout = format.formats_for(params), format.layout
    else:
        asked = dict.fromkeys(tree.selected_leaves(select, params), format)

    def one(name: str, leaf: Any) -> Any:
        if name not in asked:
            return leaf
        if isinstance(leaf, Tracer):
            raise TypeError(
                f"Leaf {name!r} is traced. How many non-zeros it has depends on its values, so `compress` runs outside "
                f"`jit`, `grad` and `vmap`; the compressed params are then an argument of the jitted function."
            )
        named = asked[name]
        kind = FORMATS[named or default_format(leaf)]
        if not has_form(name, leaf, kind, layout, unsupported if named else "dense", untold=unsupported):
            return leaf
        weight = _compress_leaf(name, leaf, kind, layout, {"grid": grid_of(name, ranges)} if kind.calibrated else {})
        return weight if named or weight.nbytes < leaf.nbytes else leaf

    return tree.map_named(one, params)


def default_format(leaf: Any) -> str:
    """The format that `compress` tries where none is named.

    | leaf | format |
    |---|---|
    | on a CPU, up to 32 bits, with the native kernels | "native" |
    | on a CPU otherwise | "bcsr" |
    | elsewhere | "bcoo" |

    Args:
        leaf: a committed array is where it lies, any other where jax's default backend is.
    """
    committed = isinstance(leaf, jax.Array) and leaf.committed
    platform = next(iter(leaf.devices())).platform if committed else jax.default_backend()
    if platform != "cpu":
        return "bcoo"
    return "native" if leaf.dtype.itemsize <= 4 and not native.why_missing() else "bcsr"


def has_form(
    name: str,
    leaf: Any,
    kind: type[SparseWeight],
    layout: Layout,
    unsupported: Unsupported,
    untold: Unsupported | None = None,
) -> bool:
    """Whether a leaf becomes a weight of this format.

    Args:
        name: of the leaf.
        leaf: in host memory.
        kind: a class of `FORMATS`.
        layout: see `compress`.
        unsupported: likewise.
        untold: the same for a leaf whose name does not tell which axis is summed over; None: as `unsupported`.

    Raises:
        ValueError: it does not, and what becomes of it is "refuse".
    """
    axes = layout.axes(name, leaf.shape)
    one_each = not axes.layers and len(axes.inputs) == len(axes.outputs) == 1
    if axes.spatial and not _is_convolution(name, leaf, layout, unsupported):
        return False
    if one_each and (not axes.spatial or (kind.convolves and len(axes.spatial) <= 2)):
        if not _is_told(name, leaf, layout, untold or unsupported):
            return False
        why_not = kind.why_not(matrix_of(np.asarray(leaf), axes.outputs == (leaf.ndim - 1,)))
        if why_not and unsupported == "refuse":
            raise ValueError(f"Leaf {name!r} {tuple(leaf.shape)} has no such form: {why_not}")
        return not why_not
    if unsupported == "dense":
        return False
    what = "stacked layers" if axes.layers else "a convolution kernel" if axes.spatial else "no matrix"
    able = sorted(name for name, one in FORMATS.items() if one.convolves)
    raise ValueError(
        f"Leaf {name!r} {tuple(leaf.shape)} is {what} by its layout. Only a matrix with one input and one output axis "
        f"can be compressed, and in the formats {', '.join(able)} a convolution kernel with one or two spatial axes. "
        f"Leave it out with `select`, keep such leaves dense with "
        f'`compress(..., unsupported="dense")`, or correct `layout`.'
    )


def _is_convolution(name: str, leaf: Any, layout: Layout, unsupported: Unsupported) -> bool:
    """Whether a leaf with spatial axes has them for certain; what may be stacked layers is refused, or stays dense."""
    try:
        layout.check_stacked(name, leaf.shape)
    except ValueError:
        if unsupported == "refuse":
            raise
        return False
    return True


def _is_told(name: str, leaf: Any, layout: Layout, unsupported: Unsupported) -> bool:
    """Whether it is known which axis of a leaf is summed over; if not it is refused, or stays dense."""
    try:
        layout.check_named(name, leaf.shape)
    except ValueError as error:
        if unsupported == "refuse":
            raise ValueError(f"{error} A plan knows it too: `compress(params, tune(apply_fn, params, x))`.") from None
        return False
    return True


def _compress_leaf(
    name: str, leaf: Any, kind: type[SparseWeight], layout: Layout, fields: dict[str, Any]
) -> SparseWeight:
    host = np.asarray(leaf)
    if np.isnan(host).any():
        raise ValueError(f"Leaf {name!r} holds a NaN, so it cannot be told what is zero. Find where it comes from.")
    outputs_last = layout.axes(name, leaf.shape).outputs == (leaf.ndim - 1,)
    weight = kind.from_leaf(host, outputs_last=outputs_last, name=name, **fields)
    if not isinstance(leaf, jax.Array) or not leaf.committed:
        return weight
    if isinstance(leaf.sharding, NamedSharding):
        # Of a sharded leaf each device gets all: its non-zeros do not fall evenly on them.
        return jax.device_put(weight, NamedSharding(leaf.sharding.mesh, PartitionSpec()))
    return jax.device_put(weight, leaf.sharding) if len(leaf.devices()) == 1 else weight


def decompress(params: Params) -> Params:
    """The tree with every compressed leaf dense again, bit for bit (a -0.0 comes back as 0.0); also under jit."""
    return jax.tree.map(lambda leaf: leaf.decompress() if _is_sparse(leaf) else leaf, params, is_leaf=_is_sparse)


def nbytes(params: Params) -> int:
    """Bytes of all arrays of a tree, compressed or not, indices included."""
    leaves = [leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")]
    return sum(math.prod(jnp.shape(leaf)) * leaf.dtype.itemsize for leaf in leaves)


def _is_sparse(leaf: Any) -> bool:
    return isinstance(leaf, SparseWeight)
