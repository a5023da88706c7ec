"""Which axes of a weight are input, output, spatial and stacked, and the one view all pruning works in.

Frameworks store the same weight differently. Here every weight is seen as

    (*layers, spatial, in, out)

where `layers` are stacked copies (scanned layers), `spatial` is the flattened window of a convolution (1 for a
matrix), `in` is summed over and `out` is not. A view is a transpose and a reshape, so going there and back is exact.
"""

import dataclasses
import math
import re
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxprune.tree import first_match


class Axes(NamedTuple):
    """Axis numbers of one leaf, by what they mean; together they are all axes of the leaf, each once."""

    layers: tuple[int, ...] = ()
    spatial: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a framework lays its weights out; rules name the exceptions.

    Attributes:
        outputs_last: True for (*spatial, in, out), the way of Flax, Haiku and Keras; False for (out, in, *spatial), the
            way of Equinox and PyTorch; None: by the leaf's name, see `BY_NAME`. A vector is all output.
        rules: (name pattern, `Axes`) pairs, first match wins; for stacked layers, or attention kernels whose heads
            make two output axes.

    Example:
        >>> FLAX.with_rules({"blocks/*/kernel": Axes(layers=(0,), inputs=(1,), outputs=(2,))})
    """

    outputs_last: bool | None = True
    rules: tuple[tuple[str, Axes], ...] = ()

    def with_rules(self, rules: dict[str, Axes]) -> "Layout":
        """This layout with more rules, which go before the ones it has."""
        return dataclasses.replace(self, rules=(*rules.items(), *self.rules))

    def axes(self, name: str, shape: tuple[int, ...]) -> Axes:
        """Axes of the leaf `name`.

        Raises:
            ValueError: a rule does not name every axis of the leaf once.
        """
        rule = first_match(self.rules, name)
        if rule is not None:
            if sorted(sum(rule, ())) != list(range(len(shape))):
                raise ValueError(
                    f"The layout's rule for {name!r} must name each of its {len(shape)} axes once, it says {rule}."
                )
            return rule
        if len(shape) < 2:
            return Axes(outputs=tuple(range(len(shape))))
        axes = tuple(range(len(shape)))
        if self._is_outputs_last(name):
            return Axes(spatial=axes[:-2], inputs=axes[-2:-1], outputs=axes[-1:])
        return Axes(spatial=axes[2:], inputs=axes[1:2], outputs=axes[:1])

    def _is_outputs_last(self, name: str) -> bool:
        return _outputs_last(name) is not False if self.outputs_last is None else self.outputs_last

    def check_stacked(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a leaf of three axes that only their number makes a convolution: no rule, no "conv" in its name.

        Stacked layers of a scan are as likely, and attention kernels whose heads are an axis; for what looks at inputs
        or outputs as a whole it is not the same.

        Raises:
            ValueError: it is such a leaf.
        """
        if len(shape) != 3 or first_match(self.rules, name) is not None or "conv" in name.lower():
            return
        way = (
            "Axes(layers=(0,), inputs=(1,), outputs=(2,))"
            if self._is_outputs_last(name)
            else "Axes((0,), (), (2,), (1,))"
        )
        raise ValueError(
            f"Leaf {name!r} {tuple(shape)} may be stacked layers of a scan, a 1-D convolution, or an attention kernel, "
            "and which of its axes are inputs and outputs depends on that. The model says it, "
            "`layout=layout_of(trace(apply_fn, params, x))`, or a rule, for stacked layers "
            f"`layout.with_rules({{{name!r}: {way}}})`."
        )

    def check_named(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a leaf of which only its name could tell the axes, and does not.

        Raises:
            ValueError: neither a rule nor the name says which axis is summed over.
        """
        told = self.outputs_last is not None or first_match(self.rules, name) or _outputs_last(name) is not None
        if not told and len(shape) > 1:
            raise ValueError(
                f"Inputs and outputs matter here, and the name {name!r} {tuple(shape)} does not tell which axis is "
                "which. Say it: `layout=jp.FLAX` for (in, out) and HWIO, `jp.TORCH` for (out, in) and OIHW, or "
                "`jp.layout_of(jp.trace(apply_fn, params, x))`, which finds it in the model's function."
            )


_NAMES = re.compile(r"(kernel|\w+_kernel|[wW]([a-z]|\d+|_\w+)?)|(weight|weight_\w+|\w+_weight)")


def _outputs_last(name: str) -> bool | None:
    """What the last part of a name says: True for kernel, w, w1, wq; False for weight, weight_ih, in_proj_weight."""
    found = _NAMES.fullmatch(name.rpartition("/")[2])
    return None if found is None else found[1] is not None


BY_NAME = Layout(outputs_last=None)
"""The default. By the last part of a leaf's name: `kernel` and `w` (and w1, wq, w_up) are (in, out) and HWIO, the way
of Flax and Haiku; `weight` (and weight_ih, in_proj_weight) are (out, in) and OIHW, that of Equinox and PyTorch. Of any
other name (in, out) is assumed where it does not matter, and a method that looks at axes refuses the leaf."""

FLAX = Layout(outputs_last=True)
"""Matrices (in, out), convolutions HWIO: Flax, Haiku, Keras."""

TORCH = Layout(outputs_last=False)
"""Matrices (out, in), convolutions OIHW: Equinox, PyTorch."""


def dims(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    """Sizes (*spatial, in, out) of one layer: what density rules such as ERK look at."""
    sizes = [math.prod(shape[a] for a in part) for part in (axes.inputs, axes.outputs)]
    return (*(shape[a] for a in axes.spatial), *sizes)


def to_view(leaf: Shaped[Array, "..."], axes: Axes) -> Shaped[Array, "*layers spatial n_in n_out"]:
    """A leaf seen as (*layers, spatial, in, out)."""
    return jnp.reshape(jnp.transpose(leaf, sum(axes, ())), view_shape(jnp.shape(leaf), axes))


def view_shape(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    """Shape of `to_view` of a leaf of this shape."""
    merged = (math.prod(shape[a] for a in part) for part in (axes.spatial, axes.inputs, axes.outputs))
    return (*(shape[a] for a in axes.layers), *merged)


def from_view(
    view: Shaped[Array, "*layers spatial n_in n_out"], axes: Axes, shape: tuple[int, ...]
) -> Shaped[Array, "..."]:
    """A view brought back to the leaf's own shape; `from_view(to_view(x, axes), axes, x.shape)` is x."""
    order = sum(axes, ())
    unmerged = jnp.reshape(view, tuple(shape[a] for a in order))
    return jnp.transpose(unmerged, tuple(order.index(a) for a in range(len(shape))))
