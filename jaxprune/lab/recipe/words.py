"""Words of a config, and the objects they stand for.

known("criterion", "wanda")           jp.wanda
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
from jaxprune import criteria
from jaxprune.lab.recipe.fields import Must
from jaxprune.lab.recipe.problems import reason, show

FACTORIES = ("joint_taylor", "momentum")
DROPPING = ("mlp", "lenet_300_100", "lenet_5", "tf_tutorial_cnn")
"""Models with dropout."""
REGISTRY: dict[str, dict[str, Any]] = {
    "criterion": {name: getattr(criteria, name) for name in criteria.__all__ if name != "Running"},
    "granularity": {
        **{one.__name__.lower(): one for one in (jp.Element, jp.Block, jp.Input, jp.Output, jp.Kernel, jp.Head)},
        "by_rule": jp.GranularityByRule,
    },
    "distribution": {
        "uniform": jp.Uniform,
        "global": jp.Global,
        "erk": jp.ERK,
        "owl": jp.OWL,
        "per_output": jp.PerOutput,
        "nm": jp.NM,
        "sigma_threshold": jp.SigmaThreshold,
        "threshold": jp.Threshold,
        "budget": jp.Budget,
        "by_rule": jp.ByRule,
    },
    "schedule": {one.__name__: one for one in (jp.cubic, jp.linear, jp.cosine, jp.exponential)},
    "preset": dict(jp.presets()),
    "model": dict.fromkeys((
        *DROPPING, "resnet20", "resnet32", "resnet56", "resnet50", "cifar_vgg16", "cifar_vgg19", "vgg16", "vgg19",
        "mobilenet_v1",
    )),
    "data set": dict.fromkeys(("digits", "mnist", "fashion_mnist", "cifar10", "imagenet2012")),
}  # fmt: skip
"""Of models and data sets the names alone: `jaxprune.lab.models` and `jaxprune.lab.data` know what they stand for."""


def known(kind: str, name: str) -> Any:
    """The object of a name; `MODULE:NAME` is imported.

    Raises:
        ValueError: there is none of that name, or it cannot be imported.
    """
    table = REGISTRY[kind]
    if name in table:
        return table[name]
    if re.fullmatch(r"[\w.]+:\w+", name) and kind != "preset":
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a module of the user's own, in which anything may happen
            why = str(error) if isinstance(error, ImportError | AttributeError) else reason(error)
            raise ValueError(f"{show(name)} cannot be imported: {why}") from error
    near = difflib.get_close_matches(name, table, 1)
    own = "" if kind == "preset" else " or MODULE:NAME"
    hint = f", did you mean {show(near[0])}?" if near else f"; there are {', '.join(table)}"
    raise ValueError(f"expected a {kind} by its name{own}, arrived {show(name)}{hint}")


def word(kind: str) -> Must:
    """Annotates a key whose value is a name that is `known`."""

    def check(name: str) -> str:
        known(kind, name)
        return name

    names = [f'`"{name}"`' for name in REGISTRY[kind]] + ([] if kind == "preset" else ["MODULE:NAME"])
    return Must(check, ", ".join(names))


def criterion(name: str, granularity: Any) -> Any:
    """A criterion by its name; those that are made for a granularity are made for this one."""
    found = known("criterion", name)
    if name == "joint_taylor":
        return found(granularity)
    return found() if name in FACTORIES or inspect.isclass(found) else found


def looks_at(found: Any) -> set[str]:
    """The evidence that a criterion needs: its keyword-only arguments without a default."""
    score = found.score if isinstance(found, jp.Running) else found
    parameters = inspect.signature(score).parameters.values()
    return {one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.default is one.empty}


def words_of(preset: jp.Preset) -> dict[str, Any]:
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


def composition(preset: jp.Preset) -> str:
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
    return "momentum" if isinstance(found, jp.Running) else "joint_taylor"


def _table(kind: str, found: Any) -> dict[str, Any]:
    name = next(name for name, one in REGISTRY[kind].items() if one is type(found))
    fields = {one.name: getattr(found, one.name) for one in dataclasses.fields(found)}
    return {"name": name, **fields}
