"""What the tables of a config are made of: strict, frozen tables, durations, fractions, keys that depend on others."""

import dataclasses
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator

from jaxprune.lab.recipe.problems import show


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


@dataclasses.dataclass(frozen=True)
class Must(AfterValidator):
    """A condition, and what the reference of keys says of it."""

    said: str = ""


def must(holds: Callable[[Any], object], expected: str) -> Must:
    """A condition on a value, said in words."""

    def check(value: Any) -> Any:
        if holds(value):
            return value
        raise ValueError(f"expected {expected}, arrived {show(value)}")

    return Must(check, expected)


class Only(tuple[str, ...]):
    """Annotates a key that has an effect only where another key, the first here, has one of the other values."""


Fraction = Annotated[float, Must(_below_one, "a fraction in [0, 1)")]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # JAX keeps 32 bits of a seed
Time = Annotated[Duration, PlainValidator(Duration.parse), PlainSerializer(str)]
Period = Annotated[Time, must(lambda duration: duration.amount > 0, "a duration above 0")]
DISTINCT = must(lambda seeds: len(set(seeds)) == len(seeds) > 0, "distinct seeds, at least one")
NEEDED: Any = Field(default=None, validate_default=True)  # None only where the rest of the file allows it
BY_NAME = BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)  # "erk" is enough
ARRAY = Field(strict=False)  # TOML has lists where frozen models have tuples; the items stay strict


class Table(pydantic.BaseModel):
    """What all tables of the file share: frozen, strict, no unknown keys.

    A key that is `Only` for other values is refused when given, and left out of `dump` and of the hash.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def conditions(cls) -> dict[str, Only]:
        """Key -> on what its effect depends."""
        return {key: note for key, field in cls.model_fields.items() for note in field.metadata if type(note) is Only}

    def idle(self) -> set[str]:
        """Keys without effect for other reasons than `conditions`."""
        return set()

    @pydantic.field_validator("*")  # runs for what was given and for NEEDED, not for other defaults
    @classmethod
    def _has_an_effect(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        key, *values = cls.conditions().get(str(info.field_name), [""])
        if key in info.data and (info.data[key] in values) == (value is None):
            state = f"{key} = {show(info.data[key])}"
            meant = f"{key} = {' or '.join(map(show, values))}"
            raise ValueError(f"missing, {state} needs it" if value is None else f"only for {meant}, here {state}")
        return value

    @pydantic.model_serializer(mode="wrap")
    def _resolved(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        idle = {key for key, (on, *values) in self.conditions().items() if getattr(self, on) not in values}
        idle |= self.idle()
        return {key: value for key, value in handler(self).items() if value is not None and key not in idle}
