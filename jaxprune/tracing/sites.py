r"""A site: one use of one leaf, and what kind of use it is.

    y = op(x, operand)  or  op(operand, x),      operand = renamed(leaf)

| kind | operations | multiply-adds |
|---|---|---|
| product | `dot_general` | |y| x (contracted sizes) |
| convolution | `conv_general_dilated` | |y| x (window) x (input channels of a group) |
| embedding | `gather`, `dynamic_slice` by an index that comes from the inputs | 0 |
| scale | `mul`, `div`; `dot_general` that sums over nothing, as einsum writes "bc,c->bc" | 0 |
| bias | `add`, `sub` | 0 |

Of a convolution, padding is counted like the rest; the holes of a dilated input are not (transposed convolutions). A
site is plain data; a product or a convolution holds enough to be run alone: `site.run(leaf, x)`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from jaxprune.layout import Axes
from jaxprune.tracing.paths import Path, Step, replay

OPS = ("dot_general", "conv_general_dilated")
PRODUCTS = ("product", "convolution")
"""The kinds of sites that multiply and add; they have `macs`, and can be run."""

KINDS = {
    "dot_general": "product",
    "conv_general_dilated": "convolution",
    "gather": "embedding",
    "dynamic_slice": "embedding",
    "mul": "scale",
    "div": "scale",
    "add": "bias",
    "add_any": "bias",
    "sub": "bias",
}
"""Operations that end a path -> the kind of the site."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One use of one leaf; a leaf used twice (tied weights) has two sites of one name.

    Attributes:
        name: the leaf's name, as in `jaxprune.tree`.
        index: which use of this leaf it is, from 0.
        kind: "product", "convolution", "embedding", "scale" or "bias".
        op: name of the operation, "dot_general" for instance.
        leaf_shape, leaf_dtype: of the leaf, all its layers included.
        x_shape, x_dtype: of the other operand, for an embedding of the indices; in the body of a scan, of one step, and
            of a `shard_map`, on one device.
        y_shape, y_dtype: of the result.
        params: (name, value) pairs of the operation's parameters, as its function in `jax.lax` takes them; of products
            and convolutions.
        weight_first: True if the weight is the left operand.
        weight_transforms: steps from the leaf to the operand, see `jaxprune.tracing.paths`.
        axes: what each axis of the leaf is to this operation: stacked, in a window, summed over, or kept. None where
            that cannot be told, since one axis of the leaf is split between two of these. Axes of size one that were
            squeezed away count as a window, longer ones from which one index was taken as stacked. The axis that an
            embedding is looked up along is its input, all axes of a scale or a bias are outputs.
        count: how often it runs in one call: lengths of the scans around it, multiplied, and devices of a `shard_map`.
            Bodies of `while` loops count once, since nobody knows how often they run; all branches of a `cond` count.
        macs: multiply-adds of one call, `count` included; 0 but for products and convolutions.
        weights: how many weights of the leaf take part: all of them, unless it was sliced.
    """

    name: str
    index: int
    kind: str
    op: str
    leaf_shape: tuple[int, ...]
    leaf_dtype: str
    x_shape: tuple[int, ...]
    x_dtype: str
    y_shape: tuple[int, ...]
    y_dtype: str
    params: tuple[tuple[str, Any], ...]
    weight_first: bool
    weight_transforms: tuple[Step, ...]
    axes: Axes | None
    count: int
    macs: int
    weights: int

    @property
    def inputs(self) -> tuple[int, ...] | None:
        """Axes of the leaf that are summed over, windows aside; None where that cannot be told."""
        return None if self.axes is None else self.axes.inputs

    @property
    def outputs(self) -> tuple[int, ...] | None:
        """Axes of the leaf that are kept; None where that cannot be told."""
        return None if self.axes is None else self.axes.outputs

    def run(self, leaf: Shaped[Array, "..."], x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """This operation alone: the same transforms, the same parameters, on any leaf and x of the same shapes.

        Pure, so it can be jitted and differentiated, and `jaxprune.sparse.apply` takes it. A leaf of stacked layers
        is used by its first one.

        Args:
            leaf: shaped like the leaf of the trace.
            x: the other operand.

        Returns:
            What the operation gave in the model, of shape `y_shape`.

        Raises:
            ValueError: the site is no product and no convolution.
        """
        if self.kind not in PRODUCTS:
            raise ValueError(f"Only products and convolutions run alone, {self.name!r} is used here as {self.kind}.")
        operand = replay(self.weight_transforms, leaf)
        lhs, rhs = (operand, x) if self.weight_first else (x, operand)
        if self.op == "dot_general":
            return lax.dot_general(lhs, rhs, **dict(self.params))
        params = dict(self.params)
        numbers = lax.ConvDimensionNumbers(*params.pop("dimension_numbers"))
        return lax.conv_general_dilated(lhs, rhs, dimension_numbers=numbers, **params)


def make_site(path: Path, op: Any, operand: int, count: int) -> Site:
    """The site of one operation of a jaxpr.

    Args:
        path: from the leaf to the operand.
        op: an equation of a jaxpr, one of `KINDS`.
        operand: which operand the path led to.
        count: how often the equation runs.
    """
    kind = "scale" if _sums_nothing(op, operand) else KINDS[op.primitive.name]
    x, y = op.invars[1 - operand].aval, op.outvars[0].aval
    return Site(
        name=path.name,
        index=0,
        kind=kind,
        op=op.primitive.name,
        leaf_shape=path.leaf_shape,
        leaf_dtype=path.leaf_dtype,
        x_shape=tuple(x.shape),
        x_dtype=jnp.dtype(x.dtype).name,
        y_shape=tuple(y.shape),
        y_dtype=jnp.dtype(y.dtype).name,
        params=_plain_params(op) if kind in PRODUCTS else (),
        weight_first=operand == 0,
        weight_transforms=path.steps,
        axes=_leaf_axes(path, _roles(op, operand, kind)),
        count=count,
        macs=count * _macs(op) if kind in PRODUCTS else 0,
        weights=path.weights,
    )


def _sums_nothing(op: Any, operand: int) -> bool:
    """Whether a product is none: every axis of the operand is multiplied by a corresponding one, and none is summed."""
    if op.primitive.name != "dot_general":
        return False
    _, batch = op.params["dimension_numbers"]
    return len(batch[operand]) == len(op.invars[operand].aval.shape)


def _roles(op: Any, operand: int, kind: str) -> tuple[str, ...]:
    """A field of `Axes` for every axis of one operand."""
    shape = op.invars[operand].aval.shape
    if kind == "embedding":
        batch = op.params["dimension_numbers"].operand_batching_dims if op.primitive.name == "gather" else ()
        sizes = zip(shape, op.params["slice_sizes"], strict=True)
        return tuple("layers" if a in batch else "inputs" if n != m else "outputs" for a, (n, m) in enumerate(sizes))
    if kind in ("scale", "bias"):
        return ("outputs",) * len(shape)
    numbers = op.params["dimension_numbers"]
    if kind == "product":
        contracted, batch = (set(axes[operand]) for axes in numbers)
        return tuple("inputs" if a in contracted else "layers" if a in batch else "outputs" for a in range(len(shape)))
    # Batch and features where the weight is the left operand, as in the gradient of a convolution.
    outputs, inputs = (numbers.rhs_spec if operand else numbers.lhs_spec)[:2]
    return tuple("outputs" if a == outputs else "inputs" if a == inputs else "spatial" for a in range(len(shape)))


def _leaf_axes(path: Path, roles: tuple[str, ...]) -> Axes | None:
    found: dict[str, set[int]] = {role: set() for role in Axes._fields}
    found["layers"] |= set(path.layers)
    for role, axes in zip(roles, path.axes, strict=True):
        found[role] |= axes
    told = [axis for axes in found.values() for axis in axes]
    if len(told) != len(set(told)):
        return None
    for axis in set(range(len(path.leaf_shape))) - set(told):
        found["spatial" if path.leaf_shape[axis] == 1 else "layers"].add(axis)
    return Axes(**{role: tuple(sorted(axes)) for role, axes in found.items()})


def _macs(op: Any) -> int:
    lhs, rhs = (operand.aval.shape for operand in op.invars)
    numbers = op.params["dimension_numbers"]
    y = op.outvars[0].aval.shape
    if op.primitive.name == "dot_general":
        return math.prod(y) * math.prod(lhs[axis] for axis in numbers[0][0])
    images, channels, *pixels = (y[axis] for axis in numbers.out_spec)
    _, inputs, *window = (rhs[axis] for axis in numbers.rhs_spec)
    places = (op.params[word] for word in ("window_strides", "padding", "lhs_dilation", "rhs_dilation"))
    return images * channels * inputs * math.prod(map(_taps, pixels, window, *places))


def _taps(pixels: int, window: int, stride: int, padding: tuple[int, int], hole: int, dilation: int) -> int:
    """Pairs along one axis of an output and an index of the window that does not look into a hole of the input."""
    if hole == 1:
        return pixels * window
    places = stride * np.arange(pixels)[:, None] + dilation * np.arange(window) - padding[0]
    return int(np.sum(places % hole == 0))


def _plain_params(op: Any) -> tuple[tuple[str, Any], ...]:
    params = {name: value for name, value in op.params.items() if name != "out_sharding"}
    params["precision"] = _plain_precision(params["precision"])
    if params["preferred_element_type"] is not None:
        params["preferred_element_type"] = jnp.dtype(params["preferred_element_type"]).name
    params["dimension_numbers"] = jax.tree.map(int, tuple(params["dimension_numbers"]))
    return tuple(sorted(params.items()))


def _plain_precision(precision: Any) -> Any:
    if isinstance(precision, tuple) and all(isinstance(one, lax.Precision) for one in precision):
        return tuple(one.name.lower() for one in precision)
    return precision.name if isinstance(precision, lax.DotAlgorithmPreset) else precision
