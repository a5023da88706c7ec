r"""A site: one use of one leaf, by a matrix product or a convolution.

    y = op(x, operand)  or  op(operand, x),      operand = renamed(leaf)

`dot_general` and `conv_general_dilated` are all that consume weights by the million; multiply-adds are

    dot_general            |y| x (contracted sizes)
    conv_general_dilated   |y| x (window) x (input channels of a group),   padding counted like the rest

A site is plain data and holds enough to be run alone: `site.run(leaf, x)`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from jaxprune.layout import Axes
from jaxprune.tracing.paths import Path, Step, replay

OPS = ("dot_general", "conv_general_dilated")


@dataclasses.dataclass(frozen=True)
class Site:
    """One use of one leaf; a leaf used twice (tied weights) has two sites of one name.

    Attributes:
        name: the leaf's name, as in `jaxprune.tree`.
        index: which use of this leaf it is, from 0.
        op: "dot_general" or "conv_general_dilated".
        leaf_shape, leaf_dtype: of the leaf, all its layers included.
        x_shape, x_dtype: of the other operand; in the body of a scan, of one step.
        y_shape, y_dtype: of the result.
        params: (name, value) pairs of the operation's parameters, as its function in `jax.lax` takes them.
        weight_first: True if the weight is the left operand.
        weight_transforms: steps from the leaf to the operand, see `jaxprune.tracing.paths`.
        axes: what each axis of the leaf is to this operation: stacked, in a window, summed over, or kept. None where
            that cannot be told, since one axis of the leaf is split between two of these. Axes of size one that were
            squeezed away count as a window.
        count: how often it runs in one call: lengths of the scans around it, multiplied. Bodies of `while` loops count
            once, since nobody knows how often they run, and of a `cond` all branches count.
        macs: multiply-adds of one call, `count` included.
    """

    name: str
    index: int
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
        """
        operand = replay(self.weight_transforms, leaf)
        lhs, rhs = (operand, x) if self.weight_first else (x, operand)
        if self.op == "dot_general":
            return lax.dot_general(lhs, rhs, **dict(self.params))
        params = dict(self.params)
        numbers = lax.ConvDimensionNumbers(*params.pop("dimension_numbers"))
        return lax.conv_general_dilated(lhs, rhs, dimension_numbers=numbers, **params)


def make_site(path: Path, leaf: Any, op: Any, *, weight_first: bool, count: int) -> Site:
    """The site of one operation of a jaxpr whose operand came along `path`.

    Args:
        path: from the leaf to the operand.
        leaf: shape and dtype of the leaf.
        op: an equation of a jaxpr, one of `OPS`.
        weight_first: which operand the path led to.
        count: how often the equation runs.
    """
    x, y = op.invars[1 if weight_first else 0].aval, op.outvars[0].aval
    kinds = _kinds(op, 0 if weight_first else 1)
    return Site(
        name=path.name,
        index=0,
        op=op.primitive.name,
        leaf_shape=tuple(leaf.shape),
        leaf_dtype=jnp.dtype(leaf.dtype).name,
        x_shape=tuple(x.shape),
        x_dtype=jnp.dtype(x.dtype).name,
        y_shape=tuple(y.shape),
        y_dtype=jnp.dtype(y.dtype).name,
        params=_plain_params(op),
        weight_first=weight_first,
        weight_transforms=path.steps,
        axes=_leaf_axes(path, kinds, tuple(leaf.shape)),
        count=count,
        macs=count * _macs(op),
    )


def _kinds(op: Any, operand: int) -> tuple[str, ...]:
    """A field of `Axes` for every axis of one operand."""
    numbers = op.params["dimension_numbers"]
    rank = len(op.invars[operand].aval.shape)
    if op.primitive.name == "dot_general":
        contracted, batch = (set(axes[operand]) for axes in numbers)
        return tuple("inputs" if a in contracted else "layers" if a in batch else "outputs" for a in range(rank))
    # Batch and features where the weight is the left operand, as in the gradient of a convolution.
    outputs, inputs = (numbers.rhs_spec if operand else numbers.lhs_spec)[:2]
    return tuple("outputs" if a == outputs else "inputs" if a == inputs else "spatial" for a in range(rank))


def _leaf_axes(path: Path, kinds: tuple[str, ...], shape: tuple[int, ...]) -> Axes | None:
    found: dict[str, set[int]] = {kind: set() for kind in Axes._fields}
    found["layers"] |= set(path.layers)
    for kind, axes in zip(kinds, path.axes, strict=True):
        found[kind] |= axes
    told = [axis for axes in found.values() for axis in axes]
    lost = set(range(len(shape))) - set(told)
    if len(told) != len(set(told)) or any(shape[axis] != 1 for axis in lost):
        return None
    found["spatial"] |= lost
    return Axes(**{kind: tuple(sorted(axes)) for kind, axes in found.items()})


def _macs(op: Any) -> int:
    lhs, rhs = (operand.aval.shape for operand in op.invars)
    numbers = op.params["dimension_numbers"]
    made = math.prod(op.outvars[0].aval.shape)
    if op.primitive.name == "dot_general":
        return made * math.prod(lhs[axis] for axis in numbers[0][0])
    return made * math.prod(rhs[axis] for axis in numbers.rhs_spec[1:])


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
