"""Overrides: values of a config on the command line, `--path.to.key value` or `--path.to.key=value`."""

import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

from jaxprune.lab.recipe.problems import ConfigError, show


def flags_of(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`--flag value` and `--flag=value` -> (flag, text of the value).

    Raises:
        ConfigError: a word that is no flag, or a flag without a value.
    """
    rest = iter(words)
    for word in rest:
        flag, equals, text = word.partition("=")
        if not re.match("--[^-]", flag):
            raise ConfigError(f"{word}: expected `--path.to.key value`")
        text = text if equals else next(rest, "--")
        if not equals and text.startswith("--"):
            raise ConfigError(f"{flag}: expected a value after it")
        yield flag, text


def override(tree: dict[str, Any], flag: str, text: str) -> tuple[str, ...]:
    """Put the value of a flag into the tree; returns its path.

    Raises:
        ConfigError: a step of the path is no table.
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {}
    # More than one: the text had a line break.
    return put(tree, flag.removeprefix("--"), parsed["value"] if len(parsed) == 1 else text, flag)


def put(tree: dict[str, Any], key: str, value: Any, said: str = "") -> tuple[str, ...]:
    """Put a value at a dotted key, called `said` in errors; returns its path.

    Raises:
        ConfigError: a step of the path is no table.
    """
    *tables, last = path = tuple(key.split("."))
    for step in tables:
        inner = tree.setdefault(step, {})
        if isinstance(inner, str) and step in ("granularity", "distribution"):
            inner = tree[step] = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"{said or key}: {step} is {show(inner)} in the file, not a table")
        tree = inner
    tree[last] = value
    return path


def at(tree: dict[str, Any], key: str) -> Any:
    """The value at a dotted key that is there."""
    return reduce(lambda inner, step: inner[step], key.split("."), tree)
