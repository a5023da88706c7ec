"""Storing: from a fine-tuned model to its file, and what that file is worth.

stored = prepared(store, network, params, masks, samples)     # without dead units, if [store] says so
quantized = quantize(store, params, masks)      # as [store] says; shared values may then be trained further
measure(path, apply, params, test)              # bytes, and the accuracy of what was read back
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab import models
from jaxprune.lab.data.samples import Samples
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.runs import train
from jaxprune.quantize.codes import cast, to_codebooks, to_integers
from jaxprune.types import Masks, Params


class Stored(NamedTuple):
    """A model as its file holds it.

    Attributes:
        apply: (params, images, key=None) -> logits.
        params: pytree of arrays or quantized leaves, perhaps of smaller shapes than the network's.
        masks: of the shapes of the params.
    """

    apply: Callable[..., Any]
    params: Any
    masks: Masks


def prepared(store: cfg.Store, network: models.Network, params: Params, masks: Masks, images: Any) -> Stored:
    """The model before it is quantized: as it is, or without the units that nothing reaches or leaves.

    Args:
        store: the [store] section.
        network: the model.
        params: fine-tuned, dead weights at zero.
        masks: True = alive.
        images: samples, for their shape.
    """
    if not store.compact:
        return Stored(network.apply, params, masks)
    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
    small = jp.compact(network.apply, params, masks, one)
    left = tree.map_named(lambda name, mask: _without(mask, small.removed.get(name, ())), masks)
    return Stored(small.apply if small.refusal else network.apply, small.params, left)


def _without(mask: Any, removed: Sequence[Sequence[int]]) -> Any:
    for axis, gone in enumerate(removed):
        mask = np.delete(np.asarray(mask), np.asarray(gone, int), axis)
    return jnp.asarray(mask)


def leaf_bytes(params: Params, form: str, network: models.Network, image: Sequence[int]) -> tuple[Any, dict[str, int]]:
    """Params compressed to a format where they can be, and leaf name -> bytes in memory.

    Args:
        params: of the network.
        form: the format.
        network: the model, which is asked how its weights lie.
        image: shape of one input, if the network does not say it.
    """
    sample = network.sample or jax.ShapeDtypeStruct(tuple(image), jnp.float32)
    one = jax.ShapeDtypeStruct((1, *sample.shape), sample.dtype)
    layout = jp.layout_of(jp.trace(network.apply, params, one))
    stored = jp.sparse.compress(params, format=form, layout=layout, unsupported="dense")
    leaves = jax.tree_util.tree_leaves_with_path(stored, is_leaf=lambda x: isinstance(x, jp.sparse.SparseWeight))
    return stored, {tree.leaf_name(path): jp.sparse.nbytes(leaf) for path, leaf in leaves}


def quantize(store: cfg.Store, params: Any, masks: Any) -> Any:
    """Params with leaves as [store] says: codebooks, integers, shorter floats, or as they are.

    Args:
        store: the [store] section.
        params: pytree of arrays, of jax or NumPy.
        masks: which weights are alive; None: those that are not zero.

    Raises:
        ValueError: weights that are not finite, or too large; `select` matches no leaf.
    """
    select = store.select or tree.weights
    if store.quantize == "codebook":
        return to_codebooks(params, masks, bits=store.bits, select=select)
    if store.quantize in ("int8", "int4"):
        return to_integers(params, masks, bits=int(store.quantize[-1]), select=select)
    return params if store.quantize == "none" else cast(params, store.quantize, select=select)


def identity(config: cfg.Config, seed: int, image: Sequence[int], classes: int) -> dict[str, Any]:
    """What a file says of its model: enough to build it and to find the run, and no more, since it counts.

    Args:
        config: the experiment.
        seed: of this model.
        image: shape of one input.
        classes: how many there are.
    """
    return {
        "name": config.name,
        "hash": cfg.config_hash(config),
        "seed": seed,
        "data": config.data.name,
        "model": config.model.model_dump(mode="json", exclude={"dropout", "adjust_dropout"}),
        "image": list(image),
        "classes": classes,
        "jaxprune": importlib.metadata.version("jaxprune"),
    }


def measure(path: Path, apply: Callable[..., Any], like: Params, dense: Params, test: Samples) -> dict[str, Any]:
    """Bytes of a file, of the dense model, the weights left, and the accuracy of the model that is read from the file.

    Args:
        path: of the file.
        apply: the stored model's function, jitted.
        like: params of the stored model, for their structure.
        dense: params before any unit was removed.
        test: samples to classify.
    """
    params = jp.load(path, like=like)
    return {
        "bytes": path.stat().st_size,
        "dense_bytes": sum(leaf.nbytes for leaf in tree.named_leaves(dense).values()),
        "shapes": {name: list(leaf.shape) for name, leaf in tree.named_leaves(params).items()},
        "nnz": sum(int(np.count_nonzero(leaf)) for name, leaf in tree.selected_leaves(tree.weights, params).items()),
        "accuracy": train.accuracy(train.predict(apply, params, test), test),
    }
