"""A walk through a model, segment after segment, with what each product has for inputs on the way.

    walk = Walk(apply_fn, params, batches, leaves, "blocks")
    for piece in walk.pieces:
        for part in piece:
            sums = walk.moments(part)       of every leaf in `solved_in(part)`, whose layers may move now
        walk.behind(piece)                  the batches go through what the piece has become

Only the moments of one part are there at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from jaxprune.layout import Axes
from jaxprune.oneshot.arguments import alike
from jaxprune.oneshot.cuts import Segment, blocks
from jaxprune.oneshot.program import flat
from jaxprune.oneshot.streams import Runner, to_host, units
from jaxprune.tracing.features import places
from jaxprune.types import Params


class Walk:
    """The batches before the next piece of a model.

    Args:
        apply_fn: the model.
        params: trained weights.
        batches: calibration inputs of one shape.
        leaves: name -> weights of the selected leaves, as they are in the dense model.
        order: "products" or "blocks".
        beside: whether the dense model's arrays go beside, for `cross`.

    Attributes:
        pieces: what lies between two cuts, each as the segments that are solved one after the other.
        leaves: name -> weights so far; another weight put here is what later pieces get their inputs from.

    Raises:
        ValueError: see `flat` and `alike`; a leaf is used in two stages.
    """

    def __init__(
        self,
        apply_fn: Callable[..., Any],
        params: Params,
        batches: list[Any],
        leaves: Mapping[str, Any],
        order: str,
        *,
        beside: bool = False,
    ) -> None:
        arrays = alike(batches)
        program = flat(apply_fn, params, batches[0], set(leaves))
        self.pieces = blocks(program, order)
        _check_once(self.parts)
        self.leaves = dict(leaves)
        self._runner = Runner(program.fixed)
        first = [program.inputs.index(var) for var in self.parts[0].before]
        self._ours = [to_host([batch[i] for i in first]) for batch in arrays]
        self._dense = (dict(leaves), list(self._ours)) if beside else None

    @property
    def parts(self) -> list[Segment]:
        """Those of all pieces."""
        return [part for piece in self.pieces for part in piece]

    def moments(self, part: Segment) -> dict[str, dict[str, Float[Array, "layers features features"]]]:
        """Leaf name -> "moments" and, with the dense model beside, "cross", of the layers that a part is solved for."""
        return self._runner.moments(part, self.leaves, self._ours, self._dense)

    def behind(self, piece: list[Segment]) -> None:
        """Takes the batches through a piece, unless it is the last one."""
        if piece is not self.pieces[-1]:
            self._runner.advance(piece[-1], self.leaves, self._ours)
            if self._dense is not None:
                self._runner.advance(piece[-1], *self._dense)


class Place(NamedTuple):
    """Layers of a leaf that are solved together, and its axes."""

    name: str
    axes: Axes
    layers: tuple[int, ...]


def solved_in(part: Segment) -> Iterator[Place]:
    """The layers that a part is solved for, leaf by leaf."""
    for name, unit in units(part).items():
        yield Place(name, next(places(s.site).axes for s in part.solved if s.site and s.site.name == name), unit.layers)


def _check_once(parts: list[Segment]) -> None:
    """Refuse a leaf whose weights would be needed before all of its inputs are known."""
    met: dict[tuple[str, int], int] = {}
    for number, part in enumerate(parts):
        for unit in units(part).values():
            for layer in unit.layers:
                if met.setdefault((unit.name, layer), number) != number:
                    raise ValueError(
                        f"{unit.name!r} is used in products that come one after the other, and the second one's inputs "
                        "are known only when it is pruned. Leave it out with `select`, or take `order='layers'`."
                    )
