r"""How much every output of a product matters to a loss: second moments of the loss's derivatives there.

    found = of_outputs(loss, params, batches)         found[name] = sum over tokens of g g^T, g = d loss / d y

With x the inputs and y = x W the outputs of a product, $X^\top X \otimes G^\top G$ is the Kronecker-factored Fisher
matrix of W if the loss is the negative log-likelihood of what was sampled from the model.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxprune import tree
from jaxprune.criteria.calibration import second_moments
from jaxprune.tracing.features import layers_of, places, results_of
from jaxprune.tracing.finder import arrays_of, jaxpr_of
from jaxprune.tracing.products import Product, Products
from jaxprune.tracing.sites import Site
from jaxprune.types import Params


def of_outputs(
    loss: Callable[..., Float[Array, ""]],
    params: Params,
    batches: Iterable[Any],
    *,
    select: tree.Select = tree.weights,
    diagonal: bool = False,
) -> dict[str, Float[Array, "layers outputs *outputs"]]:
    r"""$\sum_t g_t g_t^\top$ of every product with a selected leaf, $g_t$ the derivatives of the loss by its outputs.

    One backward pass a batch, in which every product is followed by an identity whose derivative by a matrix of zeros
    beside it is taken to be $G^\top G$. A leaf that is used more than once has the sum over its uses.

    Args:
        loss: (params, batch) -> scalar, a sum over tokens.
        params: the weights.
        batches: as `of_activations` has them.
        select: leaves to look at.
        diagonal: only $\sum_t g_{to}^2$ of every output, (layers, outputs).

    Returns:
        Leaf name -> (layers, outputs, outputs), outputs in the order of the leaf's view; leaves in no product left out.

    Raises:
        ValueError: a leaf cannot be followed to its products; derivatives are not finite; there is no batch.

    References:
        Martens and Grosse 2015, arXiv:1503.05671.
    """
    names = set(tree.selected_leaves(select, params))
    sites: dict[str, Site] = {}

    def total(zeros: dict[str, Array], params: Params, batch: Any) -> Any:
        def do(product: Product, state: Any) -> Any:
            name = product.site.name
            sites.setdefault(name, product.site)
            if name not in zeros:
                return state, product.plain()
            return state, _tapped(product, zeros[name])

        program = Products(jaxpr_of(loss, params, batch), params, names, do, differentiated=True)
        return program.run(arrays_of((params, (batch,), {}))[0], ())[1][0]

    derive = jax.jit(lambda *args: jax.grad(total)(*args))
    found: dict[str, Array] = {}
    for batch in batches:
        if not sites:
            jax.eval_shape(total, {}, params, batch)
            zeros = {name: _zeros(site, diagonal) for name, site in sites.items()}
        more = derive(zeros, params, batch)
        found = {name: found[name] + one for name, one in more.items()} if found else more
    if not found:
        raise ValueError("There is no batch, or no product with a selected leaf, so there is nothing to look at.")
    for name, one in found.items():
        if not np.isfinite(one).all():
            raise ValueError(
                f"Derivatives of the loss by the outputs of {name!r} are not finite. Mend the loss, or the batch."
            )
    return found


def _zeros(site: Site, diagonal: bool) -> Float[Array, "layers outputs *outputs"]:
    axes = places(site).axes
    layers, outputs = (math.prod(site.leaf_shape[a] for a in part) for part in (axes.layers, axes.outputs))
    return jnp.zeros((layers, outputs) if diagonal else (layers, outputs, outputs), jnp.float32)


def _tapped(product: Product, zeros: Float[Array, "layers outputs *outputs"]) -> Shaped[Array, "..."]:
    """The result of a product; the derivative by the zeros is that of the result times itself, in the leaf's order."""
    site, ndim = product.site, product.weight.ndim
    order, layers = places(site).outputs, layers_of(product)

    @jax.custom_vjp
    def tap(y: Array, zeros: Array) -> Array:
        return y

    def backward(_: Any, g: Array) -> tuple[Array, Array]:
        rows = results_of(site, ndim, g)
        full = jnp.zeros((len(rows), *zeros.shape[1:]), jnp.float32)
        if zeros.ndim == 2:
            return g, full.at[:, order].add(jnp.sum(jnp.square(rows), axis=1))
        return g, full.at[:, order[:, None], order[None]].add(second_moments(rows, rows))

    tap.defvjp(lambda y, zeros: (y, None), backward)
    return tap(product.plain(), zeros[layers])
