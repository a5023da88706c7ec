"""Tables that are made from objects: a granularity or a distribution by its name, its arguments as keys.

    class NM: n: int; m: int; along: Literal[...] = "inputs"        distribution = {name = "nm", n = 2, m = 4}

A class that its room shows is a word by that, see `words`. Its arguments are the keys, with their types and defaults;
what they mean its docstring says under `Attributes:`. What it refuses to be made of, the config refuses.
"""

import functools
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import jax
import pydantic
from pydantic import Discriminator, Field, Tag
from pydantic_core import ErrorDetails, InitErrorDetails

from jaxprune import distributions, granularity
from jaxprune.lab.recipe import words
from jaxprune.lab.recipe.fields import ARRAY, BY_NAME, Fraction, Table
from jaxprune.lab.recipe.problems import nearest, show

FOUND = {
    "couplings": "Traced by the run.",
    "curves": "Without them the run prunes each leaf alone, and measures the accuracy on held-out samples.",
}
"""Arguments that a run finds out by itself, and what the reference says of that."""

STAND_INS: dict[str, Any] = {"curves": (("*", ((1 - 2**-24, 0.0),)),)}
"""For those, before anything was measured: all leaves alike."""


class Answer(Table):
    """One of the four answers by its name, with the arguments of what it names as further keys."""

    model_config = pydantic.ConfigDict(extra="allow")
    kind: ClassVar[str]
    name: str

    @pydantic.model_validator(mode="before")
    @classmethod
    def _of_the_object(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("name", cls.model_fields["name"].default)
        try:
            found = words.known(cls.kind, name)
        except (ValueError, TypeError):
            return {"name": name}  # which is refused at its key
        try:
            checked = arguments(found).model_validate({key: value for key, value in given.items() if key != "name"})
        except pydantic.ValidationError as invalid:
            raise pydantic.ValidationError.from_exception_data(
                cls.__name__, [_said(cls.kind, name, error) for error in invalid.errors(include_url=False)]
            ) from None
        values = dict(checked)
        if not any(key in FOUND and values.get(key) is None for key in _asked(found)):
            try:
                _made(found, values, {})
            except TypeError as error:  # such as an argument that neither a file nor a run can give
                raise ValueError(str(error)) from None
        return {"name": name, **values}

    @property
    def tables(self) -> Iterator["Answer"]:
        """This one, and those of its rules."""
        yield self
        for rule in (self.options.get("rules") or {}).values():
            if isinstance(rule, Answer):
                yield from rule.tables

    @property
    def options(self) -> dict[str, Any]:
        """All keys but the name."""
        return dict(self.model_extra or {})

    @property
    def left_to_the_run(self) -> set[str]:
        """Those of `FOUND` that it, or one of its rules, needs and is not given."""
        return {
            key
            for table in self.tables
            for key in _asked(words.known(table.kind, table.name))
            if key in FOUND and table.options.get(key) is None
        }

    def made(self, found: Mapping[str, Any] = types.MappingProxyType({})) -> Any:
        """The object.

        Args:
            found: what the run found out, by the names in `FOUND`.
        """
        return _made(words.known(self.kind, self.name), self.options, found)


class Granularity(Answer):
    """Which weights live or die together."""

    kind = "granularity"
    name: Annotated[str, words.word("granularity")] = "element"


class Distribution(Answer):
    """Who competes with whom, and how many win."""

    kind = "distribution"
    name: Annotated[str, words.word("distribution")] = "global"

    def takes_sparsity(self) -> bool | None:
        """Whether it needs a sparsity (True) or refuses one (False); None where it takes either, or a model says."""
        made, leaf = self.made(STAND_INS), jax.ShapeDtypeStruct((1, 8, 8), "float32")

        def answers(sparsity: float | None) -> bool:
            try:
                jax.eval_shape(lambda scores: made({"": scores}, sparsity, dims={"": (8, 8)}), leaf)
            except Exception:  # perhaps of a user's own
                return False
            return True

        alone, told = answers(None), answers(0.0)
        return None if alone == told else told


def _made(found: Any, options: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    if not inspect.isclass(found):
        return found
    given = {key: _inner(value, known) for key, value in options.items() if value is not None or key not in FOUND}
    return found(**{key: known[key] for key in _asked(found) if key in FOUND and key in known} | given)


def _asked(found: Any) -> Mapping[str, inspect.Parameter]:
    """What a class is made of; any other object is made already."""
    return inspect.signature(found).parameters if inspect.isclass(found) else {}


def _inner(value: Any, known: Mapping[str, Any]) -> Any:
    """Tables of rules as what they stand for; rules as the pairs that objects keep."""
    if isinstance(value, dict):
        return tuple((pattern, _inner(one, known)) for pattern, one in value.items())
    return value.made(known) if isinstance(value, Answer) else value


def _said(kind: str, name: str, error: ErrorDetails) -> InitErrorDetails:
    """An error of the arguments as one of the table: what is missing or belongs to other names says so."""
    text, key = "", str(error["loc"][0])
    if error["type"] == "missing":
        text = f"missing, name = {show(name)} needs it"
    elif error["type"] == "extra_forbidden":
        others = [word for word, found in words.REGISTRY[kind].items() if key in arguments(found).model_fields]
        text = f"only for name = {' or '.join(map(show, others))}, here name = {show(name)}"
        if not others:
            text = f"unknown key, {nearest(key, ('name', *arguments(words.known(kind, name)).model_fields))}"
    said = {"type": "value_error", "ctx": {"error": text}} if text else {"type": error["type"]}
    return InitErrorDetails(**{"ctx": error.get("ctx", {}), "loc": error["loc"], "input": error["input"], **said})


@functools.cache
def arguments(found: Any) -> type[pydantic.BaseModel]:
    """The keys of a class: its arguments that a file can say, described; of any other object none."""
    fields: dict[str, Any] = {}
    for key, one in _asked(found).items():
        hint = in_toml(typing.get_type_hints(found).get(key, Any))
        default = ... if one.default is one.empty else one.default
        if key in FOUND:
            hint, default = hint and hint | None, None
        if hint is not None:
            said = " ".join(filter(None, (described(found).get(key), FOUND.get(key))))
            fields[key] = (hint, Field(default, description=said))
    return pydantic.create_model("Arguments", __config__=Table.model_config, **fields)


def described(found: type) -> dict[str, str]:
    """Argument -> what the docstring says of it under `Attributes:`."""
    _, _, after = (inspect.getdoc(found) or "").partition("Attributes:\n")
    section = re.match(r"(?:[ ]{4}.*(?:\n|$))*", after)
    parts = re.split(r"^    (\w+): ", section[0] if section else "", flags=re.MULTILINE)[1:]
    return {key: " ".join(text.split()) for key, text in zip(parts[::2], parts[1::2], strict=True)}


def in_toml(hint: Any) -> Any:
    """A type as values of a file have it, arrays for tuples and tables for pairs; None: no file can say it."""
    tables = {granularity.Granularity: Granularity, distributions.Distribution: Distribution}
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return pydantic.JsonValue
    if hint in (bool, int, float, str) or origin is Literal:
        return hint
    if hint in tables:
        return Annotated[tables[hint], BY_NAME]
    if origin in (Union, types.UnionType):
        return _one_of(inner)
    if not inspect.isclass(origin) or not issubclass(origin, Iterable):
        return None
    items = [in_toml(one) for one in inner if one is not Ellipsis]
    if None in items:
        return None
    if issubclass(origin, Mapping):
        return dict[str, items[1]]
    fixed = origin is tuple and Ellipsis not in inner
    return Annotated[tuple[tuple(items)] if fixed else tuple[items[0], ...], ARRAY]


def _one_of(hints: Sequence[Any]) -> Any:
    """A union, told apart by what a value is in TOML, so that errors speak of what was meant."""
    if any(issubclass(get_origin(hint) or object, Mapping) for hint in hints):
        hints = [hint for hint in hints if get_origin(hint) is not tuple]  # pairs, for which a file has a table
    if distributions.Distribution in hints:
        hints = [Fraction if hint is float else hint for hint in hints]  # a number there is a sparsity
    made = [one for hint in hints if (one := hint if hint is Fraction else in_toml(hint)) is not None]
    if not made:
        return None
    by_kind = {_kind(one): one for one in made}
    last = list(by_kind)[-1]
    # The <> tell the branches of the union from keys in the locations of errors.
    union: Any = Annotated[
        Union[tuple(Annotated[one, Tag(f"<{kind}>")] for kind, one in by_kind.items())],  # noqa: UP007
        Discriminator(lambda value: f"<{kind if (kind := _KINDS.get(type(value), last)) in by_kind else last}>"),
    ]
    chosen: Any = union if len(made) > 1 else made[0]
    return chosen | None if types.NoneType in hints else chosen


_KINDS = {bool: "number", int: "number", float: "number", str: "text", list: "array", tuple: "array", dict: "table"}


def _kind(hint: Any) -> str:
    """What values of a type are in TOML."""
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return "text" if get_origin(bare) is Literal else _KINDS.get(get_origin(bare) or bare, "table")
