r"""Weight sharing: fine-tuning of a codebook, all members of a cluster as one weight.

    dL / dv_k = sum of dL / dw_i over the members i of cluster k

Each member is handed that sum, so an optimizer that treats every number by itself moves all of them alike, and dead
weights, which are handed 0, not at all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Integer

from jaxprune import tree
from jaxprune.quantize.codes import Codebook
from jaxprune.types import Params


class SharingState(NamedTuple):
    """State of `share_weights`: the clusters, an argument of the compiled step like every array.

    Attributes:
        clusters: leaf name -> cluster of each weight, dead ones in a cluster of their own behind the others.
    """

    clusters: dict[str, Integer[Array, "..."]]


def share_weights(quantized: Any) -> optax.GradientTransformation:
    r"""Gradients of the shared values, for an optimizer that comes after it in `optax.chain`.

    Sums are made in float32. What comes after must treat equal numbers equally: SGD, momentum and Adam do, with weight
    decay and clipping too; an optimizer that draws noise, or looks at the shape of a matrix, does not.

    Args:
        quantized: params with `Codebook` leaves; gradients of all other leaves pass through.

    Returns:
        A transformation for the front of `optax.chain`; the params to start from are `dequantize(quantized)`, and
        `reshare` brings them back.

    Raises:
        ValueError: there is no `Codebook`; at `init`, the params have no such leaf, or one of another shape.

    References:
        Han, Mao and Dally 2016, Deep Compression, arXiv:1510.00149, section 3.

    Example:
        >>> quantized = jp.storage.to_codebooks(params, masks)
        >>> params = jp.storage.dequantize(quantized)
        >>> tx = optax.chain(jp.storage.share_weights(quantized), optax.adam(1e-4))
    """
    codebooks = _codebooks(quantized)

    def init(params: Params) -> SharingState:
        _check_like(codebooks, params)
        names = tree.named_leaves(params).keys() & codebooks.keys()
        return SharingState({name: jnp.asarray(_clusters(codebooks[name])) for name in sorted(names)})

    def update(updates: Any, state: Any, params: Params | None = None) -> tuple[Any, SharingState]:
        del params

        def one(name: str, grads: Array) -> Array:
            if name not in state.clusters:
                return grads
            return _shared(grads, state.clusters[name], 2 ** codebooks[name].bits)

        return tree.map_named(one, updates), state

    return optax.GradientTransformation(init, update)


def reshare(quantized: Any, params: Params) -> Any:
    """The quantized leaves with the values that the params have now; all other leaves as they are in the params.

    A value is the mean of its members in float64; one without members stays.

    Args:
        quantized: what `share_weights` was given.
        params: fine-tuned with it.

    Raises:
        ValueError: there is no `Codebook`; the params have other leaves or shapes.
    """
    codebooks = _codebooks(quantized)
    _check_like(codebooks, params)
    return tree.map_named(lambda name, leaf: _revalued(codebooks[name], leaf) if name in codebooks else leaf, params)


def _codebooks(quantized: Any) -> dict[str, Codebook]:
    found = {name: leaf for name, leaf in tree.named_leaves(quantized).items() if isinstance(leaf, Codebook)}
    if not found:
        raise ValueError("No leaf is a `Codebook`, so no weights are shared. Call `to_codebooks` first.")
    return found


def _check_like(codebooks: dict[str, Codebook], params: Any) -> None:
    """Refuses params without one of the leaves, unless they were taken out on purpose, or with another shape there."""
    leaves = tree.named_leaves(params)
    for name, codebook in codebooks.items():
        if name not in leaves and leaves and not tree.has_masked_nodes(params):
            raise ValueError(f"The quantized leaf {name!r} is no leaf of the params. Hand in params like these.")
        if name in leaves and jnp.shape(leaves[name]) != codebook.shape:
            shape = jnp.shape(leaves[name])
            raise ValueError(f"{name!r} was quantized with shape {codebook.shape}, in the params it has {shape}.")


def _clusters(codebook: Codebook) -> np.ndarray:
    return np.where(codebook.alive, codebook.codes.astype(np.uint16), np.uint16(2**codebook.bits))


def _shared(grads: Float[Array, "*shape"], clusters: Integer[Array, "*shape"], count: int) -> Float[Array, "*shape"]:
    sums = jax.ops.segment_sum(grads.ravel().astype(jnp.float32), clusters.ravel(), count + 1)
    return sums.at[count].set(0.0).astype(grads.dtype)[clusters]


def _revalued(codebook: Codebook, leaf: Any) -> Codebook:
    codes, weights = codebook.codes[codebook.alive], np.asarray(leaf)[codebook.alive].astype(np.float64)
    sums, members = (np.bincount(codes, w, len(codebook.values)) for w in (weights, None))
    means = (sums / np.maximum(members, 1)).astype(codebook.dtype)
    values = np.where(members > 0, means, codebook.values)
    return Codebook(codebook.codes, values, codebook.bits, codebook.alive)
