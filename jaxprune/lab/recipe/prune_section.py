"""The [prune] section: how the zeros come about."""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, Field

from jaxprune.lab.recipe import words
from jaxprune.lab.recipe.answers import Distribution, Granularity
from jaxprune.lab.recipe.fields import (
    ARRAY,
    BY_NAME,
    NEEDED,
    Count,
    Duration,
    Fraction,
    NotNegative,
    Only,
    Period,
    Table,
    Time,
    must,
)
from jaxprune.lab.recipe.problems import show

_word = words.word


def _rewind(text: str) -> str:
    return text if text in ("none", "rate", "initialisation") else str(Duration.parse(text))


THRESHOLDS = {"threshold": "t", "sigma_threshold": "k"}
"""Distributions that grow from round to round, and what of them does."""
Group = Annotated[tuple[str, ...], ARRAY, must(len, "patterns of leaf names")]
RISING = must(lambda levels: list(levels) == sorted(levels), "sparsities that rise from round to round")
FACTOR = must(lambda factor: factor >= 1, "a factor of at least 1")
CriterionName = Annotated[str, _word("criterion")]


class Prune(Table):
    """How the zeros come about.

    `preset`: of `jaxprune.presets()`; gives every key here that is not given. `criterion`, `grow`, `schedule` and the
    names of granularity and distribution may be MODULE:NAME, a user's own. `select`: glob patterns of leaf names, none
    = every matrix and convolution kernel. `sparsity`: fraction removed at the end. `iterations`: steps in which one
    shot is done. `duration`: of the stage, of an iterative one after each of the `rounds`. `rewind`: where a round
    begins: "none", "rate" (the learning rate begins anew), "initialisation", or weights so far into the training ("1
    epoch"). `levels`: sparsity of each round, in the place of `rounds` and `sparsity`. `growth`: of a threshold from
    round to round. `groups`: patterns of leaf names; each group goes through all rounds before the next, or they take
    turns (`in_turn`). `freeze`: whether the other leaves stay as they are meanwhile. `tolerance`: a round that ends
    this much below the dense validation accuracy does not count, and ends the rounds of its group, or the stage; of n
    groups one after the other the i-th may lose i/n of it. `patience`: rounds in a row that a group in turn may fail
    before it has ended; it tries the same again at its next turn. `learning_rate`: of the stage, whose optimizer is
    [train]'s but for that. `update_every`: between masks; of alternating phases, the length; without it 100 steps, or a
    tenth of a stage of less than 1000. `margin`, `decay`: see `jaxprune.splice`.
    """

    preset: Annotated[str | None, _word("preset")] = None
    how: Literal["one-shot", "gradual", "iterative", "alternating", "regrow", "splice"] = "one-shot"
    criterion: CriterionName = "magnitude"
    grow: Annotated[CriterionName, Only(("how", "regrow"))] = "gradient"
    granularity: Annotated[Granularity, BY_NAME] = Granularity()
    distribution: Annotated[Distribution, BY_NAME] = Distribution()
    schedule: Annotated[str, _word("schedule"), Only(("how", "gradual", "splice"))] = "cubic"
    select: Annotated[tuple[str, ...], ARRAY] = ()
    levels: Annotated[tuple[Fraction, ...], ARRAY, RISING, Only(("how", "iterative"))] = ()
    sparsity: Fraction | None = NEEDED
    iterations: Annotated[Count, Only(("how", "one-shot"))] = 1
    rounds: Annotated[Count, Only(("how", "iterative"))] = 5
    growth: Annotated[float, FACTOR, Only(("how", "iterative"))] = 1.0
    groups: Annotated[tuple[Group, ...], ARRAY, Only(("how", "iterative"))] = ()
    in_turn: Annotated[bool, Only(("how", "iterative"))] = False
    freeze: Annotated[bool, Only(("how", "iterative"))] = True
    rewind: Annotated[str, AfterValidator(_rewind), Only(("how", "iterative"))] = "none"
    tolerance: Annotated[Fraction | None, Only(("how", "iterative"))] = None
    patience: Annotated[Count, Only(("how", "iterative"))] = 1
    margin: Annotated[NotNegative, Only(("how", "splice"))] = 0.0
    decay: Annotated[NotNegative, Only(("how", "splice"))] = 0.0
    duration: Annotated[Time, Only(("how", "gradual", "iterative", "alternating", "regrow", "splice"))] = Duration(
        10, "epochs"
    )
    learning_rate: Annotated[
        float | None, Field(gt=0), Only(("how", "gradual", "iterative", "alternating", "regrow", "splice"))
    ] = None
    update_every: Annotated[Period | None, Only(("how", "gradual", "alternating", "regrow", "splice"))] = None

    def idle(self) -> set[str]:
        """Levels are as many as they are."""
        return {"rounds"} if self.levels else set()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _of_preset(cls, given: Any) -> Any:
        preset = words.REGISTRY["preset"].get(str(given.get("preset"))) if isinstance(given, dict) else None
        if preset is None:
            return given
        table, conditions = words.words_of(preset), cls.conditions()
        how = given.get("how", table["how"])
        return {key: value for key, value in table.items() if how in conditions.get(key, (how,))} | given

    @pydantic.field_validator("sparsity")
    @classmethod
    def _fits_distribution(cls, value: float | None, info: pydantic.ValidationInfo) -> float | None:
        if (given := info.data.get("distribution")) is None:  # refused already
            return value
        if info.data.get("levels"):
            if value is not None:
                raise ValueError("has no effect beside prune.levels")
            return value
        if value is None:
            asking = [one.name for one in given.tables if one.takes_sparsity() and one.name != "by_rule"]
            if asking:
                raise ValueError(f"missing, distribution {show(asking[0])} needs it")
        elif given.takes_sparsity() is False:
            raise ValueError(f"has no effect with distribution {show(given.name)}, which decides by itself")
        return value

    @pydantic.field_validator("rounds", "growth", "groups", "in_turn", "freeze", "patience")
    @classmethod
    def _has_an_effect_here(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        if info.field_name == "rounds" and info.data.get("levels"):
            raise ValueError("has no effect beside prune.levels")
        if info.field_name == "groups" and value and info.data.get("select"):
            raise ValueError("has no effect beside prune.select: write the patterns into the groups")
        if (info.field_name, value) in (("in_turn", True), ("freeze", False)) and not info.data.get("groups"):
            raise ValueError("only for prune.groups")
        if info.field_name == "patience" and value > 1 and not info.data.get("in_turn"):
            raise ValueError("only for prune.in_turn")
        name = getattr(info.data.get("distribution"), "name", "")
        if info.field_name == "growth" and value != 1 and name not in THRESHOLDS:
            raise ValueError(f"only for distribution {' or '.join(map(show, THRESHOLDS))}")
        return value
