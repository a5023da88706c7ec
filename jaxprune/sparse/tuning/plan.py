"""A plan: which format every leaf gets on this machine, and every timing that says so. Plain data.

    plan.formats                       leaf name -> format, "dense" among them
    Plan.from_json(plan.to_json())     the same plan, bit for bit
    print(plan)                        a table

`jaxprune.sparse.tuning.tune` makes plans, `jaxprune.sparse.compress` follows them.
"""

import dataclasses
import glob
import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxprune import tree
from jaxprune.layout import Axes, Layout
from jaxprune.sparse.formats import check_format
from jaxprune.sparse.tuning.records import from_plain, to_plain
from jaxprune.types import Params

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one contestant took.

    Attributes:
        format: its format, "dense" for XLA's own operation, "planned" for a model on compressed weights.
        median, low, high: milliseconds of a run; low and high are the quartiles. None if it did not run.
        runs: how many runs these are made of.
        compile: milliseconds of lowering and compiling.
        refused: why it did not run or does not count; "" if it does.
    """

    format: str
    median: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int = 0
    compile: float | None = None
    refused: str = ""

    @property
    def notch(self) -> float:
        """Half of the median's 95 % interval, milliseconds: 1.57 (high - low) / sqrt(runs); of one run, infinite.

        McGill, Tukey and Larsen 1978, "Variations of Box Plots".
        """
        if self.low is None or self.high is None or self.runs < 2:
            return math.inf
        return 1.57 * (self.high - self.low) / math.sqrt(self.runs)


@dataclasses.dataclass(frozen=True)
class SiteTimings:
    """One use of a leaf, and all contestants there.

    Attributes:
        op: "dot_general" or "conv_general_dilated".
        x_shape, x_dtype: of the activations.
        count: how often it runs in one call of the model.
        timings: of one run each, dense first.
    """

    op: str
    x_shape: tuple[int, ...]
    x_dtype: str
    count: int
    timings: tuple[Timing, ...]


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """One leaf: what it is, what was measured, what was chosen.

    Attributes:
        name, shape, dtype: of the leaf.
        layers, spatial, inputs, outputs: its axes, by the layout it was tuned with.
        nse: non-zeros.
        sparsity: fraction of zeros.
        format: the chosen one, or "dense".
        why: the reason, in a sentence.
        sites: every use of the leaf.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layers: tuple[int, ...]
    spatial: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    nse: int
    sparsity: float
    format: str
    why: str
    sites: tuple[SiteTimings, ...]

    def milliseconds(self, format: str) -> float | None:
        """Time of all uses of the leaf in one call of the model; None if the format does not run at each."""
        return self._total(format, "median")

    def notch(self, format: str) -> float | None:
        """Half of the 95 % interval of `milliseconds`, the notches of all uses added up."""
        return self._total(format, "notch")

    def _total(self, format: str, what: str) -> float | None:
        found = [
            site.count * getattr(timing, what)
            for site in self.sites
            for timing in site.timings
            if timing.format == format and timing.median is not None and not timing.refused
        ]
        return sum(found) if found and len(found) == len(self.sites) else None


@dataclasses.dataclass(frozen=True)
class Attempt:
    """The whole model, once with dense weights and once as planned, in turns.

    Attributes:
        formats: leaf name -> format of the leaves that were compressed.
        dense, planned: milliseconds of one call; `planned.refused` says why this attempt was given up.
    """

    formats: Mapping[str, str]
    dense: Timing
    planned: Timing


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which format every leaf gets, and why.

    Attributes:
        leaves: the leaves that were selected.
        attempts: whole models that were measured, in order; the last is the plan's, unless everything is dense.
        reason: what decided, in a sentence.
        machine: `jaxprune.sparse.tuning.machine.describe()` of where this was measured.
        version: of this record.
    """

    leaves: tuple[LeafPlan, ...]
    attempts: tuple[Attempt, ...]
    reason: str
    machine: Mapping[str, Any]
    version: int = VERSION

    @property
    def formats(self) -> dict[str, str]:
        """Leaf name -> format; "dense" leaves stay arrays."""
        return {leaf.name: leaf.format for leaf in self.leaves}

    @property
    def layout(self) -> Layout:
        """The axes of the leaves, as the model was tuned with."""
        rules = {
            glob.escape(leaf.name): Axes(leaf.layers, leaf.spatial, leaf.inputs, leaf.outputs) for leaf in self.leaves
        }
        return Layout(rules=tuple(rules.items()))

    @property
    def is_dense(self) -> bool:
        """Whether no leaf is compressed."""
        return all(leaf.format == "dense" for leaf in self.leaves)

    @property
    def dense_ms(self) -> float | None:
        """Milliseconds of the dense model; None if nothing was worth a measurement of the whole."""
        return self.attempts[-1].dense.median if self.attempts else None

    @property
    def planned_ms(self) -> float | None:
        """Milliseconds of the model under this plan."""
        if self.is_dense or not self.attempts:
            return self.dense_ms
        return self.attempts[-1].planned.median

    @property
    def speedup(self) -> float:
        """Dense over planned time of the whole model; 1 where everything stays dense."""
        dense, planned = self.dense_ms, self.planned_ms
        return dense / planned if dense and planned and not self.is_dense else 1.0

    def formats_for(self, params: Params) -> dict[str, str]:
        """Leaf name -> format of the leaves to be compressed, after a check that the plan is one for these params.

        Raises:
            ValueError: a leaf of the plan is not in the params, or has another shape there; all are named.
        """
        leaves = tree.named_leaves(params)
        missing = [leaf.name for leaf in self.leaves if leaf.name not in leaves]
        if missing:
            raise ValueError(f"The plan has leaves that the params do not have: {', '.join(map(repr, missing))}.")
        other = [
            f"{leaf.name!r} (planned {leaf.shape}, here {jnp.shape(leaves[leaf.name])})"
            for leaf in self.leaves
            if leaf.shape != jnp.shape(leaves[leaf.name])
        ]
        if other:
            raise ValueError(f"The plan was made for other shapes of {', '.join(other)}. Call `tune` on these params.")
        return {name: format for name, format in self.formats.items() if format != "dense"}

    def to_json(self) -> str:
        """The plan as text, for `from_json`."""
        return json.dumps(to_plain(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
            ValueError: no JSON, another version, a missing or wrong field, a format unknown here; all by name.
        """
        try:
            plain = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"A plan is JSON as `Plan.to_json` writes it, and this is not: {error}.") from error
        version = plain.get("version") if isinstance(plain, dict) else None
        if version != VERSION:
            raise ValueError(f"This reads plans of version {VERSION}, version {version!r} arrived. Call `tune` again.")
        plan = from_plain(cls, plain)
        for leaf in plan.leaves:
            check_format(leaf.format, f"Leaf {leaf.name!r} has the format")
        return plan

    def __str__(self) -> str:
        head = ("leaf", "shape", "sparsity", "format", "dense ms", "ms", "why")
        rows = [head, *(_row(leaf) for leaf in self.leaves)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
        lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows]
        return "\n".join([*lines, self.reason])


def _row(leaf: LeafPlan) -> tuple[str, ...]:
    shape = " x ".join(map(str, leaf.shape))
    times = (_ms(leaf.milliseconds("dense")), _ms(leaf.milliseconds(leaf.format)))
    return (leaf.name, shape, f"{leaf.sparsity:.1%}", leaf.format, *times, leaf.why)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
