"""Dropout for what is left: a layer with fewer weights overfits less, and needs less noise."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import tree
from jaxprune.checks import check_number
from jaxprune.types import Masks


def adjusted_dropout(
    rate: float | Float[Array, ""], masks: Masks, select: tree.Select = tree.weights
) -> dict[str, Float[Array, ""]]:
    r"""Dropout rates for retraining a pruned model, $D_r = D_o \sqrt{C_r / C_o}$ for every layer.

    $C_o$ are the connections of the layer before pruning and $C_r$ those that are left; a convolution uses each of its
    weights equally often, so that weights are counted. A layer whose weights are all dead gets 0.

    Args:
        rate: $D_o$, the rate that the dense model was trained with, in [0, 1).
        masks: True = alive.
        select: which leaves, in any form of `Method.select`; a stacked leaf is one.

    Returns:
        Leaf name -> float32 scalar, for every selected leaf. Traced masks will do. A dropout layer that wants a
        plain number is given `float(rates[name])`, outside jit.

    Raises:
        ValueError: the rate is out of range, or nothing is selected.

    References:
        Han et al. 2015, arXiv:1506.02626, section 3.2, eq. 2: dropout acts on neurons, whose number goes as the root of
        that of their connections.
    """
    check_number(rate, "`adjusted_dropout` needs a rate in [0, 1),", high=1)
    # Selected as their weights would be, which are floating.
    shapes = jax.tree.map(lambda mask: jax.ShapeDtypeStruct(mask.shape, jnp.float32), masks)
    alive, dense = tree.named_leaves(masks), tree.selected_leaves(select, shapes)
    return {name: jnp.asarray(rate, jnp.float32) * jnp.sqrt(_density(alive[name])) for name in dense}


def _density(mask: Array) -> Float[Array, ""]:
    return jnp.sum(mask, dtype=jnp.uint32).astype(jnp.float32) * (1 / max(mask.size, 1))
