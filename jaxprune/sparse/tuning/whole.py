"""The last word: the whole model on its compressed weights, against the whole dense model.

What wins alone may lose in company. So the winners are tried together, and as long as the model is not faster with
them, the half that gains least goes back to dense; at last products and convolutions are tried apart:

    all winners -> the better half -> the better quarter -> ... -> one kind -> none: the dense model itself
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxprune.sparse.compression import compress
from jaxprune.sparse.dispatch import apply
from jaxprune.sparse.formats import FORMATS, SparseUseError
from jaxprune.sparse.tuning.plan import Attempt, LeafPlan, Plan, Timing
from jaxprune.sparse.tuning.race import REFUSALS, Program, compiled, differs, race
from jaxprune.tracing.finder import arrays_of
from jaxprune.types import Params

MARGIN = 0.05
"""The planned model must be this fraction faster than the dense one: machines drift by as much after it is measured."""
MOST = 1000
"""Most runs of a model: a small one runs in microseconds, and its median must be known within one percent."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and everything it is called with.

    Attributes:
        apply_fn: (params, *args) -> arrays.
        params: dense.
        args: its other arguments, arrays among them.
        repeats: runs of each; as many as fill `seconds`, if None.
        seconds: aim for all runs of one.
    """

    apply_fn: Callable[..., Any]
    params: Params
    args: tuple[Any, ...]
    repeats: int | None
    seconds: float

    @functools.cached_property
    def dense(self) -> Program:
        """The dense model, compiled."""
        return compiled(self._run, self.params, self._arrays)

    def compress(self, leaves: Sequence[LeafPlan]) -> Params:
        """The params with each of these leaves in its format."""
        return compress(self.params, Plan(tuple(leaves), (), "", {}))

    def why_not(self, leaves: Sequence[LeafPlan]) -> str:
        """Why the model cannot run with these leaves compressed; "" if it can. Nothing is run."""
        try:
            jax.eval_shape(apply(self._run), self.compress(leaves), self._arrays)
        except SparseUseError as error:
            return str(error)
        return ""

    def attempt(self, leaves: Sequence[LeafPlan]) -> Attempt:
        """The model with these leaves compressed, compared with dense and measured."""
        formats = {leaf.name: leaf.format for leaf in leaves}
        try:
            planned = compiled(apply(self._run), self.compress(leaves), self._arrays)
        except REFUSALS as error:
            return Attempt(formats, Timing("dense"), Timing("planned", refused=str(error)))
        loose = any(FORMATS[format].lossy for format in formats.values())
        if difference := differs(planned.call(), self.dense.call(), loose=loose):
            return Attempt(formats, Timing("dense"), Timing("planned", refused=difference))
        times = race({"dense": self.dense, "planned": planned}, repeats=self.repeats, seconds=self.seconds, most=MOST)
        refused = verdict(times["dense"], times["planned"])
        return Attempt(formats, times["dense"], dataclasses.replace(times["planned"], refused=refused))

    @property
    def _arrays(self) -> list[Any]:
        return arrays_of(self.args)[0]

    def _run(self, params: Params, arrays: list[Any]) -> Any:
        return self.apply_fn(params, *arrays_of(self.args)[1](arrays))


def verdict(dense: Timing, planned: Timing) -> str:
    """Why the planned model is not faster than the dense one; "" if it clearly is.

    Args:
        dense: timing of the dense model.
        planned: timing of the planned one.
    """
    if dense.median is None or planned.median is None:
        return "It was not measured."
    both = f"{planned.median:.3f} ms planned, {dense.median:.3f} ms dense"
    if planned.median > (1 - MARGIN) * dense.median:
        return f"The whole model is not faster: {both}."
    if planned.median + planned.notch + dense.notch > dense.median:
        return f"The whole model is too close to tell: {both}, with a noise of {planned.notch + dense.notch:.3f} ms."
    return ""


def settle(leaves: Sequence[LeafPlan], model: Model) -> tuple[list[LeafPlan], list[Attempt], str]:
    """The leaves with what the whole model leaves of their formats.

    Args:
        leaves: all leaves, with the formats that won alone.
        model: what they are leaves of.

    Returns:
        The leaves, the attempts, and what decided.
    """
    settled = {leaf.name: leaf for leaf in leaves}
    winners = [leaf for leaf in leaves if leaf.format != "dense"]
    if not winners:
        return list(leaves), [], "Everything stays dense: no format is faster anywhere."
    if model.why_not(winners):
        refused = {leaf.name: reason for leaf in winners if (reason := model.why_not([leaf]))}
        settled |= {name: _dense(settled[name], reason) for name, reason in refused.items()}
        winners = [leaf for leaf in winners if leaf.name not in refused]
    attempts: list[Attempt] = []
    for tried in _candidates(sorted(winners, key=_gain, reverse=True)):
        attempts.append(model.attempt(tried))
        if not (reason := attempts[-1].planned.refused):
            settled |= {leaf.name: leaf for leaf in tried}
            return list(settled.values()), attempts, _won(attempts[-1])
        settled |= {leaf.name: _dense(leaf, reason) for leaf in tried}
    last = attempts[0].planned.refused if attempts else "no leaf can be compressed where the model uses it."
    return list(settled.values()), attempts, f"Everything stays dense: {last}"


def _candidates(winners: Sequence[LeafPlan]) -> Iterator[Sequence[LeafPlan]]:
    """What is tried together, the best first in `winners`: fewer and fewer, then products and convolutions apart."""
    seen, some = [], list(winners)
    while some:
        seen.append(some)
        yield some
        some = some[: len(some) // 2]
    for op in dict.fromkeys(leaf.sites[0].op for leaf in winners):
        alike = [leaf for leaf in winners if leaf.sites[0].op == op]
        if alike not in seen:
            yield alike


def _dense(leaf: LeafPlan, reason: str) -> LeafPlan:
    return dataclasses.replace(leaf, format="dense", why=f"{leaf.why} But in the model: {reason}")


def _gain(leaf: LeafPlan) -> float:
    return (leaf.milliseconds("dense") or 0.0) - (leaf.milliseconds(leaf.format) or 0.0)


def _won(attempt: Attempt) -> str:
    dense, planned = attempt.dense.median or 0.0, attempt.planned.median or 0.0
    return (
        f"The whole model takes {planned:.3f} ms as planned, {dense:.3f} ms dense: {dense / planned:.2f} times faster."
    )
