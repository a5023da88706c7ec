"""Config: a TOML file is an experiment.

    config = load("experiments/quickstart.toml", ["--prune.sparsity", "0.95"])
    config_hash(config)                               # equal hash, equal results

Every section is a frozen, strictly typed model. What cannot be meant is refused: an unknown key, a wrong type, and a
key without effect beside the rest of the file (`momentum` without SGD), because a setting that does nothing documents
an experiment that never ran. Problems come all at once, one line each: `FILE: path.to.key: what is wrong`.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tomli_w
from pydantic import Field

from jaxprune.lab.recipe import words
from jaxprune.lab.recipe.answers import Distribution, Granularity
from jaxprune.lab.recipe.data_section import Data, Model
from jaxprune.lab.recipe.fields import (
    ARRAY,
    DISTINCT,
    Count,
    Duration,
    Fraction,
    NotNegative,
    Only,
    Period,
    Seed,
    Table,
    Time,
    must,
)
from jaxprune.lab.recipe.overrides import at, flags_of, override, put
from jaxprune.lab.recipe.problems import ConfigError, line, show
from jaxprune.lab.recipe.prune_section import Prune
from jaxprune.storage.encodings import pattern_of

__all__ = [
    "Config",
    "ConfigError",
    "Data",
    "Distribution",
    "Duration",
    "Finetune",
    "Granularity",
    "Model",
    "Phase",
    "Point",
    "Prune",
    "Store",
    "Sweep",
    "Table",
    "config_hash",
    "dump",
    "load",
    "load_sweep",
    "training_hash",
]


class Phase(Table):
    """A stretch of training. `weight_decay` is decoupled in adamw, an L2 term of the gradient in sgd and adam."""

    duration: Time = Duration(20, "epochs")
    batch_size: Count = 64
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    momentum: Annotated[Fraction, Only(("optimizer", "sgd"))] = 0.9
    weight_decay: NotNegative = 0.0


class Finetune(Phase):
    """The phase after pruning: shorter and gentler unless told otherwise; nothing is taken over from [train]."""

    duration: Time = Duration(10, "epochs")
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4


class Distill(Table):
    """What the dense model teaches the pruned one: `share` of the loss, at a `temperature`; 0 = nothing."""

    share: Fraction = 0.0
    temperature: Annotated[float, Field(gt=0)] = 4.0


class Sparse(Table):
    """How the pruned weights are stored when deployed."""

    format: Annotated[str, words.word("format")] = "bcoo"


QUANTIZED = ("codebook", "int8", "int4", "bfloat16", "float16")


class Quantize(Table):
    """What is stored instead of the weights: codes of shared values, integers with a scale, or shorter floats."""

    quantize: Literal["none", "codebook", "int8", "int4", "bfloat16", "float16"] = "none"


class Store(Finetune, Quantize):
    """How the model's file is written, and how the values that weights share in it are trained.

    `bits`: of a code, 2^bits values a leaf. `select`: glob patterns of leaves that are quantized, none = every matrix
    and convolution kernel. `deflate`: whether bytes are deflated where that makes them fewer. `compact`: whether units
    that nothing reaches or leaves are removed first.
    """

    bits: Annotated[int, Field(ge=1, le=8), Only(("quantize", "codebook"))] = 4
    select: Annotated[tuple[str, ...], ARRAY, Only(("quantize", *QUANTIZED))] = ()
    encoding: Annotated[str, must(lambda name: name == "auto" or pattern_of(name), "an encoding")] = "auto"
    deflate: bool = True
    compact: bool = False

    @classmethod
    def conditions(cls) -> dict[str, Only]:
        """Those of a phase besides: only codebooks are trained."""
        # `quantize` is a field of the base that comes last, and so stands before these.
        return dict.fromkeys(Finetune.model_fields, Only(("quantize", "codebook"))) | super().conditions()


class Checkpoint(Table):
    """How often the run is saved, and how many of the last checkpoints stay on disk."""

    every: Period = Duration(1, "epochs")
    keep: Count = 2


class Published(Table):
    """What others came to: `who`, fraction `removed`, test `accuracy`, and how many times `smaller` their file was."""

    who: str
    removed: Fraction | None = None
    accuracy: Annotated[float | None, Field(ge=0, le=1)] = None
    smaller: Annotated[float | None, Field(gt=0)] = None


class Config(Table):
    """An experiment. Only `name` is required; without [prune], 90 % of the weights go in one shot.

    `title`: what it is, in a few words for tables.
    """

    name: Annotated[str, must(re.compile("[A-Za-z0-9._-]+").fullmatch, "letters, digits and . _ -")]
    title: str = ""
    seeds: Annotated[tuple[Seed, ...], ARRAY, DISTINCT] = (0,)
    data: Data = Data()
    model: Model = Model()
    train: Phase = Phase()
    prune: Prune = Prune(sparsity=0.9)
    finetune: Finetune = Finetune()
    distill: Distill = Distill()
    sparse: Sparse = Sparse()
    store: Store = Store()
    checkpoint: Checkpoint = Checkpoint()
    published: Annotated[tuple[Published, ...], ARRAY] = ()


@dataclasses.dataclass(frozen=True)
class Point:
    """One experiment of a sweep: what it sets, `{"prune.sparsity": 0.9}`, and the experiment."""

    values: dict[str, Any]
    config: Config


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Experiments over a grid: the axes of the file's [sweep], and a point for each of their combinations."""

    name: str
    axes: dict[str, list[Any]]
    points: tuple[Point, ...]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment; `overrides` is the rest of a command line, `--path.to.key value` or `--path.to.key=value`.

    A value is TOML, or a bare string when it is no TOML. Raises ConfigError: file, syntax, keys, types, values, and a
    file with a [sweep].
    """
    tree, flags = _read(path, overrides)
    if "sweep" in tree:
        raise ConfigError(f"{path}: sweep: one experiment was expected, this is a sweep of several")
    return _validated(tree, path, flags)


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read an experiment or a sweep, which without [sweep] has one point; arguments and errors are those of `load`.

    [sweep] has a list of values in the place of each value that it moves: `prune.sparsity = [0.9, 0.95]`. What is
    overridden is the same in all points: an axis of that name goes, tables of an axis above it take it over.
    """
    tree, flags = _read(path, overrides)
    axes = _axes(tree.pop("sweep", {}), str(path))
    for flag in flags:
        axes = _fixed(axes, ".".join(flag), tree)
    points = []
    for chosen in itertools.product(*axes.values()):
        values, one = dict(zip(axes, chosen, strict=True)), copy.deepcopy(tree)
        for key, value in values.items():
            put(one, key, value)
        points.append(Point(values, _validated(one, path, flags)))
    return Sweep(points[0].config.name, axes, tuple(points))


def _axes(table: Any, path: str, above: str = "") -> dict[str, list[Any]]:
    """Dotted key -> its values."""
    if isinstance(table, Mapping):
        found = [_axes(inner, path, f"{above}.{key}" if above else key) for key, inner in table.items()]
        return {key: values for one in found for key, values in one.items()}
    distinct = {json.dumps(value, default=str) for value in table} if isinstance(table, list) else ()
    if not above or not distinct or len(distinct) < len(table):
        raise ConfigError(f"{path}: sweep.{above}: expected a list of distinct values, arrived {show(table)}")
    return {above: table}


def _fixed(axes: dict[str, list[Any]], flag: str, tree: dict[str, Any]) -> dict[str, list[Any]]:
    """Axes beside a value of the command line, which stands in the tree already."""

    def with_it(key: str, value: Any) -> Any:
        put(one := {}, key, copy.deepcopy(value))
        put(one, flag, at(tree, flag), f"--{flag}")
        return at(one, key)

    return {
        key: [with_it(key, value) for value in values] if flag.startswith(f"{key}.") else values
        for key, values in axes.items()
        if key != flag
    }


def _read(path: str | Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    try:
        tree = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no TOML (names line and column), no UTF-8, absurd nesting
        raise ConfigError(f"{path}: no valid TOML: {error}") from error
    return tree, [override(tree, flag, text) for flag, text in flags_of(overrides)]


def _validated(tree: dict[str, Any], path: str | Path, flags: Sequence[tuple[str, ...]]) -> Config:
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as invalid:
        raise ConfigError("\n".join(line(Config, error, path, flags) for error in invalid.errors())) from None


def dump(config: Config) -> str:
    """The resolved experiment as TOML: defaults written out, keys without effect left out."""
    tree = config.model_dump(mode="json")
    # In one line, because tomli_w writes numbers before tables, which would change the order of rules.
    inline = re.findall(r"(?s)\{.*\}", tomli_w.dumps({"": [0, tree["prune"].pop("distribution")]}))[0]
    return tomli_w.dumps(tree).replace("[prune]\n", f"[prune]\ndistribution = {inline}\n", 1)


# What was so before the key had a place in the file: experiments from then keep their hash.
_BEFORE = {"schedule": "cubic", "iterations": 1, "rewind": "none", "normalized": False, "along": "inputs", "shift": 0}
_BEFORE |= {"levels": [], "growth": 1.0, "groups": [], "in_turn": False, "freeze": True, "pooled": False, "patience": 1}
_BEFORE |= {"adjust_dropout": False, "compact": False, "flip": False, "m": 5.0}
_PERIODIC = ("gradual", "alternating", "regrow", "splice")


def config_hash(config: Config) -> str:
    """Eight hex digits, equal when two experiments compute the same.

    What only names, tells or saves does not count, nor does a preset's name beside what it stands for.
    """
    apart = dict.fromkeys(("name", "title", "checkpoint", "published"), True)
    tree = config.model_dump(mode="json", exclude={**apart, "data": {"data_dir"}})
    tree["prune"].pop("preset", None)
    if config.prune.how in _PERIODIC:  # not given it was 100 steps, and still is in long stages
        given = tree["prune"].pop("update_every", None)
        tree["prune"]["update_every"] = {None: "100 steps", "100 steps": "100 steps, given"}.get(given, given)
    for section in ("store", "distill"):
        if getattr(config, section) == type(config).model_fields[section].default:
            del tree[section]
    # Keys stand in the order of the classes, not of the file; only rules keep the file's, where it has a meaning.
    return hashlib.sha256(json.dumps(_as_before(tree)).encode()).hexdigest()[:8]


def training_hash(config: Config) -> str:
    """The hash of what the dense training depends on, whatever comes after it; the seed apart."""
    return config_hash(Config(name=config.name, data=config.data, model=config.model, train=config.train))


def _as_before(table: Any, patterns: bool = False) -> Any:
    """A table without the keys that say what was so before; names of leaves in `rules` are no keys."""
    if not isinstance(table, dict):
        return table
    # By their text, since the m of 5 in NM(2, 5) is not the m of 5.0 in OWL.
    kept = {key: one for key, one in table.items() if patterns or repr(one) != repr(_BEFORE.get(key, Ellipsis))}
    of_names = ("rules", "costs", "curves")
    return {key: one if key == "options" else _as_before(one, key in of_names) for key, one in kept.items()}
