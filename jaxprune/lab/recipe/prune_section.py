"""The [prune] section: how the zeros come about."""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, Discriminator, Field, Tag

from jaxprune.lab.recipe import words
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


THRESHOLDS = ("threshold", "sigma_threshold")
Group = Annotated[tuple[str, ...], ARRAY, must(len, "patterns of leaf names")]
RISING = must(lambda levels: list(levels) == sorted(levels), "sparsities that rise from round to round")
FACTOR = must(lambda factor: factor >= 1, "a factor of at least 1")
CriterionName = Annotated[str, _word("criterion")]


class Granularity(Table):
    """Which weights live or die together; `rows` x `cols` weights make a block, an equal share of an axis a head.

    `rules`: pattern of leaf names -> granularity; the first match wins.
    """

    name: Annotated[str, _word("granularity")] = "element"
    rows: Annotated[Count | None, Only(("name", "block"))] = NEEDED
    cols: Annotated[Count | None, Only(("name", "block"))] = NEEDED
    heads: Annotated[Count | None, Only(("name", "head"))] = NEEDED
    along: Annotated[Literal["outputs", "inputs"], Only(("name", "head"))] = "outputs"
    rules: Annotated[dict[str, Annotated["Granularity", BY_NAME]] | None, Only(("name", "by_rule"))] = NEEDED


class Distribution(Table):
    """Who competes with whom, and how many win.

    `floor`: density in [0, 1) that no leaf falls below. `normalized`: scores over the norm of their leaf's. `n` of
    every `m` groups `along` an axis survive. A weight dies below `k` standard deviations of its leaf (`pooled`: of all
    leaves together), or below the score `t`. `lam`: most that a leaf's sparsity differs by. `rules`: pattern of leaf
    names -> sparsity or distribution; the first match wins, so the order of the file is kept.
    """

    name: Annotated[str, _word("distribution")] = "global"
    floor: Annotated[Fraction, Only(("name", "global"))] = 0.0
    normalized: Annotated[bool, Only(("name", "global"))] = False
    n: Annotated[Count | None, Only(("name", "nm"))] = NEEDED
    m: Annotated[Count | None, Only(("name", "nm"))] = NEEDED
    along: Annotated[Literal["inputs", "outputs", "window"], Only(("name", "nm"))] = "inputs"
    k: Annotated[NotNegative | None, Only(("name", "sigma_threshold"))] = NEEDED
    pooled: Annotated[bool, Only(("name", "sigma_threshold"))] = False
    t: Annotated[NotNegative | None, Only(("name", "threshold"))] = NEEDED
    lam: Annotated[Fraction, Only(("name", "owl"))] = 0.08
    per_output: Annotated[bool, Only(("name", "owl"))] = False
    costs: Annotated[dict[str, NotNegative] | None, Only(("name", "budget"))] = None
    limit: Annotated[NotNegative | None, Only(("name", "budget"))] = None
    per_cost: Annotated[bool, Only(("name", "budget"))] = False
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
        table = words.words_of(preset)
        how = given.get("how", table["how"])
        for part in (Granularity, Distribution):  # options that this name does not have
            name = part.__name__.lower()
            table[name] = _meant(part, {"name": table[name]["name"]}, table[name])
        return _meant(cls, {"how": how}, table) | given

    @pydantic.field_validator("sparsity")
    @classmethod
    def _fits_distribution(cls, value: float | None, info: pydantic.ValidationInfo) -> float | None:
        if (given := info.data.get("distribution")) is None:  # refused already
            return value
        if info.data.get("levels"):
            if value is not None:
                raise ValueError("has no effect beside prune.levels")
            return value
        names = [getattr(one, "name", "") for one in (given, *(given.rules or {}).values())]
        asking = [name for name in names if name in ("uniform", "global", "erk", "owl", "per_output")]
        asking += ["budget"] if given.name == "budget" and given.limit is None else []
        if value is None and asking:
            raise ValueError(f"missing, distribution {show(asking[0])} needs it")
        if value is not None and given.name in THRESHOLDS:
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


def _meant(table: type[Table], known: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options that have an effect beside what is known."""
    conditions = table.conditions()
    return {
        key: value
        for key, value in options.items()
        if key in table.model_fields and (key not in conditions or known.get(conditions[key][0]) in conditions[key][1:])
    }
