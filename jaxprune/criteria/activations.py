"""Criteria that look at what activations were on some data; `jaxprune.evidence` gathers it."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.criteria.weights import OfOutputs, Views, of_outputs
from jaxprune.types import Scores


def wanda(params: Views, /, *, input_norms: Mapping[str, Float[Array, "..."]], **_: Any) -> Scores:
    r"""Magnitude of a weight times the norm of the activations it meets.

    $S_{ij} = |W_{ij}| \, \lVert X_{:,i} \rVert_2$ for a layer $y = xW$ and calibration inputs $X$, (tokens, in).

    Args:
        params: weights.
        input_norms: leaf name -> L2 norm of every input feature over all tokens, (*layers, in); of a convolution
            (in,), or (spatial, in) where each tap of the window has its own.

    Raises:
        ValueError: none for a leaf, or other inputs.

    References:
        Sun et al. 2023, arXiv:2306.11695. There scores are ranked within each output: combine with `PerOutput()`.
    """
    scores = {}
    for name, view in params.items():
        *layers, spatial, n_in, _out = view.shape
        norms = jnp.asarray(input_norms[name], jnp.float32) if name in input_norms else None
        if norms is None or norms.shape not in ((*layers, n_in), (*layers, spatial, n_in)):
            arrived = None if norms is None else norms.shape
            raise ValueError(
                f"`input_norms` needs one number for each input of {name!r}, {(*layers, n_in)}; {arrived} arrived."
            )
        each_tap = norms.reshape(*layers, -1, n_in, 1)
        scores[name] = jnp.abs(view).astype(jnp.float32) * each_tap
    return scores


def activation_mean(params: Views, /, *, output_means: OfOutputs, **_: Any) -> Scores:
    r"""Mean absolute activation of an output, for all of its weights: $S_j = \mathbb{E} |a_j|$.

    Combine with `Output()`.

    Args:
        params: weights.
        output_means: leaf name -> mean of every output's activations, (*layers, out).

    References:
        Molchanov et al. 2017, arXiv:1611.06440, section 2.2.
    """
    return {name: of_outputs("output_means", output_means, name, view) for name, view in params.items()}


def apoz(params: Views, /, *, zero_fractions: OfOutputs, **_: Any) -> Scores:
    r"""Share of activations of an output that are not zero, for all of its weights: $S_j = 1 - \mathrm{APoZ}_j$.

    Combine with `Output()`.

    Args:
        params: weights.
        zero_fractions: leaf name -> fraction of zeros among every output's activations, (*layers, out).

    References:
        Hu et al. 2016 (average percentage of zeros), arXiv:1607.03250, eq. 1.
    """
    return {
        name: jnp.maximum(1 - of_outputs("zero_fractions", zero_fractions, name, view), 0)
        for name, view in params.items()
    }
