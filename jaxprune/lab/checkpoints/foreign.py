"""What containers of arrays do not say of a model, in plain data beside its arrays.

    described(params, masks)         {name: {"path": keys, "alive": ..., "shape": ..., "dtype": ...}}, what is not usual
    rebuilt(leaves, descriptions)    params, masks

A container keeps a name for each array, which is its keys joined by slashes, and no masks. A path is described where
the name split at slashes is another one (lists, tuples, numbers as keys, slashes in keys), a mask where a zero is
alive: True if all weights are, else the positions of those zeros. Shape and dtype are those of arrays without elements.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import tree
from jaxprune.storage import paths


def described(params: Any, masks: Any = None) -> dict[str, dict[str, Any]]:
    """Leaf name -> what its name and its array do not say; leaves of which they say all are left out.

    Args:
        params: pytree of NumPy arrays.
        masks: likewise, of bools; None: those weights are alive that are not zero.
    """
    alive = {} if masks is None else tree.named_leaves(masks)
    found = {}
    for name, (keys, leaf) in paths.flattened(params).items():
        one: dict[str, Any] = {} if list(keys) == name.split("/") else {"path": list(keys)}
        if not leaf.size:
            one |= {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
        elif name in alive and (zeros := np.flatnonzero(np.asarray(alive[name]) & ~_is_alive(leaf))).size:
            one["alive"] = True if np.all(alive[name]) else zeros.tolist()
        if one:
            found[name] = one
    return found


def rebuilt(leaves: Mapping[str, Any], descriptions: Mapping[str, Any]) -> tuple[Any, Any]:
    """(params, masks).

    Args:
        leaves: name -> NumPy array, those without elements perhaps left out.
        descriptions: of `described`.

    Raises:
        ValueError: descriptions of other leaves.
    """
    found, alive = {}, {}
    try:
        sizes = {name: (one["shape"], jnp.dtype(one["dtype"])) for name, one in descriptions.items() if "shape" in one}
        every = {**{name: np.zeros(*size) for name, size in sizes.items()}, **leaves}
        for name, leaf in every.items():
            one = descriptions.get(name, {})
            keys = tuple(tuple(key) if isinstance(key, list) else key for key in one.get("path", name.split("/")))
            mask = np.asarray(_is_alive(leaf))
            mask.reshape(-1)[slice(None) if one.get("alive") is True else one.get("alive", [])] = True
            found[keys], alive[keys] = leaf, mask
        if not descriptions.keys() <= every.keys():
            raise ValueError("a leaf that is described is not there")
        return paths.nested(found), paths.nested(alive)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"The description of its leaves is not that of its arrays: {error}.") from None


@np.errstate(invalid="ignore")  # of NaNs that are compared
def _is_alive(leaf: Any) -> np.ndarray:
    return np.asarray(np.asarray(leaf) != 0)
