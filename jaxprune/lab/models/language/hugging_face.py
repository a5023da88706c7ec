"""Models in the layout of Hugging Face's transformers: config.json, and safetensors, in one file or several.

    params, config, _, said = read("SmolLM2-135M")
    write("pruned", params, config, metadata=said)

Read are Llama (SmolLM as well) and Qwen2; of BERT see `encoders`. Matrices are (out, in), positions turn halves of a
head.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxprune import files
from jaxprune.lab.models.language.config import Config
from jaxprune.lab.models.language.decoder import with_pairs
from jaxprune.lab.models.language.files import HUGGING_FACE, Language, gathered, spread
from jaxprune.storage import container
from jaxprune.storage.container import FileError
from jaxprune.types import Params

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_FIELDS = {
    "vocabulary": "vocab_size",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "hidden": "intermediate_size",
    "head_dim": "head_dim",
    "length": "max_position_embeddings",
    "theta": "rope_theta",
    "epsilon": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
_ONLY = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "attention_bias": False}
"""What the decoder does; another value is refused."""


def read(folder: str | os.PathLike[str]) -> Language:
    """The model of a folder; metadata are its config.json.

    Raises:
        FileError: another kind of model, or files that are damaged or missing.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    said = read_json(folder / CONFIG)
    config, array = _config(folder, said), reader(folder)
    try:
        return Language(gathered(array, HUGGING_FACE, config.shapes()), config, None, said)
    except FileError as error:
        raise FileError(f"{folder}: {error}") from None


def reader(folder: Path) -> Callable[[str], np.ndarray]:
    """Name -> array in float32, of a folder's safetensors; KeyError where there is none.

    Raises:
        FileError: files that are damaged or missing.
    """
    index = read_json(folder / INDEX).get("weight_map", {}) if (folder / INDEX).exists() else {}
    if not all(isinstance(file, str) and Path(file).name == file for file in index.values()):
        raise FileError(f"{folder / INDEX} is damaged: it names files elsewhere.")
    headers: dict[str, container.Header] = {}

    def array(name: str) -> np.ndarray:
        file = index[name] if index else WEIGHTS
        if file not in headers:
            with (folder / file).open("rb") as opened:
                headers[file] = container.read_header(opened, folder / file)
        entry = headers[file].entries[name]
        data = np.memmap(folder / file, np.uint8, "r")[entry.start : entry.end]
        return data.view(entry.dtype).reshape(entry.shape).astype(np.float32)

    return array


def write(
    folder: str | os.PathLike[str],
    params: Params,
    config: Config,
    *,
    metadata: Mapping[str, Any] | None = None,
    dtype: Any = np.float32,
    shard: int | None = None,
) -> None:
    """A folder with config.json and the weights; of the kind qwen2 if there are biases, else llama.

    Args:
        folder: where; it is made.
        params: shaped as `config.shapes()`, blocks as a list.
        config: of the model; positions are brought to halves. Heads that do not divide the width, as one of six gone
            leaves them, are written, but transformers 5.24 refuses them in spite of `head_dim`.
        metadata: more of config.json; what the config says goes before it.
        dtype: of the weights.
        shard: most bytes of a file, single tensors excepted; None: all in one.
    """
    folder = Path(folder)
    params, config = with_pairs(params, config, "halves")
    kind = "qwen2" if config.qkv_bias else "llama"
    said = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    about = {"hidden_act": "silu", **(metadata or {}), **said, "model_type": kind, "architectures": [_CLASSES[kind]]}
    about["torch_dtype"] = np.dtype(dtype).name
    arrays = {name: array.astype(dtype) for name, array in spread(params, HUGGING_FACE).items()}
    write_arrays(folder, arrays, about, shard)


def write_arrays(
    folder: Path, arrays: dict[str, Shaped[np.ndarray, "..."]], about: Mapping[str, Any], shard: int | None = None
) -> None:
    """A folder of any model: its weights by their names, and config.json.

    Args:
        folder: where; it is made.
        arrays: name -> weights.
        about: config.json.
        shard: see `write`.
    """
    groups = _groups(arrays, shard)
    files = [WEIGHTS] if len(groups) == 1 else [_shard_name(i, len(groups)) for i in range(len(groups))]
    for file, group in zip(files, groups, strict=True):
        blobs = {name: container.blob_of(array) for name, array in group.items()}
        container.write(folder / file, blobs, {"format": "pt"})
    if len(groups) > 1:
        weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        size = sum(array.nbytes for array in arrays.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    _write_json(folder / CONFIG, about)


def _shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _groups(
    arrays: dict[str, Shaped[np.ndarray, "..."]], most: int | None
) -> list[dict[str, Shaped[np.ndarray, "..."]]]:
    groups: list[dict[str, np.ndarray]] = [{}]
    for name, array in arrays.items():
        size = sum(each.nbytes for each in groups[-1].values()) + array.nbytes
        if most is not None and groups[-1] and size > most:
            groups.append({})
        groups[-1][name] = array
    return groups


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        FileError: it holds no such object.
    """
    try:
        found = container.parsed(path.read_text("utf-8"))
    except ValueError as error:
        raise FileError(f"{path} is damaged: {error}.") from None
    if not isinstance(found, dict):
        raise FileError(f"{path} is damaged: it is no JSON object.")
    return found


def _write_json(path: Path, plain: Mapping[str, Any]) -> None:
    files.write(path, json.dumps(dict(plain), indent=2))


def _config(folder: Path, said: dict[str, Any]) -> Config:
    kind = said.get("model_type")
    if kind not in _CLASSES:
        raise FileError(f"{folder} holds a model of the kind {kind!r}. There are: {', '.join(_CLASSES)}.")
    for name, only in _ONLY.items():
        if said.get(name, only) != only:
            raise FileError(f"{folder / CONFIG}: {name} is {said[name]!r}, this decoder has {only!r}.")
    # Since transformers 5 what positions are is in a table of its own.
    positions = said.get("rope_parameters") or said.get("rope_scaling") or {}
    if positions.get("rope_type", positions.get("type", "default")) != "default":
        raise FileError(f"{folder / CONFIG}: positions are scaled, {positions}, which this decoder does not do.")
    told = {ours: said[theirs] for ours, theirs in _FIELDS.items() if said.get(theirs) is not None}
    told |= {"theta": float(positions["rope_theta"])} if "rope_theta" in positions else {}
    told.setdefault("tied", False)
    told.setdefault("kv_heads", told.get("heads"))
    try:
        return Config(**told, pairs="halves", qkv_bias=kind == "qwen2")
    except (TypeError, ValueError) as error:
        raise FileError(f"{folder / CONFIG}: its sizes are not those of a decoder: {error}.") from None
