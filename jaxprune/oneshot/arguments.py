"""What may be handed to `prune`: each refusal says what to do instead."""

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune import tree
from jaxprune.checks import check_sparsity
from jaxprune.distributions import NM, Distribution
from jaxprune.layout import Axes
from jaxprune.oneshot.layerwise import Solver
from jaxprune.tracing.finder import arrays_of
from jaxprune.types import Masks, Params


def check_solver(solver: Solver, masks: Masks | None, loss: Any, params: Params) -> None:
    """Refuse masks and a loss for a solver that takes none, and one that takes masks without them.

    Raises:
        ValueError: so it is; masks of another structure than the params.
    """
    words = inspect.signature(solver).parameters
    if loss is not None and "outputs" not in words:
        raise ValueError(f"`{solver}` cannot weigh outputs: leave `loss` out, or take `AlternatingDirections()`.")
    if masks is None and "mask" in words:
        raise ValueError(f"`{solver}` fits the weights of a mask: say which stay, `masks=`.")
    if masks is not None and "mask" not in words:
        raise ValueError(f"`{solver}` chooses a mask of its own: leave `masks` out, or take `LeastSquares()`.")
    if masks is not None:
        tree.check_like("The masks", masks, params)


def check_words(order: str, fit: str, sparsity: Any, pattern: Any, masks: Any) -> None:
    """Refuse words that are none, and sparsities; warn of a fit that does not go with the order.

    Raises:
        ValueError: another word, or a sparsity outside [0, 1), or none where one is needed.
    """
    for what, word, words in (("order", order, ("products", "blocks", "layers")), ("fit", fit, ("dense", "own"))):
        if word not in words:
            raise ValueError(f"`{what}` is one of {', '.join(map(repr, words))}; {word!r} arrived.")
    if (order, fit) == ("blocks", "dense"):
        warnings.warn(
            "`fit='dense'` with `order='blocks'` aims at outputs of the dense model from inputs that still change, by "
            "which models have collapsed: take `order='products'`, or `fit='own'`.",
            stacklevel=3,
        )
    if isinstance(sparsity, Mapping):
        for name, shares in sparsity.items():
            for share in np.ravel(shares):
                check_sparsity(float(share), f"sparsity[{name!r}]")
    elif sparsity is not None:
        check_sparsity(sparsity)
    elif not isinstance(pattern, NM) and masks is None:
        raise ValueError("`sparsity` is the fraction removed, in [0, 1); only `NM` and `masks` go without.")


def alike(batches: list[Any]) -> list[list[Any]]:
    """The arrays of every batch; they must have the same shapes.

    Raises:
        ValueError: they have others, or there is no batch.
    """
    if not batches:
        raise ValueError("There is no batch, so there is nothing to calibrate on.")
    arrays = [arrays_of(batch)[0] for batch in batches]
    shapes = [[(jnp.shape(one), one.dtype) for one in batch] for batch in arrays]
    for i, one in enumerate(shapes):
        if one != shapes[0]:
            raise ValueError(f"Batches must be alike: the first has {shapes[0]}, number {i} has {one}. Cut or pad it.")
    return arrays


def share_of_layer(each: Mapping[str, Any], name: str, layer: int) -> Float[Array, ""]:
    """The sparsity of one layer.

    Raises:
        ValueError: it has none.
    """
    shares = np.ravel(each.get(name, ()))
    if layer >= len(shares):
        raise ValueError(
            f"`sparsity` has {len(shares)} numbers for {name!r}, which has layer {layer} too, counted from 0. Leave it "
            "out with `select`, or give each layer a number."
        )
    return jnp.float32(shares[layer])


def check_runs(name: str, axes: Axes, shape: tuple[int, ...], pattern: Distribution | None) -> None:
    """Refuse `NM` whose runs do not divide the inputs.

    Raises:
        ValueError: they do not.
    """
    inputs = math.prod(shape[axis] for axis in axes.inputs)
    if isinstance(pattern, NM) and inputs % pattern.m:
        raise ValueError(
            f"`NM({pattern.n}, {pattern.m})` needs runs of {pattern.m} along the input axis, but {name!r} has {inputs} "
            "inputs. Leave it out with `select`."
        )
