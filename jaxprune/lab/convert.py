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
from jaxprune.lab import checkpoint, data, orbax_files, store
from jaxprune.lab import config as cfg
from jaxprune.storage import Artifact, container, paths
from jaxprune.storage.quantize import is_quantized

KINDS = ("jaxprune", "safetensors", "orbax")
PARAMS, MASKS = "params/", "/masks/"
"""What begins the names of weights in a checkpoint of a run, and what comes before the name of each one's mask."""

PLAIN = "model_metadata"
"""Under which plain safetensors, whose metadata are texts, have those of a model."""


class Model(NamedTuple):
    """What is converted.

    Attributes:
        params: pytree of arrays, some leaves perhaps quantized.
        masks: which weights are alive; None: those that are not zero.
        metadata: plain data about them.
    """

    params: Any
    masks: Any
    metadata: dict[str, Any]


def read(source: Path) -> Model:
    """A model from a file of ours, plain safetensors, a checkpoint of a run or of Orbax, or Keras's ResNet-50.

    Args:
        source: a file; the folder of a checkpoint, of a stage of a run (its newest one then), or of a PyTree
            checkpoint; or a folder that holds ResNet50/model.json of TensorFlow.js.

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
        return _of_run(source)
    params, metadata = orbax_files.read_tree(source)
    return Model(params, None, metadata)


def _of_file(source: Path) -> Model:
    with Artifact(source) as file:
        metadata = metadata_of(file)
    return Model(jp.load(source, to="quantized"), jp.load(source, to="masks"), metadata)


def metadata_of(file: Artifact) -> dict[str, Any]:
    """What a file says of its model, those that `write` made plain safetensors included."""
    return json.loads(file.metadata[PLAIN]) if PLAIN in file.metadata else file.metadata


def _of_keras(folder: Path) -> Model:
    from jaxprune.lab.models import pretrained

    model, params = pretrained.load_resnet50(folder)
    about = {"name": "keras_resnet50"}, list(model.image), model.classes, pretrained.labels(folder)
    return Model(params, None, dict(zip(("model", "image", "classes", "labels"), about, strict=True)))


def _of_run(folder: Path) -> Model:
    leaves = checkpoint.read_leaves(folder)
    params = {name.removeprefix(PARAMS): leaf for name, leaf in leaves.items() if name.startswith(PARAMS)}
    masks = {name.partition(MASKS)[2]: leaf for name, leaf in leaves.items() if MASKS in name}
    if not params:
        raise ValueError(f"{folder} is no checkpoint of a run: none of its leaves is called {PARAMS}...")
    run = next((parent for parent in folder.absolute().parents if (parent / "config.toml").is_file()), None)
    metadata = {}
    if run is not None:
        seed = int(folder.absolute().relative_to(run).parts[0].removeprefix("seed_"))
        config = cfg.load(run / "config.toml")
        metadata = store.identity(config, seed, *data.facts(config.data))
    return Model(_nested(params), _nested(masks) if masks.keys() == params.keys() else None, metadata)


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
    return Model(params, model.masks, {key: value for key, value in model.metadata.items() if key != "accuracy"})


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
        model: what to write; masks are kept in files of ours alone.
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
    if kind == "orbax":
        orbax_files.write_tree(target, _nested(tree.named_leaves(dense)), model.metadata)
        return
    arrays = tree.named_leaves(dense)
    for name, array in arrays.items():
        if array.dtype not in container.NAMES:
            raise TypeError(f"Leaf {name!r} is {array.dtype}, which safetensors do not have.")
    blobs = {name: container.blob_of(array) for name, array in arrays.items()}
    container.write(target, blobs, {PLAIN: json.dumps(model.metadata)})


def size_text(target: Path, model: Model) -> str:
    """What was written, beside the model's arrays as they are in memory."""
    dense = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in tree.named_leaves(model.params).values())
    files = [file for file in target.rglob("*") if file.is_file()] if target.is_dir() else [target]
    size = sum(file.stat().st_size for file in files)
    return f"{size:,} bytes, {dense / size:.2f} times smaller than dense" if size < dense else f"{size:,} bytes"


def _dense(_: str, leaf: Any) -> np.ndarray:
    return leaf.dequantize() if is_quantized(leaf) else np.asarray(leaf)
