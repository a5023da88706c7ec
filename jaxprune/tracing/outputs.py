r"""What becomes of a product's outputs: bias, scale and nonlinearity, as far as each output stays by itself.

    y = x w     y + b     (y - m) s     max(0, y) ...        until outputs, or tokens, meet

A *stage* is a value that everything which comes of the product passes through, and that is a function of one output at
one place alone, of weights and of constants. The stages of ReLU written as $y \cdot [y > 0]$ are $y$ and the product.
"""

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, Shaped

from jaxprune.tracing.operations import ELEMENTWISE, IDENTITIES
from jaxprune.tracing.paths import Path, Step, replay, start

_LINEAR = {"add", "add_any", "sub", "neg", "convert_element_type", "reduce_precision", *IDENTITIES}
_RENAMING = {"mul", "convert_element_type", "transpose", "squeeze", "broadcast_in_dim", "reshape"}


class Stage(NamedTuple):
    """A value that all of a product's result goes through.

    Attributes:
        var: its variable.
        made_by: the equation that makes it.
        back: moves from its shape to that of the result, to be taken by `replay`.
        bends: whether more than a sum or a multiple was taken since the stage before.
        weighted: whether an array of more than one number came in since then.
    """

    var: Var
    made_by: JaxprEqn
    back: tuple[Step, ...]
    bends: bool
    weighted: bool


class Scale(NamedTuple):
    """A leaf whose own numbers multiply a product's outputs.

    Attributes:
        name: the leaf's name.
        values: shaped like the product's result.
        axes: of the result, those along which the leaf's numbers differ.
    """

    name: str
    values: Shaped[Array, "..."]
    axes: frozenset[int]


class Became(NamedTuple):
    """What a product's result became.

    Attributes:
        activation: the value after bias, scale and nonlinearity, see `activation`; shaped like the result.
        scales: leaves that multiplied it on the way to where outputs or tokens meet, in order.
    """

    activation: Shaped[Array, "..."]
    scales: tuple[Scale, ...]


def became(uses: "Uses", product: JaxprEqn, known: Mapping[Any, Any]) -> Became:
    """What the result of a product became in the jaxpr that it stands in.

    Args:
        uses: of that jaxpr.
        product: its equation.
        known: for each variable the `array`, and `what` is known of it, see `jaxprune.tracing.transfer`.
    """
    found = stages(uses, product, lambda var: var in known and known[var].what is True)
    last = activation(found)
    return Became(replay(last.back, known[last.var].array), tuple(_scales(uses, found, known)))


class Uses:
    """Where the variables of a jaxpr come from and go to; equations that make nothing, such as prints, do not count.

    Attributes:
        eqns: the equations.
        made: variable -> the equation that makes it.
        of: variable -> numbers of the equations that take it.
        leaving: variables that are results.
    """

    def __init__(self, jaxpr: Jaxpr) -> None:
        self.eqns = jaxpr.eqns
        self.made: dict[Var, JaxprEqn] = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
        self.of: dict[Var, list[int]] = defaultdict(list)
        self.leaving = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
        for number, eqn in enumerate(jaxpr.eqns):
            for var in dict.fromkeys(_variables(eqn) if eqn.outvars else ()):
                self.of[var].append(number)


def stages(uses: Uses, product: JaxprEqn, varies: Callable[[Var], bool]) -> list[Stage]:
    """The stages of a product, itself the first.

    Args:
        uses: of the jaxpr that it stands in.
        product: its equation.
        varies: whether a variable depends on the model's inputs.
    """
    back = _followed(uses, product, varies)
    passed = _passed(uses, back)
    found, bends, weighted = [Stage(product.outvars[0], product, (), False, False)], False, False
    for var, moves in itertools.islice(back.items(), 1, None):
        eqn = uses.made[var]
        bends |= _bends(eqn, back)
        weighted |= any(given not in back and math.prod(_shape(given)) > 1 for given in _variables(eqn))
        if var in passed:
            found.append(Stage(var, eqn, moves, bends, weighted))
            bends = weighted = False
    return found


def _followed(uses: Uses, product: JaxprEqn, varies: Callable[[Var], bool]) -> dict[Var, tuple[Step, ...]]:
    """What is made of a product's outputs, each by itself, in the order of the jaxpr -> moves back to the result."""
    back: dict[Var, tuple[Step, ...]] = {product.outvars[0]: ()}
    pending, seen = list(uses.of[product.outvars[0]]), set[int]()
    while pending:
        number = heapq.heappop(pending)
        moves = None if number in seen else _back(uses.eqns[number], back, varies)
        seen.add(number)
        if moves is not None:
            [made] = uses.eqns[number].outvars
            back[made] = moves
            for user in uses.of[made]:
                heapq.heappush(pending, user)
    return back


def activation(found: Sequence[Stage]) -> Stage:
    """The first stage after the nonlinearity, at the end of what follows it without weights; without one the last.

    Args:
        found: of `stages`.
    """
    bent = list(itertools.accumulate((stage.bends for stage in found), bool.__or__))
    until = (i for i, stage in enumerate(found) if i and bent[i - 1] and stage.weighted)
    return found[next(until, len(found)) - 1]


def _back(
    eqn: JaxprEqn, back: Mapping[Var, tuple[Step, ...]], varies: Callable[[Var], bool]
) -> tuple[Step, ...] | None:
    """Moves back from what an equation makes of a product's outputs; None where these meet others, or are mixed."""
    ours = [var for var in _variables(eqn) if var in back]
    if len(eqn.outvars) != 1 or any(var not in back and varies(var) for var in _variables(eqn)):
        return None
    if eqn.primitive.name in ELEMENTWISE | IDENTITIES:
        shapes = {_shape(var) for var in (*ours, *eqn.outvars)}
        return back[ours[0]] if len({back[var] for var in ours}) == len(shapes) == 1 else None
    undone = _undone(eqn)
    return None if undone is None else (undone, *back[ours[0]])


def _undone(move: JaxprEqn) -> Step | None:
    """The step that brings back what an equation moves; None where it does more than that."""
    name, shape = move.primitive.name, _shape(move.invars[0])
    if name == "transpose":
        return ("transpose", tuple(map(int, np.argsort(move.params["permutation"]))))
    plain = name in ("squeeze", "broadcast_in_dim") or (name == "reshape" and move.params["dimensions"] is None)
    return ("reshape", shape) if plain and math.prod(shape) == math.prod(_shape(move.outvars[0])) else None


def _bends(eqn: JaxprEqn, ours: Collection[Var]) -> bool:
    """Whether an equation takes more of a product's outputs than a sum or a multiple."""
    name, inside = eqn.primitive.name, [not isinstance(var, Literal) and var in ours for var in eqn.invars]
    if name == "mul":
        return sum(inside) > 1
    if name in ("div", "select_n"):  # by weights, and where a mask says so
        return inside[name == "div"]
    return name not in _LINEAR and _undone(eqn) is None


def _passed(uses: Uses, ours: dict[Var, tuple[Step, ...]]) -> set[Var]:
    """Those of some variables, in the order in which they are made, that all comes through which the first becomes."""
    after: dict[Var, set[Var]] = {}
    for var in reversed(ours):
        users = [uses.eqns[number].outvars[0] for number in uses.of[var]]
        ways = [{user, *after[user]} if user in after else set[Var]() for user in users]
        after[var] = set.intersection(*ways) if ways and var not in uses.leaving else set()
    return after[next(iter(ours))]


def _scales(uses: Uses, found: Sequence[Stage], known: Mapping[Var, Any]) -> Iterator[Scale]:
    for before, stage in itertools.pairwise(found):
        factors = _variables(stage.made_by) if stage.made_by.primitive.name == "mul" else []
        for name, array, path in (one for var in factors if var is not before.var for one in _own(var, uses, known)):
            there = _moved(path.broadcast(_shape(stage.var), range(len(path.shape))), stage.back)
            axes = frozenset(axis for axis, size in enumerate(there.shape) if size > 1 and there.axes[axis])
            yield Scale(name, replay(there.steps, array), axes)


def _own(var: Var, uses: Uses, known: Mapping[Var, Any]) -> Iterator[tuple[str, Any, Path]]:
    """Leaves whose own numbers are factors of a variable: name, array, and the path from that to the variable."""
    leaf, eqn, shape = known[var].what if var in known else False, uses.made.get(var), _shape(var)
    if isinstance(leaf, Path) and leaf.changed_by is None:
        yield leaf.name, known[var].array, start(leaf.name, shape, leaf.leaf_dtype)
        return
    if eqn is None or eqn.primitive.name not in _RENAMING:
        return
    for name, array, path in (one for given in _variables(eqn) for one in _own(given, uses, known)):
        if eqn.primitive.name == "mul":
            yield name, array, path.broadcast(shape, range(len(path.shape)))
        elif (followed := path.followed(eqn.primitive.name, eqn.params, shape)) is not None:
            yield name, array, followed


def _moved(path: Path, steps: Sequence[Step]) -> Path:
    for word, argument in steps:
        shape = tuple(path.shape[i] for i in argument) if word == "transpose" else argument
        moved = path.followed(word, {"permutation": argument, "dimensions": None}, shape)
        assert moved is not None
        path = moved
    return path


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(var.aval.shape)


def _variables(eqn: JaxprEqn) -> list[Var]:
    return [var for var in eqn.invars if not isinstance(var, Literal)]
