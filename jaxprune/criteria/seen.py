r"""What weights met on some data: statistics of their inputs, and of what their outputs became.

seen = of_activations(apply_fn, params, batches)          seen.input_norms    seen.output_means    seen.for_(method)
"""

import dataclasses
import glob
import inspect
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.layout import BY_NAME, Axes, Layout


class Inputs(NamedTuple):
    """What one leaf met: `layers` are its stacked layers, `features` its window and its inputs, each flattened.

    Attributes:
        shape: of the leaf.
        axes: of the leaf, as its product uses them.
        tokens: how many rows were multiplied by it; of a use of some of its outputs, in proportion.
        squares: sums of squares.
        magnitudes: sums of absolute values.
        zeros: how many were zero.
        moments: $X^\\top X$; None where nobody asked for them.
    """

    shape: tuple[int, ...]
    axes: Axes
    tokens: Float[Array, "layers"]
    squares: Float[Array, "layers features"]
    magnitudes: Float[Array, "layers features"]
    zeros: Float[Array, "layers features"]
    moments: Float[Array, "layers features features"] | None

    def shaped(self, values: Float[Array, "layers features"]) -> Float[Array, "..."]:
        """Numbers of features as criteria have them, (*layers, in), or (*layers, window, in) of a convolution."""
        parts = [tuple(self.shape[a] for a in part) for part in (self.axes.layers, self.axes.spatial, self.axes.inputs)]
        layers, spatial, inputs = (*parts[0],), math.prod(parts[1]), math.prod(parts[2])
        return values.reshape(*layers, *([spatial] if spatial > 1 else []), inputs)


class Outputs(NamedTuple):
    """What one leaf's outputs became: activations, each after bias, scale and nonlinearity.

    Attributes:
        shape: of the leaf.
        axes: of the leaf, as its product uses them.
        tokens: how many activations of each output there were.
        magnitudes: sums of absolute values.
        zeros: how many were zero.
        scales: what multiplies each output on its way; zeros where nothing does.
        scaled_by: names of the leaves that have these numbers, of all uses; None where a use has none.
    """

    shape: tuple[int, ...]
    axes: Axes
    tokens: Float[Array, "layers outputs"]
    magnitudes: Float[Array, "layers outputs"]
    zeros: Float[Array, "layers outputs"]
    scales: Float[Array, "layers outputs"]
    scaled_by: frozenset[str | None]

    def shaped(self, values: Float[Array, "layers outputs"]) -> Float[Array, "*layers out"]:
        """Numbers of outputs as criteria have them."""
        return values.reshape(*(self.shape[a] for a in self.axes.layers), -1)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What every leaf met, by its name; of `of_activations`.

    Attributes:
        leaves: name -> sums over its inputs.
        outputs: name -> sums over what its outputs became.
    """

    leaves: Mapping[str, Inputs]
    outputs: Mapping[str, Outputs]

    @property
    def input_norms(self) -> dict[str, Array]:
        """L2 norm of every input over all tokens, (*layers, in), of a convolution (window, in): for `wanda`."""
        return {name: one.shaped(jnp.sqrt(one.squares)) for name, one in self.leaves.items()}

    @property
    def input_means(self) -> dict[str, Array]:
        """Mean absolute value of every input, shaped as `input_norms`."""
        return {name: one.shaped(_ratio(one.magnitudes, one.tokens[:, None])) for name, one in self.leaves.items()}

    @property
    def input_zero_fractions(self) -> dict[str, Array]:
        """Fraction of zeros of every input, shaped as `input_norms`."""
        return {name: one.shaped(_ratio(one.zeros, one.tokens[:, None])) for name, one in self.leaves.items()}

    @property
    def output_means(self) -> dict[str, Array]:
        """Mean absolute activation of every output, (*layers, out): for `activation_mean`."""
        return {name: one.shaped(_ratio(one.magnitudes, one.tokens)) for name, one in self.outputs.items()}

    @property
    def output_zero_fractions(self) -> dict[str, Array]:
        """Fraction of zeros among every output's activations, (*layers, out): for `apoz`, which calls them APoZ."""
        return {name: one.shaped(_ratio(one.zeros, one.tokens)) for name, one in self.outputs.items()}

    @property
    def scales(self) -> dict[str, Array]:
        """What multiplies every output on its way, as batch norm does, (*layers, out): for `norm_scale`.

        Leaves whose outputs nothing multiplies are not in it.

        Raises:
            ValueError: a leaf is used more than once, and its outputs are not scaled by the same leaf each time.
        """
        for name, one in self.outputs.items():
            if len(one.scaled_by) > 1:
                by = ", ".join(sorted("nothing" if scale is None else repr(scale) for scale in one.scaled_by))
                raise ValueError(f"Outputs of {name!r} are scaled by {by}: by which is not told. Score them yourself.")
        return {name: one.shaped(one.scales) for name, one in self.outputs.items() if one.scaled_by != {None}}

    @property
    def moments(self) -> dict[str, Array]:
        r"""$X^\top X$, (*layers, features, features) with features (window, in) flattened.

        Raises:
            ValueError: they were not asked for.
        """
        found = {name: one.moments for name, one in self.leaves.items()}
        if any(one is None for one in found.values()):
            raise ValueError("No second moments were gathered: `of_activations(..., moments=True)` does.")
        layers = {name: [one.shape[a] for a in one.axes.layers] for name, one in self.leaves.items()}
        return {name: one.reshape(*layers[name], *one.shape[1:]) for name, one in found.items() if one is not None}

    @property
    def layout(self) -> Layout:
        """The axes of the leaves that were met, for `Method(layout=...)`."""
        return dataclasses.replace(
            BY_NAME, rules=tuple((glob.escape(name), one.axes) for name, one in self.leaves.items())
        )

    def for_(self, method: Any) -> dict[str, dict[str, Array]]:
        """The evidence that a method's criterion takes: `compute_masks(method, params, s, **seen.for_(method))`.

        Args:
            method: `Method`, or whatever has a `criterion` and a `layout`.

        Raises:
            ValueError: the method's layout takes other axes of a leaf for its outputs than its product does.
        """
        words = inspect.signature(method.criterion).parameters
        return {word: self._laid_out(had, method.layout) for word, had in EVIDENCE.items() if word in words}

    def _laid_out(self, word: str, layout: Layout) -> dict[str, Array]:
        field = "outputs" if word in ("output_means", "output_zero_fractions", "scales") else "inputs"
        values = getattr(self, word)
        return {name: _in_axes(name, self.leaves[name], one, layout, field) for name, one in values.items()}


EVIDENCE: Mapping[str, str] = MappingProxyType(
    {word: word for word in ("input_norms", "input_means", "input_zero_fractions", "output_means", "scales")}
    | {"zero_fractions": "output_zero_fractions"}
)
"""What a criterion may ask for -> the attribute of `Seen` that answers."""


def _ratio(sums: Float[Array, "layers features"], tokens: Float[Array, "..."]) -> Float[Array, "layers features"]:
    return sums / jnp.maximum(tokens, 1)


def _in_axes(name: str, one: Inputs, values: Array, layout: Layout, field: str) -> Array:
    """Numbers of inputs or of outputs, along the axes that a method takes for the leaf's layers, window, and those."""
    ours, theirs = one.axes, layout.axes(name, one.shape)
    if set(ours.outputs) != set(theirs.outputs):
        raise ValueError(
            f"The method's layout says {theirs} of {name!r} {one.shape}, its product sums over axes "
            f"{(*ours.spatial, *ours.inputs)}. Hand the method `layout=seen.layout`."
        )
    parts = ("layers", "outputs") if field == "outputs" else ("layers", "spatial", "inputs")
    before, after = ([axis for part in parts for axis in getattr(axes, part)] for axes in (ours, theirs))
    values = values.reshape([one.shape[axis] for axis in before])
    values = jnp.transpose(values, [before.index(axis) for axis in after])
    layers, *merged = ([one.shape[axis] for axis in getattr(theirs, part)] for part in parts)
    sizes = [math.prod(part) for part in merged if part or part is merged[-1]]  # a matrix has no window
    return values.reshape(*layers, *sizes)
