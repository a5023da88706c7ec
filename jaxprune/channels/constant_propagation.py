"""Constants: what a model computes whatever its inputs are, when its weights are known.

    known (1, 1, 1, 64):  channel 3 is 0.25 in every image, at every pixel; channel 5 is not known

A filter whose weights are all masked puts out its bias, and so does everything made of it alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal, Var

from jaxprune.channels.constant_rules import CONSTANT_RULES, Known, all_of, elementwise, in_all, nothing
from jaxprune.compat import ClosedJaxpr
from jaxprune.tracing.inlined import LOOPS, loop
from jaxprune.tracing.operations import ELEMENTWISE, IDENTITIES


def constants(jaxpr: ClosedJaxpr, inputs: Sequence[Known]) -> dict[Var, Known]:
    """What is known of every variable of a program without calls, those of the bodies of loops too.

    Args:
        jaxpr: the program.
        inputs: what is known of its inputs.
    """
    known: dict[Var, Known] = {}
    _run(jaxpr, inputs, known)
    return known


def _run(jaxpr: ClosedJaxpr, inputs: Sequence[Known], known: dict[Var, Known]) -> list[Known]:
    def of(atom: Any) -> Known:
        return all_of(atom.val) if isinstance(atom, Literal) else known[atom]

    known |= zip(jaxpr.jaxpr.invars, inputs, strict=True)
    known |= zip(jaxpr.jaxpr.constvars, map(all_of, jaxpr.consts), strict=True)
    for eqn in jaxpr.jaxpr.eqns:
        known |= zip(eqn.outvars, _step(eqn, [of(atom) for atom in eqn.invars], known), strict=True)
    return [of(atom) for atom in jaxpr.jaxpr.outvars]


def _step(eqn: Any, given: list[Known], known: dict[Var, Known]) -> Sequence[Known]:
    name = eqn.primitive.name
    if name in LOOPS:
        return _loop(eqn, given, known)
    if name == "cond":
        found = [_run(branch, given[1:], known) for branch in eqn.params["branches"]]
        return [in_all(results) for results in zip(*found, strict=True)]
    if name in IDENTITIES:
        return given
    if name in ELEMENTWISE:
        return [elementwise(eqn, given)]
    rule = CONSTANT_RULES.get(name)
    unknown = [nothing(var.aval) for var in eqn.outvars]
    if rule is None or not any(one.known.any() for one in given):
        return unknown
    return rule(eqn, given) or unknown


def _loop(eqn: Any, given: list[Known], known: dict[Var, Known]) -> Sequence[Known]:
    """A carry is known where it is after every step what it was before; a layer, where all layers agree."""
    body, consts, carry, layers, test, tested = loop(eqn, given)
    layers = [in_all([Known(*parts) for parts in zip(*one, strict=True)]) for one in layers]
    while True:
        results = _run(body, [*consts, *carry, *layers], known)
        kept = [in_all([before, after]) for before, after in zip(carry, results, strict=False)]
        if all(np.array_equal(a.known, b.known) for a, b in zip(kept, carry, strict=True)):
            break
        carry = kept
    if test:
        _run(test, [*tested, *kept], known)
    return [*kept, *(Known(*(part[None] for part in one)) for one in results[len(kept) :])]
