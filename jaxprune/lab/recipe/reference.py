"""The reference of a config's keys, made from their types: `jaxprune keys`, kept as experiments/CONFIG.md."""

import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from jaxprune import tables
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.recipe import words
from jaxprune.lab.recipe.answers import Answer, arguments
from jaxprune.lab.recipe.data_section import Options
from jaxprune.lab.recipe.fields import Duration, Must, Table
from jaxprune.lab.recipe.problems import show

OPENING = """\
# Keys of a config

Written by `jaxprune keys > experiments/CONFIG.md`, from the types that configs are checked by. Every key can be given
on the command line too, as `--prune.sparsity 0.9`. `[sweep]` has lists in the place of values, `prune.sparsity = [0.8,
0.9]`, and makes a run of each of their combinations. MODULE:NAME is an object of your own, imported from the folder
that the command runs in; a run's folder is named after names and values, not after code: where your code changes, give
the experiment another name, or delete the folder."""

_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def markdown() -> str:
    """All keys: a table for every section, under what its class says of it."""
    parts = [OPENING]
    for name, section in _sections(cfg.Config, ""):
        rows = [_row(section, key, field) for key, field in section.model_fields.items() if not _is_section(field)]
        parts += [_title(name), inspect.getdoc(section) or ""]
        header = ("key", "value", "default", "only with")
        if issubclass(section, Answer):
            known = words.REGISTRY[section.kind]
            said = {name: (inspect.getdoc(found) or "").partition("\n")[0] for name, found in known.items()}
            parts.append("\n".join(f"- `{show(name)}`: {text}" for name, text in said.items()))
            rows, header = [(*row, "") for row in rows] + _rows_of_arguments(known), (*header, "what it is")
        parts.append(tables.markdown(header, rows, words=len(header)))
    return "\n\n".join(parts)


def _rows_of_arguments(known: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (f"`{key}`", _value(field), _default(field), f"`name` = `{show(name)}`", _meaning(field))
        for name, found in known.items()
        for key, field in arguments(found).model_fields.items()
    ]


def _meaning(field: FieldInfo) -> str:
    """What a docstring says of an argument, with the signs of this file."""
    return _cell(field.description or "").replace(">=", "≥").replace("<=", "≤")


def _title(name: str) -> str:
    if not name:
        return "## At the top"
    array = get_origin(cfg.Config.model_fields[name.partition(".")[0]].annotation) is tuple
    return f"## `[[{name}]]`, as often as there are some" if array else f"## `[{name}]`"


def _sections(section: type[Table], path: str) -> Iterator[tuple[str, type[Table]]]:
    yield path, section
    for key, field in section.model_fields.items():
        if _is_section(field):
            yield from _sections(_table_of(field.annotation), f"{path}.{key}" if path else key)


def _table_of(hint: Any) -> Any:
    """The table that a type is, or is an array of."""
    inner = get_args(hint)[0] if get_origin(hint) is tuple else hint
    return inner if isinstance(inner, type) and issubclass(inner, Table) else None


def _is_section(field: FieldInfo) -> bool:
    return _table_of(field.annotation) is not None


def _row(section: type[Table], key: str, field: FieldInfo) -> tuple[str, ...]:
    on, *values = section.conditions().get(key, ("",))
    condition = f"`{on}` = {_listed(values)}" if on else ""
    return f"`{key}`", _value(field), _default(field), _cell(condition)


def _value(field: FieldInfo) -> str:
    return _cell(_words(field.annotation, field.metadata))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(f"`{show(value)}`" for value in values)


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "needed"
    if value is None:
        return ""
    value = str(value) if isinstance(value, Duration) else list(value) if isinstance(value, tuple) else value
    return f"`{show(value)}`"


def _words(hint: Any, notes: Sequence[Any] = ()) -> str:
    """A type in words: what its notes say of it, else what it is, with its bounds."""
    if any(note in notes for note in get_args(Options)[1:]):
        return "a table of your own"
    said = [note.said for note in notes if isinstance(note, Must)]
    if said and get_origin(hint) not in (tuple, dict):
        return said[0]
    return "; ".join([" ".join(filter(None, (_base(hint), " and ".join(_bounds(notes))))), *said])


def _base(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _words(inner[0], inner[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(one) for one in inner if one is not types.NoneType))
    if origin is Literal:
        return _listed(inner)
    if origin is tuple:
        return f"an array: {_words(inner[0])}"
    if origin is dict:
        return f"a table: pattern of leaf names to {_words(inner[1])}"
    if isinstance(hint, typing.ForwardRef | str):
        return f"a {str(getattr(hint, '__forward_arg__', hint)).lower()}"
    names = {bool: "`true`, `false`", int: "an integer", float: "a number", str: "text"}
    return names.get(hint, '`"20 epochs"`, `"500 steps"`' if hint is Duration else f"a {hint.__name__.lower()}")


def _bounds(notes: Sequence[Any]) -> list[str]:
    flat = [one for note in notes for one in (note.metadata if isinstance(note, FieldInfo) else [note])]
    return [f"{sign} {getattr(one, name):,}" for one in flat for name, sign in _BOUNDS if hasattr(one, name)]
