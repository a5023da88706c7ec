"""Loops around `compute_masks`: masks found in many small steps, each judged with what the last one left."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.checks import check_sparsity
from jaxprune.masks import apply_masks
from jaxprune.methods import Method, compute_masks
from jaxprune.types import Masks, Params


def iterate(
    method: Method, params: Params, sparsity: float, *, count: int, evidence: Callable[[Params], Mapping[str, Any]]
) -> Masks:
    r"""Masks in `count` rounds, each with evidence of the weights that are left: $s_k = 1 - (1 - s)^{k / n}$.

    One compiled loop under jit. With `synflow` and a hundred rounds no layer is emptied, however high the sparsity.

    Args:
        method: the composition.
        params: weights; none is trained in between.
        sparsity: of the last round, in [0, 1).
        count: rounds n, at least 1.
        evidence: params with dead weights at zero -> what the criterion looks at, by keyword.

    Returns:
        Masks of the last round.

    Raises:
        ValueError: `sparsity` or `count` is out of range; what `compute_masks` raises.

    References:
        Tanaka et al. 2020, arXiv:2006.05467, algorithm 1.
    """
    check_sparsity(sparsity)
    if count < 1:
        raise ValueError(f"`iterate` needs count >= 1, got {count}.")
    shares = jnp.asarray([1 - (1 - sparsity) ** (k / count) for k in range(1, count)] + [sparsity], jnp.float32)

    def one(k: Any, masks: Masks) -> Masks:
        return compute_masks(method, params, shares[k], masks=masks, **evidence(apply_masks(params, masks)))

    everything = jax.tree.map(lambda param: jnp.ones_like(param, dtype=bool), params)
    return jax.lax.fori_loop(0, count, one, everything)
