"""The model as a row of operations, loops over selected leaves written out, and what each of them needs.

    program = flat(apply_fn, params, batch, names)        program.steps[i] : reads, writes, maybe a `Use` of a leaf

What depends on no batch and on no selected leaf is computed once (`program.fixed`), unless it only repeats a smaller
array for one operation, which takes less memory when it is done where it is needed. What only renames a selected leaf
is left out, since `jaxprune.tracing.paths.replay` makes the operand of a leaf whose weights have moved. Steps after the
last product of a selected leaf are left out too.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Literal, Var

from jaxprune import tree
from jaxprune.compat import ClosedJaxpr, primitive_name, scan_groups
from jaxprune.tracing.finder import arrays_of, jaxpr_of, sites_of
from jaxprune.tracing.inlined import bind, inlined
from jaxprune.tracing.paths import Path, start
from jaxprune.tracing.products import Known, Products, pairs
from jaxprune.tracing.sites import PRODUCTS, Site
from jaxprune.tracing.transfer import Value, end, use
from jaxprune.types import Params


class Step(NamedTuple):
    """One operation.

    Attributes:
        eqn: the equation.
        site: of the product with a selected leaf that it is; None where it is none.
        stage: how many products with selected leaves come before it, one behind the other.
    """

    eqn: JaxprEqn
    site: Site | None
    stage: int

    @property
    def reads(self) -> list[Var]:
        """Variables that it needs, but for the operand made of a selected leaf."""
        weight = None if self.site is None else 1 - self.site.weight_first
        return [atom for i, atom in enumerate(self.eqn.invars) if isinstance(atom, Var) and i != weight]


@dataclasses.dataclass(frozen=True)
class Program:
    """A model ready to be cut.

    Attributes:
        steps: in an order in which they can be run, stage after stage, the products of a stage last.
        inputs: variables that a batch gives.
        fixed: what is the same for all batches, by its variable.
    """

    steps: tuple[Step, ...]
    inputs: tuple[Var, ...]
    fixed: dict[Var, Any]


def flat(apply_fn: Callable[..., Any], params: Params, batch: Any, names: Collection[str]) -> Program:
    """The program of `apply_fn(params, batch)`.

    Args:
        apply_fn: the model.
        params: the weights.
        batch: one batch.
        names: of the selected leaves.

    Raises:
        ValueError: a selected leaf cannot be followed to its products, is in a `while` or a `cond`, or is something
            else than a factor of a product as well; no selected leaf is in a product.
    """
    values, jaxpr = arrays_of((params, (batch,), {}))[0], jaxpr_of(apply_fn, params, batch)
    names = _of_products(jaxpr, params, names)
    program = _Unrolled(jaxpr, params, names, lambda product, state: (state, product.plain()))
    shapes = [jax.ShapeDtypeStruct(jnp.shape(value), value.dtype) for value in values]
    whole = inlined(jax.make_jaxpr(lambda *values: program.run(values, ())[1])(*shapes))
    leaves = {name: leaf for name, leaf in tree.named_leaves(params).items() if tree.is_array(leaf)}
    return _sorted(whole, leaves, values, names)


def _of_products(jaxpr: ClosedJaxpr, params: Params, names: Collection[str]) -> set[str]:
    """The names without those of leaves that are in no product, such as biases."""
    kinds: dict[str, set[str]] = {}
    for site in sites_of(jaxpr, params):
        kinds.setdefault(site.name, set()).add(site.kind)
    found = {name for name in names if name not in kinds or kinds[name].intersection(PRODUCTS)}
    if not found:
        raise ValueError(f"None of the selected leaves is in a product: {tree.listed(sorted(names))}.")
    return found


class _Unrolled(Products):
    """Scans over selected leaves, or with them inside, are written out step by step."""

    def _meets(self, known: Sequence[Value]) -> bool:
        return any(isinstance(what, Path) and what.name in self.names for what in known)

    def _scan(self, eqn: JaxprEqn, arrays: list[Any], known: list[Value], state: Any) -> tuple[Any, list[Known]]:
        if not self._meets(known):
            return state, pairs(bind(eqn, arrays, eqn.params), [True] * len(eqn.outvars))
        consts, carry = scan_groups(eqn)
        stop, count = consts + carry, eqn.params["length"]
        carried = pairs(arrays[consts:stop], known[consts:stop])
        made: list[list[Any]] = []
        for i in reversed(range(count)) if eqn.params["reverse"] else range(count):
            layers = [lax.index_in_dim(x, i, keepdims=False) for x in arrays[stop:]]
            paths = [_layer(what, i) if isinstance(what, Path) else what for what in known[stop:]]
            given = [*pairs(arrays[:consts], known[:consts]), *carried, *pairs(layers, paths)]
            state, results = self._run(
                eqn.params["jaxpr"], [one.array for one in given], [one.what for one in given], state
            )
            carried = results[:carry]
            self._check(eqn, [one.what for one in results[carry:]])
            made.append([one.array for one in results[carry:]])
        if eqn.params["reverse"]:
            made.reverse()
        stacked = [jnp.stack(column) for column in zip(*made, strict=True)]
        return state, [*carried, *pairs(stacked, [True] * len(stacked))]

    def _while(self, eqn: JaxprEqn, arrays: list[Any], known: list[Value], state: Any) -> tuple[Any, list[Known]]:
        return self._whole(eqn, arrays, known, state)

    def _cond(self, eqn: JaxprEqn, arrays: list[Any], known: list[Value], state: Any) -> tuple[Any, list[Known]]:
        return self._whole(eqn, arrays, known, state)

    def _whole(self, eqn: JaxprEqn, arrays: list[Any], known: list[Value], state: Any) -> tuple[Any, list[Known]]:
        for what in known:
            if isinstance(what, Path) and what.name in self.names:
                raise ValueError(
                    f"{what.name!r} is used inside a `{primitive_name(eqn)}`, whose steps cannot be pruned one after "
                    "the other. Leave it out with `select`, or take `order='layers'`."
                )
        return state, pairs(bind(eqn, arrays, eqn.params), [True] * len(eqn.outvars))


def _layer(path: Path, i: int) -> Path:
    return path.part([(i, i + 1, 1), *((0, n, 1) for n in path.shape[1:])]).reshape(path.shape[1:])


def _sorted(whole: ClosedJaxpr, leaves: dict[str, Any], values: list[Any], names: Collection[str]) -> Program:
    jaxpr = whole.jaxpr
    given = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*whole.consts, *values], strict=True))
    inputs = tuple(jaxpr.invars[len(leaves) :])
    paths = [start(name, tuple(leaf.shape), leaf.dtype.name) for name, leaf in leaves.items()]
    known: dict[Any, Value] = dict(zip(jaxpr.invars, paths, strict=False))
    stages: dict[Any, int] = dict.fromkeys(inputs, 0)  # of what varies from batch to batch, or with selected leaves
    steps: list[Step] = []
    before: list[JaxprEqn] = []  # what is the same for all batches
    for eqn in jaxpr.eqns:
        atoms = [known.get(atom, atom in stages) if isinstance(atom, Var) else False for atom in eqn.invars]
        found = use(eqn, atoms, 1) if any(isinstance(what, Path) for what in atoms) else end(eqn, atoms)
        ours = [site for site in found.sites if site.name in names]
        for site in ours:
            if site.kind not in PRODUCTS:
                raise ValueError(
                    f"{site.name!r} is used as {site.kind} as well as in products: what fits one spoils the other. "
                    "Leave it out with `select`."
                )
        known |= {var: what for var, what in zip(eqn.outvars, found.results, strict=True) if isinstance(what, Path)}
        if any(isinstance(what, Path) and what.name in names for what in found.results):
            continue
        step = Step(eqn, ours[0] if ours else None, 0)
        if not ours and not any(var in stages for var in step.reads):
            before.append(eqn)
            continue
        step = step._replace(stage=max((stages.get(var, 0) for var in step.reads), default=0))
        stages |= dict.fromkeys(eqn.outvars, step.stage + bool(ours))
        steps.append(step)
    steps.sort(key=lambda step: (step.stage, step.site is not None))
    needed = _with_repeats(_needed(steps), before)
    stages |= dict.fromkeys((var for step in needed for var in step.eqn.outvars), 0)
    read = dict.fromkeys(var for step in needed for var in step.reads)
    return Program(tuple(needed), inputs, _computed(before, given, [var for var in read if var not in stages]))


def _with_repeats(steps: list[Step], before: list[JaxprEqn]) -> list[Step]:
    """The steps, and in front of each the `broadcast_in_dim` of `before` that it alone needs."""
    readers = Counter(var for step in steps for var in dict.fromkeys(step.reads))
    repeats = {eqn.outvars[0]: eqn for eqn in before if eqn.primitive is lax.broadcast_in_dim_p}
    found = []
    for step in steps:
        alone = [var for var in dict.fromkeys(step.reads) if var in repeats and readers[var] == 1]
        found += [Step(repeats[var], None, step.stage) for var in alone]
        found.append(step)
    return found


def _computed(eqns: list[JaxprEqn], given: dict[Any, Any], wanted: list[Any]) -> dict[Any, Any]:
    """Variable -> its array, of those wanted."""
    there = {var: given[var] for var in wanted if var in given}
    wanted = [var for var in wanted if var not in there]
    known = {var: given[var] for eqn in eqns for var in eqn.invars if isinstance(var, Var) and var in given}

    def run(values: list[Any]) -> list[Any]:
        found = dict(zip(known, values, strict=True))
        for eqn in eqns:
            operands = [atom.val if isinstance(atom, Literal) else found[atom] for atom in eqn.invars]
            found |= zip(eqn.outvars, bind(eqn, operands, eqn.params), strict=True)
        return [found[var] for var in wanted]

    return there | dict(zip(wanted, jax.jit(run)(list(known.values())), strict=True))


def _needed(steps: list[Step]) -> list[Step]:
    """Those that some product comes of, and the products."""
    wanted: set[Any] = set()
    kept = []
    for step in reversed(steps):
        if step.site is not None or wanted.intersection(step.eqn.outvars):
            kept.append(step)
            wanted.update(step.reads)
    return kept[::-1]
