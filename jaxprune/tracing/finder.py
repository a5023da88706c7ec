"""The finder: walks a model's jaxpr and keeps, for every variable that is a leaf renamed, the path it came along.

    walk : (jaxpr, paths of its inputs, count) -> (sites, paths of its outputs)

Equations that rename pass a path on, equations that multiply end it in a site, those that hold a jaxpr are walked
into, and everything else (an addition, an index, an elementwise product) lets it go.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal

from jaxprune import tree
from jaxprune.tracing.paths import Path, start
from jaxprune.tracing.sites import OPS, Site, make_site
from jaxprune.types import Params

Found = tuple[list[Site], list[Path | None]]
CALLS: Mapping[str, str] = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
"""Operations that do what their jaxpr does, once -> the parameter that holds it."""


def trace(fn: Callable[..., Any], params: Params, *args: Any, **kwargs: Any) -> tuple[Site, ...]:
    """Every place where `fn(params, *args, **kwargs)` multiplies or convolves with a leaf of the params.

    A leaf is followed through reshape, transpose, casts, copies, `stop_gradient` and axes of size one, and into `jit`,
    `jax.checkpoint`, functions with custom derivatives, `scan` (as a constant, or as stacked layers), `while` and
    `cond`. Nothing is computed. A leaf that is added to, indexed or scaled first is in no site; neither is a model's
    embedding table, looked up by index.

    Args:
        fn: the model, a function of its parameters.
        params: any pytree of arrays or `jax.ShapeDtypeStruct`.
        args: of `fn`: arrays or `jax.ShapeDtypeStruct`, in any pytree; what is neither (a number, a bool, a string) is
            handed to `fn` as it is.
        kwargs: likewise.

    Returns:
        The sites in the order of execution. Two branches of a `cond` follow one another.

    Raises:
        ValueError: two leaves of the params have the same name.

    Example:
        >>> for site in jp.trace(model.apply, params, x):
        ...     print(site.name, site.op, site.macs)
    """
    return sites_of(jaxpr_of(fn, params, *args, **kwargs), params)


def jaxpr_of(fn: Callable[..., Any], params: Params, *args: Any, **kwargs: Any) -> ClosedJaxpr:
    """`fn(params, *args, **kwargs)` as a jaxpr whose first inputs are the array leaves of the params, in order.

    Args:
        fn: see `trace`.
        params: see `trace`.
        args: see `trace`.
        kwargs: see `trace`.
    """
    arrays, rebuild = arrays_of((params, args, kwargs))

    def of_arrays(*given: Any) -> Any:
        params, args, kwargs = rebuild(given)
        return jax.tree.leaves(fn(params, *args, **kwargs))

    return jax.make_jaxpr(of_arrays)(*(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays))


def arrays_of(values: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a pytree (or their `jax.ShapeDtypeStruct`), and what puts others in their place.

    Args:
        values: any pytree; what is no array in it is kept as it is.

    Returns:
        The arrays, and a function of as many others that gives the pytree with those.
    """
    leaves, structure = jax.tree.flatten(values)
    places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def rebuild(arrays: Sequence[Any]) -> Any:
        filled = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            filled[i] = array
        return jax.tree.unflatten(structure, filled)

    return [leaves[i] for i in places], rebuild


def sites_of(jaxpr: ClosedJaxpr, params: Params) -> tuple[Site, ...]:
    """The sites in a jaxpr that `jaxpr_of` made with these params.

    Args:
        jaxpr: of the model.
        params: the same pytree.

    Raises:
        ValueError: two leaves have the same name.
    """
    named = {name: leaf for name, leaf in tree.named_leaves(params).items() if _is_array(leaf)}
    paths: list[Path | None] = [start(name, leaf.shape) for name, leaf in named.items()]
    paths += [None] * (len(jaxpr.jaxpr.invars) - len(paths))
    sites, _ = _walk(jaxpr.jaxpr, paths, 1, named)
    uses: Counter[str] = Counter()
    numbered = []
    for site in sites:
        numbered.append(dataclasses.replace(site, index=uses[site.name]))
        uses[site.name] += 1
    return tuple(numbered)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _walk(jaxpr: Any, paths: Sequence[Path | None], count: int, named: Mapping[str, Any]) -> Found:
    known = {var: path for var, path in zip(jaxpr.invars, paths, strict=True) if path is not None}
    sites: list[Site] = []

    def of(atom: Any) -> Path | None:
        return None if isinstance(atom, Literal) else known.get(atom)

    for op in jaxpr.eqns:
        given = [of(atom) for atom in op.invars]
        if not any(given):
            continue
        more, results = _step(op, given, count, named)
        sites += more
        known |= {var: path for var, path in zip(op.outvars, results, strict=True) if path is not None}
    return sites, [of(atom) for atom in jaxpr.outvars]


def _step(op: Any, given: list[Path | None], count: int, named: Mapping[str, Any]) -> Found:
    """What one equation does with the paths of its operands."""
    name = op.primitive.name
    nothing: list[Path | None] = [None] * len(op.outvars)
    if name in OPS:
        made = [
            make_site(path, named[path.name], op, weight_first=i == 0, count=count)
            for i, path in enumerate(given)
            if path is not None
        ]
        return made, nothing
    if name in CALLS:
        return _walk(_open(op.params[CALLS[name]]), given, count, named)
    if name == "scan":
        return _scan(op, given, count, named)
    if name == "while":
        return _while(op, given, count, named)
    if name == "cond":
        branches = [_walk(branch.jaxpr, given[1:], count, named) for branch in op.params["branches"]]
        return [site for sites, _ in branches for site in sites], nothing
    followed = given[0].followed(name, op.params, tuple(op.outvars[0].aval.shape)) if given[0] else None
    return [], [followed, *nothing[1:]]


def _scan(op: Any, given: list[Path | None], count: int, named: Mapping[str, Any]) -> Found:
    consts, carry = op.params["num_consts"], op.params["num_carry"]
    layers = [path and path.layer() for path in given[consts + carry :]]
    sites, kept = _loop(
        op.params["jaxpr"], given[:consts], given[consts : consts + carry], layers, count * op.params["length"], named
    )
    return sites, [*kept, *[None] * (len(op.outvars) - carry)]


def _while(op: Any, given: list[Path | None], count: int, named: Mapping[str, Any]) -> Found:
    tested, consts = op.params["cond_nconsts"], op.params["body_nconsts"]
    carry = given[tested + consts :]
    sites, kept = _loop(op.params["body_jaxpr"], given[tested : tested + consts], carry, [], count, named)
    asked, _ = _walk(op.params["cond_jaxpr"].jaxpr, [*given[:tested], *kept], count, named)
    return [*asked, *sites], kept


def _loop(
    body: ClosedJaxpr,
    consts: list[Path | None],
    carry: list[Path | None],
    layers: list[Path | None],
    count: int,
    named: Mapping[str, Any],
) -> Found:
    """Sites of a loop's body, and the carries that are the same leaf after every step as before."""
    while True:
        sites, results = _walk(body.jaxpr, [*consts, *carry, *layers], count, named)
        kept = [before if before == after else None for before, after in zip(carry, results, strict=False)]
        if kept == carry:
            return sites, kept
        carry = kept


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
