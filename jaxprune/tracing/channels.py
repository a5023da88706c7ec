"""Channels: the granularity whose groups reach across leaves.

    a filter, its bias, its scale, and what reads it    one group, found by `jaxprune.tracing.couplings`

Other granularities cut up one leaf at a time; this one pools the scores of all weights that go with a channel, wherever
they are, and its masks hold for every leaf, biases too, so that `jaxprune.compact` can take the channel away.
"""

import collections
import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune.numerics import ordered_sum
from jaxprune.tracing.couplings import STAYS, Couplings

Groups = Float[Array, "1 1 channels"]


@dataclasses.dataclass(frozen=True)
class Channels:
    """Whole channels: filters, neurons, heads, with all that belongs to them.

    A channel is worth the mean score of the selected weights that it has. Channels of one layer compete as the outputs
    of one leaf do; the layer's name is that of its first matrix or kernel and the axis there, "conv1/kernel:3". Further
    layers along that axis, such as the other half of outputs that are split, are "conv1/kernel:3.1" and so on.

    Attributes:
        couplings: of the model, from `jaxprune.couplings`.

    References:
        Fang et al. 2023, DepGraph, arXiv:2301.12900 (importance of coupled groups, there summed).
    """

    couplings: Couplings

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Layer -> its channels."""
        found = {}
        along = collections.Counter()
        for group in self.couplings.layers:
            members = self.couplings.members[group[0]]
            name, axis = max(members, key=lambda member: len(self.couplings.channels[member[0]]) > 1)
            number = f".{along[name, axis]}" if along[name, axis] else ""
            found[f"{name}:{axis}{number}"] = group
            along[name, axis] += 1
        return found

    def pool_leaves(self, scores: Mapping[str, Float[Array, "..."]]) -> dict[str, Groups]:
        """One score for every channel that has weights among these leaves, layer by layer."""
        totals = jnp.zeros(self.couplings.count, jnp.float32)
        weights = np.zeros(self.couplings.count)
        for name, score in scores.items():
            for axis, ids in enumerate(self.couplings.channels[name]):
                if (ids == STAYS).all():
                    continue
                others = tuple(a for a in range(score.ndim) if a != axis)
                free = np.flatnonzero(ids != STAYS)
                totals = totals.at[ids[free]].add(ordered_sum(score, others).reshape(-1)[free])
                np.add.at(weights, ids[free], score.size // len(ids))
        mean = totals * jnp.asarray(1 / np.maximum(weights, 1), totals.dtype)
        scored = {layer: np.asarray(group) for layer, group in self.layers.items() if weights[list(group)].all()}
        return {layer: mean[group][None, None] for layer, group in scored.items()}

    def expand_leaves(
        self, kept: Mapping[str, Bool[Array, "1 1 channels"]], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Bool[Array, "..."]]:
        """The verdict on every channel, for all the weights that it has in leaves of these shapes."""
        alive = jnp.ones(self.couplings.count, bool)
        for layer, group in self.layers.items():
            if layer in kept:
                alive = alive.at[np.asarray(group)].set(kept[layer].reshape(-1))
        masks = {}
        for name, shape in shapes.items():
            mask = jnp.ones(shape, bool)
            for axis, ids in enumerate(self.couplings.channels[name]):
                if (ids == STAYS).all():
                    continue
                along = jnp.where(ids == STAYS, True, alive[np.where(ids == STAYS, 0, ids)])
                mask = mask & along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
            masks[name] = mask
        return masks
