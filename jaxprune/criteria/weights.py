"""Criteria that look at weights alone, or at those beside them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxprune.exact.numerics import ordered_sum, rounded
from jaxprune.types import Scores

View = Float[Array, "*layers spatial n_in n_out"]
Views = Mapping[str, View]
OfOutputs = Mapping[str, Float[Array, "..."]]
"""Leaf name -> a number for each output, (*layers, out)."""


def magnitude(params: Views, /, **_: Any) -> Scores:
    r"""Absolute value, $S = |w|$.

    With `Output()` filters compete by their L1 norms.

    References:
        Han et al. 2015, arXiv:1506.02626; of filters: Li et al. 2017, arXiv:1608.08710.
    """
    return {name: jnp.abs(param).astype(jnp.float32) for name, param in params.items()}


def squared_magnitude(params: Views, /, **_: Any) -> Scores:
    r"""Square, $S = w^2$: with groups these compete by their L2 norms; for single weights it ranks as `magnitude` does.

    References:
        He et al. 2018, arXiv:1808.06866.
    """
    return {name: jnp.square(param.astype(jnp.float32)) for name, param in params.items()}


def random(params: Views, /, *, key: Key[Array, ""], **_: Any) -> Scores:
    """Uniform random numbers in [0, 1): the baseline every criterion has to beat.

    Args:
        params: only names and shapes are looked at.
        key: a key from `jax.random.key`. A leaf's numbers depend on the key and the leaf's place, not on its values.
    """
    keys = jax.random.split(key, len(params))
    return {
        name: jax.random.uniform(keys[i], param.shape, jnp.float32) for i, (name, param) in enumerate(params.items())
    }


def lamp(params: Views, /, **_: Any) -> Scores:
    r"""Square of a weight, over the squares of all of its leaf that are not smaller.

    $S_i = w_i^2 / \sum_{j: |w_j| \ge |w_i|} w_j^2$, of equal weights the lower index counting as the larger. The
    largest of a leaf scores 1, so that none is emptied; made for `Global()`, which then finds each leaf's sparsity.

    References:
        Lee et al. 2021, arXiv:2010.07611.
    """
    return {name: _lamp(param) for name, param in params.items()}


def _lamp(view: View) -> View:
    squares = rounded(jnp.square(view.astype(jnp.float32))).reshape(*view.shape[:-3], -1)
    order = jnp.argsort(-squares, axis=-1, stable=True)
    falling = jnp.take_along_axis(squares, order, -1)
    share = falling / jnp.maximum(jnp.cumsum(falling, -1), jnp.finfo(jnp.float32).tiny)
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(share, back, -1).reshape(view.shape)


def geometric_median(params: Views, /, **_: Any) -> Scores:
    r"""Distance of a filter from all others of its leaf, $S_j = \sum_i \lVert F_j - F_i \rVert_2$.

    The filter nearest to the others' geometric median is the one they can best stand in for, whatever its norm. All
    weights of an output score alike: combine with `Output()`. Takes time in the square of the outputs.

    References:
        He et al. 2019 (FPGM), arXiv:1811.00250.
    """
    return {
        name: jnp.broadcast_to(_distances(param)[..., None, None, :], param.shape) for name, param in params.items()
    }


def _distances(view: View) -> Float[Array, "*layers n_out"]:
    filters = jnp.moveaxis(view.astype(jnp.float32), -1, 0)  # (out, *layers, spatial, in)

    def distance(one: Array) -> Array:
        squares = jnp.squeeze(ordered_sum(rounded(jnp.square(filters - one[None])), (-2, -1)), (-2, -1))
        return jnp.squeeze(ordered_sum(jnp.sqrt(squares), (0,)), 0)

    return jnp.moveaxis(jax.lax.map(distance, filters), 0, -1)


def norm_scale(params: Views, /, *, scales: OfOutputs, **_: Any) -> Scores:
    r"""Scale of the normalisation that follows, $S_j = |\gamma_j|$ for all weights of output j.

    Combine with `Output()`, and with an L1 penalty on the scales as the model trains.

    Args:
        params: weights.
        scales: leaf name -> the scale of every output, (*layers, out); of every pruned leaf.

    References:
        Liu et al. 2017 (network slimming), arXiv:1708.06519.
    """
    return {name: of_outputs("scales", scales, name, param) for name, param in params.items()}


def of_outputs(key: str, evidence: OfOutputs, name: str, view: View) -> View:
    """A number for every output, as the score of each of its weights: its absolute value.

    Raises:
        ValueError: none for this leaf, or as many as other outputs.
    """
    expected = (*view.shape[:-3], view.shape[-1])
    arrived = jnp.shape(evidence[name]) if name in evidence else None
    if arrived != expected:
        hint = " Leave out leaves that have none with `select`." if arrived is None else ""
        raise ValueError(f"`{key}` needs one number for each output of {name!r}, {expected}; {arrived} arrived.{hint}")
    return jnp.broadcast_to(jnp.abs(evidence[name]).astype(jnp.float32)[..., None, None, :], view.shape)
