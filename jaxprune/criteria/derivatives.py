r"""How much every output of a product matters to a loss: second moments of the loss's derivatives there.

    found = of_outputs(loss, params, batches)         found[name].moments: sum over tokens of g g^T, g = d loss / d y

With x the inputs and y = x W the outputs of a product, $X^\top X \otimes G^\top G$ is the Kronecker-factored Fisher
matrix of W if the loss is the negative log-likelihood of what was sampled from the model.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxprune import tree
from jaxprune.criteria.calibration import second_moments
from jaxprune.tracing.features import inputs_of, layers_of, places, results_of
from jaxprune.tracing.finder import arrays_of, jaxpr_of
from jaxprune.tracing.products import Product, Products
from jaxprune.types import Params


class Derivatives(NamedTuple):
    r"""What a loss's derivatives g by the outputs of a leaf's products are.

    Attributes:
        moments: $\sum_t g_t g_t^\top$, each token counted by $\lVert x_t \rVert^2$ as far as these differ, so that the
            trace is $\sum_t \lVert g_t \rVert^2$ all the same.
        tokens: for every batch $\lVert g_t \rVert^2$, divided by their mean over all batches; None of a leaf that is
            used more than once, whose tokens all count the same.
    """

    moments: Float[Array, "layers outputs outputs"]
    tokens: list[Float[Array, "layers tokens"]] | None


def of_outputs(
    loss: Callable[..., Float[Array, ""]], params: Params, batches: Iterable[Any], *, select: tree.Select = tree.weights
) -> dict[str, Derivatives]:
    r"""How much the outputs of every product with a selected leaf matter to a loss, and how much each token does.

    One backward pass a batch, in which every product is followed by an identity whose derivative by zeros beside it is
    taken to be what is wanted. With the inputs' moments weighed by the tokens,
    $\sum_t \lVert g_t \rVert^2 x_t x_t^\top \otimes \sum_t \lVert x_t \rVert^2 g_t g_t^\top$ is, up to its scale, the
    Kronecker product with the same partial traces as $\sum_t x_t x_t^\top \otimes g_t g_t^\top$, the Fisher matrix of
    the leaf; where x and g are independent it is Martens' and Grosse's. A leaf that is used more than once has the sum
    over its uses, tokens unweighed.

    Args:
        loss: (params, batch) -> scalar, a sum over tokens.
        params: the weights.
        batches: as `of_activations` has them.
        select: leaves to look at.

    Returns:
        Leaf name -> derivatives, outputs in the order of the leaf's view; leaves in no product left out.

    Raises:
        ValueError: a leaf cannot be followed to its products; derivatives are not finite; there is no batch.

    References:
        Martens and Grosse 2015, arXiv:1503.05671.
    """
    names = set(tree.selected_leaves(select, params))
    uses: dict[str, dict[int, Product]] = {}

    def total(slots: dict[str, _Slots], params: Params, batch: Any) -> Any:
        def do(product: Product, state: Any) -> Any:
            name = product.site.name
            uses.setdefault(name, {})[product.number] = product
            return state, _tapped(product, slots[name]) if name in slots else product.plain()

        program = Products(jaxpr_of(loss, params, batch), params, names, do)
        return program.run(arrays_of((params, (batch,), {}))[0], ())[1][0]

    derive = jax.jit(lambda *args: jax.grad(total)(*args))
    parts: list[dict[str, _Slots]] = []
    known: dict[Any, dict[str, _Slots]] = {}
    for batch in batches:
        shapes = tuple((jnp.shape(one), one.dtype) for one in arrays_of(batch)[0])
        if shapes not in known:
            uses.clear()
            jax.eval_shape(lambda params, batch: total({}, params, batch), params, batch)
            known[shapes] = {name: _zeros(products) for name, products in uses.items()}
        parts.append(derive(known[shapes], params, batch))
    if not parts or not parts[0]:
        raise ValueError("There is no batch, or no product with a selected leaf, so there is nothing to look at.")
    return {name: _together(name, [part[name] for part in parts]) for name in parts[0]}


class _Slots(NamedTuple):
    """Zeros whose derivatives are sums of one batch."""

    moments: Float[Array, "layers outputs outputs"]
    tokens: Float[Array, "layers tokens"] | None


def _zeros(products: Mapping[int, Product]) -> _Slots:
    site = products[0].site
    axes = places(site).axes
    layers, outputs = (math.prod(site.leaf_shape[a] for a in part) for part in (axes.layers, axes.outputs))
    tokens = math.prod(site.y_shape) // places(site).outputs.size // places(site).layers.size
    alone = jnp.zeros((layers, tokens), jnp.float32) if len(products) == 1 else None
    return _Slots(jnp.zeros((layers, outputs, outputs), jnp.float32), alone)


def _tapped(product: Product, slots: _Slots) -> Shaped[Array, "..."]:
    """The result of a product; the derivatives by the slots are those of the result, in the leaf's order."""
    site, ndim = product.site, product.weight.ndim
    order, layers = places(site).outputs, layers_of(product)
    squares = None if slots.tokens is None else jnp.sum(jnp.square(inputs_of(product)), -1)

    @jax.custom_vjp
    def tap(y: Array, here: _Slots, squares: Array | None) -> Array:
        return y

    def backward(squares: Array | None, g: Array) -> tuple[Array, _Slots, Array | None]:
        rows = results_of(site, ndim, g)
        moments = second_moments(rows, rows if squares is None else rows * squares[..., None])
        full = jnp.zeros((len(moments), *slots.moments.shape[1:]), jnp.float32)
        full = full.at[:, order[:, None], order[None]].add(moments)
        if squares is None:
            return g, _Slots(full, None), None
        return g, _Slots(full, jnp.sum(jnp.square(rows), -1)), jnp.zeros_like(squares)

    tap.defvjp(lambda y, here, squares: (y, squares), backward)
    return tap(product.plain(), jax.tree.map(lambda slot: slot[layers], slots), squares)


def _together(name: str, parts: list[_Slots]) -> Derivatives:
    moments = sum(part.moments for part in parts)
    if not np.isfinite(moments).all():
        raise ValueError(
            f"Derivatives of the loss by the outputs of {name!r} are not finite. Mend the loss, or the batch."
        )
    tokens = [part.tokens for part in parts if part.tokens is not None]
    if not tokens:
        return Derivatives(moments, None)
    whole = sum(one.sum(-1) for one in tokens)
    counts = sum(one.shape[-1] for one in tokens)
    traces = jnp.trace(moments, axis1=1, axis2=2)
    scale = jnp.where(traces > 0, whole / jnp.where(traces > 0, traces, 1), 1)
    means = jnp.where(whole > 0, whole / counts, 1)[:, None]
    return Derivatives(
        moments * scale[:, None, None], [jnp.where(whole[:, None] > 0, one / means, 1) for one in tokens]
    )
