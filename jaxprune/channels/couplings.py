"""Couplings: which channels of which leaves live or die together.

    y = conv(x, a) + shortcut;  z = relu(y) @ b          outputs of a = channels of the shortcut = inputs of b

Every index along every axis of every array in the model is a unit (`jaxprune.channels.units`); the operations say which
units are the same (`jaxprune.channels.rules`). What is left are the groups that can be removed as one: a filter, its
bias and its normalisation, and all that reads it, through additions, concatenations, flattening, heads, stacked layers.

Where a reshape leaves open along which axis channels lie, that is taken which leaves most of them free
(`jaxprune.channels.choices`). Only shapes are looked at. What cannot be followed is a barrier that keeps its channels:
inputs and outputs of the function, sums over channels (a mean divides by their number), and operations without a rule.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Literal, Var

from jaxprune import tree
from jaxprune.channels.alike import Alike
from jaxprune.channels.choices import Choices, Removed, Walked, best_walk, fitting_walk, torn
from jaxprune.channels.reshapes import reshape
from jaxprune.channels.rules import RULES, barrier
from jaxprune.channels.told import table
from jaxprune.channels.units import AxisUnits, Ids
from jaxprune.compat import ClosedJaxpr, primitive_name, scan_groups
from jaxprune.tracing.finder import jaxpr_of
from jaxprune.tracing.inlined import inlined
from jaxprune.tracing.refusals import check_consumed
from jaxprune.tracing.symbolic import at_numbers
from jaxprune.types import Leaves

STAYS = -1
"""The number of an index that must stay."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Couplings:
    """The channels of a model; printed, a line for each layer of them, and then what must stay and why.

    Attributes:
        channels: leaf -> for each of its axes the channel of every index, `STAYS` where it must stay. Equal numbers
            are one channel, wherever they are; numbers count from 0 without gaps.
        reasons: (leaf, axis) -> why the first index that must stay there does.
        barriers: operations that could not be followed, and where they are.
        alike: a number for each channel, equal for those that the function treats the same (`jaxprune.channels.alike`):
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

    @cached_property
    def names(self) -> tuple[str, ...]:
        """A name for each of `layers`: its first weight and the axis there, "conv1/kernel:3".

        A weight is what `jaxprune.weights` takes for one; where there is none, such as in a normalisation by itself,
        it is the first leaf with the most axes. Further layers along that axis are "conv1/kernel:3.1" and so on.
        """
        along = Counter[str]()
        names = []
        for layer in self.layers:
            leaf, axis = max(self.members[layer[0]], key=lambda member: self._weight(member[0]))
            name = f"{leaf}:{axis}"
            names.append(f"{name}.{along[name]}" if along[name] else name)
            along[name] += 1
        return tuple(names)

    def _weight(self, leaf: str) -> tuple[bool, int]:
        axes = self.channels[leaf]
        known = tree.weights(leaf, jax.ShapeDtypeStruct(tuple(map(len, axes)), np.dtype(np.float32)))
        return known, 0 if known else len(axes)

    def __str__(self) -> str:
        """The layers with their sizes and what goes with them, then what must stay and why, then barriers."""
        return table(self.channels, self.layers, self.names, self.members, self.reasons, self.barriers)

    def __repr__(self) -> str:
        return f"<Couplings: {self.count} channels of {len(self.layers)} layers, {len(self.channels)} leaves>"

    def check(self, params: Leaves) -> None:
        """Refuses couplings of another model.

        Args:
            params: any pytree of arrays.

        Raises:
            ValueError: a leaf has another shape, or is not there.
        """
        self.check_shapes({name: np.shape(leaf) for name, leaf in tree.named_leaves(params).items()})

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The same, of the shapes of all leaves by name.

        Raises:
            ValueError: likewise.
        """
        for name, known in self.channels.items():
            if shapes.get(name) != tuple(map(len, known)):
                raise ValueError(
                    f"The couplings are those of another model: leaf {name!r} has shape {tuple(map(len, known))} "
                    f"there and {shapes.get(name)} here. Trace them anew with `couplings`."
                )


def couplings(apply_fn: Callable[..., Any], params: Leaves, *args: Any, **kwargs: Any) -> Couplings:
    """The channels of `apply_fn(params, *args, **kwargs)` that can be removed, and what goes with each.

    Args:
        apply_fn: the model, a function of its parameters.
        params: any pytree of arrays or `jax.ShapeDtypeStruct`; statistics of batches count.
        args: of `apply_fn`, arrays or `jax.ShapeDtypeStruct`.
        kwargs: likewise.

    Raises:
        ValueError: see `jaxprune.trace`: the function consumes none of the params, or holds weights of its own.
    """
    return walk(inlined(jaxpr_of(apply_fn, params, *args, **kwargs)), params).couplings()


class Walk(Walked):
    """The units of every array in a program without calls.

    Attributes:
        axes: variable -> units of its axes, those of bodies of loops too.
        barriers: see `Couplings`.
    """

    def __init__(self, choices: Choices, same: Mapping[Var, Var]) -> None:
        super().__init__(choices)
        self._same = same  # variable of the program as it was -> of the one with numbers for symbolic sizes
        self.axes: dict[Var, AxisUnits] = {}
        self.barriers: list[str] = []
        self._literals: dict[int, AxisUnits] = {}  # by their place in the program: equal ones may be cut differently
        self._constants: list[tuple[AxisUnits, Any]] = []
        self._steps: list[tuple[JaxprEqn, list[AxisUnits], list[AxisUnits]]] = []
        self._activations: set[Var] = set()

    def of(self, atom: Any) -> AxisUnits:
        """Units of the axes of an operand."""
        if not isinstance(atom, Literal):
            return self.axes[self._same.get(atom, atom)]
        if id(atom) not in self._literals:
            self._literals[id(atom)] = axes = self._apart(atom)
            self._constants += [(axes, atom.val)] if axes else []
        return self._literals[id(atom)]

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
        if name == "reshape":
            return reshape(self.units, eqn, given, partial(self.choices.pick, eqn))
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


def walk(jaxpr: ClosedJaxpr, params: Leaves, removed: Removed | None = None) -> Walk:
    """The units of a program that `jaxpr_of` and `inlined` made with these params.

    Args:
        jaxpr: of the model, without calls.
        params: the same pytree.
        removed: leaf -> for each of its axes the indices that are gone, if any are, and these together.

    Raises:
        ValueError: see `jaxprune.trace`; what is removed does not go together.
    """
    leaves = {name: leaf for name, leaf in tree.named_leaves(params).items() if tree.is_array(leaf)}
    run = partial(_walked, *at_numbers(jaxpr), leaves, removed or {})
    if removed is None:
        return best_walk(run)
    found = fitting_walk(run, removed)
    for name, axis in torn(found, removed):
        raise ValueError(
            f"What is removed of leaf {name!r} along axis {axis} does not go together with the rest of what is "
            "removed: other indices would have to go with it. Was it found for this function, and arguments of these "
            "kinds?"
        )
    return found


def _walked(
    jaxpr: ClosedJaxpr, same: Mapping[Var, Var], leaves: Mapping[str, Any], removed: Removed, choices: Choices
) -> Walk:
    found = Walk(choices, same)
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
    for axes in found.run(jaxpr, inputs, jaxpr.jaxpr.invars[len(found.leaves) :]):
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
