"""Couplings: which channels of which leaves live or die together.

    y = conv(x, a) + shortcut;  z = relu(y) @ b          outputs of a = channels of the shortcut = inputs of b

Indices that are one unit of the program (`jaxprune.channels.walk`) can be removed as one: a filter, its bias and its
normalisation, and all that reads it, through additions, concatenations, flattening, heads, stacked layers. Only shapes
are looked at. What cannot be followed is a barrier that keeps its channels: inputs and outputs of the function, sums
over channels (a mean divides by their number), and operations without a rule. Printed:

    layer          channels  goes with
    conv/kernel:3         8  conv/bias:0, fc/kernel:0 (9 each)

    stays, since it is an output of the function: fc/bias:0, fc/kernel:1
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax
import numpy as np

from jaxprune import tree
from jaxprune.channels.choices import walk
from jaxprune.channels.union_find import Ids
from jaxprune.channels.walk import Walk
from jaxprune.tables import columns
from jaxprune.tracing.finder import jaxpr_of
from jaxprune.tracing.inlined import inlined
from jaxprune.tracing.refusals import listed
from jaxprune.types import Leaves

STAYS = -1
"""The number of an index that must stay."""
MOST = 6
"""How many members of a layer, or axes with one reason, a line names."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Couplings:
    """The channels of a model; printed, a line for each layer of them, and then what must stay and why.

    Attributes:
        channels: leaf -> for each of its axes the channel of every index, `STAYS` where it must stay. Equal numbers
            are one channel, wherever they are; numbers count from 0 without gaps.
        reasons: (leaf, axis) -> why the first index that must stay there does.
        barriers: operations that could not be followed, and where they are.
        alike: a number for each channel, equal for those that the function treats the same
            (`jaxprune.channels.symmetry`): they may change places, all their indices together.
    """

    channels: Mapping[str, tuple[Ids, ...]]
    reasons: Mapping[tuple[str, int], str]
    barriers: tuple[str, ...]
    alike: Ids

    @property
    def count(self) -> int:
        """How many channels can be removed."""
        return 1 + max((int(ids.max()) for axes in self.channels.values() for ids in axes if ids.size), default=STAYS)

    @cached_property
    def members(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """For each channel the axes (leaf, axis) that it has indices of, in the order of the params."""
        found: list[list[tuple[str, int]]] = [[] for _ in range(self.count)]
        for name, axes in self.channels.items():
            for axis, ids in enumerate(axes):
                for channel in np.unique(ids[ids != STAYS]):
                    found[channel].append((name, axis))
        return tuple(map(tuple, found))

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """Channels side by side: those with the same members, such as all filters of one convolution."""
        found: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for channel, members in enumerate(self.members):
            found.setdefault(members, []).append(channel)
        return tuple(map(tuple, found.values()))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """A name for each of `layers`: its first weight and the axis there, "conv1/kernel:3".

        A weight is what `jaxprune.weights` takes for one; where there is none, such as in a normalisation by itself,
        it is the first leaf with the most axes. Further layers along that axis are "conv1/kernel:3.1" and so on.
        """
        along = Counter[str]()
        names = []
        for layer in self.layers:
            leaf, axis = max(self.members[layer[0]], key=lambda member: self._weight(member[0]))
            name = f"{leaf}:{axis}"
            names.append(f"{name}.{along[name]}" if along[name] else name)
            along[name] += 1
        return tuple(names)

    def _weight(self, leaf: str) -> tuple[bool, int]:
        axes = self.channels[leaf]
        known = tree.weights(leaf, jax.ShapeDtypeStruct(tuple(map(len, axes)), np.dtype(np.float32)))
        return known, 0 if known else len(axes)

    def __str__(self) -> str:
        """The layers with their sizes and what goes with them, then what must stay and why, then barriers."""
        rows = [
            (name, str(len(layer)).rjust(len("channels")), self._goes_with(name, layer))
            for name, layer in zip(self.names, self.layers, strict=True)
        ]
        table = columns(("layer", "channels", "goes with"), rows, 3) if rows else "No channel can be removed."
        why: dict[str, list[str]] = {}
        for (leaf, axis), reason in self.reasons.items():
            why.setdefault(reason, []).append(f"{leaf}:{axis}")
        rest = [f"stays, since {reason}: {listed(found, most=MOST)}" for reason, found in why.items()]
        rest += [f"not followed: {barrier}" for barrier in self.barriers]
        return "\n".join([table, *([""] if rest else []), *rest])

    def _goes_with(self, name: str, layer: tuple[int, ...]) -> str:
        found = []
        for leaf, axis in self.members[layer[0]]:
            each = int(np.isin(self.channels[leaf][axis], layer).sum()) / len(layer)
            found.append(f"{leaf}:{axis}" if each == 1 else f"{leaf}:{axis} ({each:g} each)")
        return listed([member for member in found if member != name], most=MOST)

    def __repr__(self) -> str:
        return f"<Couplings: {self.count} channels of {len(self.layers)} layers, {len(self.channels)} leaves>"

    def check(self, params: Leaves) -> None:
        """Refuses couplings of another model.

        Args:
            params: any pytree of arrays.

        Raises:
            ValueError: a leaf has another shape, or is not there.
        """
        self.check_shapes({name: np.shape(leaf) for name, leaf in tree.named_leaves(params).items()})

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The same, of the shapes of all leaves by name.

        Raises:
            ValueError: likewise.
        """
        for name, known in self.channels.items():
            if shapes.get(name) != tuple(map(len, known)):
                raise ValueError(
                    f"The couplings are those of another model: leaf {name!r} has shape {tuple(map(len, known))} "
                    f"there and {shapes.get(name)} here. Trace them anew with `couplings`."
                )


def couplings(apply_fn: Callable[..., Any], params: Leaves, *args: Any, **kwargs: Any) -> Couplings:
    """The channels of `apply_fn(params, *args, **kwargs)` that can be removed, and what goes with each.

    Args:
        apply_fn: the model, a function of its parameters.
        params: any pytree of arrays or `jax.ShapeDtypeStruct`; statistics of batches count.
        args: of `apply_fn`, arrays or `jax.ShapeDtypeStruct`.
        kwargs: likewise.

    Raises:
        ValueError: see `jaxprune.trace`: the function consumes none of the params, or holds weights of its own.
    """
    return couplings_of(walk(inlined(jaxpr_of(apply_fn, params, *args, **kwargs)), params))


def couplings_of(found: Walk) -> Couplings:
    """What the units of a walked program come to for the leaves."""
    units = found.units
    roots = {name: [units.roots(ids) for ids in axes] for name, axes in found.leaves.items()}
    free = [ids[~units.fixed(ids)] for axes in roots.values() for ids in axes]
    known = np.unique(np.concatenate([np.zeros(0, np.int64), *free]))
    channels, reasons = {}, {}
    for name, axes in roots.items():
        stays = [units.fixed(ids) for ids in axes]
        channels[name] = tuple(
            np.where(s, STAYS, np.searchsorted(known, ids)) for s, ids in zip(stays, axes, strict=True)
        )
        reasons |= {(name, a): units.why(int(ids[s][0])) for a, (s, ids) in enumerate(zip(stays, axes, strict=True))
                    if s.any()}  # fmt: skip
    alike = np.unique(found.alike()[known], return_inverse=True)[1].reshape(-1)
    return Couplings(channels, reasons, tuple(dict.fromkeys(found.barriers)), alike)
