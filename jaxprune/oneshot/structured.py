"""Structured one-shot pruning: whole hidden units, heads and layers go, and the model is a smaller one of its kind.

    small = prune_channels(apply_fn, params, batches, {"*/down/*": 0.25, "*/out/*": 1 / 6})      # width
    params, removed = prune_layers(loss, params, batches, 2)                                    # depth

Channels are those of `jaxprune.channels`, scored by what the products that read them get
(`jaxprune.oneshot.importance`). The weights that read those that stay are then fitted to the dense model's outputs,
and what nobody reads is cut away.

References:
    Muralidharan et al. 2024, Minitron, arXiv:2407.14679.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune import tree
from jaxprune.channels import Channels, Compacted, compact
from jaxprune.channels.coupling import couplings
from jaxprune.checks import check_sparsity
from jaxprune.criteria.calibration import Inputs, of_activations
from jaxprune.criteria.derivatives import of_outputs
from jaxprune.distributions import Uniform
from jaxprune.granularity import Geometry
from jaxprune.layout import Axes, to_view
from jaxprune.oneshot.importance import ActivationImportance, Importance, Reader
from jaxprune.oneshot.layerwise import best, matrices
from jaxprune.oneshot.least_squares import LeastSquares
from jaxprune.oneshot.order import prune
from jaxprune.tracing.finder import trace
from jaxprune.tracing.sites import PRODUCTS
from jaxprune.types import Masks, Params

_ACTIVATIONS = ActivationImportance()


def prune_channels(
    apply_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    sparsity: float | tree.Rules[float],
    *,
    importance: Importance = _ACTIVATIONS,
    refit: bool = True,
    damping: float = 0.01,
    loss: Callable[..., Any] | None = None,
) -> Compacted:
    r"""A smaller model without the channels that matter least on some calibration data.

    Channels compete with those side by side, so layers of one width stay of one width: n of them lose round(n s). Heads
    that share keys and values go together with these, so the number of queries for each key stays. The weights that
    read what stays are fitted one product after the other, to the dense model's outputs.

    Stacked layers lose the same channels in each of them, by the sum over the layers; unstack them to choose for each.

    Args:
        apply_fn: the model, (params, batch) -> anything.
        params: trained weights; any pytree of arrays.
        batches: calibration inputs of one shape; pytrees of arrays.
        sparsity: fraction of the channels of every layer to remove, in [0, 1); or rules, pattern -> fraction, over the
            names of a layer and of all that belongs to it, see `jaxprune.Channels`: "*/down/*" or "*/down/kernel:0".
            The first that matches wins, and layers that none matches keep all their channels.
        importance: what channels are scored by; the lowest go.
        refit: whether to fit weights; without, those that stay stay as they are.
        damping: of the fit, see `Solver`.
        loss: (params, batch) -> scalar, a sum over tokens: errors of outputs then count by how much the loss sees of
            them, for an `importance` that looks at weights. None: all outputs count the same.

    Returns:
        See `Compacted`; with `apply_fn` a function of sizes, hand it these.

    Raises:
        ValueError: a rule matches no layer; a sparsity is outside [0, 1); no product reads a layer's channels; what
            `of_activations`, `of_outputs`, `oneshot.prune` and `compact` refuse.

    Example:
        >>> small = jp.oneshot.prune_channels(apply_fn, params, batches, 0.25)
        >>> logits = small.apply(small.params, x)
    """
    batches = list(batches)
    if not batches:
        raise ValueError("There is no batch, so there is nothing to calibrate on.")
    groups = Channels(couplings(apply_fn, params, batches[0]))
    fractions = _fractions(groups, sparsity)
    reading = _reading(groups, {site.name: site.axes for site in trace(apply_fn, params, batches[0])
                                if site.kind in PRODUCTS and site.axes is not None}, fractions)  # fmt: skip
    names = {name for members in reading.values() for name, _ in members}

    def select(name: str, leaf: Any) -> bool:
        return name in names

    seen = of_activations(apply_fn, params, batches, select=select, moments=importance.looks_at_moments)
    outputs = {} if loss is None else of_outputs(loss, params, batches, select=select)
    leaves, kept = tree.named_leaves(params), {}
    for layer, fraction in fractions.items():
        numbers = {channel: number for number, channel in enumerate(groups.layers[layer])}
        readers = [
            reader
            for name, axis in reading[layer]
            for reader in _readers(
                name, leaves[name], seen.leaves[name], outputs.get(name),
                _along(seen.leaves[name], axis, groups.couplings.channels[name][axis], numbers),
            )
        ]  # fmt: skip
        kept[layer] = _kept(layer, importance(readers, len(numbers)), fraction)
    masks = _masks(groups, kept, params)
    if refit:
        params, _ = prune(apply_fn, params, batches, LeastSquares(damping), select=select, masks=masks)
    return compact(apply_fn, params, masks, batches[0])


def _fractions(groups: Channels, sparsity: float | tree.Rules[float]) -> dict[str, float]:
    """Layer -> fraction of its channels that go; layers that lose none are left out."""
    rules = (("*", sparsity),) if isinstance(sparsity, int | float) else tree.pairs(sparsity)
    fractions: dict[str, float] = {}
    for pattern, fraction in rules:
        check_sparsity(fraction)
        layers = groups.matching(pattern)
        if not layers:
            raise ValueError(
                f"`sparsity` names {pattern!r}, which matches no layer of channels and nothing in one. Layers are "
                f"{tree.listed(groups.layers)}; `print(jp.couplings(...))` lists all that belongs to them."
            )
        for layer in layers:
            fractions.setdefault(layer, fraction)
    return {layer: fraction for layer, fraction in fractions.items() if fraction > 0}


def _reading(groups: Channels, axes: Mapping[str, Axes], layers: Iterable[str]) -> dict[str, list[tuple[str, int]]]:
    """Layer -> the axes (leaf, axis) along which products read it."""
    found = {}
    for layer in layers:
        members = groups.couplings.members[groups.layers[layer][0]]
        found[layer] = [(name, axis) for name, axis in members if name in axes and axis in axes[name].inputs]
        if not found[layer]:
            raise ValueError(
                f"No product with a leaf reads the channels of {layer!r}, so there is nothing to tell them by. Leave "
                "the layer out of `sparsity`."
            )
    return found


def _readers(
    name: str,
    leaf: Float[Array, "..."],
    seen: Inputs,
    outputs: Float[Array, "layers outputs outputs"] | None,
    channels: Int[np.ndarray, "features"],
) -> list[Reader]:
    """What reads channels in one leaf: a matrix, or each of a stack."""
    weights = matrices(to_view(jnp.asarray(leaf), seen.axes)).astype(jnp.float32)
    return [
        Reader(
            name, weights[i], seen.tokens[i], seen.squares[i], seen.magnitudes[i],
            None if seen.moments is None else seen.moments[i], None if outputs is None else outputs[i], channels,
        )
        for i in range(len(weights))
    ]  # fmt: skip


def _along(
    seen: Inputs, axis: int, channels: Int[np.ndarray, "indices"], numbers: Mapping[int, int]
) -> Int[np.ndarray, "features"]:
    """For each feature of a leaf's view the number of its channel along an axis; -1 for none of those numbered."""
    along = np.asarray([numbers.get(int(channel), -1) for channel in channels])
    features = (*seen.axes.spatial, *seen.axes.inputs)
    shape = [len(channels) if a == axis else 1 for a in features]
    return np.broadcast_to(along.reshape(shape), [seen.shape[a] for a in features]).reshape(-1)


def _kept(layer: str, scores: Float[Array, "channels"], fraction: float) -> Bool[Array, "channels"]:
    """Which channels of a layer stay."""
    if not jnp.isfinite(scores).all():
        raise ValueError(f"Scores of the channels of {layer!r} are not finite. Take more data, or another importance.")
    kept = best(scores[None], fraction, Uniform())[0]
    if not kept.any():
        raise ValueError(
            f"{fraction:g} of the {len(scores)} channels of {layer!r} are all of them. Remove less, or leave the layer "
            "out of `sparsity`."
        )
    return kept


def _masks(groups: Channels, kept: Mapping[str, Bool[Array, "channels"]], params: Params) -> Masks:
    shapes = {name: np.shape(leaf) for name, leaf in tree.named_leaves(params).items()}
    found = groups.expand_leaves({layer: one[None, None] for layer, one in kept.items()}, Geometry({}, shapes))
    return tree.map_named(lambda name, leaf: found.get(name, jnp.ones(np.shape(leaf), bool)), params)
