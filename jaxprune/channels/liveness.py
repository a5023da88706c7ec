"""Liveness: which channels of a masked model anybody reads.

A channel is read where a product sums over it, with a weight that is not zero, into a channel that is read itself; what
must stay is read. So a channel that is zero everywhere is not read, nor one whose readers all died, to a fixed point.
A channel that is the same number everywhere is not read either where that number can be added to a bias behind it:

    relu(b1) @ w2 + b2    ->    b2 + relu(b1) @ w2,   for the channels of b1 whose weights in w1 are all zero
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal, Var
from jaxtyping import Bool, Inexact, Int

from jaxprune.channels.constant_rules import Known, all_of, exact
from jaxprune.channels.walk import Walk
from jaxprune.tracing.inlined import equations

Facts = Mapping[Var, Known]
Live = Bool[np.ndarray, " units"]
Vector = Inexact[np.ndarray, " outputs"] | Int[np.ndarray, " outputs"]
_RENAMES = frozenset(("broadcast_in_dim", "reshape", "copy", "squeeze"))


class Fold(NamedTuple):
    """A vector behind a product that constants can be added to.

    Attributes:
        leaf: the input of the program that it is.
        sign: what the constants are multiplied with first: -1 for a mean that is subtracted.
        weight: which operand of the product makes its channels.
        outputs: the axis of that operand that they lie along.
    """

    leaf: Var
    sign: int
    weight: int = 1
    outputs: int = 0


class Sum(NamedTuple):
    """A product, and one axis that it sums over.

    Attributes:
        eqn: the product.
        axes: that axis of the left operand, and of the right one.
        others: further axes of each operand that it sums over; their channels are read together with these.
        fold: where its constants can go, if anywhere.
    """

    eqn: Any
    axes: tuple[int, int]
    others: tuple[tuple[int, ...], tuple[int, ...]]
    fold: Fold | None


def find_sums(jaxpr: Jaxpr, walk: Walk) -> list[Sum]:
    """Every axis that a product of the program sums over.

    Args:
        jaxpr: the program, without calls.
        walk: its units.
    """
    folds = _find_folds(jaxpr)
    found = []
    for eqn in equations(jaxpr):
        fold, numbers = folds.get(eqn.outvars[0]), eqn.params.get("dimension_numbers", ())
        if eqn.primitive.name == "dot_general":
            both, fold = numbers[0], _placed(fold, eqn, walk, numbers[0])
            found += [Sum(eqn, (a, b), both, fold) for a, b in zip(*both, strict=True)]
        elif eqn.primitive.name == "conv_general_dilated" and eqn.params["feature_group_count"] == 1:
            # Groups go as a whole: where one is removed, its inputs and outputs are the same channels.
            borders = any(map(any, eqn.params["padding"])) or set(eqn.params["lhs_dilation"]) != {1}
            fold = None if borders else _placed(fold, eqn, walk, ((), numbers.rhs_spec[1:]))
            found.append(Sum(eqn, (numbers.lhs_spec[1], numbers.rhs_spec[1]), ((), ()), fold))
    return found


def _placed(fold: Fold | None, eqn: Any, walk: Walk, summed: Sequence[Sequence[int]]) -> Fold | None:
    """The fold with the axis of the weights whose channels are the vector's, None if that is not one axis."""
    if fold is None:
        return None
    for operand, atom in enumerate(eqn.invars):
        rest = [axis for axis in range(len(_shape(atom))) if axis not in summed[operand]]
        if len(rest) == 1 and np.array_equal(walk.roots(atom)[rest[0]], walk.roots(fold.leaf)[0]):
            return fold._replace(weight=operand, outputs=rest[0])
    return None


def live_units(sums: list[Sum], walk: Walk, facts: Facts, spared: Live | None = None) -> Live:
    """For every unit whether it is kept; True at roots alone.

    Args:
        sums: of `find_sums`.
        walk: the units of the same program.
        facts: what is known of its variables.
        spared: units that are kept though nobody may read them. Those that are constants stay in their place.
    """
    live = walk.units.all_fixed()
    spared = np.zeros_like(live) if spared is None else spared
    while True:
        before = int(live.sum())
        for one in sums:
            ids = walk.roots(one.eqn.invars[0])[one.axes[0]]
            if not live[ids].all():
                live[ids[_read(one, walk, facts, live, spared[ids])]] = True
        if int(live.sum()) == before:
            return live | spared


def _read(one: Sum, walk: Walk, facts: Facts, live: Live, spared: Any) -> Any:
    read: Any = True
    for atom, axis, others in zip(one.eqn.invars, one.axes, one.others, strict=True):
        alive = [live[ids] | (other in others) for other, ids in enumerate(walk.roots(atom))]
        read = read & _somewhere(~_fact(atom, facts).zero, alive, axis)
    return read if one.fold is None else read & ~(_constant(one, facts)[1] & ~spared)


def _somewhere(found: Any, live: list[Bool[np.ndarray, " _"]], axis: int) -> Any:
    """For every index of one axis, whether there is anything at it where all other axes are alive."""
    for other, alive in enumerate(live):
        if other == axis:
            continue
        if found.shape[other] == 1:
            found = found & alive.any()
        elif not alive.all():
            found = np.compress(alive, found, other)
        found = found.any(other, keepdims=True)
    return np.broadcast_to(found.reshape(-1), (len(live[axis]),))


def _constant(one: Sum, facts: Facts) -> tuple[Any, Any]:
    """The numbers that channels are everywhere, and whether they are."""
    weight = one.fold.weight if one.fold else 1
    weights, x = (_fact(one.eqn.invars[operand], facts) for operand in (weight, 1 - weight))
    axis, shape = one.axes[1 - weight], _shape(one.eqn.invars[1 - weight])
    whole = weights.known.all() and all(size == 1 for a, size in enumerate(x.value.shape) if a != axis)
    value, known = (x.value, x.known) if whole else (np.zeros(1), np.zeros(1, bool))
    size = shape[axis]
    return np.broadcast_to(value.reshape(-1), (size,)), np.broadcast_to(known.reshape(-1), (size,))


def _fact(atom: Any, facts: Facts) -> Known:
    return all_of(atom.val) if isinstance(atom, Literal) else facts[atom]


def folded(sums: list[Sum], walk: Walk, facts: Facts, live: Live) -> dict[Var, Vector]:
    """What to add to leaves of the program in the place of the constants that are removed.

    Args:
        sums: of `find_sums`.
        walk: the units of the same program.
        facts: what is known of its variables.
        live: units that are kept.
    """
    found = {}
    for one in sums:
        if one.fold is None:
            continue
        value, known = _constant(one, facts)
        gone = known & ~live[walk.roots(one.eqn.invars[0])[one.axes[0]]]
        if gone.any():
            weights, values = map(_widest, (_fact(one.eqn.invars[one.fold.weight], facts).value, value[gone]))
            rows = np.moveaxis(weights, (one.axes[one.fold.weight], one.fold.outputs), (0, -1))[gone]
            each = rows.reshape(len(rows), -1, rows.shape[-1]).sum(1)  # over the window
            found[one.fold.leaf] = one.fold.sign * values @ each
    return found


def _widest(array: Any) -> Any:
    """Numbers of the same kind in 64 bits, or twice 64."""
    array = exact(array)
    return array if array.dtype.kind == "i" else array.astype(np.result_type(array.dtype, np.float64))


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(var.aval.shape)


def _find_folds(jaxpr: Any) -> dict[Var, Fold]:
    """Result of a product -> the vector added to it next, or taken from it, if nobody else uses either."""
    uses = Counter(atom for eqn in equations(jaxpr) for atom in eqn.invars if isinstance(atom, Var))
    uses.update(atom for atom in jaxpr.outvars if isinstance(atom, Var))
    maker = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    user = {atom: eqn for eqn in jaxpr.eqns for atom in eqn.invars if isinstance(atom, Var)}
    found = {}
    for eqn in jaxpr.eqns:
        var = eqn.outvars[0]
        step = user.get(var)
        if eqn.primitive.name not in ("dot_general", "conv_general_dilated") or uses[var] != 1 or step is None:
            continue
        if step.primitive.name not in ("add", "sub"):
            continue
        other = step.invars[1 if step.invars[0] is var else 0]
        while isinstance(other, Var) and other in maker and uses[other] == 1 and _is_renamed(maker[other]):
            other = maker[other].invars[0]
        if isinstance(other, Var) and other in jaxpr.invars and uses[other] == len(_shape(other)) == 1:
            found[var] = Fold(other, -1 if step.primitive.name == "sub" else 1)
    return found


def _is_renamed(eqn: Any) -> bool:
    """Whether what is added to the operand arrives in the result: casts to another kind of numbers drop some of it."""
    if eqn.primitive.name != "convert_element_type":
        return eqn.primitive.name in _RENAMES
    before, after = (eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype)
    kinds = (jnp.floating, jnp.complexfloating)
    return any(jnp.issubdtype(before, kind) and jnp.issubdtype(after, kind) for kind in kinds)
