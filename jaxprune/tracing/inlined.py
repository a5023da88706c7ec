"""A jaxpr without calls: what `jit`, `remat` and functions with custom derivatives wrap, written out in its place.

Inner jaxprs are shared between the calls of one function, and so are their variables; written out, every variable
stands for one array. Loops and branches keep their bodies, each with variables of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.interpreters import partial_eval

from jaxprune.compat import ClosedJaxpr, closed

CALLS: Mapping[str, str] = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
"""Operations that do what their jaxpr does, once -> the parameter that holds it."""

BODIES: Mapping[str, tuple[str, ...]] = {
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
}
"""Operations that run jaxprs more or less than once -> the parameters that hold them."""

Bind = Callable[[JaxprEqn, list[Any]], Sequence[Any]]


def inlined(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """The same program without calls, and without what nothing comes of; its inputs stay.

    Args:
        jaxpr: any.
    """

    def run(eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
        return bind(eqn, values, with_bodies(eqn, inlined))

    inputs = (jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in jaxpr.jaxpr.invars)
    whole = jax.make_jaxpr(lambda *values: evaluate(jaxpr, values, run))(*inputs)
    alive, _ = partial_eval.dce_jaxpr(whole.jaxpr, [True] * len(whole.jaxpr.outvars), instantiate=True)
    return closed(alive, whole.consts)


def bodies(eqn: JaxprEqn) -> list[ClosedJaxpr]:
    """The jaxprs that a loop or a branch runs; none for other equations."""
    held = [eqn.params[word] for word in BODIES.get(eqn.primitive.name, ())]
    return [body for one in held for body in (one if isinstance(one, tuple) else (one,))]


def with_bodies(eqn: JaxprEqn, change: Callable[[ClosedJaxpr], ClosedJaxpr]) -> dict[str, Any]:
    """The parameters of an equation, each of its bodies changed."""
    params = dict(eqn.params)
    for word in BODIES.get(eqn.primitive.name, ()):
        held = params[word]
        params[word] = tuple(map(change, held)) if isinstance(held, tuple) else change(held)
    return params


def evaluate(jaxpr: ClosedJaxpr, values: Sequence[Any], run: Bind, calls: Mapping[str, str] = CALLS) -> list[Any]:
    """Results of a jaxpr whose operations are done by `run`, calls entered.

    Args:
        jaxpr: what to evaluate.
        values: its inputs.
        run: (equation, values of its operands) -> its results.
        calls: operations that are entered -> the parameter that holds their jaxpr.
    """
    return _evaluate(jaxpr.jaxpr, jaxpr.consts, values, run, calls)


def _evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any], run: Bind, calls: Mapping[str, str]
) -> list[Any]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))

    def of(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        given = [of(atom) for atom in eqn.invars]
        with source_info_util.user_context(eqn.source_info.traceback, name_stack=eqn.source_info.name_stack):
            if eqn.primitive.name in calls:
                inner = eqn.params[calls[eqn.primitive.name]]
                closed = isinstance(inner, ClosedJaxpr)
                consts = inner.consts if closed else ()
                results = _evaluate(inner.jaxpr if closed else inner, consts, given, run, calls)
            else:
                results = run(eqn, given)
        known |= zip(eqn.outvars, results, strict=True)
    return [of(atom) for atom in jaxpr.outvars]


def bind(eqn: JaxprEqn, values: Sequence[Any], params: dict[str, Any]) -> Sequence[Any]:
    """The operation of an equation on other values, with other parameters; always a list of results."""
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(params))
    return results if eqn.primitive.multiple_results else [results]
