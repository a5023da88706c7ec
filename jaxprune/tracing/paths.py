"""The way of a leaf to the operation that consumes it: a chain of steps that only rename its weights, or take a part.

    operand = steps[-1](... steps[0](leaf))     transpose | reshape | broadcast | slice | rev | tile | cast | layer

Along the way `axes` keeps, for every axis of the array so far, which axes of the leaf it runs over:

    leaf (in, heads x dim)   reshape (in, heads, dim)   ->  axes ({0}, {1}, {1})

so that what an operation does with an axis can be told of the leaf. Steps are plain data, (word, argument), and
`replay` takes them again. A step "changed" says that the numbers are no longer the leaf's, as in `1 + scale`: such a
path ends in no product, but it may still end in a scale or a bias.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from jaxprune.tracing.operations import merged_axes

Step = tuple[str, Any]


@dataclasses.dataclass(frozen=True)
class Path:
    """One leaf on its way.

    Attributes:
        name: the leaf's name.
        leaf_shape, leaf_dtype: of the leaf.
        shape: of the leaf renamed so far.
        axes: for each axis of that shape, the axes of the leaf that it runs over; none where it was broadcast.
        weights: how many weights of the leaf are still in it, all layers of a scan included.
        layers: axes of the leaf that a scan has taken apart.
        steps: what was done so far.
    """

    name: str
    leaf_shape: tuple[int, ...]
    leaf_dtype: str
    shape: tuple[int, ...]
    axes: tuple[frozenset[int], ...]
    weights: int
    layers: tuple[int, ...] = ()
    steps: tuple[Step, ...] = ()

    @property
    def changed_by(self) -> str | None:
        """Name of the operation that first changed the weights' numbers, None if none did."""
        return next((argument for word, argument in self.steps if word == "changed"), None)

    @property
    def is_vector(self) -> bool:
        """Whether at most one axis is longer than one, broadcast ones aside."""
        return sum(size > 1 and bool(over) for size, over in zip(self.shape, self.axes, strict=True)) <= 1

    @property
    def is_broadcast(self) -> bool:
        """Whether some axis repeats the same weights."""
        return any(size > 1 and not over for size, over in zip(self.shape, self.axes, strict=True))

    def followed(self, primitive: str, params: dict[str, Any], shape: tuple[int, ...]) -> "Path | None":
        """The path through one operation of one operand, None if that operation does more than rename.

        Args:
            primitive: name of the operation.
            params: its parameters.
            shape: of its result.
        """
        if primitive == "convert_element_type":
            return self._then((primitive, jnp.dtype(params["new_dtype"]).name), self.shape, self.axes)
        if primitive == "transpose":
            order = tuple(int(axis) for axis in params["permutation"])
            return self._then((primitive, order), shape, tuple(self.axes[axis] for axis in order))
        if primitive in ("rev", "tile"):
            argument = tuple(int(n) for n in params["dimensions" if primitive == "rev" else "reps"])
            return self._then((primitive, argument), shape, self.axes)
        if primitive == "slice":
            steps = params["strides"] or (1,) * len(shape)
            return self.part([*zip(params["start_indices"], params["limit_indices"], steps, strict=True)])
        if primitive == "broadcast_in_dim":
            return self.broadcast(shape, tuple(map(int, params["broadcast_dimensions"])))
        if primitive == "squeeze" or (primitive == "reshape" and params["dimensions"] is None):
            return self.reshape(shape)
        return None

    def layer(self, loop: int = 0) -> "Path":
        """The path into the body of a scan over the first axis: one layer of the stack.

        Args:
            loop: how many other scans are around this one, for who wants to know whose step it is.
        """
        path = self._then(("layer", loop), self.shape[1:], self.axes[1:])
        return dataclasses.replace(path, layers=(*self.layers, *sorted(self.axes[0])))

    def part(self, cuts: Sequence[tuple[int, int, int]], *, in_turn: bool = False) -> "Path":
        """The path into a slice.

        Args:
            cuts: (first index, first that is out, step) along each axis.
            in_turn: True if this stands for all parts, one after another, as in a loop.
        """
        shape = tuple(len(range(*cut)) for cut in cuts)
        if shape == self.shape:
            return self
        path = self._then(("slice", tuple(cuts)), shape, self.axes)
        if in_turn:
            return path
        # An axis made by a broadcast holds no weights of its own: cut, it leaves them all.
        sizes = [(a, b) for a, b, over in zip(self.shape, shape, self.axes, strict=True) if over]
        before, after = (math.prod(column) for column in zip(*sizes, strict=True)) if sizes else (1, 1)
        return dataclasses.replace(path, weights=self.weights * after // max(1, before))

    def reshape(self, shape: tuple[int, ...]) -> "Path":
        """The path through a reshape to this shape, or a squeeze."""
        if shape == self.shape:
            return self
        return self._then(("reshape", shape), shape, _reshaped(self.axes, self.shape, shape))

    def broadcast(self, shape: tuple[int, ...], places: Sequence[int]) -> "Path":
        """The path into a larger array.

        Args:
            shape: of that.
            places: where the axes stand there.
        """
        # Along axes of size one alone nothing moves: what `w[None]` and `expand_dims` do.
        if math.prod(shape) == math.prod(self.shape):
            return self.reshape(shape)
        axes = [frozenset[int]()] * len(shape)
        for size, over, place in zip(self.shape, self.axes, places, strict=True):
            axes[place] = over if size == shape[place] else frozenset()
        return self._then(("broadcast", (shape, tuple(places))), shape, tuple(axes))

    def changed(self, primitive: str, shape: tuple[int, ...]) -> "Path":
        """The path through an operation on single elements that makes other numbers of them.

        Args:
            primitive: its name.
            shape: of its result; axes of size one may have grown, and a scalar may have become an array.
        """
        path = self.broadcast(shape, range(len(self.shape)))
        return path._then(("changed", primitive), shape, path.axes)

    def _then(self, step: Step, shape: tuple[int, ...], axes: tuple[frozenset[int], ...]) -> "Path":
        return dataclasses.replace(self, shape=shape, axes=axes, steps=(*self.steps, step))


def start(name: str, shape: tuple[int, ...], dtype: str) -> Path:
    """A leaf before anything happened to it."""
    axes = tuple(frozenset({axis}) for axis in range(len(shape)))
    return Path(name, shape, dtype, shape, axes, math.prod(shape))


def replay(steps: tuple[Step, ...], leaf: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The operand made of the leaf; of a stack, of its first layer.

    Raises:
        ValueError: the operand is no longer made of the leaf's own numbers.
    """
    for word, argument in steps:
        if word == "changed":
            raise ValueError(f"The weights were changed by `{argument}` on their way, which cannot be done again.")
        leaf = _STEPS[word](leaf, argument)
    return leaf


_STEPS: Mapping[str, Callable[[Any, Any], Any]] = {
    "transpose": lax.transpose,
    "reshape": lax.reshape,
    "broadcast": lambda leaf, argument: lax.broadcast_in_dim(leaf, *argument),
    "slice": lambda leaf, argument: lax.slice(leaf, *zip(*argument, strict=True)),
    "rev": lax.rev,
    "tile": jnp.tile,
    "convert_element_type": lambda leaf, argument: lax.convert_element_type(leaf, jnp.dtype(argument)),
    "layer": lambda leaf, loop: leaf[0],
}


def _reshaped(
    axes: tuple[frozenset[int], ...], old: tuple[int, ...], new: tuple[int, ...]
) -> tuple[frozenset[int], ...]:
    """Axes after a reshape: within a run every new axis runs over all old ones; a new axis of size one over none."""
    if 0 in old:
        return (frozenset[int]().union(*axes),) * len(new)
    found = [frozenset[int]()] * len(new)
    for olds, news in merged_axes(old, new):
        taken = frozenset[int]().union(*(axes[axis] for axis in olds))
        for axis in news:
            found[axis] = taken
    return tuple(found)
