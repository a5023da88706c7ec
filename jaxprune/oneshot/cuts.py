"""Where a program is cut: between stages of products, at the place of each gap where the fewest bytes are alive.

| order | cuts |
|---|---|
| products | every gap |
| blocks | gaps no wider than their neighbours: in a decoder, after attention and after the feed-forward part |
"""

import itertools
from typing import Any, NamedTuple

from jax.extend.core import Var

from jaxprune.oneshot.program import Program, Step


class Segment(NamedTuple):
    """What is run at once.

    Attributes:
        steps: its operations.
        before: variables of a batch that it reads, in order.
        after: those that later segments read.
        fixed: variables that are the same for all batches.
    """

    steps: tuple[Step, ...]
    before: tuple[Var, ...]
    after: tuple[Var, ...]
    fixed: tuple[Var, ...]

    @property
    def products(self) -> list[Step]:
        """Its products with selected leaves."""
        return [step for step in self.steps if step.site is not None]


def segments(program: Program, order: str) -> list[Segment]:
    """The program in pieces, each with at least one product.

    Args:
        program: of `flat`.
        order: "products" or "blocks".
    """
    live = _alive(program)
    gaps = [min(gap, key=lambda place: (_bytes(live[place]), -place)) for gap in _gaps(program.steps)]
    if order == "blocks":
        sizes = [_bytes(live[place]) for place in gaps]
        around = zip([sizes[0], *sizes], [*sizes[1:], sizes[-1]], strict=False) if sizes else ()
        gaps = [gap for gap, size, beside in zip(gaps, sizes, around, strict=False) if size <= min(beside)]
    places = [0, *gaps, len(program.steps)]
    found = []
    for first, last in itertools.pairwise(places):
        steps = program.steps[first:last]
        read = [var for step in steps for var in step.reads]
        made = {var for step in steps for var in step.eqn.outvars}
        outside = [var for var in dict.fromkeys(read) if var not in made]
        fixed = tuple(var for var in outside if var in program.fixed)
        found.append(Segment(steps, tuple(live[first]), tuple(live[last]), fixed))
    return found


def _gaps(steps: tuple[Step, ...]) -> list[range]:
    """Places from behind the products of one stage to before those of the next."""
    products = [place for place, step in enumerate(steps) if step.site is not None]
    pairs = itertools.pairwise(products)
    return [range(a + 1, b + 1) for a, b in pairs if steps[a].stage != steps[b].stage]


def _alive(program: Program) -> list[list[Any]]:
    """For every place, the variables of a batch that are made before it and read behind it."""
    made = dict.fromkeys(program.inputs, 0)
    last: dict[Any, int] = {}
    for place, step in enumerate(program.steps):
        made |= dict.fromkeys(step.eqn.outvars, place + 1)
        last |= dict.fromkeys((var for var in step.reads if var not in program.fixed), place)
    live: list[list[Any]] = [[] for _ in range(len(program.steps) + 1)]
    for var, end in last.items():
        for place in range(made[var], end + 1):
            live[place].append(var)
    return live


def _bytes(variables: list[Any]) -> int:
    return sum(var.aval.size * var.aval.dtype.itemsize for var in variables)
