"""The finder: walks a model's jaxpr and keeps, for every variable that is a leaf renamed, the path it came along.

    walk : (jaxpr, values of its inputs, count) -> (sites, uses that were lost, values of its outputs)

Equations that hold a jaxpr are walked into here; what the others do with a leaf is in `jaxprune.tracing.transfer`.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from jaxprune import tree
from jaxprune.compat import ClosedJaxpr, present_forms
from jaxprune.tracing.inlined import CALLS, loop
from jaxprune.tracing.paths import Path, start
from jaxprune.tracing.refusals import Lost, check_consumed, check_followed
from jaxprune.tracing.sites import Site
from jaxprune.tracing.transfer import Found, Value, end, use
from jaxprune.types import Leaves


def trace(
    apply_fn: Callable[..., Any], params: Leaves, *args: Any, strict: bool = False, **kwargs: Any
) -> tuple[Site, ...]:
    """Every place where `apply_fn(params, *args, **kwargs)` consumes a leaf of the params.

    Those are products, convolutions, look-ups in embedding tables, scales (of a normalisation, for instance) and
    biases, see `Site.kind`. A leaf is followed through reshape, transpose, casts, copies, `stop_gradient`, broadcasts,
    slices, splits, flips and tiles, and into `jit`, `jax.checkpoint`, functions with custom derivatives, `scan` (as a
    constant, or as stacked layers), `while`, `cond` and `shard_map` (into one device's shard). A leaf that goes through
    operations on single elements first, such as `1 + scale` or `rsqrt(variance)`, is a scale or a bias still, but no
    factor of a product any more: zeros in it would be no zeros there. Nothing is computed, and what nothing comes of is
    left out.

    Not followed are concatenations, sums over a leaf, gathers between devices and operations unknown here; they let the
    leaf go, and `strict` names them.

    Args:
        apply_fn: the model, a function of its parameters.
        params: any pytree of arrays or `jax.ShapeDtypeStruct`.
        args: of `apply_fn`: arrays or `jax.ShapeDtypeStruct`, in any pytree; what is neither (a number, a bool, a
            string) is handed to `apply_fn` as it is.
        strict: True to refuse a model where some use of a leaf, or some leaf, is in no site.
        kwargs: as `args`.

    Returns:
        The sites in the order of execution. Two branches of a `cond` follow one another.

    Raises:
        ValueError: two leaves of the params have the same name; no leaf is consumed; a leaf is not, and the function
            closes over an array of its size; or, if `strict`, a leaf is not, or cannot be followed.

    Example:
        >>> for site in jp.trace(model.apply, params, x):
        ...     print(site.name, site.kind, site.macs)
    """
    return sites_of(jaxpr_of(apply_fn, params, *args, **kwargs), params, strict=strict)


def jaxpr_of(apply_fn: Callable[..., Any], params: Leaves, *args: Any, **kwargs: Any) -> ClosedJaxpr:
    """`apply_fn(params, *args, **kwargs)` as a jaxpr whose first inputs are the array leaves of the params, in order.

    Args:
        apply_fn: see `trace`.
        params: see `trace`.
        args: see `trace`.
        kwargs: see `trace`.
    """
    arrays, rebuild = arrays_of((params, args, kwargs))

    def of_arrays(*given: Any) -> Any:
        params, args, kwargs = rebuild(given)
        return jax.tree.leaves(apply_fn(params, *args, **kwargs))

    with present_forms():
        return jax.make_jaxpr(of_arrays)(*(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays))


def arrays_of(values: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a pytree (or their `jax.ShapeDtypeStruct`), and what puts others in their place.

    Args:
        values: any pytree; what is no array in it is kept as it is.

    Returns:
        The arrays, and a function of as many others that gives the pytree with those.
    """
    leaves, structure = jax.tree.flatten(values)
    places = [i for i, leaf in enumerate(leaves) if tree.is_array(leaf)]

    def rebuild(arrays: Sequence[Any]) -> Any:
        filled = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            filled[i] = array
        return jax.tree.unflatten(structure, filled)

    return [leaves[i] for i in places], rebuild


def sites_of(jaxpr: ClosedJaxpr, params: Leaves, *, strict: bool = False) -> tuple[Site, ...]:
    """The sites in a jaxpr that `jaxpr_of` made with these params.

    Args:
        jaxpr: of the model.
        params: the same pytree.
        strict: see `trace`.

    Raises:
        ValueError: see `trace`.
    """
    named = {name: leaf for name, leaf in tree.named_leaves(params).items() if tree.is_array(leaf)}
    alive, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    unused = [name for name, use in zip(named, used, strict=False) if not use]
    check_consumed(jaxpr.jaxpr, named, unused, strict=strict)
    values: list[Value] = [start(name, tuple(leaf.shape), leaf.dtype.name) for name, leaf in named.items()]
    values += [True] * (len(used) - len(values))
    found = _walk(alive, [value for value, use in zip(values, used, strict=True) if use], 1)
    if strict:
        check_followed(found.lost)
    uses: Counter[str] = Counter()
    numbered = []
    for site in found.sites:
        numbered.append(dataclasses.replace(site, index=uses[site.name]))
        uses[site.name] += 1
    return tuple(numbered)


def _walk(jaxpr: Any, values: Sequence[Value], count: int) -> Found:
    known = dict(zip(jaxpr.invars, values, strict=True))
    sites: list[Site] = []
    lost: list[Lost] = []

    def of(atom: Any) -> Value:
        return not isinstance(atom, Literal) and known.get(atom, False)

    for op in jaxpr.eqns:
        found = _step(op, [of(atom) for atom in op.invars], count)
        sites += found.sites
        lost += found.lost
        known |= zip(op.outvars, found.results, strict=True)
    return Found(sites, lost, [of(atom) for atom in jaxpr.outvars])


def _step(op: Any, given: list[Value], count: int) -> Found:
    """What one equation does with the values of its operands, those that hold jaxprs included."""
    name = op.primitive.name
    if not any(isinstance(value, Path) for value in given):
        return end(op, given)
    if name in CALLS:
        found = _walk(_open(op.params[CALLS[name]]), given, count)
    elif name in _BODIES:
        found = _BODIES[name](op, given, count)
    else:
        return use(op, given, count)
    return found._replace(lost=[lost.inside(op) for lost in found.lost])


def _loop(op: Any, given: list[Value], count: int) -> Found:
    """What is in a loop's body, with carries that are after every step what they were before.

    A carry that is not loses its path for good, and may become an activation then: so this ends.
    """
    _, consts, carry, layers, test, tested = one = loop(op, given)
    layers = [value.layer() if isinstance(value, Path) else value for value in layers]
    before, kept = None, carry
    while kept != before:
        found = _walk(one.body.jaxpr, [*consts, *kept, *layers], count * op.params.get("length", 1))
        before, kept = kept, [_both(a, b) for a, b in zip(kept, found.results, strict=False)]
    made: list[Value] = [value is True for value in found.results[len(carry) :]]
    lost = _dropped(op, carry, kept) + _dropped(op, found.results, [*kept, *made])
    asked = _walk(test.jaxpr, [*tested, *kept], count) if test else Found([], [], [])
    return Found([*asked.sites, *found.sites], [*asked.lost, *found.lost, *lost], [*kept, *made])


def _cond(op: Any, given: list[Value], count: int) -> Found:
    branches = [_walk(branch.jaxpr, given[1:], count) for branch in op.params["branches"]]
    results = [functools.reduce(_both, values) for values in zip(*(one.results for one in branches), strict=True)]
    lost = [lost for one in branches for lost in [*one.lost, *_dropped(op, one.results, results)]]
    return Found([site for one in branches for site in one.sites], lost, results)


def _shard_map(op: Any, given: list[Value], count: int) -> Found:
    """The body runs on every device, each with its shard; the leaf's path goes on into the first shard."""
    body, mesh = op.params["jaxpr"], op.params["mesh"]
    devices = int(np.prod([mesh.shape[axis] for axis in op.params["newly_manual_axes"]]))
    shards = [
        value.part([(0, size, 1) for size in var.aval.shape], in_turn=True) if isinstance(value, Path) else value
        for value, var in zip(given, body.invars, strict=True)
    ]
    found = _walk(body, shards, count * devices)
    made: list[Value] = [value is True for value in found.results]
    return Found(found.sites, [*found.lost, *_dropped(op, found.results, made)], made)


_BODIES: Mapping[str, Callable[[Any, list[Value], int], Found]] = {
    "scan": _loop,
    "while": _loop,
    "cond": _cond,
    "shard_map": _shard_map,
}
"""Operations that hold jaxprs and are more than a call."""


def _both(a: Value, b: Value) -> Value:
    """What is known of something that is now one, now the other."""
    return a if a == b else a is True or b is True


def _dropped(op: Any, values: Sequence[Value], kept: Sequence[Value]) -> list[Lost]:
    """Paths that do not go on after this equation."""
    return [Lost(a, op) for a, b in zip(values, kept, strict=True) if isinstance(a, Path) and a != b]


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
