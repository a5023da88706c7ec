"""A jaxpr without calls: what `jit`, `remat` and functions with custom derivatives wrap, written out in its place.

Inner jaxprs are shared between the calls of one function, and so are their variables; written out, every variable
stands for one array. Loops and branches keep their bodies, each with variables of its own.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.interpreters import partial_eval

from jaxprune.compat import ClosedJaxpr, closed, scan_groups

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

REMAT = ("remat2", "checkpoint")
OF_DERIVATIVES = ("custom_jvp_call", "custom_vjp_call", *REMAT)
"""Those of them that are nothing but a word on how derivatives are to be found."""

BODIES: Mapping[str, tuple[str, ...]] = {
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
}
"""Operations that run jaxprs more or less than once -> the parameters that hold them."""

LOOPS = ("scan", "while")

Bind = Callable[[JaxprEqn, list[Any]], Sequence[Any]]


def inlined(jaxpr: ClosedJaxpr, kept: Collection[str] = ()) -> ClosedJaxpr:
    """The same program without calls, and without what nothing comes of; its inputs stay.

    Args:
        jaxpr: any.
        kept: calls that stay as they are, inside as well.
    """
    calls = CALLS.keys() - set(kept)

    def run(eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
        return bind(eqn, values, with_bodies(eqn, lambda body: inlined(body, kept)))

    inputs = (jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in jaxpr.jaxpr.invars)
    whole = jax.make_jaxpr(lambda *values: evaluate(jaxpr, values, run, calls))(*inputs)
    alive, _ = partial_eval.dce_jaxpr(whole.jaxpr, [True] * len(whole.jaxpr.outvars), instantiate=True)
    return closed(alive, whole.consts)


class Loop(NamedTuple):
    """A `scan` or a `while`, and what its operands are to it.

    Attributes:
        body: one step, a function of constants, carry and layers; it gives the carry, and the layers that are stacked.
        consts, carry, layers: values of the operands; of a `while` there are no layers.
        test: of a `while`, a function of `tested` and the carry.
        tested: constants of the test.
    """

    body: ClosedJaxpr
    consts: list[Any]
    carry: list[Any]
    layers: list[Any]
    test: ClosedJaxpr | None = None
    tested: Sequence[Any] = ()


def loop(eqn: JaxprEqn, values: Sequence[Any]) -> Loop:
    """The loop of an equation, one of `LOOPS`.

    Args:
        eqn: the equation.
        values: one for each of its operands.
    """
    params, values = eqn.params, list(values)
    if eqn.primitive.name == "scan":
        consts, carry = scan_groups(eqn)
        stop = consts + carry
        return Loop(params["jaxpr"], values[:consts], values[consts:stop], values[stop:])
    start, stop = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    return Loop(params["body_jaxpr"], values[start:stop], values[stop:], [], params["cond_jaxpr"], values[:start])


def bodies(eqn: JaxprEqn) -> Iterator[tuple[Jaxpr, list[Any]]]:
    """The jaxprs that a loop or a branch runs, with its operand for every input, None for those that change in a loop.

    Of other equations none.
    """
    if eqn.primitive.name in LOOPS:
        one = loop(eqn, eqn.invars)
        changing = [None] * len(one.carry)
        if one.test:
            yield one.test.jaxpr, [*one.tested, *changing]
        yield one.body.jaxpr, [*one.consts, *changing, *one.layers]
    elif eqn.primitive.name == "cond":
        for branch in eqn.params["branches"]:
            yield branch.jaxpr, eqn.invars[1:]


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations, those of the bodies of loops and branches included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body, _ in bodies(eqn):
            yield from equations(body)


def with_bodies(eqn: JaxprEqn, change: Callable[[ClosedJaxpr], ClosedJaxpr]) -> dict[str, Any]:
    """The parameters of an equation, each of its bodies changed."""
    params = dict(eqn.params)
    for word in BODIES.get(eqn.primitive.name, ()):
        held = params[word]
        params[word] = tuple(map(change, held)) if isinstance(held, tuple) else change(held)
    return params


def evaluate(jaxpr: ClosedJaxpr, values: Sequence[Any], run: Bind, calls: Collection[str] = CALLS) -> list[Any]:
    """Results of a jaxpr whose operations are done by `run`, calls entered.

    Args:
        jaxpr: what to evaluate.
        values: its inputs.
        run: (equation, values of its operands) -> its results.
        calls: operations that are entered.
    """
    known = dict(zip([*jaxpr.jaxpr.constvars, *jaxpr.jaxpr.invars], [*jaxpr.consts, *values], strict=True))

    def of(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.jaxpr.eqns:
        given = [of(atom) for atom in eqn.invars]
        with source_info_util.user_context(eqn.source_info.traceback, name_stack=eqn.source_info.name_stack):
            results = evaluate(called(eqn), given, run, calls) if eqn.primitive.name in calls else run(eqn, given)
        known |= zip(eqn.outvars, results, strict=True)
    return [of(atom) for atom in jaxpr.jaxpr.outvars]


def called(eqn: JaxprEqn) -> ClosedJaxpr:
    """What an operation of `CALLS` does."""
    inner = eqn.params[CALLS[eqn.primitive.name]]
    return inner if isinstance(inner, ClosedJaxpr) else closed(inner, ())


def bind(eqn: JaxprEqn, values: Sequence[Any], params: dict[str, Any]) -> Sequence[Any]:
    """The operation of an equation on other values, with other parameters; always a list of results."""
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(params))
    return results if eqn.primitive.multiple_results else [results]
