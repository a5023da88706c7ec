"""Evidence: what criteria look at besides the weights, computed from a model's function and data.

    compute_masks(Method(criterion=grasp), params, 0.9, hessian_grads=hessian_grads(loss, params))

All are pure; jit them with the data as arguments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxprune.compat import present_forms
from jaxprune.criteria.calibration import bytes_of_moments, of_activations
from jaxprune.criteria.derivatives import of_outputs
from jaxprune.criteria.seen import Inputs, Outputs, Seen
from jaxprune.tracing.exponents import known_power, scaled, times_power
from jaxprune.types import Params

__all__ = [
    "Activations",
    "Inputs",
    "Outputs",
    "Seen",
    "activations",
    "bytes_of_moments",
    "flow_grads",
    "hessian_grads",
    "of_activations",
    "of_outputs",
    "squared_grads",
]


def hessian_grads(loss: Callable[[Params], Float[Array, ""]], params: Params) -> Params:
    r"""$H g$, the Hessian of the loss times its gradient: for `grasp`.

    Args:
        loss: params -> loss; twice differentiable there (a ReLU's second derivative is 0).
        params: where.
    """
    gradient = jax.grad(loss)
    return jax.jvp(gradient, (params,), (gradient(params),))[1]


def flow_grads(apply_fn: Callable[..., Any], params: Params, x: Shaped[Array, "..."] | jax.ShapeDtypeStruct) -> Params:
    r"""$\partial R / \partial |w|$ with $R = \sum f_{|w|}(\mathbb{1})$: for `synflow`.

    No data are looked at. Norms and the like break the flow: hand in a function without them, or with them frozen.
    Every layer multiplies the flow by about the same, so that in a deep network it leaves the range of its dtype;
    layers are rescaled on the way (`jaxprune.tracing.exponents`), and all derivatives then have one power of two too
    much or too little. While R is between $2^{-42}$ and $2^{42}$ (of float32), they have none.

    Args:
        apply_fn: (params, x) -> outputs, summed over all of them.
        params: weights; biases take part with their absolute values too.
        x: shape and dtype of the input, one sample being enough; its values are not looked at.
    """
    absolute = jax.tree.map(jnp.abs, params)
    ones = jnp.ones(x.shape, x.dtype)

    def flow(weights: Params) -> Any:
        return scaled(lambda weights, x: jnp.sum(apply_fn(weights, x)), weights, ones)

    grads, exponent = jax.grad(flow, has_aux=True)(absolute)
    return jax.tree.map(lambda grad: times_power(grad, known_power(exponent, grad.dtype)), grads)


def squared_grads(loss: Callable[[Params, Any], Float[Array, ""]], params: Params, samples: Any) -> Params:
    r"""$F = \frac{1}{n} \sum_i (\partial \ell_i / \partial w)^2$, the Fisher information's diagonal: for `fisher`.

    Args:
        loss: (params, sample) -> loss of this one sample.
        params: where.
        samples: pytree of arrays with n samples along their first axis, seen one after the other.

    Raises:
        ValueError: there are no samples.
    """
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(samples)}
    if len(counts) != 1 or not (count := max(counts))[:1] > (0,):
        raise ValueError(f"`samples` must have equally many samples in every leaf, at least one; it has {counts}.")

    def add(total: Params, sample: Any) -> tuple[Params, None]:
        grads = jax.grad(loss)(params, sample)
        return jax.tree.map(lambda t, g: t + jnp.square(g.astype(jnp.float32)), total, grads), None

    nothing = jax.tree.map(lambda param: jnp.zeros(jnp.shape(param), jnp.float32), params)
    with present_forms():
        total, _ = jax.lax.scan(add, nothing, samples)
    return jax.tree.map(lambda t: t * (1 / count[0]), total)


class Activations(NamedTuple):
    """Sums over the tokens of a batch, for each feature; of several batches `jax.tree.map(jnp.add, one, other)`.

    Attributes:
        tokens: how many there were.
        squares: sum of squares.
        magnitudes: sum of absolute values.
        zeros: how many were zero.
    """

    tokens: Float[Array, ""]
    squares: Float[Array, "features"]
    magnitudes: Float[Array, "features"]
    zeros: Float[Array, "features"]

    @property
    def norms(self) -> Float[Array, "features"]:
        """L2 norms over all tokens: for `wanda`."""
        return jnp.sqrt(self.squares)

    @property
    def means(self) -> Float[Array, "features"]:
        """Mean absolute values: for `activation_mean`."""
        return self.magnitudes / jnp.maximum(self.tokens, 1)

    @property
    def zero_fractions(self) -> Float[Array, "features"]:
        """Fractions of zeros: for `apoz`."""
        return self.zeros / jnp.maximum(self.tokens, 1)


def activations(values: Float[Array, "*tokens features"]) -> Activations:
    """Sums over a batch: every axis but the last one counts tokens (samples, positions, pixels)."""
    flat = values.reshape(-1, values.shape[-1]).astype(jnp.float32)
    return Activations(
        tokens=jnp.float32(flat.shape[0]),
        squares=jnp.sum(jnp.square(flat), 0),
        magnitudes=jnp.sum(jnp.abs(flat), 0),
        zeros=jnp.sum(flat == 0, 0, dtype=jnp.float32),
    )
