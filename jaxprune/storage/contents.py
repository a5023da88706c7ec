r"""Contents: what a file holds, tensor by tensor, and how far its bytes are from their entropy.

    print(contents(artifact))

The entropy of a tensor of n weights, k of them alive, is that of its mask and of what is stored of the living, each
symbol by itself: $n H(k / n)$ bits and, for codes, $-\sum_c k_c \log_2 (k_c / k)$; numbers that are stored as they are
count as their bytes, first bytes together, second bytes together and so on, which is how they are deflated. Tables and
scales are left out. Repetitions may bring a file below it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxprune import tables
from jaxprune.storage import streams
from jaxprune.storage.artifact import VERSION, Artifact
from jaxprune.storage.tensors import Stored

HEADER = ("tensor", "shape", "dtype", "encoding", "values", "sparsity", "bits/weight", "entropy", "bytes", "ratio")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file, its header, or the whole file.

    Attributes:
        name: the leaf's.
        shape: of the weight; () for header and file.
        dtype: of the weight; "" for header and file.
        encoding: the pattern's name; likewise.
        values: "raw", or the kind of codes, such as "codebook4"; likewise.
        weights: how many it has, dead ones included.
        nnz: how many are alive.
        dense_bytes: as a dense array.
        bytes: in the file.
        entropy_bits: see the module; of all weights together.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    values: str
    weights: int
    nnz: int
    dense_bytes: int
    bytes: int
    entropy_bits: float

    @property
    def sparsity(self) -> float:
        """Fraction removed; 0 without weights."""
        return 1 - self.nnz / self.weights if self.weights else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits in the file for each weight, dead ones counted; 0 without weights."""
        return 8 * self.bytes / self.weights if self.weights else 0.0

    @property
    def entropy_per_weight(self) -> float:
        """Entropy in bits for each weight, dead ones counted; 0 without weights."""
        return self.entropy_bits / self.weights if self.weights else 0.0

    @property
    def ratio(self) -> float | None:
        """Times smaller than dense; None where nothing is stored."""
        return self.dense_bytes / self.bytes if self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: attributes and properties."""
        derived = ("sparsity", "bits_per_weight", "entropy_per_weight", "ratio")
        properties = {name: getattr(self, name) for name in derived}
        return {**dataclasses.asdict(self), "shape": list(self.shape), **properties}


@dataclasses.dataclass(frozen=True)
class Contents(tables.Table):
    """A row for each tensor, one for the header, and the whole file; `str(contents)` is the text.

    Attributes:
        tensors: in the file's order.
        file_bytes: of the whole file.
        version: of the format; None for plain safetensors.
        metadata: what was handed to `save`.
    """

    tensors: tuple[Tensor, ...]
    file_bytes: int
    version: int | None
    metadata: dict[str, Any]

    @property
    def header(self) -> Tensor:
        """All that is no tensor: descriptions and metadata."""
        return _sum("header", (), self.file_bytes - sum(tensor.bytes for tensor in self.tensors))

    @property
    def total(self) -> Tensor:
        """The whole file, its header counted."""
        return _sum("file", self.tensors, self.file_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; tensors and total as `Tensor.to_dict` has them."""
        return {
            "version": self.version,
            "metadata": self.metadata,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "header_bytes": self.header.bytes,
            "total": self.total.to_dict(),
        }

    @property
    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]], int]:
        """Header, rows, and how many of the first columns hold words."""
        return HEADER, [_row(tensor) for tensor in (*self.tensors, self.header, self.total)], 5


def contents(artifact: Artifact) -> Contents:
    """The table of an open file; tensors are read one at a time.

    Raises:
        FileError: a tensor's bytes are damaged; naming it.
    """
    tensors = tuple(_tensor(name, artifact) for name in artifact.records)
    described = all(record.crc32 is not None for record in artifact.records.values())  # others cannot be read
    return Contents(tensors, artifact.path.stat().st_size, VERSION if described else None, artifact.metadata)


def _tensor(name: str, artifact: Artifact) -> Tensor:
    stored, record = artifact.read(name), artifact.records[name]
    alive = stored.mask()
    return Tensor(
        name=name,
        shape=record.shape,
        dtype=record.dtype,
        encoding=record.encoding,
        values=record.values,
        weights=alive.size,
        nnz=int(np.count_nonzero(alive)),
        dense_bytes=record.dense_bytes,
        bytes=record.stored_bytes,
        entropy_bits=streams.entropy(alive) + _entropy_of_values(stored, alive),
    )


def _entropy_of_values(stored: Stored, alive: Shaped[np.ndarray, "..."]) -> float:
    leaf = stored.leaf()
    if not isinstance(leaf, np.ndarray):
        return streams.entropy(leaf.codes[alive])
    planes = np.ascontiguousarray(leaf[alive]).view(np.uint8).reshape(-1, leaf.dtype.itemsize)
    return math.fsum(streams.entropy(plane) for plane in planes.T)


def _sum(name: str, tensors: Sequence[Tensor], stored: int) -> Tensor:
    fields = ("weights", "nnz", "dense_bytes", "entropy_bits")
    sums = {field: sum(getattr(tensor, field) for tensor in tensors) for field in fields}
    return Tensor(name=name, shape=(), dtype="", encoding="", values="", bytes=stored, **sums)


def _row(tensor: Tensor) -> tuple[str, ...]:
    words = (tensor.name, "x".join(map(str, tensor.shape)), tensor.dtype, tensor.encoding, tensor.values)
    if not tensor.weights:
        return (*words, "", "", "", f"{tensor.bytes:,}", "")
    ratio = "" if tensor.ratio is None else f"{tensor.ratio:.2f}x"
    bits = (f"{tensor.bits_per_weight:.3f}", f"{tensor.entropy_per_weight:.3f}")
    return (*words, f"{tensor.sparsity:.2%}", *bits, f"{tensor.bytes:,}", ratio)
