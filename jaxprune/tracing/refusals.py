"""What `trace` refuses: params that the model does not consume, and, if strict, uses that nobody can follow."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import Jaxpr, subjaxprs

from jaxprune.compat import primitive_name
from jaxprune.tracing.paths import Path


class Lost(NamedTuple):
    """A leaf that ran into something that cannot be followed.

    Attributes:
        path: of the leaf until there.
        op: the equation.
        calls: the equations that it lies in, outwards.
    """

    path: Path
    op: Any
    calls: tuple[Any, ...] = ()

    def inside(self, call: Any) -> "Lost":
        """The same, seen from outside of the equation `call`."""
        return self._replace(calls=(*self.calls, call))


def check_consumed(jaxpr: Jaxpr, named: Mapping[str, Any], unused: Sequence[str], *, strict: bool) -> None:
    """Refuses params that the model leaves aside, because it has weights of its own, or nothing to do with them.

    A leaf that is not consumed is no error by itself: a key for dropout, a head that is not asked for.

    Args:
        jaxpr: the model.
        named: name -> leaf of the params.
        unused: names of the leaves that nothing comes of.
        strict: True if these are errors too.

    Raises:
        ValueError: no leaf is consumed; or one is not while the model holds a matrix of its size; or, if `strict`, any
            leaf is not.
    """
    if not unused:
        return
    nothing = len(unused) == len(named)
    shapes = [tuple(named[name].shape) for name in unused]
    sizes = {math.prod(shape) for shape in shapes if len(shape) > 1}
    own = [aval for aval in _constants(jaxpr) if nothing or math.prod(aval.shape) in sizes]
    if own:
        raise ValueError(
            f"The function holds arrays of its own, of shapes {listed([str(tuple(aval.shape)) for aval in own])}, and "
            f"does not consume {_quoted(unused)}. Weights must come in as arguments: have it use the params that it is "
            "given. Those that it closes over are constants, which cannot be pruned."
        )
    if nothing:
        raise ValueError(
            f"The function consumes no leaf of the params, which are {_quoted(unused)}. Hand in the params that it "
            "uses, as its first argument."
        )
    if strict:
        raise ValueError(f"The function does not consume {_quoted(unused)}. Take them out, or trace without `strict`.")


def check_followed(lost: Sequence[Lost]) -> None:
    """Refuses uses of leaves that are in no site.

    Args:
        lost: those uses.

    Raises:
        ValueError: there are any; it names leaf, operation and line.
    """
    if not lost:
        return
    uses = dict.fromkeys(map(_described, lost))
    raise ValueError(
        f"Not every use of the params can be followed: {listed(list(uses), '; ')}. Write these in other operations, "
        "or trace without `strict`, which leaves them out."
    )


def _described(lost: Lost) -> str:
    changed = f", changed by `{lost.path.changed_by}`," if lost.path.changed_by else ""
    lines = [source_info_util.summarize(op.source_info) for op in (lost.op, *lost.calls)]
    # Functions of libraries have no line of the user's; those traced before, the line of their first call.
    known = [*dict.fromkeys(line for line in lines if line)]
    where = ", called at ".join(known[:1] + known[1:][-1:])
    return f"{lost.path.name!r}{changed} runs into `{primitive_name(lost.op)}` at {where}"


def _constants(jaxpr: Jaxpr) -> Iterator[Any]:
    """Matrices of numbers that are no integers, and arrays of more axes, that a program holds."""
    avals: list[Any] = [var.aval for var in jaxpr.constvars]
    yield from (aval for aval in avals if len(aval.shape) > 1 and jnp.issubdtype(aval.dtype, jnp.inexact))
    for inner in subjaxprs(jaxpr):
        yield from _constants(inner)


def _quoted(names: Sequence[str]) -> str:
    return listed([repr(name) for name in names])


def listed(words: Sequence[str], between: str = ", ", most: int = 4) -> str:
    """Words for an error, and how many more there are than are named."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return between.join(words[:most]) + more
