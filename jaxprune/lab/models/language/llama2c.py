"""Files of llama2.c: seven numbers, then float32 arrays, those of all layers together; and its tokenizer.

    model = read("stories15M.bin")            # params, config; what lies behind the weights
    write("pruned.bin", model.params, model.config)

| bytes | hold |
|---|---|
| 28 | int32: dim, hidden, layers, heads, kv_heads, vocabulary (negative: the output layer is its own), length |
| ... | float32: the arrays in the order of `_arrays`, matrices (out, in), a layer after the other |

Reference: https://github.com/karpathy/llama2.c, `export.py`, version 0.
"""

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxprune import files
from jaxprune.lab.models.language.config import Config
from jaxprune.lab.models.language.decoder import with_pairs
from jaxprune.storage.container import FileError
from jaxprune.types import Params

_HEADER = struct.Struct("<7i")

_BLOCK = ("norm1", "query", "key", "value", "out", "norm2", "gate", "down", "up")


class Llama2c(NamedTuple):
    """What a file holds.

    Attributes:
        params: shaped as `config.shapes()`.
        config: of the model.
        rest: bytes behind the weights; a tokenizer, where both lie in one file.
    """

    params: Params
    config: Config
    rest: bytes


def read(path: str | os.PathLike[str]) -> Llama2c:
    """The model of a file.

    Raises:
        FileError: the file is no such model, or is cut off.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    if len(data) < _HEADER.size:
        raise FileError(f"{path} is no model of llama2.c: it has {len(data)} bytes, its header alone has 28.")
    dim, hidden, layers, heads, kv_heads, vocabulary, length = _HEADER.unpack_from(data)
    sizes = (dim, hidden, layers, heads, kv_heads, abs(vocabulary), length)
    if min(sizes) < 1 or max(sizes) > 2**24 or dim % (2 * heads) or heads % kv_heads:
        raise FileError(
            f"{path} is no model of llama2.c: it begins with {(dim, hidden, layers, heads, kv_heads, vocabulary)}, "
            "where dim, hidden, layers, heads, kv_heads and vocabulary were expected."
        )
    config = Config(abs(vocabulary), dim, layers, heads, kv_heads, hidden, length=length, tied=vocabulary > 0)
    arrays, at = {}, _HEADER.size
    for name, shape in _arrays(config):
        end = at + 4 * math.prod(shape)
        if end > len(data):
            raise FileError(f"{path} is cut off: {name!r} {shape} ends at byte {end}, the file at {len(data)}.")
        arrays[name] = np.frombuffer(data, "<f4", math.prod(shape), at).reshape(shape)
        at = end
    return Llama2c(_params(arrays, config), config, data[at:])


def write(path: str | os.PathLike[str], params: Params, config: Config) -> None:
    """A file of a model, whole or not at all.

    Args:
        path: where.
        params: shaped as `config.shapes()`, blocks as a list.
        config: of the model. Rotary positions of halves are brought to neighbours, which is how llama2.c turns.

    Raises:
        ValueError: what llama2.c cannot have: biases, another base of angles, another epsilon, heads of another width.
    """
    fixed = Config(config.vocabulary, config.dim, config.layers, config.heads, config.kv_heads, config.hidden)
    for field in ("theta", "epsilon", "head_dim", "qkv_bias"):
        if (ours := getattr(config, field)) != (theirs := getattr(fixed, field)):
            raise ValueError(f"`{field}` is {ours}, a file of llama2.c can only have {theirs}. Write GGUF instead.")
    params, config = with_pairs(params, config, "neighbours")
    vocabulary = config.vocabulary if config.tied else -config.vocabulary
    sizes = (config.dim, config.hidden, config.layers, config.heads, config.kv_heads, vocabulary, config.length)
    parts = [_HEADER.pack(*sizes)]
    for name, shape in _arrays(config):
        array = _turns(config)[name] if name in ("cos", "sin") else _gathered(params, name)
        if array.shape != shape:
            raise ValueError(
                f"{name!r} should have shape {shape}, {array.shape} arrived: `config` is of another model."
            )
        parts.append(np.ascontiguousarray(array, "<f4").tobytes())
    files.write(Path(path), parts)


def _arrays(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order of the file."""
    block = config.shapes()["layers"][0]
    yield "embed", (config.vocabulary, config.dim)
    for name in _BLOCK:
        (leaf,) = block[name].values()
        yield name, (config.layers, *leaf.shape[::-1])
    yield "norm", (config.dim,)
    yield "cos", (config.length, config.head_dim // 2)
    yield "sin", (config.length, config.head_dim // 2)
    if not config.tied:
        yield "output", (config.vocabulary, config.dim)


def _params(arrays: dict[str, np.ndarray], config: Config) -> Params:
    def one(leaf: np.ndarray) -> dict:
        return {"scale": jnp.asarray(leaf)} if leaf.ndim == 1 else {"kernel": jnp.asarray(leaf.T)}

    return {
        "embed": {"embedding": jnp.asarray(arrays["embed"])},
        "layers": [{name: one(arrays[name][i]) for name in _BLOCK} for i in range(config.layers)],
        "norm": one(arrays["norm"]),
    } | ({} if config.tied else {"output": one(arrays["output"])})


def _gathered(params: Params, name: str) -> np.ndarray:
    if name == "embed":
        return np.asarray(params["embed"]["embedding"])
    if name in _BLOCK:
        return np.stack([np.asarray(*block[name].values()).T for block in params["layers"]])
    return np.asarray(*params[name].values()).T


def _turns(config: Config) -> dict[str, Float[np.ndarray, "length pairs"]]:
    """Tables that llama2.c once read; it skips them now."""
    n = np.float32(config.head_dim)
    speeds = np.float32(1) / np.float32(config.theta) ** (np.arange(0, n, 2, dtype=np.float32) / n)
    angles = np.arange(config.length, dtype=np.float32)[:, None] * speeds
    return {"cos": np.cos(angles), "sin": np.sin(angles)}


# ---------------------------------------------------------------- the tokenizer's file


def read_tokenizer(data: bytes) -> tuple[list[bytes], list[float]]:
    """Pieces and their scores, of `tokenizer.bin`.

    Args:
        data: int32 longest piece; then for each piece its score (float32), length (int32) and bytes.

    Raises:
        FileError: the bytes end within a piece.
    """
    pieces, scores, at = [], [], 4
    while at < len(data):
        if at + 8 > len(data):
            raise FileError(f"The tokenizer is cut off within piece {len(pieces)}.")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8 + length
        if length < 0 or at > len(data):
            raise FileError(f"The tokenizer is cut off within piece {len(pieces)}, or is none.")
        pieces.append(data[at - length : at])
        scores.append(score)
    return pieces, scores


def write_tokenizer(pieces: list[bytes], scores: list[float]) -> bytes:
    """The bytes of `tokenizer.bin`."""
    parts = [struct.pack("<i", max(map(len, pieces), default=0))]
    parts += [struct.pack("<fi", score, len(piece)) + piece for piece, score in zip(pieces, scores, strict=True)]
    return b"".join(parts)
