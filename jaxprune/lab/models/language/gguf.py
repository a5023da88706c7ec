"""GGUF, version 3: a container of metadata and tensors, read and written.

    file = read("model.gguf")
    file.metadata["general.architecture"];    file.tensors["token_embd.weight"].values()
    write("pruned.gguf", metadata, {"token_embd.weight": ("Q8_0", array)})
    params, config, tokenizer, metadata = read_model("model.gguf")
    write_model("pruned.gguf", params, config, type="Q8_0", metadata=metadata)

In metadata a number's type is NumPy's: `np.uint32(5)` comes back as such. A Python int is written as uint32, a float
as float32, which is what readers expect; lists hold texts, arrays numbers. Shapes have the slowest axis first, as in
NumPy: a matrix is (out, in).

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from jaxprune import files
from jaxprune.lab.models.language import blocks, tokenizers
from jaxprune.lab.models.language.config import Config, Pairs
from jaxprune.lab.models.language.decoder import with_pairs
from jaxprune.lab.models.language.files import GGUF, Language, gathered, spread
from jaxprune.storage.container import FileError
from jaxprune.types import Params

_NUMBERS = ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", None, None, "u8", "i8", "f8"]
_TEXT, _LIST = 8, 9
_ALIGNMENT = "general.alignment"
_TYPES = {number: type for type, number in blocks.IDS.items()}


class Tensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        type: such as "F16" or "Q4_1".
        shape: slowest axis first.
        data: its bytes, where they lie in the file.
    """

    type: str
    shape: tuple[int, ...]
    data: UInt8[np.ndarray, "n_bytes"]

    def values(self) -> Float[np.ndarray, "..."]:
        """In float32."""
        return blocks.dequantize(self.type, self.data, self.shape)


class Gguf(NamedTuple):
    """What a file holds."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


class _Reader:
    def __init__(self, path: Path):
        self.path, self.data, self.at = path, np.memmap(path, np.uint8, "r"), 0

    def take(self, count: int) -> Any:
        if count > len(self.data) - self.at:
            raise FileError(
                f"{self.path} is cut off: {count} bytes were expected at {self.at}, it has {len(self.data)}."
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        return int(np.frombuffer(self.take(struct.calcsize(form)), f"<{form}")[0])

    def text(self) -> str:
        return bytes(self.take(self.number("Q"))).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            of, count = self.number("I"), self.number("Q")
            if of in (_TEXT, _LIST):
                return [self.value(of) for _ in range(count)]
            dtype = self.dtype(of)
            return np.frombuffer(bytes(self.take(count * dtype.itemsize)), dtype)
        dtype = self.dtype(kind)
        return np.frombuffer(bytes(self.take(dtype.itemsize)), dtype)[0]

    def dtype(self, kind: int) -> np.dtype[Any]:
        name = _NUMBERS[kind] if kind < len(_NUMBERS) else None
        if name is None:
            raise FileError(f"{self.path} is damaged: a value of type {kind} before byte {self.at}.")
        return np.dtype(name).newbyteorder("<")


def read(path: str | os.PathLike[str]) -> Gguf:
    """Metadata and tensors; values of tensors are read from the file when they are asked for.

    Raises:
        FileError: no such file, another version, or a damaged one; or types of tensors that are not read.
        OSError: it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        if (found := file.read(8)) != b"GGUF" + struct.pack("<I", 3):
            raise FileError(f"{path} is no GGUF file of version 3: it begins with {found!r}.")
    reader = _Reader(path)
    reader.take(8)
    n_tensors, n_metadata = reader.number("Q"), reader.number("Q")
    metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(n_metadata)}
    entries = []
    for _ in range(n_tensors):
        name, axes = reader.text(), reader.number("I")
        shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
        entries.append((name, shape, reader.number("I"), reader.number("Q")))
    alignment = int(metadata.get(_ALIGNMENT, 32))
    start = reader.at + -reader.at % alignment
    tensors = {}
    for name, shape, number, offset in entries:
        type = _TYPES.get(number, f"number {number}")
        reader.at = start + offset
        try:
            tensors[name] = Tensor(type, shape, reader.take(blocks.nbytes(type, shape)))
        except ValueError as error:
            raise FileError(f"{path}: tensor {name!r}: {error}") from None
    return Gguf(metadata, tensors)


def write(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, Shaped[np.ndarray, "..."]]],
) -> None:
    """A file, whole or not at all.

    Args:
        path: where.
        metadata: see this module.
        tensors: name -> type, one of `blocks.WRITTEN`, and values; in the order of the file.

    Raises:
        ValueError: a type that is not written, or that does not fit the values; the tensor is named.
        TypeError: metadata that have no place in the format.
    """
    alignment = int(metadata.get(_ALIGNMENT, 32))
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for name, value in metadata.items():
        try:
            kind, data = _value(value)
        except TypeError as error:
            raise TypeError(f"Metadata {name!r}: {error}") from None
        header += [_text(name), struct.pack("<I", kind), data]
    offset, parts = 0, []
    for name, (type, array) in tensors.items():
        try:
            data = blocks.quantize(type, array)
        except ValueError as error:
            raise ValueError(f"Tensor {name!r} {array.shape}: {error}") from None
        header += [_text(name), struct.pack(f"<I{array.ndim}Q", array.ndim, *array.shape[::-1])]
        header.append(struct.pack("<IQ", blocks.IDS[type], offset))
        parts += [data.data, b"\0" * (-len(data) % alignment)]
        offset += len(data) + -len(data) % alignment
    before = b"".join(header)
    files.write(Path(path), [before, b"\0" * (-len(before) % alignment), *parts])


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> tuple[int, bytes]:
    """The number of a type, and the bytes."""
    if isinstance(value, str):
        return _TEXT, _text(value)
    if isinstance(value, list):
        return _LIST, b"".join(_list(value))
    if isinstance(value, int | float) and not isinstance(value, bool | np.generic):
        value = np.float32(value) if isinstance(value, float) else np.uint32(value)
    array = np.asarray(value)
    name = array.dtype.str[1:].replace("b1", "?")
    if name not in _NUMBERS or array.ndim > 1:
        raise TypeError(f"a {type(value).__name__} of {array.dtype} has no place in GGUF.")
    kind, data = _NUMBERS.index(name), array.astype(array.dtype.newbyteorder("<")).tobytes()
    return (kind, data) if not array.ndim else (_LIST, struct.pack("<IQ", kind, len(array)) + data)


def _list(values: list[Any]) -> Iterator[bytes]:
    found = [_value(value) for value in values]
    kinds = {kind for kind, _ in found} or {_TEXT}
    if len(kinds) > 1:
        raise TypeError("a list holds values of one type, several arrived.")
    yield struct.pack("<IQ", kinds.pop(), len(values))
    for _, data in found:
        yield data


# ---------------------------------------------------------------- a model in it

_PAIRS: dict[str, Pairs] = {"llama": "neighbours", "qwen2": "halves"}
"""Architectures that are read, and how each turns queries and keys."""


def read_model(path: str | os.PathLike[str]) -> Language:
    """A decoder of the architectures llama and qwen2, its tokenizer, and what else the file says.

    Raises:
        FileError: another architecture, positions that are scaled, or tensors that are missing or not read.
    """
    file = read(path)
    try:
        config = _config(file)
        params = gathered(lambda name: file.tensors[name].values(), GGUF, config.shapes())
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    has_tokenizer = "tokenizer.ggml.model" in file.metadata
    return Language(params, config, tokenizers.of_gguf(file.metadata) if has_tokenizer else None, file.metadata)


def write_model(
    path: str | os.PathLike[str],
    params: Params,
    config: Config,
    *,
    type: str = "F32",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """A file of a decoder, whole or not at all; of the architecture qwen2 if it has biases, else llama.

    Args:
        path: where.
        params: shaped as `config.shapes()`, blocks as a list.
        config: of the model; positions are brought to how the architecture turns.
        type: of matrices, one of `blocks.WRITTEN`; vectors are F32. The embedding is as the matrices are.
        metadata: what the file says besides, such as a tokenizer; what the config says goes before it.

    Raises:
        ValueError: a type that is not written (Q4_1 loses zeros), or rows that are no whole blocks of it.
    """
    architecture = "qwen2" if config.qkv_bias else "llama"
    params, config = with_pairs(params, config, _PAIRS[architecture])
    other = {name: value for name, value in (metadata or {}).items() if name.partition(".")[0] not in _PAIRS}
    said = {"general.architecture": architecture, **_described(config, architecture), **other}
    tensors = {name: (type if array.ndim > 1 else "F32", array) for name, array in spread(params, GGUF).items()}
    write(path, said | {"general.architecture": architecture}, tensors)


_FIELDS = {
    "layers": "block_count",
    "length": "context_length",
    "dim": "embedding_length",
    "hidden": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "theta": "rope.freq_base",
    "epsilon": "attention.layer_norm_rms_epsilon",
    "vocabulary": "vocab_size",
}


def _described(config: Config, architecture: str) -> dict[str, Any]:
    said = {f"{architecture}.{theirs}": getattr(config, ours) for ours, theirs in _FIELDS.items()}
    widths = ("attention.value_length", "rope.dimension_count")
    return said | {f"{architecture}.{name}": config.head_dim for name in widths}


def _config(file: Gguf) -> Config:
    architecture = file.metadata.get("general.architecture", "")
    if architecture not in _PAIRS:
        raise FileError(f"its architecture is {architecture!r}. There are: {', '.join(_PAIRS)}.")
    found = {ours: file.metadata.get(f"{architecture}.{theirs}") for ours, theirs in _FIELDS.items()}
    scaling = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise FileError("its positions are scaled, which this decoder does not do.")
    if "token_embd.weight" not in file.tensors:
        raise FileError("there is no tensor 'token_embd.weight'.")
    found["vocabulary"] = file.tensors["token_embd.weight"].shape[0]
    found["kv_heads"] = found["kv_heads"] or found["heads"]
    told = {name: value.item() if hasattr(value, "item") else value for name, value in found.items() if value}
    try:
        return Config(
            **told,
            pairs=_PAIRS[architecture],
            tied="output.weight" not in file.tensors,
            qkv_bias="blk.0.attn_q.bias" in file.tensors,
        )
    except (TypeError, ValueError) as error:
        raise FileError(f"its sizes are not those of a decoder: {error}.") from None
