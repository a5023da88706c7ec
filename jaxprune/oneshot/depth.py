"""Whole layers left out: which ones the loss misses least.

    params, removed = prune_layers(loss, params, batches, 2)

Layers are blocks that may be left out, as residual ones are: entries of a list in the params, or stacked along the
first axis of every leaf. The function must take as many as there are.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxprune import tree
from jaxprune.types import Params


def layer_importance(
    loss: Callable[..., Any], params: Params, batches: Iterable[Any], *, layers: str = "layers"
) -> Float[np.ndarray, "layers"]:
    """How much the loss rises without each of the layers, the mean over batches.

    Args:
        loss: (params, batch) -> scalar, a mean.
        params: dicts and lists of arrays.
        batches: calibration data of one shape; pytrees of arrays.
        layers: where they are in the params, such as "layers" or "decoder/blocks".

    Raises:
        ValueError: there are no layers there, or no batch.

    References:
        Muralidharan et al. 2024, arXiv:2407.14679, section 2.2 (depth, by perplexity).
    """
    batches = list(batches)
    if not batches:
        raise ValueError("There is no batch, so there is nothing to calibrate on.")
    value = jax.jit(loss)

    def mean(params: Params) -> float:
        return float(np.mean([np.asarray(value(params, batch), np.float64) for batch in batches]))

    count, dense = _count(params, layers), mean(params)
    if count < 2:
        raise ValueError(f"There is one layer in {layers!r}, and none could be left out.")
    return np.asarray([mean(without_layers(params, [i], layers=layers)) - dense for i in range(count)])


def prune_layers(
    loss: Callable[..., Any], params: Params, batches: Iterable[Any], count: int, *, layers: str = "layers"
) -> tuple[Params, tuple[int, ...]]:
    """Leaves out so many layers, one after the other, each time the one whose absence raises the loss least.

    Args:
        loss: (params, batch) -> scalar, a mean.
        params: dicts and lists of arrays.
        batches: calibration data of one shape; pytrees of arrays.
        count: how many go.
        layers: where they are in the params.

    Returns:
        Params with fewer layers, and the numbers of those that are gone, in the order in which they went.

    Raises:
        ValueError: see `layer_importance`; also a count below 0, or one that leaves no layer; no loss is finite.
    """
    batches, left = list(batches), list(range(_count(params, layers)))
    if not 0 <= count < len(left):
        raise ValueError(f"`count` is how many of the {len(left)} layers in {layers!r} go, one stays; got {count}.")
    removed = []
    for _ in range(count):
        rises = layer_importance(loss, params, batches, layers=layers)
        if not np.isfinite(rises).any():
            raise ValueError(f"Without any one of the layers in {layers!r} the loss is not finite. Mend the loss.")
        least = int(np.nanargmin(rises))
        params = without_layers(params, [least], layers=layers)
        removed.append(left.pop(least))
    return params, tuple(removed)


def without_layers(params: Params, numbers: Collection[int], *, layers: str = "layers") -> Params:
    """Params without some of their layers.

    Args:
        params: dicts and lists of arrays.
        numbers: of the layers that go, from 0.
        layers: where they are in the params.

    Raises:
        ValueError: there are no layers there, or none of such a number.
    """
    count = _count(params, layers)
    if not all(0 <= number < count for number in numbers):
        raise ValueError(f"Layers in {layers!r} are numbered from 0 to {count - 1}; got {sorted(numbers)}.")
    kept = [i for i in range(count) if i not in numbers]

    def fewer(node: Any) -> Any:
        if isinstance(node, list | tuple):
            return type(node)(node[i] for i in kept)
        return jax.tree.map(lambda leaf: leaf[np.asarray(kept)], node)

    return _replaced(params, layers.split("/"), fewer)


def _count(params: Params, layers: str) -> int:
    """How many layers there are."""
    found: list[Any] = []
    _replaced(params, layers.split("/"), lambda node: found.append(node) or node)
    if isinstance(found[0], list | tuple):
        return len(found[0])
    sizes = {name: jnp.shape(leaf)[:1] for name, leaf in tree.named_leaves(found[0]).items()}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise ValueError(
            f"{layers!r} is neither a list of layers nor a tree of leaves that are stacked alike: their first axes are "
            f"{tree.listed(f'{name} {size}' for name, size in sizes.items())}. Say where they are, `layers=`."
        )
    return next(iter(sizes.values()))[0]


def _replaced(node: Any, path: list[str], change: Callable[[Any], Any]) -> Any:
    """The params with what lies at a path changed."""
    if not path:
        return change(node)
    word, *rest = path
    if isinstance(node, dict) and word in node:
        return {**node, word: _replaced(node[word], rest, change)}
    if isinstance(node, list | tuple) and word.isdigit() and int(word) < len(node):
        return type(node)(_replaced(one, rest, change) if i == int(word) else one for i, one in enumerate(node))
    there = tree.listed(node) if isinstance(node, dict) else f"a {type(node).__name__}"
    raise ValueError(f"Layers were expected at {word!r}, but there is {there}. Say where they are, `layers=`.")
