"""Criterion: how much does each weight matter?

A criterion maps weights, and evidence where it needs any, to scores: non-negative float32, larger = keep.

    scores = criterion(params, **evidence)

`params` is a mapping leaf name -> view (*layers, spatial, in, out), and so is evidence that has the structure of the
params. A criterion takes the evidence it needs as keyword-only arguments and lets the rest pass.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxprune.types import Scores

Views = Mapping[str, Float[Array, "*layers spatial n_in n_out"]]


def magnitude(params: Views, /, **_: Any) -> Scores:
    r"""Absolute value, $S = |w|$.

    References:
        Han et al. 2015, arXiv:1506.02626.
    """
    return {name: jnp.abs(param).astype(jnp.float32) for name, param in params.items()}


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


def taylor(params: Views, /, *, grads: Views, **_: Any) -> Scores:
    r"""First-order change of the loss if the weight were zero, $S = |w \cdot \partial L / \partial w|$.

    Args:
        params: weights.
        grads: gradient of the loss, shaped like the weights; of one batch, or the mean of several.

    References:
        Molchanov et al. 2019, arXiv:1906.10771 (there squared and summed per filter: combine with `Output()`);
        at initialisation and ranked globally it is SNIP, Lee et al. 2019, arXiv:1810.02340.
    """
    return {
        name: jnp.abs(param.astype(jnp.float32) * grads[name].astype(jnp.float32)) for name, param in params.items()
    }
