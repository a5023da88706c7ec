"""Channels: the granularity whose groups reach across leaves.

    a filter, its bias, its scale, and what reads it    one group, found by `jaxprune.channels.coupling`

Other granularities cut up one leaf at a time; this one pools the scores of all weights that go with a channel, wherever
they are, and its masks hold for every leaf, biases too, so that `jaxprune.compact` can take the channel away.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune import layout as layouts
from jaxprune import tree
from jaxprune.channels.coupling import STAYS, Couplings
from jaxprune.exact.numerics import ordered_sum
from jaxprune.granularity import Geometry

Groups = Float[Array, "1 1 channels"]


@dataclasses.dataclass(frozen=True)
class Channels:
    """Whole channels: filters, neurons, heads, with all that belongs to them.

    A channel is worth the mean score of the selected weights that it has. Channels of one layer compete as the outputs
    of one leaf do; the layer's name is that of its first matrix or kernel and the axis there, "conv1/kernel:3". Further
    layers along that axis, such as the other half of outputs that are split, are "conv1/kernel:3.1" and so on.
    `print(couplings)` lists them.

    Attributes:
        couplings: of the model, from `jaxprune.couplings`.
        ignore: patterns of names, of layers ("conv1/kernel:3") or of anything that belongs to one: a leaf
            ("conv1/*"), or one of its axes ("*/value/kernel:2"). A layer with such a member keeps all its channels, in
            every leaf. (`Method.select` says whose scores count, and lets a channel go by the scores of the others.)

    Raises:
        ValueError: a pattern matches nothing.

    Example:
        >>> some = jp.Channels(couplings, ignore="conv2/kernel:3")  # these channels stay as many as they are

    References:
        Fang et al. 2023, DepGraph, arXiv:2301.12900 (importance of coupled groups, there summed).
    """

    looks_at_axes: ClassVar[bool] = False  # the couplings say where channels are

    couplings: Couplings
    ignore: str | Iterable[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignore", (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore))
        leaves = self.couplings.channels.items()
        known = [*self._names, *(name for leaf, axes in leaves for name in _calls(leaf, range(len(axes))))]
        for pattern in self.ignore:
            if not fnmatch.filter(known, pattern):
                raise ValueError(
                    f"`Channels(ignore=...)` names {pattern!r}, which matches no layer and no leaf. Layers are "
                    f"{tree.listed(self._names)}; print the couplings for all that belongs to them."
                )

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Layer -> its channels; without those that are ignored."""
        named = zip(self._names.items(), self.couplings.layers, strict=True)
        return {layer: group for (layer, names), group in named if not self._is_ignored(names)}

    def matching(self, pattern: str) -> list[str]:
        """Names of the layers that have the name, or anything with it, as `ignore` has patterns; ignored ones too."""
        return [layer for layer, names in self._names.items() if fnmatch.filter(names, pattern)]

    @property
    def _names(self) -> dict[str, list[str]]:
        """Layer -> what a pattern may call it by."""
        members = [self.couplings.members[group[0]] for group in self.couplings.layers]
        return {
            layer: [layer, *(name for leaf, axis in found for name in _calls(leaf, [axis]))]
            for layer, found in zip(self.couplings.names, members, strict=True)
        }

    def _is_ignored(self, names: list[str]) -> bool:
        return any(fnmatch.filter(names, pattern) for pattern in self.ignore)

    def pool_leaves(self, scores: Mapping[str, Float[Array, "..."]], geometry: Geometry) -> dict[str, Groups]:
        """One score for every channel that has weights among these leaves, layer by layer."""
        self.couplings.check_shapes(geometry.shapes)
        totals = jnp.zeros(self.couplings.count, jnp.float32)
        weights = np.zeros(self.couplings.count)
        for name, view in scores.items():
            score = layouts.from_view(view, geometry.axes[name], geometry.shapes[name])
            for axis, ids in enumerate(self.couplings.channels[name]):
                others, free = tuple(a for a in range(score.ndim) if a != axis), np.flatnonzero(ids != STAYS)
                if not len(free):
                    continue
                totals = totals.at[ids[free]].add(ordered_sum(score, others).reshape(-1)[free])
                np.add.at(weights, ids[free], score.size // len(ids))
        mean = totals * jnp.asarray(1 / np.maximum(weights, 1), totals.dtype)
        scored = {layer: np.asarray(group) for layer, group in self.layers.items() if weights[list(group)].all()}
        return {layer: mean[group][None, None] for layer, group in scored.items()}

    def expand_leaves(
        self, kept: Mapping[str, Bool[Array, "1 1 channels"]], geometry: Geometry
    ) -> dict[str, Bool[Array, "..."]]:
        """The verdict on every channel, for all the weights that it has: masks of all leaves that channels reach."""
        alive = jnp.ones(self.couplings.count, bool)
        for layer, group in self.layers.items():
            if layer in kept:
                alive = alive.at[np.asarray(group)].set(kept[layer].reshape(-1))
        masks = {}
        for name, along_axes in self.couplings.channels.items():
            shape = geometry.shapes[name]
            mask = jnp.ones(shape, bool)
            for axis, ids in enumerate(along_axes):
                if (ids == STAYS).all():
                    continue
                along = jnp.where(ids == STAYS, True, alive[np.where(ids == STAYS, 0, ids)])
                mask = mask & along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
            masks[name] = mask
        return masks


def _calls(leaf: str, axes: Iterable[int]) -> list[str]:
    return [leaf, *(f"{leaf}:{axis}" for axis in axes)]
