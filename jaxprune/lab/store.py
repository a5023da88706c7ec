"""Storing: from a fine-tuned model to its file, and what that file is worth.

quantized = quantize(store, params, masks)      # as [store] says; shared values may then be trained further
write(path, quantized, masks, metadata)
measure(path, apply, params, test)              # bytes, and the accuracy of what was read back
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab import config as cfg
from jaxprune.lab import data, train
from jaxprune.storage.quantize import cast, to_codebooks, to_integers
from jaxprune.types import Params


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


def identity(config: cfg.Config, seed: int) -> dict[str, Any]:
    """What a file says of its model: enough to build it and to find the run, and no more, since it counts.

    Args:
        config: the experiment.
        seed: of this model.
    """
    return {
        "name": config.name,
        "hash": cfg.config_hash(config),
        "seed": seed,
        "data": config.data.name,
        "model": config.model.model_dump(mode="json", exclude={"dropout"}),
        "image": list(data.IMAGES[config.data.name]),
        "classes": data.CLASSES,
        "jaxprune": importlib.metadata.version("jaxprune"),
    }


def write(path: Path, store: cfg.Store, quantized: Any, masks: Any, metadata: dict[str, Any]) -> None:
    """The file of a model.

    Raises:
        ValueError: an encoding that these weights do not have.
        OSError: it cannot be written.
    """
    jp.save(path, quantized, masks=masks, encoding=store.encoding, deflate=store.deflate, metadata=metadata)


def measure(path: Path, apply: Callable[..., Any], like: Params, test: train.Samples) -> dict[str, Any]:
    """Bytes of a file, of its tensors as dense arrays, and the accuracy of the model that is read from it.

    Args:
        path: of the file.
        apply: the network's function, jitted.
        like: params of the network, for their structure.
        test: samples to classify.
    """
    params = jp.load(path, like=like)
    return {
        "bytes": path.stat().st_size,
        "dense_bytes": sum(leaf.nbytes for leaf in tree.named_leaves(params).values()),
        "accuracy": train.accuracy(train.predict(apply, params, test), test),
    }
