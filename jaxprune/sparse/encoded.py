"""Activations that stay codes of 8 bits from one product of integers to the next.

    y = fused_product(..., x)           becomes     [y,] codes = fused_product(..., x)
    z = fused_product(..., y)                       z = fused_product(..., codes)

A product that reads y rounds it first. So the product that makes y, with all that `fuse` joined to it, writes the codes
itself, and y no more unless somebody else wants it too, such as a block for its residual. Between the two y may be
reshaped, with its channels as they are, and max-pooled, since a larger number has no smaller code. (A NaN has one in
the middle. Where there is a residual, which may bring one, pools stay in floating point.)

Grids are static. Of a y that is read with several the most frequent one is written; other products round y themselves.
"""

from collections import Counter, defaultdict
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jaxprune.compat import type_like
from jaxprune.quantize.int8 import MOST_TERMS
from jaxprune.sparse.native_product import fused_product_p

_X = 5
"""Where x is among the operands of a product of integers."""


def with_codes(jaxpr: Jaxpr) -> Jaxpr:
    """The jaxpr with codes between its fused products of integers, wherever they can be."""
    grids = _grids(jaxpr)
    readers = [_is_product(eqn) and grids.get(eqn.invars[_X]) == eqn.params["sizes"].grid for eqn in jaxpr.eqns]
    numbers = {var for var in jaxpr.outvars if isinstance(var, Var)}
    codes: dict[Any, Var] = {}
    for eqn, reads in zip(reversed(jaxpr.eqns), reversed(readers), strict=True):
        moved = not _is_product(eqn) and eqn.outvars and eqn.outvars[0] in grids
        if reads or (moved and eqn.outvars[0] in codes):
            x = eqn.invars[_X if reads else 0]
            codes.setdefault(x, _variable_of_codes(x))
        if not moved or eqn.outvars[0] in numbers:
            numbers.update(v for i, v in enumerate(eqn.invars) if isinstance(v, Var) and not (reads and i == _X))
    eqns: list[JaxprEqn] = []
    for eqn, reads in zip(jaxpr.eqns, readers, strict=True):
        if reads:
            eqn = eqn.replace(invars=[*eqn.invars[:_X], codes[eqn.invars[_X]], *eqn.invars[_X + 1 :]])
        y = eqn.outvars[0] if eqn.outvars else None
        if y not in codes:
            eqns.append(eqn)
        elif _is_product(eqn):
            steps = eqn.params["steps"]._replace(grid=grids[y], keep=y in numbers)
            eqns.append(eqn.replace(params=eqn.params | {"steps": steps}, outvars=steps.results(y, codes[y])))
        else:
            eqns += [eqn] * (y in numbers)
            sizes = {"new_sizes": _shape(codes[y])} if eqn.primitive is lax.reshape_p else {}
            params = eqn.params | sizes
            eqns.append(eqn.replace(params=params, invars=[codes[eqn.invars[0]]], outvars=[codes[y]]))
    return jaxpr.replace(eqns=eqns)


def _grids(jaxpr: Jaxpr) -> dict[Any, tuple[float, ...]]:
    """Of every variable that may be had as codes."""
    made_by: dict[Any, JaxprEqn] = {}
    asked: dict[Var, Counter[tuple[float, ...]]] = defaultdict(Counter)
    for eqn in jaxpr.eqns:
        if _is_product(eqn):
            x, sizes = eqn.invars[_X], eqn.params["sizes"]
            if x in made_by and sizes.n_in // (n := _shape(x)[-1]) * _whole_runs(n) <= MOST_TERMS:
                asked[made_by[x].outvars[0]][sizes.grid] += 1
            made_by[eqn.outvars[0]] = eqn
        elif _keeps_channels(eqn) and eqn.invars[0] in made_by:
            product = made_by[eqn.invars[0]]
            if eqn.primitive is lax.reshape_p or not product.params["steps"].residual:
                made_by[eqn.outvars[0]] = product
    chosen = {y: grids.most_common(1)[0][0] for y, grids in asked.items()}
    return {var: chosen[eqn.outvars[0]] for var, eqn in made_by.items() if eqn.outvars[0] in chosen}


def _is_product(eqn: JaxprEqn) -> bool:
    return eqn.primitive is fused_product_p and bool(eqn.params["sizes"].grid)


def _keeps_channels(eqn: JaxprEqn) -> bool:
    """Whether codes may be reshaped or pooled in the place of the numbers."""
    if any(isinstance(var, Literal) for var in eqn.invars):
        return False
    if eqn.primitive is lax.reshape_p:
        before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
        return eqn.params["dimensions"] is None and before[-1:] == after[-1:]
    if eqn.primitive is not lax.reduce_window_max_p:
        return False
    each = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    return all(eqn.params[name][-1] == 1 for name in each) and not any(eqn.params["padding"][-1])


def _whole_runs(channels: int) -> int:
    return -(-channels // 4) * 4


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _variable_of_codes(var: Any) -> Var:
    shape = _shape(var)
    return Var(type_like((*shape[:-1], _whole_runs(shape[-1])), jnp.uint8, var.aval))
