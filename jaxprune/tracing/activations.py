r"""Activations: how many bytes of them are alive at once, at the worst moment.

    peak = max over operations i of  sum of bytes(v) over arrays v with  made(v) <= i <= last used(v)

Operations run one after the other, in the order of the jaxpr; the operands and the results of one are alive together.
An input is alive up to its last use, a result of the model up to the end. What is made of weights alone is a weight and
does not count, and what no result comes of is not made. Calls are entered; the body of a loop counts once, on top of
what is alive around it, and so does the largest branch of a `cond`.

XLA may need less, since it fuses operations whose results then never lie in memory, writes in place and reorders; it
may need more for scratch space and padding. This is the model's own number, the same on every machine.
"""

from collections.abc import Callable
from typing import Any

from jax.extend.core import Jaxpr, Literal, Var

from jaxprune import tree
from jaxprune.tracing.finder import arrays_of, jaxpr_of
from jaxprune.tracing.inlined import bodies, inlined
from jaxprune.types import Leaves


def peak_activations(apply_fn: Callable[..., Any], params: Leaves, *args: Any, **kwargs: Any) -> int:
    """Bytes of activations alive at the worst moment of `apply_fn(params, *args, **kwargs)`. Nothing is computed.

    Args:
        apply_fn: the model, a function of its parameters.
        params: any pytree of arrays or `jax.ShapeDtypeStruct`; they and what is made of them alone do not count.
        args: of `apply_fn`, likewise; they count up to their last use.
        kwargs: likewise.

    Raises:
        ValueError: two leaves of the params have the same name.
    """
    tree.named_leaves(params)
    whole = inlined(jaxpr_of(apply_fn, params, *args, **kwargs)).jaxpr
    weights = set(whole.invars[: len(arrays_of(params)[0])])
    return _peak(whole, weights, set(whole.invars) - weights)


def _peak(jaxpr: Jaxpr, weights: set[Var], alive: set[Var]) -> int:
    """The most bytes at once of `alive` and of what the equations make; `weights` grows by what is made of weights."""
    last = {atom: place for place, eqn in enumerate(jaxpr.eqns) for atom in _variables(eqn.invars)}
    last |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    alive = {var for var in alive if var in last}
    peak = sum(map(_bytes, alive))
    for place, eqn in enumerate(jaxpr.eqns):
        inside = 0  # what a body makes itself; its inputs are alive outside
        for body, given in bodies(eqn):
            pairs = zip(body.invars, given, strict=True)
            inner = {var for var, atom in pairs if isinstance(atom, Var) and atom in weights}
            inside = max(inside, _peak(body, inner, set()))
        operands = _variables(eqn.invars)
        if operands and weights.issuperset(operands):
            weights |= set(eqn.outvars)
        else:
            alive |= set(eqn.outvars)
        peak = max(peak, sum(map(_bytes, alive)) + inside)
        alive = {var for var in alive if last.get(var, -1) > place}
    return peak


def _variables(atoms: Any) -> set[Var]:
    return {atom for atom in atoms if not isinstance(atom, Literal)}


def _bytes(var: Any) -> int:
    return var.aval.size * var.aval.dtype.itemsize
