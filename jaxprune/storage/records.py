"""Records: what a file says of each tensor, and whether it can be true, before any memory is taken."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxprune.storage import values
from jaxprune.storage.bits import packed_size
from jaxprune.storage.container import Problem, require
from jaxprune.storage.encodings import pattern_of
from jaxprune.storage.patterns import Pattern
from jaxprune.storage.streams import check_size

_LARGEST = 2**62  # bytes; sums stay within 64 bits


class Part(NamedTuple):
    """A stream of a tensor.

    Attributes:
        name: see `jaxprune.storage.patterns` and `values`.
        coder: see `jaxprune.storage.streams`.
        stored: bytes in the file.
        size: bytes that they become.
    """

    name: str
    coder: str
    stored: int
    size: int


class Record(NamedTuple):
    """What the file says of a tensor.

    Attributes:
        path: the keys that lead to it.
        shape: of the weight.
        dtype: of the weight, NumPy's name.
        encoding: the pattern's name.
        values: "raw", or the codes' kind and bits: "codebook4", "int8".
        count: weights stored.
        alive: which are alive: all "stored", or those of them that are "nonzero".
        parts: streams, in their order.
        scale_shape: of the scale and zero of an "int".
        crc32: of all stored bytes; None: not known.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    values: str
    count: int
    alive: str
    parts: tuple[Part, ...] = ()
    scale_shape: tuple[int, ...] = ()
    crc32: int | None = None

    @property
    def dense_bytes(self) -> int:
        """Of the weight as a dense array."""
        return math.prod(self.shape) * values.DTYPES[self.dtype].itemsize

    @property
    def stored_bytes(self) -> int:
        """In the file."""
        return sum(part.stored for part in self.parts)

    @property
    def inflated_bytes(self) -> int:
        """Of all streams that are deflated in the file."""
        return sum(part.size for part in self.parts if part.coder != "raw")

    @property
    def pattern(self) -> Pattern:
        """The pattern that `encoding` names."""
        return pattern_of(self.encoding)

    @property
    def side_by_side(self) -> bool:
        """Whether codes are bits, not bytes."""
        return any((part.name, part.coder) == ("codes", "raw") for part in self.parts)

    @property
    def value_bytes(self) -> dict[str, int]:
        """Stream of the values -> its bytes; a "zero" may be left out.

        Raises:
            Problem: there are no such values, or not of this dtype.
        """
        itemsize, scales = values.DTYPES[self.dtype].itemsize, math.prod(self.scale_shape)
        if self.values == "raw":
            return {"values": itemsize * self.count}
        known = re.fullmatch("codebook[1-8]|int[48]", self.values) and "float" in self.dtype
        require(known, f"there are no values of kind {self.values!r} for {self.dtype}")
        width = int(self.values[-1])
        codes = {"codes": packed_size(self.count, width) if self.side_by_side else self.count}
        return codes | (
            {"table": itemsize << width} if "book" in self.values else {"scale": 4 * scales, "zero": scales}
        )

    def to_json(self, name: str) -> dict[str, Any]:
        """Plain data of the leaf with this name; what is as usual is left out."""
        plain = {**self._asdict(), "path": list(self.path), "scale_shape": list(self.scale_shape)}
        plain["crc32"], usual = f"{self.crc32 or 0:08x}", _usual(name)
        return {key: value for key, value in plain.items() if key not in usual or value != usual[key]}


def _usual(name: str) -> dict[str, Any]:
    return {"path": name.split("/"), "values": "raw", "alive": "stored", "scale_shape": []}


def from_json(plain: Any, name: str) -> Record:
    """A record from plain data, its types checked, and nothing else.

    Raises:
        Problem: another structure.
    """
    kinds = {"path": list, "shape": list, "dtype": str, "encoding": str, "values": str, "count": int, "alive": str}
    kinds |= {"parts": list, "scale_shape": list, "crc32": str}
    if not isinstance(plain, Mapping) or set(plain) - set(kinds) or set(kinds) - set(plain) - set(_usual(name)):
        raise Problem(f"its record has not the keys {', '.join(kinds)}")
    plain = {**_usual(name), **plain}
    for key, kind in kinds.items():
        require(type(plain[key]) is kind, f"its {key} is no {kind.__name__}")
    numbers = [*plain["shape"], *plain["scale_shape"], plain["count"]]
    parts = [tuple(part) if type(part) is list else () for part in plain["parts"]]
    whole = all(list(map(type, part)) == [str, str, int, int] for part in parts)
    require(whole, "its parts are not [name, coder, stored, size] each")
    numbers += [number for part in parts for number in part[2:]]
    count = all(type(number) is int and 0 <= number < _LARGEST for number in numbers)
    require(count, f"its numbers are not whole, or not below {_LARGEST}")
    require(re.fullmatch("[0-9a-f]{8}", plain["crc32"]), "its crc32 is not of eight hexadecimal digits")
    path = tuple(tuple(key) if type(key) is list else key for key in plain["path"])
    tuples = {"path": path, "shape": tuple(plain["shape"]), "scale_shape": tuple(plain["scale_shape"])}
    tuples["parts"] = tuple(Part(*part) for part in parts)
    return Record(**{**plain, **tuples, "crc32": int(plain["crc32"], 16)})


def check(record: Record, stored: int) -> None:
    """Refuse what cannot be true.

    Streams that are deflated may together become no larger than the dense tensor, so that whoever has memory for it can
    decode them.

    Args:
        record: from a file, or for one.
        stored: bytes that the file has for it.

    Raises:
        Problem: why.
    """
    require(record.dtype in values.DTYPES, f"its dtype {record.dtype!r} is none of {', '.join(values.DTYPES)}")
    count, pattern = math.prod(record.shape), record.pattern
    # Without its zeros: NumPy has no empty array of absurd other sizes.
    if len(record.shape) > 32 or 8 * math.prod(size or 1 for size in record.shape) >= _LARGEST:
        raise Problem(f"its shape {record.shape} is absurd")
    fits = record.count <= count and record.alive in ("stored", "nonzero")
    require(fits, f"it stores {record.count} weights of {count}, {record.alive!r} alive")
    told = record.values == "raw" or record.alive == "stored"
    require(told, f"its codes {record.values!r} do not tell which weights are alive")
    misfit = pattern.misfit(record.shape)
    require(not misfit, f"it cannot be encoded as {record.encoding!r}: {misfit}")
    _check_parts(record, pattern.stream_bytes(record.shape, record.count))
    require(record.stored_bytes == stored, f"its parts are {record.stored_bytes} bytes, the file has {stored}")


def _check_parts(record: Record, expected: dict[str, int]) -> None:
    """Args: expected: stream -> bytes of the pattern's."""
    if record.scale_shape and (
        len(record.scale_shape) != len(record.shape)
        or any(scales not in (1, size) for scales, size in zip(record.scale_shape, record.shape, strict=True))
    ):
        raise Problem(f"its scales {record.scale_shape} do not lie along its axes {record.shape}")
    expected = expected | record.value_bytes
    names = [part.name for part in record.parts]
    known = names == [name for name in expected if name in names or name != "zero"]
    require(known, f"its parts are {names}, {list(expected)} were expected")
    for part in record.parts:
        check_size(part.coder, part.stored, part.size)
        if part.size > expected[part.name] or (part.size < expected[part.name] and part.name != "gaps"):
            raise Problem(f"its {part.name} are {part.size} bytes, {expected[part.name]} were expected")
    if record.inflated_bytes > record.dense_bytes:
        raise Problem(f"its deflated parts become {record.inflated_bytes} bytes, more than it has dense")
