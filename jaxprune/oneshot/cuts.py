"""Where a program is cut: at places where the arrays of the batches wait for the next part of the model to be pruned.

| order | cuts | between two cuts |
|---|---|---|
| products | all gaps but those half as wide again as both neighbours | stage after stage |
| blocks | gaps no wider than their neighbours, in a decoder after attention and after the rest | at once |

A gap is between the products of one stage and those of the next, and is cut where the fewest bytes are alive. What lies
between the cut and the products of a later stage is computed again for their moments, so that nothing wide has to wait.
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
        solved: its products whose weights are found on what it gives them; those before them have theirs.
    """

    steps: tuple[Step, ...]
    before: tuple[Var, ...]
    after: tuple[Var, ...]
    fixed: tuple[Var, ...]
    solved: tuple[Step, ...]

    @property
    def products(self) -> list[Step]:
        """All of its products with selected leaves."""
        return [step for step in self.steps if step.site is not None]


def blocks(program: Program, order: str) -> list[list[Segment]]:
    """The program in pieces between cuts, each as the segments that are solved one after the other.

    All segments of a piece begin where it does, and the last one is all of it.

    Args:
        program: of `flat`.
        order: "products" or "blocks".
    """
    live = _alive(program)
    gaps = [min(gap, key=lambda place: (_bytes(live[place]), -place)) for gap in _gaps(program.steps)]
    sizes = [_bytes(live[place]) for place in gaps]
    around = [[*sizes[max(i - 1, 0) : i], *sizes[i + 1 : i + 2]] for i in range(len(sizes))]
    if order == "blocks":
        cut = [size <= min(beside, default=size) for size, beside in zip(sizes, around, strict=True)]
    else:
        cut = [size <= 1.5 * max(beside, default=size) for size, beside in zip(sizes, around, strict=True)]
    cuts = [0, *itertools.compress(gaps, cut), len(program.steps)]
    ends = cuts[1:] if order == "blocks" else [*gaps, len(program.steps)]
    found: list[list[Segment]] = []
    for first, last in itertools.pairwise(cuts):
        inside = [end for end in ends if first < end <= last]
        starts = [first, *inside[:-1]]
        found.append([_segment(program, live, first, *part) for part in zip(starts, inside, strict=True)])
    return found


def _segment(program: Program, live: list[list[Any]], first: int, new: int, last: int) -> Segment:
    """The steps from `first` to before `last`, of which those from `new` on are solved."""
    steps = program.steps[first:last]
    made = {var for step in steps for var in step.eqn.outvars}
    outside = dict.fromkeys(var for step in steps for var in step.reads if var not in made)
    fixed = tuple(var for var in outside if var in program.fixed)
    solved = tuple(step for step in program.steps[new:last] if step.site is not None)
    return Segment(steps, tuple(live[first]), tuple(live[last]), fixed, solved)


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
