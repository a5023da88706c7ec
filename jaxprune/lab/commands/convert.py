"""Converting: a model out of any file or checkpoint that is known here, and into another.

model = quantized(read(path), "codebook4")
write(path, model, "jaxprune", encoding="bitmask")
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab.checkpoints import checkpoint, foreign, orbax_files
from jaxprune.lab.data import sets
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.runs import store
from jaxprune.quantize.codes import is_quantized
from jaxprune.storage import Artifact, container, paths

KINDS = ("jaxprune", "safetensors", "orbax")
PARAMS, MASKS = "params/", "/masks/"
"""What begins the names of weights in a checkpoint of a run, and what comes before the name of each one's mask."""

PLAIN, LEAVES = "model_metadata", "model_leaves"
"""Under which plain safetensors, whose metadata are texts, have a model's others; and what `foreign` says of leaves."""

TRAINED = ("params", "batch_stats")
OTHERS = ("opt_state", "optimizer", "opt", "step")
"""What a model is in a checkpoint of Flax's `TrainState` or the like, and what one has beside it."""


class Model(NamedTuple):
    """What is converted.

    Attributes:
        params: pytree of arrays, some leaves perhaps quantized.
        masks: which weights are alive; None: those that are not zero.
        metadata: plain data about them.
        left_out: what a checkpoint of training has beside them.
    """

    params: Any
    masks: Any
    metadata: dict[str, Any]
    left_out: tuple[str, ...] = ()


def read(source: Path, *, everything: bool = False) -> Model:
    """A model from a file of ours, plain safetensors, a checkpoint of a run or of Orbax, or Keras's ResNet-50.

    Args:
        source: a file; the folder of a checkpoint, of a stage of a run (its newest one then), or of a PyTree
            checkpoint; or a folder that holds ResNet50/model.json of TensorFlow.js.
        everything: whether of a checkpoint of training all arrays are taken, not the model's alone: its params, and the
            statistics of batch norms beside them.

    Raises:
        ValueError: none of these, or damaged.
        CheckpointError: a damaged checkpoint of a run.
        OSError: it cannot be read.
    """
    if not source.is_dir():
        return _of_file(source)
    if (source / "ResNet50" / "model.json").is_file():
        return _of_keras(source)
    if checkpoint.is_checkpoint(source):
        return _of_run(source, everything)
    return _of_orbax(source, everything)


def _of_file(source: Path) -> Model:
    with Artifact(source) as file:
        metadata, leaves = metadata_of(file), _object(file.metadata.get(LEAVES))
    params, masks = jp.load(source, to="quantized"), jp.load(source, to="masks")
    if leaves is not None:
        params, masks = foreign.rebuilt(jax.tree.map(np.asarray, params), leaves)
    return Model(params, masks, metadata)


def metadata_of(file: Artifact) -> dict[str, Any]:
    """What a file says of its model, those that `write` made plain safetensors included."""
    found = dict(file.metadata)
    if _object(found.get(LEAVES)) is not None:
        del found[LEAVES]
    if (others := _object(found.get(PLAIN))) is not None:
        del found[PLAIN]
    return {**found, **(others or {})}


def _object(text: Any) -> dict[str, Any] | None:
    """The object that a text is in JSON, or None."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _of_orbax(folder: Path, everything: bool) -> Model:
    params, metadata = orbax_files.read_tree(folder)
    if isinstance(leaves := metadata.get(LEAVES), dict):
        found = {name: leaf for name, (_, leaf) in paths.flattened(params).items()}
        params, masks = foreign.rebuilt(found, leaves)
        return Model(params, masks, {key: value for key, value in metadata.items() if key != LEAVES})
    left_out: tuple[str, ...] = ()
    if isinstance(params, dict) and "params" in params and any(key in params for key in OTHERS) and not everything:
        kept = {key: params[key] for key in TRAINED if jax.tree.leaves(params.get(key))}
        left_out = tuple(key for key in params if key not in kept and jax.tree.leaves(params[key]))
        params = kept["params"] if kept.keys() == {"params"} else kept
    keys = dict(paths.flattened(params).values())
    if keys and all(one[-1:] == ("value",) for one in keys):  # Flax NNX's Variables
        params = paths.nested({one[:-1]: leaf for one, leaf in keys.items()})
    return Model(params, None, metadata, left_out)


def _of_keras(folder: Path) -> Model:
    from jaxprune.lab.models import pretrained

    model, params = pretrained.load_resnet50(folder)
    about = {"name": "keras_resnet50"}, list(model.image), model.classes, pretrained.labels(folder)
    return Model(params, None, dict(zip(("model", "image", "classes", "labels"), about, strict=True)))


def _of_run(folder: Path, everything: bool) -> Model:
    leaves = checkpoint.read_leaves(folder)
    if everything:
        return Model(_nested(leaves), None, {})
    params = {name.removeprefix(PARAMS): leaf for name, leaf in leaves.items() if name.startswith(PARAMS)}
    masks = {name.partition(MASKS)[2]: leaf for name, leaf in leaves.items() if MASKS in name}
    if not params:
        raise ValueError(f"{folder} is no checkpoint of a run: none of its leaves is called {PARAMS}...")
    run = next((parent for parent in folder.absolute().parents if (parent / "config.toml").is_file()), None)
    metadata = {}
    if run is not None:
        seed = int(folder.absolute().relative_to(run).parts[0].removeprefix("seed_"))
        config = cfg.load(run / "config.toml")
        metadata = store.identity(config, seed, *sets.facts(config.data))
    left_out = tuple(dict.fromkeys(name.split("/")[0] for name in leaves if not name.startswith(PARAMS)))
    return Model(_nested(params), _nested(masks) if masks.keys() == params.keys() else None, metadata, left_out)


def _nested(leaves: dict[str, Any]) -> Any:
    return paths.nested({tuple(name.split("/")): leaf for name, leaf in leaves.items()})


def quantized(model: Model, how: str, select: tuple[str, ...] = ()) -> Model:
    """The model with leaves in another form; its accuracy, being another, leaves the metadata.

    Args:
        model: what `read` gave; leaves that are quantized already are taken as the weights they stand for.
        how: "codebook2" to "codebook8", "int8", "int4", "bfloat16", "float16", or "none": back to floats.
        select: glob patterns of leaf names, none = every matrix and convolution kernel.

    Raises:
        ValueError: no such form; a pattern that matches no leaf; weights that are not finite.
    """
    kind, bits = ("codebook", how[-1]) if how.startswith("codebook") else (how, "")
    given = {"quantize": kind} | ({"bits": int(bits)} if bits else {}) | ({"select": select} if kind != "none" else {})
    asked = cfg.Store.model_validate(given)
    chosen = tree.selector(select or tree.weights)

    def one(name: str, leaf: Any) -> Any:
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return leaf.dequantize() if is_quantized(leaf) and chosen(name, shape) else leaf

    params = store.quantize(asked, tree.map_named(one, model.params), model.masks)
    return model._replace(
        params=params, metadata={key: one for key, one in model.metadata.items() if key != "accuracy"}
    )


def kind_of(target: Path, to: str = "") -> str:
    """What is to be written: as asked for, or by the suffix.

    Raises:
        ValueError: neither says it.
    """
    kind = to or target.suffix.removeprefix(".")
    if kind not in KINDS:
        raise ValueError(f"{target}: name it .jaxprune or .safetensors, or say --to {', '.join(KINDS)}.")
    return kind


def write(target: Path, model: Model, kind: str, *, encoding: str = "auto", deflate: bool = True) -> None:
    """A file of ours, dense safetensors that any of its readers has, or an Orbax PyTree checkpoint.

    Args:
        target: the file, or for Orbax the folder.
        model: what to write. Structure and masks are in plain safetensors and Orbax's files where their own names and
            arrays do not say them: in the metadata, see `jaxprune.lab.checkpoints.foreign`.
        kind: one of `KINDS`.
        encoding: of a file of ours, see `jaxprune.save`.
        deflate: likewise.

    Raises:
        ValueError, TypeError: what cannot be written so, by name.
        OSError: it cannot be written.
    """
    if kind == "jaxprune":
        jp.save(target, model.params, masks=model.masks, encoding=encoding, deflate=deflate, metadata=model.metadata)
        return
    dense = tree.map_named(_dense, model.params)
    leaves, flat = foreign.described(dense, model.masks), paths.flattened(dense)
    if kind == "orbax":
        nested = paths.nested({keys: leaf for keys, leaf in flat.values() if leaf.size})
        orbax_files.write_tree(target, nested, {**model.metadata, LEAVES: leaves})
        return
    arrays = tree.named_leaves(dense)
    for name, array in arrays.items():
        if array.dtype not in container.NAMES:
            raise TypeError(f"Leaf {name!r} is {array.dtype}, which safetensors do not have.")
    blobs = {name: container.blob_of(array) for name, array in arrays.items()}
    texts = {key: text for key, text in model.metadata.items() if _is_plain(key, text)}
    others = {key: one for key, one in model.metadata.items() if key not in texts}
    say = leaves or any(keys != (name,) for name, (keys, _) in flat.items())
    texts |= {key: json.dumps(one) for key, one, need in ((PLAIN, others, others), (LEAVES, leaves, say)) if need}
    container.write(target, blobs, texts)


def _is_plain(key: str, text: Any) -> bool:
    """Whether plain safetensors can have it in their metadata as it is, and as nothing of ours."""
    return isinstance(text, str) and not key.startswith("jaxprune") and key not in (PLAIN, LEAVES)


def size_text(target: Path, model: Model) -> str:
    """What was written, beside the model's arrays as they are in memory."""
    dense = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in tree.named_leaves(model.params).values())
    files = [file for file in target.rglob("*") if file.is_file()] if target.is_dir() else [target]
    size = sum(file.stat().st_size for file in files)
    text = f"{size:,} bytes, {dense / size:.2f} times smaller than dense" if size < dense else f"{size:,} bytes"
    return text + (f"; left out: {', '.join(model.left_out)} (--everything)" if model.left_out else "")


def _dense(_: str, leaf: Any) -> np.ndarray:
    return leaf.dequantize() if is_quantized(leaf) else np.asarray(leaf)
