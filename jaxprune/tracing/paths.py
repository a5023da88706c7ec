"""The way of a leaf to the operation that consumes it: a chain of steps that only rename its weights.

    operand = steps[-1](... steps[0](leaf))        transpose | reshape | convert_element_type | layer

Along the way `axes` keeps, for every axis of the array so far, which axes of the leaf it runs over:

    leaf (in, heads x dim)   reshape (in, heads, dim)   ->  axes ({0}, {1}, {1})

so that what an operation does with an axis can be told of the leaf. Steps are plain data, (word, argument), and
`replay` takes them again.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

Step = tuple[str, Any]
IDENTITIES = frozenset({"copy", "stop_gradient", "sharding_constraint"})


@dataclasses.dataclass(frozen=True)
class Path:
    """One leaf on its way.

    Attributes:
        name: the leaf's name.
        shape: of the leaf renamed so far.
        axes: for each axis of that shape, the axes of the leaf that it runs over.
        layers: axes of the leaf that a scan has taken apart.
        steps: what was done so far.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[frozenset[int], ...]
    layers: tuple[int, ...] = ()
    steps: tuple[Step, ...] = ()

    def followed(self, primitive: str, params: dict[str, Any], shape: tuple[int, ...]) -> "Path | None":
        """The path through one operation of one operand, None if that operation does more than rename.

        Args:
            primitive: name of the operation.
            params: its parameters.
            shape: of its result.
        """
        if primitive in IDENTITIES:
            return self
        if primitive == "convert_element_type":
            return self._then((primitive, jnp.dtype(params["new_dtype"]).name), self.shape, self.axes)
        if primitive == "transpose":
            order = tuple(int(axis) for axis in params["permutation"])
            return self._then((primitive, order), shape, tuple(self.axes[axis] for axis in order))
        reshaped = primitive == "reshape" and params["dimensions"] is None
        # A broadcast along axes of size one alone moves nothing: what `w[None]` and `expand_dims` do.
        grown = primitive == "broadcast_in_dim" and math.prod(shape) == math.prod(self.shape)
        if not (reshaped or grown or primitive == "squeeze"):
            return None
        if shape == self.shape:
            return self
        return self._then(("reshape", shape), shape, _reshaped(self.axes, self.shape, shape))

    def layer(self) -> "Path":
        """The path into the body of a scan over the first axis: one layer of the stack."""
        path = self._then(("layer", 0), self.shape[1:], self.axes[1:])
        return dataclasses.replace(path, layers=(*self.layers, *sorted(self.axes[0])))

    def _then(self, step: Step, shape: tuple[int, ...], axes: tuple[frozenset[int], ...]) -> "Path":
        return dataclasses.replace(self, shape=shape, axes=axes, steps=(*self.steps, step))


def start(name: str, shape: tuple[int, ...]) -> Path:
    """A leaf before anything happened to it."""
    return Path(name, tuple(shape), tuple(frozenset({axis}) for axis in range(len(shape))))


def replay(steps: tuple[Step, ...], leaf: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The operand made of the leaf; of a stack, of its first layer."""
    for word, argument in steps:
        if word == "transpose":
            leaf = lax.transpose(leaf, argument)
        elif word == "reshape":
            leaf = lax.reshape(leaf, argument)
        elif word == "convert_element_type":
            leaf = lax.convert_element_type(leaf, jnp.dtype(argument))
        else:
            leaf = leaf[argument]
    return leaf


def _reshaped(
    axes: tuple[frozenset[int], ...], old: tuple[int, ...], new: tuple[int, ...]
) -> tuple[frozenset[int], ...]:
    """Axes after a reshape: old and new sizes, ones aside, are cut into the shortest runs of equal product.

    Within a run every new axis runs over all old ones; a new axis of size one runs over none.
    """
    if 0 in old:
        return (frozenset[int]().union(*axes),) * len(new)
    olds = [(size, run_over) for size, run_over in zip(old, axes, strict=True) if size > 1]
    news = [size for size in new if size > 1]
    found: list[frozenset[int]] = []
    while len(found) < len(news):
        before, taken = olds.pop(0)
        run, after = 1, news[len(found)]
        while before != after:
            if before < after:
                size, more = olds.pop(0)
                before, taken = before * size, taken | more
            else:
                after, run = after * news[len(found) + run], run + 1
        found += [taken] * run
    kept = iter(found)
    return tuple(next(kept) if size > 1 else frozenset() for size in new)
