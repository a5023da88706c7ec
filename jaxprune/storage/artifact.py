"""The artifact: a pruned model in one small file that is safe to open.

    save("model.jaxprune", params)      params = load("model.jaxprune")      masks = load("model.jaxprune", to="masks")

A safetensors container. A tensor that is stored dense is an ordinary tensor of it, any other one its encoded bytes; the
metadata say how each is encoded, see FORMAT.md. No code is ever loaded, and whatever is damaged, absurd or newer than
this library is refused before memory is taken for it.
"""

import fnmatch
import io
import json
import math
import os
import threading
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxprune import tree
from jaxprune.quantize.codes import is_quantized
from jaxprune.storage import container, memory, passes, paths, records, values
from jaxprune.storage.container import FileError, Header, Problem
from jaxprune.storage.encodings import pattern_of
from jaxprune.storage.records import Record
from jaxprune.storage.tensors import Pieces, Stored, encode
from jaxprune.storage.threads import each

VERSION = 1
MARK = "jaxprune"
TENSORS, USER, CRC32 = f"{MARK}.tensors", f"{MARK}.user", f"{MARK}.crc32"


def save(
    path: str | os.PathLike[str],
    params: Any,
    *,
    masks: Any = None,
    encoding: str | Mapping[str, str] = "auto",
    deflate: bool = True,
    signed_zeros: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write params to a file, whole or not at all.

    Every bit comes back with `load`, of quantized leaves that of their codes; -0.0 comes back as 0.0, which dead
    weights are after `w * mask`, unless signs are asked for.

    Args:
        path: where; its folder is made, an old file replaced.
        params: any pytree of arrays, of jax or NumPy, some leaves perhaps quantized (`jaxprune.storage.to_codebooks`,
            `to_integers`); of an NNX model `nnx.state(model)`, for `nnx.Param` alone has no statistics of batch norms.
        masks: which weights are alive, dead ones being zero; without, those that are not zero. Only where a living
            weight may be zero do they say more than the weights.
        encoding: "auto" takes the smallest for each tensor; a name (see `jaxprune.storage.encodings`) is for matrices
            and convolution kernels, all others are dense then; or rules name pattern -> encoding, first match wins.
        deflate: whether bytes are deflated where that makes them fewer: smaller by a tenth to a third, and slower.
        signed_zeros: whether a -0.0 is stored, and comes back; a weight is as dead as with 0.0.
        metadata: free plain data, such as config, metrics and where the model comes from.

    Raises:
        TypeError: a leaf is no array, or of a dtype that has no place in the format; metadata that are no plain data.
        ValueError: an encoding that a tensor does not have, masks that do not fit or that have a dead weight which is
            not zero (with `signed_zeros`, a dead -0.0 beside a living zero), leaves of one name.
        OSError: disk full, no permission; an old file is untouched.
    """
    where, names = Path(path), tree.named_leaves(params)
    if masks is not None:
        tree.check_like("The masks", masks, params)
    _check_encodings(encoding, names)
    of_mask = {} if masks is None else tree.named_leaves(masks)

    def encoded(item: tuple[str, tuple[Any, Any]]) -> tuple[str, Record, Pieces]:
        name, (keys, leaf) = item
        host = _host(name, leaf)
        host = passes.without_signs(host) if isinstance(host, np.ndarray) and not signed_zeros else host
        mask = np.asarray(of_mask[name], bool) if name in of_mask else None
        try:
            paths.check(keys, name)
            return name, *encode(keys, host, mask, _encoding_of(encoding, name, host), deflate=deflate)
        except Problem as error:
            raise ValueError(f"Leaf {name!r}: {error}.") from None

    blobs, described = {}, {}
    for name, record, pieces in each(encoded, paths.flattened(params).items()):
        blobs[name] = container.Blob(*_as_stored(record), pieces)
        described[name] = record.to_json(name)
    texts = {TENSORS: _json(described), USER: _json(dict(metadata or {}))}
    container.write(where, blobs, {MARK: str(VERSION), **texts, CRC32: _crc(texts)})


def _json(plain: Any) -> str:
    return json.dumps(plain, separators=(",", ":"))


def _crc(texts: Mapping[str, str]) -> str:
    return f"{zlib.crc32((texts[TENSORS] + texts[USER]).encode('utf-8', 'surrogatepass')):08x}"


def _as_stored(record: Record) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The container's dtype and shape: the weight's where its bytes are, so that any reader of safetensors has it."""
    if (record.encoding, record.values, record.parts[0].coder) == ("dense", "raw", "raw"):
        return values.DTYPES[record.dtype], record.shape
    return np.dtype(np.uint8), (record.stored_bytes,)


def _host(name: str, leaf: Any) -> values.Leaf:
    if not tree.is_array(leaf):
        raise TypeError(
            f"Leaf {name!r} is a {type(leaf).__name__}, an array was expected. Hand in the arrays alone, for Equinox "
            "`eqx.filter(model, eqx.is_array)`, and make arrays of numbers."
        )
    if isinstance(leaf, Tracer | jax.ShapeDtypeStruct):
        raise TypeError(f"Leaf {name!r} has no values yet, it is a {type(leaf).__name__}. Save outside of `jit`.")
    if leaf.dtype.name not in values.DTYPES:
        raise TypeError(
            f"Leaf {name!r} is {leaf.dtype}, which has no place in a file. There are: {', '.join(values.DTYPES)}. Take "
            "it apart (`jax.random.key_data`, real and imaginary parts), or leave it out, in Flax NNX dropout's keys "
            "with `nnx.state(model, nnx.Not(nnx.RngState))`."
        )
    if is_quantized(leaf):
        return leaf
    array = np.asarray(leaf)
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _check_encodings(encoding: str | Mapping[str, str], names: Iterable[str]) -> None:
    rules = {"*": encoding} if isinstance(encoding, str) else encoding
    for pattern, one in rules.items():
        if one != "auto":
            pattern_of(one)
        if not isinstance(encoding, str) and not fnmatch.filter(names, pattern):
            raise ValueError(f"`encoding` names {pattern!r}, which matches no leaf. There are: {', '.join(names)}.")


def _encoding_of(encoding: str | Mapping[str, str], name: str, leaf: values.Leaf) -> str:
    if not isinstance(encoding, str):
        return tree.first_match(encoding.items(), name) or "auto"
    is_weight = tree.weights(name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return encoding if encoding == "auto" or is_weight else "auto" if is_quantized(leaf) else "dense"


class Artifact:
    """An open file; reads single tensors, from any thread. Use it in a `with` statement.

    Attributes:
        path: of the file.
        records: leaf name -> what the file says of it.
        metadata: what was handed to `save`.

    Raises:
        FileError: damaged, of a newer version, or no such file; the message names the tensor.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: io.BufferedReader = self.path.open("rb")
        self._one_reads = threading.Lock()
        try:
            self._header = container.read_header(self._file, self.path)
            self.records, self.metadata = self._described(self._header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Artifact":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def read(self, name: str) -> Stored:
        """One tensor.

        Raises:
            FileError: its bytes are damaged.
            KeyError: there is no such tensor.
        """
        record, entry = self.records[name], self._header.entries[name]
        blob = memory.zeros(entry.end - entry.start, np.uint8).data
        with self._one_reads:
            self._file.seek(entry.start)
            got = self._file.readinto(blob)
        try:
            return Stored(record, blob[:got])
        except Problem as error:
            raise self.problem(name, error) from None

    def check_memory(self, names: Iterable[str], most: int | None = None) -> None:
        """Refuse tensors that together are larger than the machine's memory, or than `most` bytes.

        Raises:
            FileError: naming the tensor that is too much.
        """
        limit, total = most if most is not None else _memory(), 0
        for name in names:
            total += self.records[name].dense_bytes
            if total > limit:
                raise FileError(
                    f"{self.path}: with tensor {name!r} {self.records[name].shape} the dense tensors are {total:,} "
                    f"bytes, {limit:,} are allowed. If the file is to be trusted, raise `max_bytes`."
                )

    def problem(self, name: str, error: Exception) -> FileError:
        """The error, with file and tensor."""
        return FileError(f"{self.path}: tensor {name!r}: {error}. Fetch or write the file again.")

    def _described(self, header: Header) -> tuple[dict[str, Record], dict[str, Any]]:
        texts = header.metadata
        # Any of the names marks a file of ours, so that damage to one makes it no plain one.
        if not any(key.startswith(MARK) for key in texts):
            return {name: self._record(None, name, entry) for name, entry in header.entries.items()}, dict(texts)
        if texts.get(MARK) != str(VERSION):
            raise FileError(
                f"{self.path} has version {texts.get(MARK, '')[:20]!r}, this library reads {VERSION}. Update it."
            )
        if not {TENSORS, USER, CRC32} <= set(texts) or texts[CRC32] != _crc(texts):
            raise FileError(f"{self.path} is damaged: the checksum of its description differs.")
        try:
            described, user = container.parsed(texts[TENSORS]), container.parsed(texts[USER])
        except ValueError as error:
            raise FileError(f"{self.path} has a damaged description: {error}.") from None
        if not isinstance(described, dict) or not isinstance(user, dict) or set(described) != set(header.entries):
            raise FileError(f"{self.path} is damaged: it does not describe the {len(header.entries)} tensors it holds.")
        found = {name: self._record(described[name], name, entry) for name, entry in header.entries.items()}
        if len({record.path for record in found.values()}) != len(found):
            raise FileError(f"{self.path} is damaged: two tensors have one path.")
        return found, user

    def _record(self, plain: Any, name: str, entry: container.Entry) -> Record:
        """What our description says of a tensor, held against the container; None is said of plain ones."""
        size = entry.end - entry.start
        try:
            if plain is None:
                of_all, whole = math.prod(entry.shape), records.Part("values", "raw", size, size)
                record = Record((name,), entry.shape, entry.dtype.name, "dense", "raw", of_all, "nonzero", (whole,))
            else:
                record = records.from_json(plain, name)
            records.check(record, size)
            paths.check(record.path, name)
            dtype, shape = _as_stored(record)
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise Problem(f"it is stored as {entry.dtype} {entry.shape}, {dtype} {shape} was expected")
        except Problem as error:
            raise self.problem(name, error) from None
        return record


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
