"""Uses: what one equation does with a leaf. It passes its path on, ends it in a site, or loses it.

    use : (equation, values of its operands, count) -> (sites, uses that were lost, values of its results)

A value is the path of a leaf, or whether it depends on the model's inputs: activations do; positions, and masks that a
model makes up, do not. A vector that meets activations is a scale or a bias; one that meets numbers from nowhere is
changed by them, and goes on.
"""

import itertools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

from jax.extend.core import Literal

from jaxprune.tracing.operations import ELEMENTWISE, IDENTITIES
from jaxprune.tracing.paths import Path
from jaxprune.tracing.refusals import Lost
from jaxprune.tracing.sites import KINDS, OPS, Site, make_site

Value: TypeAlias = Path | bool
"""The path of a leaf; or True for what depends on the model's inputs, False for what does not."""


class Found(NamedTuple):
    """What was found in a jaxpr, or in one equation.

    Attributes:
        sites: in the order of execution.
        lost: uses of leaves that are in no site and cannot be followed.
        results: values of the outputs.
    """

    sites: list[Site]
    lost: list[Lost]
    results: list[Value]


def use(op: Any, given: list[Value], count: int) -> Found:
    """What an equation without jaxprs of its own does.

    Args:
        op: the equation.
        given: values of its operands, at least one of them a path.
        count: how often it runs.
    """
    name, first = op.primitive.name, given[0]
    if name in IDENTITIES:
        return Found([], [], given)
    if name in OPS:
        # A factor must be the leaf's own numbers: zeros in `1 + w` are no zeros.
        factors = [i for i, value in enumerate(given) if isinstance(value, Path) and value.changed_by is None]
        return end(op, given, factors, count)
    if name in ELEMENTWISE and name != "convert_element_type":
        return _elementwise(op, given, count)
    if not isinstance(first, Path):
        return end(op, given)
    if name in ("gather", "dynamic_slice"):
        return _looked_up(op, first, given, count)
    if any(isinstance(value, Path) for value in given[1:]):
        return end(op, given)
    if name in ("split", "unstack"):
        return Found([], [], [*_split(op, first)])
    followed = first.followed(name, op.params, tuple(op.outvars[0].aval.shape))
    return Found([], [], [followed]) if followed else end(op, given)


def end(op: Any, given: Sequence[Value], used: Collection[int] = (), count: int = 1) -> Found:
    """An equation after which no path goes on.

    Args:
        op: the equation.
        given: values of its operands.
        used: those that end in a site; the other paths are lost.
        count: how often it runs.
    """
    sites = [make_site(value, op, i, count) for i, value in enumerate(given) if isinstance(value, Path) and i in used]
    lost = [Lost(value, op) for i, value in enumerate(given) if isinstance(value, Path) and i not in used]
    return Found(sites, lost, [any(value is True for value in given)] * len(op.outvars))


def _looked_up(op: Any, table: Path, given: list[Value], count: int) -> Found:
    """A look-up by the inputs or by a leaf; or a slice, at numbers that the jaxpr shows or that a loop counts up."""
    if op.primitive.name == "gather" or any(given[1:]):
        return end(op, given, (0,), count)
    sizes, starts = tuple(map(int, op.params["slice_sizes"])), op.invars[1:]
    if not all(isinstance(start, Literal) for start in starts):
        return Found([], [], [table.part([(0, size, 1) for size in sizes], in_turn=True)])
    axes = zip(starts, table.shape, sizes, strict=True)
    first = [min(max(int(start.val), 0), whole - size) for start, whole, size in axes]
    return Found([], [], [table.part([(a, a + size, 1) for a, size in zip(first, sizes, strict=True)])])


def _split(op: Any, whole: Path) -> list[Path]:
    """The parts along an axis; unstacked, they are left without it."""
    axis = op.params["axis"]
    sizes = [int(size) for size in op.params.get("sizes", (1,) * whole.shape[axis])]
    cuts = [(0, size, 1) for size in whole.shape]
    parts = []
    for size, stop, var in zip(sizes, itertools.accumulate(sizes), op.outvars, strict=True):
        cuts[axis] = (stop - size, stop, 1)
        parts.append(whole.part(cuts).reshape(tuple(var.aval.shape)))
    return parts


def _elementwise(op: Any, given: list[Value], count: int) -> Found:
    """Scales and biases; or one leaf changed by numbers that are no activations."""
    used = [i for i, value in enumerate(given) if isinstance(value, Path) and _ends(op, value, given, i)]
    rest = [value for i, value in enumerate(given) if isinstance(value, Path) and i not in used]
    found = end(op, given, used, count)
    if len({path.name for path in rest}) != 1 or any(value is True for value in given):
        return found
    changed = rest[0].changed(op.primitive.name, tuple(op.outvars[0].aval.shape))
    return Found(found.sites, [], [changed])


def _ends(op: Any, path: Path, given: list[Value], place: int) -> bool:
    """Whether a leaf scales or shifts: activations, or another leaf along its channels.

    A matrix times an array of its own shape does not: that is a mask, or another matrix.
    """
    others = given[:place] + given[place + 1 :]
    kind = KINDS.get(op.primitive.name)
    activations = any(other is True for other in others)
    leaves = any(isinstance(other, Path) and other.name != path.name for other in others)
    if kind is None or not (activations or leaves):
        return False
    along_channels = path.is_vector or path.is_broadcast or path.shape != tuple(op.outvars[0].aval.shape)
    return along_channels or (kind == "bias" and activations)
