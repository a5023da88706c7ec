"""Records: frozen dataclasses as JSON and back, with errors that say which field is wrong.

from_plain(type, to_plain(record)) == record         tuples are lists in JSON, and tuples again after it
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def to_plain(record: Any) -> Any:
    """A record and all records in it as dicts and lists."""
    if dataclasses.is_dataclass(record):
        return {field.name: to_plain(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, tuple | list):
        return [to_plain(one) for one in record]
    return {key: to_plain(one) for key, one in record.items()} if isinstance(record, Mapping) else record


def from_plain(kind: type[T], plain: Any, where: str = "") -> T:
    """The record of that type.

    Args:
        kind: a dataclass whose fields are texts, numbers, None, tuples, mappings with text keys, and such dataclasses.
        plain: what `to_plain` gave, after JSON or before.
        where: path of this record, for messages.

    Raises:
        ValueError: a field is missing, unknown, or of another type; it is named.
    """
    if not isinstance(plain, dict):
        raise ValueError(f"{where or kind.__name__} should be an object with fields, {_short(plain)} arrived.")
    fields = typing.get_type_hints(kind)
    for name in fields:
        if name not in plain:
            raise ValueError(f"{_join(where, name)} is missing.")
    for name in plain:
        if name not in fields:
            raise ValueError(f"{_join(where, name)} is no field of a {kind.__name__}. It has: {', '.join(fields)}.")
    return kind(**{name: _value(hint, plain[name], _join(where, name)) for name, hint in fields.items()})


def _value(hint: Any, plain: Any, where: str) -> Any:
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), plain, where)
    if isinstance(hint, types.UnionType):
        return None if plain is None else _value(parameters[0], plain, where)
    if origin is tuple and isinstance(plain, list):
        return tuple(_value(parameters[0], one, f"{where}/{i}") for i, one in enumerate(plain))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(plain, dict):
        return {key: _value(parameters[1], one, _join(where, key)) for key, one in plain.items()}
    if hint is Any:
        return plain
    fits = isinstance(plain, hint) if isinstance(hint, type) and origin is None else False
    if hint is float and isinstance(plain, int):
        fits = True
    if not fits or (isinstance(plain, bool) and hint is not bool):
        raise ValueError(f"{where} should be {_called(hint)}, {_short(plain)} arrived.")
    return plain


def _called(hint: Any) -> str:
    return {str: "a text", int: "an integer", float: "a number", bool: "true or false"}.get(hint, "a list or an object")


def _join(where: str, name: str) -> str:
    return f"{where}/{name}" if where else name


def _short(plain: Any) -> str:
    text = repr(plain)
    return text if len(text) <= 60 else f"{text[:57]}..."
