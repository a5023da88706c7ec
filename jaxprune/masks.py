"""What one does with masks once they are there: apply, count, compare, pack.

A mask tree has the structure and shapes of the params, dtype bool, True = alive. `apply_masks` is the only place
where a weight becomes zero outside an optimizer.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree, Shaped, UInt8

from jaxprune import tree
from jaxprune.exact.meshes import lying_like
from jaxprune.types import Masks, Params


def apply_masks(params: Params, masks: Masks) -> Params:
    r"""Weights with the dead ones at exact zero, $w' = w$ where alive, $+0$ elsewhere.

    A selection, not a product: a NaN or infinity under a dead weight is silenced too.

    Args:
        params: any pytree of arrays.
        masks: bool, same leaves and shapes.

    Raises:
        ValueError: the masks have other leaves or shapes; the message names the first.
    """
    tree.check_like("The masks", masks, params)
    return jax.tree.map(_keep, params, tree.match(masks, params))


def rewind(early_params: Params, masks: Masks) -> Params:
    """Early weights (of the initialisation, or of a step soon after) under late masks, the lottery ticket's start.

    References:
        Frankle and Carbin 2019, arXiv:1803.03635; rewinding to a later step: Frankle et al. 2020, arXiv:1912.05671.
    """
    return apply_masks(early_params, masks)


def straight_through(params: Params, masks: Masks) -> Params:
    r"""`apply_masks` whose derivative is the identity, $\partial w' / \partial w = 1$ for dead weights too.

    Dead weights then go on receiving the gradient they would have at zero, and may come back.

    References:
        Bengio, Leonard and Courville 2013, arXiv:1308.3432.
    """
    tree.check_like("The masks", masks, params)
    return jax.tree.map(_keep_straight, params, tree.match(masks, params))


def _keep(param: Array, mask: Array) -> Array:
    return jnp.where(mask, param, jnp.zeros((), param.dtype))


@jax.custom_jvp
def _keep_straight(param: Array, mask: Array) -> Array:
    return _keep(param, mask)


@_keep_straight.defjvp
def _keep_straight_jvp(primals, tangents):
    return _keep(*primals), tangents[0]


def nonzero_masks(params: Params) -> Masks:
    """Masks of what is not zero: how a pruned tree from elsewhere, or from a file, gets its masks back.

    Keys for random numbers are alive.
    """
    return jax.tree.map(_nonzero, params)


def _nonzero(param: Array) -> Array:
    if tree.is_key(param):
        return jnp.ones(param.shape, bool)
    if not jnp.issubdtype(param.dtype, jnp.floating) or param.dtype.itemsize == 1:
        return param.astype(bool)
    # By the bits but the sign's: processors that flush denormal numbers find them equal to zero.
    bits = lax.bitcast_convert_type(param, jnp.dtype(f"uint{8 * param.dtype.itemsize}"))
    return jnp.left_shift(bits, jnp.ones((), bits.dtype)) != 0


def sparsity_of(masks: Masks, select: tree.Select | None = None) -> Float[Array, ""]:
    """Fraction removed, dead weights over all weights.

    Args:
        masks: bool leaves.
        select: count only these leaves (in any form of `Method.select`); None counts all, those that are never
            pruned included.

    Returns:
        Scalar float32 in [0, 1].

    Raises:
        ValueError: there is no weight to count.
    """
    chosen = tree.selector(select) if select is not None else lambda name, leaf: True
    leaves = [leaf for name, leaf in tree.named_leaves(masks).items() if chosen(name, leaf)]
    total = sum(math.prod(leaf.shape) for leaf in leaves)
    if total == 0:
        raise ValueError("`sparsity_of` was given no weights to count.")
    # Leaf by leaf, since float32 would stop counting at 2**24.
    dead = [jnp.sum(~leaf, dtype=jnp.uint32).astype(jnp.float32) / total for leaf in leaves]
    return jnp.sum(jnp.stack(dead))


def overlap(first: Masks, second: Masks) -> Float[Array, ""]:
    r"""Likeness of two mask trees, $|A \cap B| / |A \cup B|$ over their survivors (Jaccard); 1 where both are empty.

    Raises:
        ValueError: the trees have other leaves or shapes.
    """
    tree.check_like("The second masks", second, first)
    pairs: list[Any] = list(zip(jax.tree.leaves(first), jax.tree.leaves(tree.match(second, first)), strict=True))
    both = _count([a & b for a, b in pairs])
    either = _count([a | b for a, b in pairs])
    return jnp.where(either > 0, both / jnp.maximum(either, 1.0), jnp.float32(1.0))


def _count(leaves: list[Array]) -> Float[Array, ""]:
    return jnp.sum(jnp.stack([jnp.sum(leaf, dtype=jnp.uint32).astype(jnp.float32) for leaf in leaves]))


@lying_like("masks")
def pack_masks(masks: Masks) -> PyTree[UInt8[Array, "_"]]:
    """One bit a weight: leaves of ceil(weights / 8) bytes, the first weight in the highest bit, flat in C order."""
    return jax.tree.map(lambda mask: jnp.packbits(jnp.ravel(mask)), masks)


@lying_like("like")
def unpack_masks(
    packed: PyTree[UInt8[Array, "_"]],
    like: PyTree[Shaped[Array, "..."] | jax.ShapeDtypeStruct],
) -> Masks:
    """Masks from `pack_masks`.

    Args:
        packed: uint8 leaves, as `pack_masks` made them.
        like: params, masks or `jax.ShapeDtypeStruct`s that have the shapes.

    Raises:
        ValueError: a leaf is missing, or has not the bytes that its shape needs.
    """
    sizes = tree.map_named(lambda name, leaf: jax.ShapeDtypeStruct(((math.prod(leaf.shape) + 7) // 8,), "uint8"), like)
    tree.check_like("The packed masks", packed, sizes)

    def unpack(bits: Array, leaf: Any) -> Array:
        return jnp.unpackbits(bits, count=math.prod(leaf.shape)).astype(bool).reshape(leaf.shape)

    return jax.tree.map(unpack, tree.match(packed, like), like)
