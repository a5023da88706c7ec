"""Granularity: which weights live or die together.

A granularity is a pair of maps between weights and groups,

    groups = granularity.pool(scores)              # one score per group
    mask = granularity.expand(kept, scores.shape)  # one verdict per weight

and everything between the two (`jaxprune.distributions`) sees group scores only, so every granularity works with
every distribution. Arrays arrive as views (*layers, spatial, in, out), see `jaxprune.layout`, and groups keep those
axes, shortened. A group is worth the mean of its weights' scores, so that groups of different sizes compare fairly.
Means are sums times a reciprocal: a division is rounded one way here and another there, as the compiler sees fit.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxprune.exact.numerics import ordered_sum
from jaxprune.layout import Axes, from_view, view_shape
from jaxprune.tree import Rules, each_by_rule, pairs

__all__ = ["Block", "ByRule", "Element", "Head", "Input", "Kernel", "Output"]

View = Float[Array, "*layers spatial n_in n_out"]
Groups = Float[Array, "*layers g_spatial g_in g_out"]


@runtime_checkable
class Granularity(Protocol):
    """The pair of maps between weights and groups.

    An optional `looks_at_axes = False` says that it is all one which axes are inputs and outputs, and an optional
    `spans_axes = False` that no group reaches along a whole axis, so that layers of a stack may be taps of a window.
    """

    def pool(self, scores: View) -> Groups:
        """One score per group."""
        ...

    def expand(self, kept: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """The verdict on each group, or a number, for each of its weights; `shape` is that of the view."""
        ...


@dataclasses.dataclass(frozen=True)
class Element:
    """Every weight by itself: unstructured sparsity."""

    looks_at_axes: ClassVar[bool] = False
    spans_axes: ClassVar[bool] = False

    def pool(self, scores: View) -> Groups:
        """The scores themselves."""
        return scores

    def expand(self, kept: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """The verdicts themselves."""
        return kept


@dataclasses.dataclass(frozen=True)
class _Slices:
    """All weights that share their place on the axes that are not pooled over."""

    _pooled: ClassVar[tuple[int, ...]]

    def pool(self, scores: View) -> Groups:
        """Mean over the group's axes, which stay as axes of size 1."""
        size = max(math.prod(scores.shape[axis] for axis in self._pooled), 1)
        return ordered_sum(scores, self._pooled) * (1 / size)

    def expand(self, kept: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """The group's verdict, repeated along its axes."""
        return jnp.broadcast_to(kept, shape)


@dataclasses.dataclass(frozen=True)
class Input(_Slices):
    """All weights that read one input: a row of a (in, out) matrix, an input channel of a convolution."""

    _pooled: ClassVar[tuple[int, ...]] = (-3, -1)


@dataclasses.dataclass(frozen=True)
class Output(_Slices):
    """All weights that make one output: a neuron of a dense layer, a filter of a convolution.

    References:
        Li et al. 2017, arXiv:1608.08710 (filters ranked by their L1 norm, which is this mean times a constant).
    """

    _pooled: ClassVar[tuple[int, ...]] = (-3, -2)


@dataclasses.dataclass(frozen=True)
class Kernel(_Slices):
    """The window between one input channel and one output channel of a convolution; of a matrix, each weight by itself.

    References:
        Mao et al. 2017, arXiv:1705.08922 (2-D kernels among other granularities).
    """

    _pooled: ClassVar[tuple[int, ...]] = (-3,)


@dataclasses.dataclass(frozen=True)
class Head:
    """All weights of one attention head, which has an equal share of a leaf's outputs, or inputs, in a row.

    For query, key and value projections along the outputs, for the one that joins heads along the inputs; each leaf
    then loses heads of its own. Heads that go from all four at once are channels, see `jaxprune.Channels`. Experts of a
    stacked leaf are `Output()`, with a layout that names the stack as the output axis.

    Attributes:
        heads: how many there are, >= 1; the axis must divide by it.
        along: "outputs" or "inputs".

    References:
        Michel, Levy and Neubig 2019, arXiv:1905.10650.
    """

    heads: int
    along: Literal["outputs", "inputs"] = "outputs"

    def __post_init__(self) -> None:
        if self.heads < 1 or self.along not in ("outputs", "inputs"):
            raise ValueError(
                f"`Head` needs at least 1 head, along outputs or inputs; got {self.heads} along {self.along}."
            )

    def pool(self, scores: View) -> Groups:
        """Mean of each head, (*layers, 1, 1, heads), or (*layers, 1, heads, 1) along the inputs."""
        size = self._size(scores.shape)
        runs = jnp.moveaxis(scores, self._axis, -1)
        runs = runs.reshape(*runs.shape[:-1], self.heads, size)
        share = 1 / max(size * scores.shape[-3] * scores.shape[-3 - self._axis], 1)
        means = jnp.squeeze(ordered_sum(runs, (-4, -3, -1)), -1) * share
        return jnp.moveaxis(means, -1, self._axis)

    def expand(self, kept: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """Each head's verdict, repeated over its weights."""
        return jnp.broadcast_to(jnp.repeat(kept, self._size(shape), axis=self._axis), shape)

    @property
    def _axis(self) -> int:
        return -1 if self.along == "outputs" else -2

    def _size(self, shape: tuple[int, ...]) -> int:
        if shape[self._axis] % self.heads:
            raise ValueError(f"{shape[self._axis]} {self.along} do not divide into {self.heads} heads.")
        return shape[self._axis] // self.heads


@dataclasses.dataclass(frozen=True)
class Block:
    """Tiles of `rows` inputs x `cols` outputs, the unit a block-sparse kernel can skip.

    Tiles start at input 0 and output 0 of every tap of a convolution's window; those at the far edges are smaller
    where the sizes do not divide, and are worth the mean of the weights they have.

    Attributes:
        rows: inputs of a tile, >= 1.
        cols: outputs of a tile, >= 1.
    """

    spans_axes: ClassVar[bool] = False

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"`Block` needs at least 1 row and 1 column, got {self.rows} x {self.cols}.")

    def pool(self, scores: View) -> Groups:
        """Mean of each tile, (*layers, spatial, ceil(in / rows), ceil(out / cols))."""
        *lead, n_in, n_out = scores.shape
        tall = np.minimum(self.rows, n_in - np.arange(0, n_in, self.rows))
        wide = np.minimum(self.cols, n_out - np.arange(0, n_out, self.cols))
        share = (1 / np.outer(tall, wide)).reshape((1,) * len(lead) + (len(tall), len(wide)))
        return self._tile_sums(scores) * jnp.asarray(share, scores.dtype)

    def expand(self, kept: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """Each tile's verdict, repeated over its weights."""
        wide = jnp.repeat(jnp.repeat(kept, self.rows, axis=-2), self.cols, axis=-1)
        return wide[..., : shape[-2], : shape[-1]]

    def _tile_sums(self, values: View) -> Groups:
        *lead, n_in, n_out = values.shape
        down, right = -n_in % self.rows, -n_out % self.cols
        padded = jnp.pad(values, [(0, 0)] * len(lead) + [(0, down), (0, right)])
        tiles = padded.reshape(*lead, (n_in + down) // self.rows, self.rows, (n_out + right) // self.cols, self.cols)
        return jnp.squeeze(ordered_sum(tiles, (-3, -1)), (-3, -1))


@dataclasses.dataclass(frozen=True)
class ByRule:
    """A granularity of its own for every leaf, by name: kernels here, tiles there, heads elsewhere.

    With `ByRule` every leaf has its sparsity, with `Global` or `Budget` all groups compete as one. `Global` counts
    groups, of whatever size; `Budget()` counts their weights, so that the sparsity is one of weights.

    Attributes:
        rules: pattern of names -> granularity; the first that matches wins. A leaf without a rule is refused, and a
            rule whose pattern matches no leaf. Kept as a tuple of pairs.

    Raises:
        ValueError: a rule that is no granularity of one leaf (`Channels` reach across leaves).

    Example:
        >>> ByRule({"conv*": Kernel(), "*/attention/*": Head(8), "*": Block(4, 4)})
    """

    rules: Rules[Granularity]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", pairs(self.rules))
        for pattern, granularity in pairs(self.rules):
            if not isinstance(granularity, Granularity) or isinstance(granularity, type):
                raise ValueError(
                    f"`granularity.ByRule` has {granularity!r} for {pattern!r}; what is expected pools and expands one "
                    "leaf, such as Block(4, 4) or Output()."
                )


class Geometry(NamedTuple):
    """What a granularity across leaves is told of them.

    Attributes:
        axes: of the leaves that are scored.
        shapes: of all leaves of the params.
    """

    axes: Mapping[str, Axes]
    shapes: Mapping[str, tuple[int, ...]]


@runtime_checkable
class AcrossLeaves(Protocol):
    """The pair of maps for all leaves at once; its groups may reach from one leaf to another."""

    def pool_leaves(self, scores: Mapping[str, View], geometry: Geometry) -> Mapping[str, Groups]:
        """Scores of groups, by name of a leaf, or of whatever competes as the outputs of a leaf do."""
        ...

    def expand_leaves(self, kept: Mapping[str, Any], geometry: Geometry) -> dict[str, Shaped[Array, "..."]]:
        """Masks, shaped like the leaves, of every leaf that the groups reach."""
        ...


def pool_leaves(granularity: Any, scores: Mapping[str, View], geometry: Geometry) -> dict[str, Groups]:
    """Scores of the groups of all leaves, of a granularity of whatever kind.

    Raises:
        ValueError: a leaf that does not fit, by its name.
    """
    if isinstance(granularity, AcrossLeaves):
        return dict(granularity.pool_leaves(scores, geometry))
    by_leaf = granularities(granularity, scores)
    groups = {}
    for name, score in scores.items():
        try:
            groups[name] = by_leaf[name].pool(score)
        except ValueError as error:
            raise ValueError(f"Leaf {name!r}: {error} Leave it out with `select`, or check `layout`.") from None
    return groups


def expand_leaves(granularity: Any, kept: Mapping[str, Any], geometry: Geometry) -> dict[str, Shaped[Array, "..."]]:
    """Masks of all leaves that the groups reach, of a granularity of whatever kind."""
    if isinstance(granularity, AcrossLeaves):
        return granularity.expand_leaves(kept, geometry)
    by_leaf = granularities(granularity, kept)
    masks = {}
    for name, verdicts in kept.items():
        axes, shape = geometry.axes[name], geometry.shapes[name]
        masks[name] = from_view(by_leaf[name].expand(verdicts, view_shape(shape, axes)), axes, shape)
    return masks


def granularities(granularity: Any, names: Iterable[str]) -> dict[str, Any]:
    """Leaf name -> its granularity: by its rule, or the same for all.

    Args:
        granularity: a `Granularity` or `granularity.ByRule`.
        names: all leaves that are pruned.

    Raises:
        ValueError: a leaf without a rule; a rule that matches none.
    """
    rules = granularity.rules if isinstance(granularity, ByRule) else (("*", granularity),)
    return each_by_rule("granularity.ByRule", rules, names)
