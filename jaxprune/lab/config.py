"""Config: a TOML file is an experiment.

    config = load("experiments/quickstart.toml", ["--prune.sparsity", "0.95"])
    config_hash(config)                               # equal hash, equal results

Every section is a frozen, strictly typed model. What cannot be meant is refused: an unknown key, a wrong type, and a
key without effect beside the rest of the file (`momentum` without SGD), because a setting that does nothing documents
an experiment that never ran. Problems come all at once, one line each: `FILE: path.to.key: what is wrong`.
"""

import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tomli_w
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, PlainSerializer, PlainValidator, Tag

from jaxprune.lab.overrides import flags_of, override
from jaxprune.lab.problems import ConfigError, line, show
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
    "Prune",
    "Store",
    "Table",
    "config_hash",
    "dump",
    "load",
]


@dataclasses.dataclass(frozen=True)
class Duration:
    """A stretch of training: "300 steps", or "0.5 epochs" (passes over the training data); `str` gives it back."""

    amount: float
    unit: Literal["steps", "epochs"]

    @classmethod
    def parse(cls, text: "str | Duration") -> "Duration":
        """Read "N steps", "N epochs" or the singular; a Duration comes back as it is. Raises ValueError."""
        if isinstance(text, Duration):
            return text
        found = re.fullmatch(r"([0-9]{1,12}) steps?|([0-9]{1,12}(?:\.[0-9]{1,12})?) epochs?", str(text))
        if not found:
            raise ValueError(f'expected a duration such as "20 epochs" or "500 steps", arrived {show(text)}')
        return cls(float(found[1] or found[2]), "steps" if found[1] else "epochs")

    def steps(self, steps_per_epoch: int) -> int:
        """The nearest whole number of optimizer steps, at least 0."""
        return max(0, round(self.amount * (steps_per_epoch if self.unit == "epochs" else 1)))

    def __str__(self) -> str:
        amount = f"{Decimal(repr(float(self.amount))).normalize():f}"  # never "1e-05", which would not parse
        return f"{amount} {self.unit[:-1] if amount == '1' else self.unit}"


def _below_one(value: float) -> float:
    if 0 <= value < 1:
        return value
    hint = f", did you mean {value / 100:g}?" if 1 < value < 100 else ""
    raise ValueError(f"expected a fraction in [0, 1), arrived {value:.12g}{hint}")


def _must(holds: Callable[[Any], object], expected: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if holds(value):
            return value
        raise ValueError(f"expected {expected}, arrived {show(value)}")

    return AfterValidator(check)


class Only(tuple[str, ...]):
    """Annotates a key that has an effect only where another key, the first here, has one of the other values."""


Fraction = Annotated[float, AfterValidator(_below_one)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # JAX keeps 32 bits of a seed
Time = Annotated[Duration, PlainValidator(Duration.parse), PlainSerializer(str)]
Period = Annotated[Time, _must(lambda duration: duration.amount > 0, "a duration above 0")]
DISTINCT = _must(lambda seeds: len(set(seeds)) == len(seeds) > 0, "distinct seeds, at least one")
NEEDED: Any = Field(default=None, validate_default=True)  # None only where the rest of the file allows it
BY_NAME = BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)  # "erk" is enough
ARRAY = Field(strict=False)  # TOML has lists where frozen models have tuples; the items stay strict


class Table(pydantic.BaseModel):
    """What all tables of the file share: frozen, strict, no unknown keys.

    A key that is `Only` for other values is refused when given, and left out of `dump` and of the hash.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def _conditions(cls) -> dict[str, Only]:
        return {key: note for key, field in cls.model_fields.items() for note in field.metadata if type(note) is Only}

    @pydantic.field_validator("*")  # runs for what was given and for NEEDED, not for other defaults
    @classmethod
    def _has_an_effect(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        key, *values = cls._conditions().get(str(info.field_name), [""])
        if key in info.data and (info.data[key] in values) == (value is None):
            state = f"{key} = {show(info.data[key])}"
            meant = f"{key} = {' or '.join(map(show, values))}"
            raise ValueError(f"missing, {state} needs it" if value is None else f"only for {meant}, here {state}")
        return value

    @pydantic.model_serializer(mode="wrap")
    def _resolved(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        idle = {key for key, (on, *values) in self._conditions().items() if getattr(self, on) not in values}
        return {key: value for key, value in handler(self).items() if value is not None and key not in idle}


class Granularity(Table):
    """Which weights live or die together; `rows` x `cols` weights make a block."""

    name: Literal["element", "block", "input", "output"] = "element"
    rows: Annotated[Count | None, Only(("name", "block"))] = NEEDED
    cols: Annotated[Count | None, Only(("name", "block"))] = NEEDED


class Distribution(Table):
    """Who competes with whom, and how many win.

    `floor`: density in [0, 1) that no leaf falls below. `n` of every `m` inputs survive. A weight dies below `k`
    standard deviations of its leaf, or below the score `t`. `rules`: pattern of leaf names -> sparsity or distribution;
    the first match wins, so the order of the file is kept.
    """

    name: Literal["uniform", "global", "erk", "per_output", "nm", "sigma_threshold", "threshold", "by_rule"] = "global"
    floor: Annotated[Fraction, Only(("name", "global"))] = 0.0
    n: Annotated[Count | None, Only(("name", "nm"))] = NEEDED
    m: Annotated[Count | None, Only(("name", "nm"))] = NEEDED
    k: Annotated[NotNegative | None, Only(("name", "sigma_threshold"))] = NEEDED
    t: Annotated[NotNegative | None, Only(("name", "threshold"))] = NEEDED
    rules: Annotated[dict[str, "Rule"] | None, Only(("name", "by_rule"))] = NEEDED

    @pydantic.field_validator("m")
    @classmethod
    def _not_below_n(cls, value: int | None, info: pydantic.ValidationInfo) -> int | None:
        if value is not None and value < (info.data.get("n") or 0):
            raise ValueError(f"expected at least n = {info.data['n']}, arrived {value}")
        return value


# The <> tell the branches of the union from keys in the locations of errors.
Rule = Annotated[
    Annotated[Fraction, Tag("<number>")] | Annotated[Distribution, BY_NAME, Tag("<table>")],
    Discriminator(lambda value: "<number>" if isinstance(value, int | float) else "<table>"),
]


class Data(Table):
    """Where samples come from. `data_dir` "": TFDS's default.

    `validation`: fraction of the training data held out. `shift`: in training, images are moved at random by up to so
    many pixels up or down and sideways.
    """

    name: Literal["digits", "mnist", "fashion_mnist", "cifar10"] = "digits"
    data_dir: str = ""
    validation: Fraction = 0.1
    shift: Annotated[int, Field(ge=0, le=8)] = 0


class Model(Table):
    """Which network. `widths`: hidden widths of the mlp; `dropout`: fraction of activations dropped in training."""

    name: Literal["mlp", "lenet_300_100", "lenet_5", "tf_tutorial_cnn"] = "mlp"
    widths: Annotated[tuple[Count, ...], ARRAY, Only(("name", "mlp"))] = (300, 100)
    dropout: Fraction = 0.0


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


class Prune(Table):
    """How the zeros come about.

    `select`: glob patterns of leaf names, none = every matrix and convolution kernel. `sparsity`: fraction removed at
    the end. `duration`: length of the ramp if gradual, training after each of the `rounds` if iterative.
    """

    how: Literal["one-shot", "gradual", "iterative"] = "one-shot"
    criterion: Literal["magnitude", "random", "taylor"] = "magnitude"
    granularity: Annotated[Granularity, BY_NAME] = Granularity()
    distribution: Annotated[Distribution, BY_NAME] = Distribution()
    select: Annotated[tuple[str, ...], ARRAY] = ()
    sparsity: Fraction | None = NEEDED
    rounds: Annotated[Count, Only(("how", "iterative"))] = 5
    duration: Annotated[Time, Only(("how", "gradual", "iterative"))] = Duration(10, "epochs")
    update_every: Annotated[Period, Only(("how", "gradual"))] = Duration(100, "steps")

    @pydantic.field_validator("sparsity")
    @classmethod
    def _fits_distribution(cls, value: float | None, info: pydantic.ValidationInfo) -> float | None:
        if (given := info.data.get("distribution")) is None:  # refused already
            return value
        names = [getattr(one, "name", "") for one in (given, *(given.rules or {}).values())]
        asking = [name for name in names if name in ("uniform", "global", "erk", "per_output")]
        if value is None and asking:
            raise ValueError(f"missing, distribution {show(asking[0])} needs it")
        if value is not None and given.name in ("threshold", "sigma_threshold"):
            raise ValueError(f"has no effect with distribution {show(given.name)}, which decides by itself")
        return value


class Sparse(Table):
    """How the pruned weights are stored when deployed."""

    format: Literal["bcoo", "bcsr", "block", "native", "native_row", "native_block", "native_int8", "dense"] = "bcoo"


QUANTIZED = ("codebook", "int8", "int4", "bfloat16", "float16")


class Quantize(Table):
    """What is stored instead of the weights: codes of shared values, integers with a scale, or shorter floats."""

    quantize: Literal["none", "codebook", "int8", "int4", "bfloat16", "float16"] = "none"


class Store(Finetune, Quantize):
    """How the model's file is written, and how the values that weights share in it are trained.

    `bits`: of a code, 2^bits values a leaf. `select`: glob patterns of leaves that are quantized, none = every matrix
    and convolution kernel. `deflate`: whether bytes are deflated where that makes them fewer.
    """

    bits: Annotated[int, Field(ge=1, le=8), Only(("quantize", "codebook"))] = 4
    select: Annotated[tuple[str, ...], ARRAY, Only(("quantize", *QUANTIZED))] = ()
    encoding: Annotated[str, _must(lambda name: name == "auto" or pattern_of(name), "an encoding")] = "auto"
    deflate: bool = True

    @classmethod
    def _conditions(cls) -> dict[str, Only]:
        # `quantize` is a field of the base that comes last, and so stands before these.
        return dict.fromkeys(Finetune.model_fields, Only(("quantize", "codebook"))) | super()._conditions()


class Checkpoint(Table):
    """How often the run is saved, and how many of the last checkpoints stay on disk."""

    every: Period = Duration(1, "epochs")
    keep: Count = 2


class Config(Table):
    """An experiment. Only `name` is required; without [prune], 90 % of the weights go in one shot."""

    name: Annotated[str, _must(re.compile("[A-Za-z0-9._-]+").fullmatch, "letters, digits and . _ -")]
    seeds: Annotated[tuple[Seed, ...], ARRAY, DISTINCT] = (0,)
    data: Data = Data()
    model: Model = Model()
    train: Phase = Phase()
    prune: Prune = Prune(sparsity=0.9)
    finetune: Finetune = Finetune()
    sparse: Sparse = Sparse()
    store: Store = Store()
    checkpoint: Checkpoint = Checkpoint()


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment; `overrides` is the rest of a command line, `--path.to.key value` or `--path.to.key=value`.

    A value is TOML, or a bare string when it is no TOML. Raises ConfigError: file, syntax, keys, types, values.
    """
    try:
        tree = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no TOML (names line and column), no UTF-8, absurd nesting
        raise ConfigError(f"{path}: no valid TOML: {error}") from error
    flags = [override(tree, flag, text) for flag, text in flags_of(overrides)]
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as invalid:
        raise ConfigError("\n".join(line(Config, error, path, flags) for error in invalid.errors())) from None


def dump(config: Config) -> str:
    """The resolved experiment as TOML: defaults written out, keys without effect left out."""
    tree = config.model_dump(mode="json")
    # In one line, because tomli_w writes numbers before tables, which would change the order of rules.
    inline = re.findall(r"\{.*\}", tomli_w.dumps({"": [0, tree["prune"].pop("distribution")]}))[0]
    return tomli_w.dumps(tree).replace("[prune]\n", f"[prune]\ndistribution = {inline}\n", 1)


def config_hash(config: Config) -> str:
    """Eight hex digits, equal when two experiments compute the same: name, data_dir and [checkpoint] do not count."""
    tree = config.model_dump(mode="json", exclude={"name": True, "checkpoint": True, "data": {"data_dir"}})
    # Experiments from before these had a place in the file keep their hash.
    if config.store == Store():
        del tree["store"]
    if not config.data.shift:
        del tree["data"]["shift"]
    # Keys stand in the order of the classes, not of the file; only rules keep the file's, where it has a meaning.
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:8]
