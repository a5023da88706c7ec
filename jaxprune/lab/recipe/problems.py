"""What is wrong with a config, one line for each problem: `FILE: path.to.key: what is wrong`."""

import difflib
import json
import re
from collections.abc import Iterable, Sequence

import pydantic
from pydantic_core import ErrorDetails


class ConfigError(ValueError):
    """An experiment that cannot be run as written; one line per problem, each naming file or flag, key and reason."""


def show(value: object) -> str:
    """A value as the file writes it, more or less; always one line."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def reason(error: Exception) -> str:
    """What code of the user's own failed by: its kind and the first line of its words."""
    first = (str(error).strip() or "without a word").splitlines()[0]
    return f"{type(error).__name__}: {first}"


def line(root: type[pydantic.BaseModel], error: ErrorDetails, file: object, flags: Sequence[tuple[str, ...]]) -> str:
    """One problem in one line; what a flag brought in is said as that flag."""
    path = tuple(step for step in error["loc"] if not str(step).startswith("<"))
    key = ".".join(step if re.fullmatch("[A-Za-z0-9_-]+", step) else show(step) for step in map(str, path))
    by_flag = any(path[: len(flag)] == flag[: len(path)] for flag in flags)
    return f"{'--' if by_flag else f'{file}: '}{key}: {_problem(root, error, path)}"


def _problem(root: type[pydantic.BaseModel], error: ErrorDetails, path: tuple[int | str, ...]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key, {_nearest_key(root, path)}"
    if kind in ("value_error", "missing"):
        return str(context.get("error", kind))
    python = {"tuple_type": "an array", "dict_type": "a table", "model_type": "a table"}  # whose words are not TOML's
    expected = python.get(kind) or re.sub("^[A-Z][a-z]+ should (be )?", "", error["msg"])
    text = f"expected {expected}, arrived {show(error['input'])}"
    near = difflib.get_close_matches(str(error["input"]), re.findall("'(.*?)'", context.get("expected", "")), 1)
    return f"{text}, did you mean {show(near[0])}?" if near else text


def _nearest_key(root: type[pydantic.BaseModel], path: tuple[int | str, ...]) -> str:
    """The key of the same table that was probably meant, or all of them."""
    table = root
    for step in path[:-1]:
        inner = getattr(table.model_fields.get(str(step)), "annotation", None)
        table = inner if isinstance(inner, type) and issubclass(inner, pydantic.BaseModel) else table
    sections = {name: getattr(field.annotation, "model_fields", ()) for name, field in root.model_fields.items()}
    near = [f"{name}.{path[-1]}" for name, keys in sections.items() if path[-1] in keys and path[-1] != "name"]
    return f"did you mean {near[0]}?" if near else nearest(str(path[-1]), table.model_fields)


def nearest(key: str, known: Iterable[str]) -> str:
    """The one of the known keys that was probably meant, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(key, known, 1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
