"""Words of a config, and the objects they stand for.

known("criterion", "wanda")           jp.wanda
known("distribution", "per_output")   jp.PerOutput: what a room of the library shows is a word by that
known("schedule", "mine:slowly")      `slowly` of the module `mine`, a user's own
words_of(jp.presets()["rigl"])        a preset as the [prune] table that describes it
"""

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any

import jaxprune as jp
from jaxprune import criteria, distributions, granularity, schedules
from jaxprune.lab.recipe.fields import Must
from jaxprune.lab.recipe.problems import reason, show

DROPPING = ("mlp", "lenet_300_100", "lenet_5", "tf_tutorial_cnn")
"""Models with dropout."""
DATA_SETS = {
    "digits": (8, 8, 1), "mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3),
    "imagenet2012": (224, 224, 3),
}  # fmt: skip
"""Height, width and channels of their images."""


def _shown(room: Any, fits: Any) -> dict[str, Any]:
    """Word -> object, of all that a room shows and that fits: `PerOutput` is per_output."""
    apart = "(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
    found = {re.sub(apart, "_", name).lower(): one for name, one in vars(room).items() if name[0] != "_" and fits(one)}
    return {word: found[word] for word in sorted(found)}


def _class_with(attribute: str) -> Any:
    return lambda one: inspect.isclass(one) and dataclasses.is_dataclass(one) and hasattr(one, attribute)


def _is_ramp(one: Any) -> bool:
    """Whether it is called with the sparsity that it ends at, and the steps where it begins and ends."""
    return inspect.isfunction(one) and list(inspect.signature(one).parameters)[:3] == ["final", "begin", "end"]


REGISTRY: dict[str, dict[str, Any]] = {
    "criterion": _shown(criteria, lambda one: callable(one) and not inspect.isclass(one)),
    "granularity": {
        **_shown(granularity, _class_with("pool")),
        **_shown(jp, _class_with("pool_leaves")),
        "by_rule": granularity.ByRule,
    },
    "distribution": _shown(distributions, _class_with("__call__")),
    "schedule": _shown(schedules, _is_ramp),
    "format": {**{name: one for name, one in jp.sparse.FORMATS.items() if not one.calibrated}, "dense": None},
    "preset": dict(jp.presets()),
    "model": dict.fromkeys((
        *DROPPING, "resnet20", "resnet32", "resnet56", "resnet50", "cifar_vgg16", "cifar_vgg19", "vgg16", "vgg19",
        "mobilenet_v1",
    )),
    "data set": DATA_SETS,
}  # fmt: skip
"""Of models the names alone: `jaxprune.lab.models` knows what they stand for."""
OWN = ("criterion", "granularity", "distribution", "schedule", "model", "data set")
"""Kinds of which a user may have one of his own, MODULE:NAME."""


def known(kind: str, name: str) -> Any:
    """The object of a name; `MODULE:NAME` is imported.

    Raises:
        ValueError: there is none of that name, or it cannot be imported.
    """
    table = REGISTRY[kind]
    if name in table:
        return table[name]
    if re.fullmatch(r"[\w.]+:\w+", name) and kind in OWN:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a module of the user's own, in which anything may happen
            why = str(error) if isinstance(error, ImportError | AttributeError) else reason(error)
            raise ValueError(f"{show(name)} cannot be imported: {why}") from error
    near = difflib.get_close_matches(name, table, 1)
    own = " or MODULE:NAME" if kind in OWN else ""
    hint = f", did you mean {show(near[0])}?" if near else f"; there are {', '.join(table)}"
    raise ValueError(f"expected a {kind} by its name{own}, arrived {show(name)}{hint}")


def word(kind: str) -> Must:
    """Annotates a key whose value is a name that is `known`."""

    def check(name: str) -> str:
        known(kind, name)
        return name

    names = [f'`"{name}"`' for name in REGISTRY[kind]] + (["MODULE:NAME"] if kind in OWN else [])
    return Must(check, ", ".join(names))


def criterion(name: str, granularity: Any) -> Any:
    """A criterion by its name; those that are made for a granularity are made for this one."""
    found = known("criterion", name)
    if found not in criteria.FACTORIES and not inspect.isclass(found):
        return found
    given = {"granularity": granularity} if "granularity" in inspect.signature(found).parameters else {}
    return found(**given)


def looks_at(found: Any) -> set[str]:
    """The evidence that a criterion needs: its keyword-only arguments without a default."""
    score = found.score if isinstance(found, jp.criteria.Running) else found
    parameters = inspect.signature(score).parameters.values()
    return {one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.default is one.empty}


def words_of(preset: jp.training.Preset) -> dict[str, Any]:
    """The [prune] table of a preset, without its sparsity."""
    method = preset.method
    words = {
        "how": preset.how,
        "criterion": _criterion_word(method.criterion),
        "granularity": _table("granularity", method.granularity),
        "distribution": _table("distribution", method.distribution),
        "schedule": preset.schedule.__name__,
        "iterations": preset.iterations,
        "margin": preset.margin,
        "decay": preset.decay,
        "rewind": {"": "none", "early": "1 epoch"}.get(preset.rewind, preset.rewind),
    }
    words |= {"update_every": "1 epoch"} if preset.how == "alternating" else {}
    return words | ({"grow": _criterion_word(preset.grow)} if preset.grow else {})


def composition(preset: jp.training.Preset) -> str:
    """The answers of a preset that are not the usual ones, as in "magnitude, erk, regrow by gradient"."""
    table = words_of(preset)
    share = table["distribution"]
    parts = [table["criterion"], table["granularity"]["name"], share["name"]]
    parts[2] = f"nm({share['n']}, {share['m']})" if share["name"] == "nm" else parts[2]
    when = {
        "one-shot": "one-shot" if preset.iterations == 1 else f"one-shot in {preset.iterations} steps",
        "gradual": table["schedule"],
        "iterative": f"rounds, rewind {table['rewind']}",
        "regrow": f"regrow by {table.get('grow')}",
    }
    return ", ".join(part for part in (*parts, when.get(preset.how, preset.how)) if part != "element")


def text(value: Any) -> str:
    """A value of a config, or of a point of a sweep, as tables and legends write it: shares in per cent."""
    if isinstance(value, dict):
        return ", ".join(text(inner) if key == "preset" else f"{key} {text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return " ".join(map(text, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{100 * value:.6g} %" if isinstance(value, float) and 0 < value < 1 else str(value)


def texts(values: Sequence[Any]) -> list[str]:
    """The same for values side by side: of tables, what is not the same in all."""
    tables = [value for value in values if isinstance(value, dict)]
    if len(tables) < len(values) or len(tables) < 2:
        return [text(value) for value in values]
    same = {key for key in tables[0] if all(key in one and one[key] == tables[0][key] for one in tables)}
    return [text({key: inner for key, inner in one.items() if key not in same}) for one in tables]


def _criterion_word(found: Any) -> str:
    for name, one in REGISTRY["criterion"].items():
        if one is found:
            return name
    return "momentum" if isinstance(found, jp.criteria.Running) else "joint_taylor"


def _table(kind: str, found: Any) -> dict[str, Any]:
    name = next(name for name, one in REGISTRY[kind].items() if one is type(found))
    return {"name": name, **vars(found)}
