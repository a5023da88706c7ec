"""Criteria that look at derivatives of the loss: what would change if a weight were gone."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.criteria.weights import Views
from jaxprune.exact.numerics import ordered_sum, rounded
from jaxprune.granularity import ByRule, Granularity, granularities
from jaxprune.types import Scores


def gradient(params: Views, /, *, grads: Views, **_: Any) -> Scores:
    r"""Size of the gradient, $S = |\partial L / \partial w|$: for growing, since a dead weight has one too.

    Args:
        params: weights.
        grads: gradient of the loss, shaped like the weights, dead ones included.

    References:
        Evci et al. 2020 (RigL), arXiv:1911.11134.
    """
    return {name: jnp.abs(grads[name]).astype(jnp.float32) for name in params}


def taylor(params: Views, /, *, grads: Views, **_: Any) -> Scores:
    r"""First-order change of the loss if the weight were zero, $S = |w \cdot \partial L / \partial w|$.

    Args:
        params: weights.
        grads: gradient of the loss, shaped like the weights; of one batch, or the mean of several.

    References:
        Molchanov et al. 2017, arXiv:1611.06440.
    """
    return {name: jnp.abs(change) for name, change in changes(params, grads).items()}


def taylor_squared(params: Views, /, *, grads: Views, **_: Any) -> Scores:
    r"""Square of the first-order change, $S = (w \cdot \partial L / \partial w)^2$.

    Args:
        params: weights.
        grads: as for `taylor`.

    References:
        Molchanov et al. 2019, arXiv:1906.10771, eq. 8.
    """
    return {name: jnp.square(change) for name, change in changes(params, grads).items()}


def joint_taylor(granularity: Granularity | ByRule) -> Callable[..., Scores]:
    r"""Square of the change if a whole group were zero, $S = \frac{1}{n} (\sum_{i=1}^n w_i g_i)^2$ for its n weights.

    Changes of single weights may cancel in a group; `taylor` and `taylor_squared` do not see that. All weights of a
    group score alike, and their sum is the square.

    Args:
        granularity: the one that the scores are pooled by, `granularity.ByRule` too.

    References:
        Molchanov et al. 2019, arXiv:1906.10771, eq. 7.
    """

    def joint(params: Views, /, *, grads: Views, **_: Any) -> Scores:
        by_leaf = granularities(granularity, params)
        scores = {}
        for name, change in changes(params, grads).items():
            means = by_leaf[name].pool(change)
            size = change.size / max(means.size, 1)
            scores[name] = by_leaf[name].expand(size * rounded(jnp.square(means)), change.shape)
        return scores

    return joint


def snip(params: Views, /, *, grads: Views, **_: Any) -> Scores:
    r"""Share of a weight's connection in the sensitivity of all, $S = |w g| / \sum |w g|$ over all pruned leaves.

    Ranks as `taylor` does; the scores sum to 1, so that they do not change with the loss's scale. For untrained weights
    and one batch, with `Global()`.

    Args:
        params: weights at initialisation.
        grads: gradient of the loss.

    References:
        Lee et al. 2019, arXiv:1810.02340, eq. 6.
    """
    scores = taylor(params, grads=grads)
    largest = jnp.max(jnp.stack([jnp.max(score, initial=0) for score in scores.values()]))
    unit = jnp.where(largest > 2.0**64, jnp.float32(2.0**-32), jnp.float32(1))  # so that the sum is finite
    scores = {name: score * unit for name, score in scores.items()}
    sums = [ordered_sum(score.reshape(-1), (0,)) for score in scores.values()]
    total = jnp.squeeze(ordered_sum(jnp.concatenate(sums), (0,)))
    scale = 1 / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return {name: score * scale for name, score in scores.items()}


def grasp(params: Views, /, *, hessian_grads: Views, **_: Any) -> Scores:
    r"""How much the flow of gradients suffers if the weight goes, $S = w \cdot (H g)$, from the least of all leaves on.

    $w \cdot Hg$ is minus the paper's score, whose top it removes. Scores here are not negative, so the smallest of all
    leaves is subtracted; that changes no contest, but of differences below 1e-7 of the largest none is left.

    Args:
        params: weights at initialisation.
        hessian_grads: $Hg$, shaped like the weights; see `jaxprune.evidence.hessian_grads`.

    References:
        Wang, Zhang and Grosse 2020, arXiv:2002.07376, eq. 8.
    """
    return from_least(changes(params, hessian_grads))


def synflow(params: Views, /, *, flow_grads: Views, **_: Any) -> Scores:
    r"""Flow through a weight, $S = |w| \cdot \partial R / \partial |w|$ for the network of absolute weights on ones.

    Data-free. In one shot it may empty a layer; `jaxprune.iterative_masks` goes there in a hundred steps, and does not.

    Args:
        params: weights.
        flow_grads: derivatives of R, shaped like the weights; see `jaxprune.evidence.flow_grads`.

    References:
        Tanaka et al. 2020, arXiv:2006.05467, eq. 3 and 4.
    """
    return {name: jnp.abs(change) for name, change in changes(params, flow_grads).items()}


def fisher(params: Views, /, *, squared_grads: Views, **_: Any) -> Scores:
    r"""Second-order change of the loss at a minimum, $S = \frac{1}{2} w^2 F$ by the diagonal of the Fisher information.

    Args:
        params: weights.
        squared_grads: $F = \mathbb{E}[(\partial \ell / \partial w)^2]$ over single samples, or the Hessian's diagonal;
            see `jaxprune.evidence.squared_grads`.

    References:
        LeCun, Denker and Solla 1990 (Optimal Brain Damage), eq. 7; Theis et al. 2018, arXiv:1801.05787.
    """
    return {
        name: 0.5 * jnp.square(param.astype(jnp.float32)) * jnp.abs(squared_grads[name].astype(jnp.float32))
        for name, param in params.items()
    }


def from_least(signed: Views) -> Scores:
    """Numbers of either sign as scores: less the smallest of all leaves."""
    least = jnp.min(jnp.stack([jnp.min(score, initial=0) for score in signed.values()]))
    return {name: score - least for name, score in signed.items()}


def changes(params: Views, grads: Views) -> dict[str, Float[Array, "..."]]:
    """Products of weights and derivatives, in float32."""
    return {
        name: rounded(param.astype(jnp.float32) * grads[name].astype(jnp.float32)) for name, param in params.items()
    }
