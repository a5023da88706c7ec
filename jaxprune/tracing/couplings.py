"""Couplings: which channels of which leaves live or die together.

    y = conv(x, a) + shortcut;  z = relu(y) @ b          outputs of a = channels of the shortcut = inputs of b

Every index along every axis of every array in the model is a unit (`jaxprune.tracing.units`); the operations say which
units are the same (`jaxprune.tracing.rules`). What is left are the groups that can be removed as one: a filter, its
bias and its normalisation, and all that reads it, through additions, concatenations, flattening, heads, stacked layers.

Only shapes are looked at. What cannot be followed is a barrier that keeps its channels: inputs and outputs of the
function, sums over channels (a mean divides by their number), and operations without a rule.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Literal, Var

from jaxprune import tree
from jaxprune.compat import ClosedJaxpr, primitive_name, scan_groups
from jaxprune.tracing.alike import Alike
from jaxprune.tracing.finder import jaxpr_of
from jaxprune.tracing.inlined import inlined
from jaxprune.tracing.refusals import check_consumed
from jaxprune.tracing.rules import RULES, barrier
from jaxprune.tracing.units import AxisUnits, Ids, Units
from jaxprune.types import Leaves

STAYS = -1
"""The number of an index that must stay."""


@dataclasses.dataclass(frozen=True, eq=False)
class Couplings:
    """The channels of a model.

    Attributes:
        channels: leaf -> for each of its axes the channel of every index, `STAYS` where it must stay. Equal numbers
            are one channel, wherever they are; numbers count from 0 without gaps.
        reasons: (leaf, axis) -> why the first index that must stay there does.
        barriers: operations that could not be followed, and where they are.
        alike: a number for each channel, equal for those that the function treats the same (`jaxprune.tracing.alike`):
            they may change places, all their indices together.
    """

    channels: Mapping[str, tuple[Ids, ...]]
    reasons: Mapping[tuple[str, int], str]
    barriers: tuple[str, ...]
    alike: Ids

    @property
    def count(self) -> int:
        """How many channels can be removed."""
        return 1 + max((int(ids.max()) for axes in self.channels.values() for ids in axes if ids.size), default=STAYS)

    @cached_property
    def members(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """For each channel the axes (leaf, axis) that it has indices of, in the order of the params."""
        found: list[list[tuple[str, int]]] = [[] for _ in range(self.count)]
        for name, axes in self.channels.items():
            for axis, ids in enumerate(axes):
                for channel in np.unique(ids[ids != STAYS]):
                    found[channel].append((name, axis))
        return tuple(map(tuple, found))

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """Channels side by side: those with the same members, such as all filters of one convolution."""
        found: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for channel, members in enumerate(self.members):
            found.setdefault(members, []).append(channel)
        return tuple(map(tuple, found.values()))

    def check(self, params: Leaves) -> None:
        """Refuses couplings of another model.

        Args:
            params: any pytree of arrays.

        Raises:
            ValueError: a leaf has another shape, or is not there.
        """
        self.check_shapes({name: np.shape(leaf) for name, leaf in tree.named_leaves(params).items()})

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The same, of the shapes of all leaves by name."""
        for name, known in self.channels.items():
            if shapes.get(name) != tuple(map(len, known)):
                raise ValueError(
                    f"The couplings are those of another model: leaf {name!r} has shape {tuple(map(len, known))} "
                    f"there and {shapes.get(name)} here. Trace them anew with `couplings`."
                )


def couplings(fn: Callable[..., Any], params: Leaves, *args: Any, **kwargs: Any) -> Couplings:
    """The channels of `fn(params, *args, **kwargs)` that can be removed, and what goes with each.

    Args:
        fn: the model, a function of its parameters.
        params: any pytree of arrays or `jax.ShapeDtypeStruct`; statistics of batches count.
        args: of `fn`, arrays or `jax.ShapeDtypeStruct`.
        kwargs: likewise.

    Raises:
        ValueError: see `jaxprune.trace`: the function consumes none of the params, or holds weights of its own.
    """
    return walk(inlined(jaxpr_of(fn, params, *args, **kwargs)), params).couplings()


class Walk:
    """The units of every array in a program without calls.

    Attributes:
        units: of the whole program.
        axes: variable -> units of its axes, those of bodies of loops too.
        leaves: leaf -> units of its axes.
        barriers: see `Couplings`.
    """

    def __init__(self) -> None:
        self.units = Units()
        self.axes: dict[Var, AxisUnits] = {}
        self.leaves: dict[str, AxisUnits] = {}
        self.barriers: list[str] = []
        self._constants: list[tuple[AxisUnits, Any]] = []
        self._steps: list[tuple[JaxprEqn, list[AxisUnits], list[AxisUnits]]] = []
        self._activations: set[Var] = set()

    def of(self, atom: Any) -> AxisUnits:
        """Units of the axes of an operand."""
        if not isinstance(atom, Literal):
            return self.axes[atom]
        axes = self._apart(atom)
        if axes:
            self._constants.append((axes, atom.val))
        return axes

    def couplings(self) -> Couplings:
        """What the units come to for the leaves."""
        roots = {name: [self.units.roots(ids) for ids in axes] for name, axes in self.leaves.items()}
        free = [ids[~self.units.fixed(ids)] for axes in roots.values() for ids in axes]
        known = np.unique(np.concatenate([np.zeros(0, np.int64), *free]))
        channels, reasons = {}, {}
        for name, axes in roots.items():
            stays = [self.units.fixed(ids) for ids in axes]
            found = [np.where(s, STAYS, np.searchsorted(known, ids)) for s, ids in zip(stays, axes, strict=True)]
            channels[name] = tuple(found)
            for axis, (s, ids) in enumerate(zip(stays, axes, strict=True)):
                if s.any():
                    reasons[name, axis] = self.units.why(int(ids[s][0]))
        alike = np.unique(self._alike()[known], return_inverse=True)[1].reshape(-1)
        return Couplings(channels, reasons, tuple(dict.fromkeys(self.barriers)), alike)

    def _alike(self) -> Ids:
        """Classes of units that the whole program treats the same; at roots."""
        found = Alike(self.units)
        for start, size in self.units.axes:
            found.axis(np.arange(start, start + size))
        for axes, value in self._constants:
            found.constant(axes, value)
        for eqn, given, results in self._steps:
            found.step(eqn, given, results)
        return found.classes

    def run(self, jaxpr: ClosedJaxpr, inputs: Sequence[AxisUnits], activations: Iterable[Var]) -> list[AxisUnits]:
        """Walks a program.

        Args:
            jaxpr: the program.
            inputs: units of its inputs.
            activations: those of its inputs that are not made of params alone.

        Returns:
            Units of its results.
        """
        self._activations.update(activations)
        self.axes |= zip(jaxpr.jaxpr.invars, inputs, strict=True)
        self.axes |= {var: self._apart(var) for var in jaxpr.jaxpr.constvars}
        self._constants += zip(map(self.of, jaxpr.jaxpr.constvars), jaxpr.consts, strict=True)
        for eqn in jaxpr.jaxpr.eqns:
            given = [self.of(atom) for atom in eqn.invars]
            if any(self._is_activation(atom) for atom in eqn.invars):
                self._activations.update(eqn.outvars)
            results = list(self._step(eqn, given))
            self._steps.append((eqn, given, results))
            self.axes |= zip(eqn.outvars, results, strict=True)
        return [self.of(atom) for atom in jaxpr.jaxpr.outvars]

    def _is_activation(self, atom: Any) -> bool:
        return not isinstance(atom, Literal) and atom in self._activations

    def _inside(self, outer: Sequence[Any], body: ClosedJaxpr) -> list[Var]:
        return [var for atom, var in zip(outer, body.jaxpr.invars, strict=True) if self._is_activation(atom)]

    def _apart(self, atom: Any) -> AxisUnits:
        return tuple(self.units.fresh(size) for size in atom.aval.shape)

    def _step(self, eqn: JaxprEqn, given: list[AxisUnits]) -> Sequence[AxisUnits]:
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, given)
        if name == "while":
            return self._while(eqn, given)
        if name == "cond":
            branches = eqn.params["branches"]
            found = [self.run(branch, given[1:], self._inside(eqn.invars[1:], branch)) for branch in branches]
            for results in found[1:]:
                self._unite(found[0], results, "another branch gives channels that must stay")
            return found[0]
        if name == "dot_general" and all(map(self._is_activation, eqn.invars)):
            for ids in (given[0][axis] for axis in eqn.params["dimension_numbers"][0][0]):
                self.units.fix(ids, "two activations are multiplied along it, which are often scaled by its size")
        if name in RULES:
            return RULES[name](self.units, eqn, given)
        self.barriers.append(f"{primitive_name(eqn)} at {source_info_util.summarize(eqn.source_info)}")
        return barrier(self.units, eqn, given)

    def _scan(self, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
        consts, carry = scan_groups(eqn)
        for axes in given[consts + carry :]:
            self.units.fix(axes[0], "it is an axis of stacked layers")
        body = eqn.params["jaxpr"]
        activations = {*self._inside(eqn.invars, body), *body.jaxpr.invars[consts : consts + carry]}
        results = self.run(
            body, [*given[: consts + carry], *(axes[1:] for axes in given[consts + carry :])], activations
        )
        self._unite(given[consts : consts + carry], results[:carry], "carried to channels that must stay")
        stack = np.zeros(eqn.params["length"], np.int64)
        return [*results[:carry], *((stack, *axes) for axes in results[carry:])]

    def _while(self, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
        tested, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = given[tested + consts :]
        test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        self.run(test, [*given[:tested], *carry], test.jaxpr.invars)
        results = self.run(
            body, given[tested:], {*self._inside(eqn.invars[tested:], body), *body.jaxpr.invars[consts:]}
        )
        self._unite(carry, results, "carried to channels that must stay")
        return results

    def _unite(self, some: Sequence[AxisUnits], others: Sequence[AxisUnits], reason: str) -> None:
        for a, b in zip(some, others, strict=True):
            for ids, more in zip(a, b, strict=True):
                self.units.unite(ids, more, reason)


def walk(jaxpr: ClosedJaxpr, params: Leaves) -> Walk:
    """The units of a program that `jaxpr_of` and `inlined` made with these params.

    Args:
        jaxpr: of the model, without calls.
        params: the same pytree.

    Raises:
        ValueError: see `jaxprune.trace`.
    """
    found = Walk()
    units = found.units
    leaves = tree.named_leaves(params)
    for name, leaf in leaves.items():
        if tree.is_array(leaf):
            found.leaves[name] = tuple(units.fresh(size, of_leaf=True) for size in leaf.shape)
    inputs = list(found.leaves.values())
    for var in jaxpr.jaxpr.invars[len(inputs) :]:
        inputs.append(tuple(units.fresh(size) for size in var.aval.shape))
        for ids in inputs[-1]:
            units.fix(ids, "it is an input of the function")
    for axes in found.run(jaxpr, inputs, jaxpr.jaxpr.invars[len(found.leaves) :]):
        for ids in axes:
            units.fix(ids, "it is an output of the function")
    for ids in (ids for axes in found.leaves.values() for ids in axes if len(ids) == 1):
        units.fix(ids, "it is the only channel")
    used = {atom for eqn in jaxpr.jaxpr.eqns for atom in eqn.invars if not isinstance(atom, Literal)}
    used.update(atom for atom in jaxpr.jaxpr.outvars if not isinstance(atom, Literal))
    unused = [name for name, var in zip(found.leaves, jaxpr.jaxpr.invars, strict=False) if var not in used]
    check_consumed(jaxpr.jaxpr, {name: leaves[name] for name in found.leaves}, unused, strict=False)
    for ids in (ids for name in unused for ids in found.leaves[name]):
        units.fix(ids, "the function does not use it")
    return found
