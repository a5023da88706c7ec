"""The walk: which indices of which arrays of a program are the same unit.

Every index along every axis of every array is a unit (`jaxprune.channels.union_find`), and every operation says which
of them are the same (`jaxprune.channels.coupling_rules`). Where a reshape leaves open along which axis channels lie,
that is taken which leaves most of them free (`jaxprune.channels.choices`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jaxprune.channels.coupling_rules import RULES, barrier
from jaxprune.channels.reshapes import reshape
from jaxprune.channels.symmetry import Symmetry
from jaxprune.channels.union_find import AxisUnits, Ids, Units
from jaxprune.compat import ClosedJaxpr, primitive_name
from jaxprune.tracing.inlined import LOOPS, bodies, loop
from jaxprune.tracing.refusals import check_consumed

Key = tuple[Any, ...]
Removed = Mapping[str, Sequence[Sequence[int]]]
"""Leaf -> for each of its axes the indices that are gone."""


class Choices:
    """What is chosen in one walk, and what there was to choose from.

    Attributes:
        rank: which of the axes is chosen where `made` does not say, counted from 0; the last one if there are fewer.
        made: choice -> axis.
        met: choice -> the axes that there were, in the order of the walk.
        chosen: choice -> the axis that was taken first.
        units: choice -> units along that axis, of every reshape.
    """

    def __init__(self, rank: int = 0, made: Mapping[Key, int] | None = None) -> None:
        self.rank, self.made = rank, made or {}
        self.met: dict[Key, tuple[int, ...]] = {}
        self.chosen: dict[Key, int] = {}
        self.units: dict[Key, list[Ids]] = {}

    def pick(self, eqn: Any, what: str, sizes: Sequence[int], axes: Mapping[int, tuple[bool, Ids]]) -> int:
        """One of several axes.

        Args:
            eqn: the reshape.
            what: is done with the axes.
            sizes: of them all.
            axes: those that may be chosen -> whether what is removed lies along this axis, and the units that it
                would be the axis of.
        """
        key = (what, *sizes, source_info_util.summarize(eqn.source_info))
        fitting = [axis for axis, (fits, _) in axes.items() if fits] or list(axes)
        axis = self.made.get(key, -1)
        axis = axis if axis in axes else fitting[min(self.rank, len(fitting) - 1)]
        self.met.setdefault(key, tuple(axes))
        self.chosen.setdefault(key, axis)
        self.units.setdefault(key, []).append(axes[axis][1])
        return axis


class Walk:
    """The units of every array in a program without calls.

    Attributes:
        choices: those it is walked with.
        units: of the whole program.
        leaves: leaf -> units of its axes.
        axes: variable -> units of its axes, those of bodies of loops too.
        barriers: see `Couplings`.
    """

    def __init__(self, choices: Choices, same: Mapping[Var, Var], activations: set[Var]) -> None:
        self.choices, self.units = choices, Units()
        self.leaves: dict[str, AxisUnits] = {}
        self._same = same  # variable of the program as it was -> of the one with numbers for symbolic sizes
        self.axes: dict[Var, AxisUnits] = {}
        self.barriers: list[str] = []
        self._literals: dict[int, AxisUnits] = {}  # by their place in the program: equal ones may be cut differently
        self._constants: list[tuple[AxisUnits, Any]] = []
        self._steps: list[tuple[JaxprEqn, list[AxisUnits], list[AxisUnits]]] = []
        self._activations = activations  # variables that are not made of params alone

    def of(self, atom: Any) -> AxisUnits:
        """Units of the axes of an operand."""
        if not isinstance(atom, Literal):
            return self.axes[self._same.get(atom, atom)]
        if id(atom) not in self._literals:
            self._literals[id(atom)] = axes = self._apart(atom)
            self._constants += [(axes, atom.val)] if axes else []
        return self._literals[id(atom)]

    def roots(self, atom: Any) -> list[Ids]:
        """The same, one number for all indices of a unit."""
        return [self.units.roots(ids) for ids in self.of(atom)]

    def alike(self) -> Ids:
        """Classes of units that the whole program treats the same; at roots."""
        found = Symmetry(self.units)
        for start, size in self.units.axes:
            found.axis(np.arange(start, start + size))
        for axes, value in self._constants:
            found.constant(axes, value)
        for eqn, given, results in self._steps:
            found.step(eqn, given, results)
        return found.classes

    def run(self, jaxpr: ClosedJaxpr, inputs: Sequence[AxisUnits]) -> list[AxisUnits]:
        """Walks a program.

        Args:
            jaxpr: the program.
            inputs: units of its inputs.

        Returns:
            Units of its results.
        """
        self.axes |= zip(jaxpr.jaxpr.invars, inputs, strict=True)
        self.axes |= {var: self._apart(var) for var in jaxpr.jaxpr.constvars}
        self._constants += zip(map(self.of, jaxpr.jaxpr.constvars), jaxpr.consts, strict=True)
        for eqn in jaxpr.jaxpr.eqns:
            given = [self.of(atom) for atom in eqn.invars]
            results = list(self._step(eqn, given))
            self._steps.append((eqn, given, results))
            self.axes |= zip(eqn.outvars, results, strict=True)
        return [self.of(atom) for atom in jaxpr.jaxpr.outvars]

    def _apart(self, atom: Any) -> AxisUnits:
        return tuple(self.units.fresh(size) for size in atom.aval.shape)

    def _step(self, eqn: JaxprEqn, given: list[AxisUnits]) -> Sequence[AxisUnits]:
        name = eqn.primitive.name
        if name in LOOPS:
            return self._loop(eqn, given)
        if name == "cond":
            found = [self.run(branch, given[1:]) for branch in eqn.params["branches"]]
            for results in found[1:]:
                self._unite(found[0], results, "another branch gives channels that must stay")
            return found[0]
        if name == "dot_general" and all(_is_in(atom, self._activations) for atom in eqn.invars):
            for ids in (given[0][axis] for axis in eqn.params["dimension_numbers"][0][0]):
                self.units.fix(ids, "two activations are multiplied along it, which are often scaled by its size")
        if name == "reshape":
            return reshape(self.units, eqn, given, partial(self.choices.pick, eqn))
        if name in RULES:
            return RULES[name](self.units, eqn, given)
        self.barriers.append(f"{primitive_name(eqn)} at {source_info_util.summarize(eqn.source_info)}")
        return barrier(self.units, eqn, given)

    def _loop(self, eqn: JaxprEqn, given: list[AxisUnits]) -> list[AxisUnits]:
        body, consts, carry, layers, test, tested = loop(eqn, given)
        for axes in layers:
            self.units.fix(axes[0], "it is an axis of stacked layers")
        if test:
            self.run(test, [*tested, *carry])
        results = self.run(body, [*consts, *carry, *(axes[1:] for axes in layers)])
        carried, stacked = results[: len(carry)], results[len(carry) :]
        self._unite(carry, carried, "carried to channels that must stay")
        return [*carried, *((np.zeros(eqn.params["length"], np.int64), *axes) for axes in stacked)]

    def _unite(self, some: Sequence[AxisUnits], others: Sequence[AxisUnits], reason: str) -> None:
        for a, b in zip(some, others, strict=True):
            for ids, more in zip(a, b, strict=True):
                self.units.unite(ids, more, reason)


def walk_with(
    jaxpr: ClosedJaxpr, same: Mapping[Var, Var], leaves: Mapping[str, Any], removed: Removed, choices: Choices
) -> Walk:
    """The units of a whole program.

    Args:
        jaxpr: of the model, without calls and symbolic sizes.
        same: see `at_numbers`.
        leaves: arrays of the params, which are its first inputs.
        removed: of each leaf what is gone, if anything is.
        choices: those that are made.
    """
    found = Walk(choices, same, _activations(jaxpr.jaxpr, set(jaxpr.jaxpr.invars[len(leaves) :])))
    units = found.units
    for name, leaf in leaves.items():
        gone = removed.get(name, ((),) * len(leaf.shape))
        found.leaves[name] = tuple(
            units.fresh(size, of_leaf=True, gone=indices) for size, indices in zip(leaf.shape, gone, strict=True)
        )
    inputs = list(found.leaves.values())
    for var in jaxpr.jaxpr.invars[len(inputs) :]:
        inputs.append(tuple(units.fresh(size) for size in var.aval.shape))
        for ids in inputs[-1]:
            units.fix(ids, "it is an input of the function")
    for axes in found.run(jaxpr, inputs):
        for ids in axes:
            units.fix(ids, "it is an output of the function")
    for ids in (ids for axes in found.leaves.values() for ids in axes if len(ids) == 1):
        units.fix(ids, "it is the only channel")
    used = {atom for eqn in jaxpr.jaxpr.eqns for atom in eqn.invars if not isinstance(atom, Literal)}
    used.update(atom for atom in jaxpr.jaxpr.outvars if not isinstance(atom, Literal))
    unused = [name for name, var in zip(found.leaves, jaxpr.jaxpr.invars, strict=False) if var not in used]
    check_consumed(jaxpr.jaxpr, leaves, unused, strict=False)
    for ids in (ids for name in unused for ids in found.leaves[name]):
        units.fix(ids, "the function does not use it")
    return found


def _activations(jaxpr: Jaxpr, known: set[Var]) -> set[Var]:
    """Variables that are not made of params alone, those of bodies of loops too; inputs that are none are `known`."""
    for eqn in jaxpr.eqns:
        if any(_is_in(atom, known) for atom in eqn.invars):
            known.update(eqn.outvars)
        for body, given in bodies(eqn):
            inside = zip(body.invars, given, strict=True)
            known.update([var for var, atom in inside if atom is None or _is_in(atom, known)])
            _activations(body, known)
    return known


def _is_in(atom: Any, variables: set[Var]) -> bool:
    return not isinstance(atom, Literal) and atom in variables
