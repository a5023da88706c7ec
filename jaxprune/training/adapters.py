r"""Low-rank adapters of pruned weights, masked so that merging them keeps every zero.

    adapters = init_adapters(key, params, rank=8)
    loss(adapted(params, adapters, masks), batch)           # params stand still, adapters are trained
    params = adapted(params, adapters, masks)               # merged: the same call, after training

    W' = (W + scale A B) where alive, 0 elsewhere           W (in, out), A (in, rank), B (rank, out)

Unmasked, A B would fill every zero of W. What is trained is what is merged, to the bit.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxprune import tree
from jaxprune.exact.numerics import at_least_float32
from jaxprune.layout import BY_NAME, Axes, Layout, from_view, view_shape
from jaxprune.types import Leaves, Masks, Params


class Adapter(NamedTuple):
    """Two factors; of a convolution features are its window times its inputs, of stacked layers each has its own.

    Attributes:
        a: random to begin with.
        b: zero to begin with, so that nothing changes.
    """

    a: Float[Array, "*layers features rank"]
    b: Float[Array, "*layers rank outputs"]


def init_adapters(
    key: Key[Array, ""], params: Leaves, rank: int, *, select: tree.Select = tree.weights, layout: Layout = BY_NAME
) -> dict[str, Adapter]:
    r"""An adapter for every selected leaf, by its name; float32, float64 for leaves that are.

    $A \sim N(0, 1 / features)$ and $B = 0$.

    Args:
        key: draws A.
        params: weights, or their shapes and dtypes.
        rank: inner size, at most the smaller one of features and outputs.
        select: leaves that are adapted.
        layout: their axes; `layout_of(trace(apply_fn, params, x))` where names do not tell.

    Raises:
        ValueError: a rank below 1, or above what a leaf has; a leaf whose axes are not told.

    References:
        Hu et al. 2021, LoRA, arXiv:2106.09685, section 4.1.
    """
    leaves = tree.selected_leaves(select, params)
    adapters = {}
    for one, (name, leaf) in zip(jax.random.split(key, len(leaves)), leaves.items(), strict=True):
        layout.check_stacked(name, leaf.shape)
        layout.check_named(name, leaf.shape)
        *layers, features, outputs = _matrix(leaf.shape, layout.axes(name, leaf.shape))
        if not 1 <= rank <= min(features, outputs):
            raise ValueError(
                f"`rank` is from 1 to {min(features, outputs)} for {name!r}, which is {features} x {outputs} as a "
                f"matrix; got {rank}. Take another, or leave the leaf out with `select`."
            )
        dtype = at_least_float32(leaf.dtype)
        a = jax.random.normal(one, (*layers, features, rank), dtype) * jnp.asarray(features**-0.5, dtype)
        adapters[name] = Adapter(a, jnp.zeros((*layers, rank, outputs), dtype))
    return adapters


def adapted(
    params: Params,
    adapters: Mapping[str, Adapter],
    masks: Masks | None = None,
    *,
    scale: float | Float[Array, ""] = 1.0,
    layout: Layout = BY_NAME,
) -> Params:
    r"""The params with their adapters in them, $W' = W + s A B$ where alive and exactly 0 elsewhere, in W's dtype.

    Pure, under jit and differentiable: gradients by A and B come through alive weights alone.

    Args:
        params: pruned weights.
        adapters: of `init_adapters`; leaves without one stay as they are.
        masks: True = alive; None: everywhere, which fills the zeros.
        scale: s; the paper's alpha / rank.
        layout: as `init_adapters` had it.

    Raises:
        ValueError: masks of other params; an adapter of no leaf, or of one of another shape.

    References:
        Hu et al. 2021, LoRA, arXiv:2106.09685; masked: Munoz et al. 2024, SQFT, arXiv:2410.03750.

    Example:
        Distilled from the dense model, adapters alone being trained:

        >>> import jax, jax.numpy as jnp, jaxprune as jp, optax
        >>> def model(params, x):
        ...     return x @ params["kernel"]
        >>> dense = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
        >>> masks = jp.compute_masks(jp.Method(), dense, 0.5)
        >>> pruned = jp.apply_masks(dense, masks)
        >>> adapters = jp.training.init_adapters(jax.random.key(1), pruned, rank=2)
        >>> def loss(adapters, pruned, masks, dense, x):
        ...     student = model(jp.training.adapted(pruned, adapters, masks), x)
        ...     return jp.distillation_loss(student, model(dense, x))
        >>> tx = optax.adam(1e-2)
        >>> @jax.jit
        ... def step(adapters, opt_state, pruned, masks, dense, x):
        ...     grads = jax.grad(loss)(adapters, pruned, masks, dense, x)
        ...     updates, opt_state = tx.update(grads, opt_state)
        ...     return optax.apply_updates(adapters, updates), opt_state
        >>> adapters, opt_state = step(adapters, tx.init(adapters), pruned, masks, dense, jnp.eye(8))
        >>> merged = jp.training.adapted(pruned, adapters, masks)
        >>> print(float(jp.sparsity_of(jp.nonzero_masks(merged))))
        0.5
    """
    if masks is not None:
        tree.check_like("The masks", masks, params)
    alive = tree.named_leaves(masks)
    leaves = tree.named_leaves(params)
    for name in adapters:
        if name not in leaves:
            raise ValueError(f"There is an adapter for {name!r}, but no such leaf. There are: {tree.listed(leaves)}.")

    def one(name: str, leaf: Array) -> Array:
        if name not in adapters:
            return leaf
        change = scale * _change(name, leaf, adapters[name], layout)
        return jnp.where(alive.get(name, True), leaf.astype(change.dtype) + change, 0).astype(leaf.dtype)

    return tree.map_named(one, params)


def _change(name: str, leaf: Array, adapter: Adapter, layout: Layout) -> Float[Array, "..."]:
    """A B, shaped like the leaf."""
    axes = layout.axes(name, leaf.shape)
    wanted, rank = _matrix(leaf.shape, axes), adapter.a.shape[-1]
    shapes = ((*wanted[:-1], rank), (*wanted[:-2], rank, wanted[-1]))
    if (adapter.a.shape, adapter.b.shape) != shapes:
        raise ValueError(
            f"The adapter of {name!r} {leaf.shape} has factors {adapter.a.shape}, {adapter.b.shape}; {shapes[0]} and "
            f"{shapes[1]} was expected: it is another leaf's, or `layout` is not the one it was made with."
        )
    return from_view((adapter.a @ adapter.b).reshape(view_shape(leaf.shape, axes)), axes, leaf.shape)


def _matrix(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    """(*layers, features, outputs) of a leaf."""
    *layers, spatial, inputs, outputs = view_shape(shape, axes)
    return (*layers, spatial * inputs, outputs)
