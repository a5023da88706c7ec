"""Tables of a pruned tree: per leaf and in total, as text, Markdown or plain data."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxprune import tables, tree
from jaxprune.masks import nonzero_masks
from jaxprune.types import Masks, Params

HEADER = ("leaf", "shape", "weights", "nnz", "sparsity", "bytes")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf, or the total.

    Attributes:
        name: its name, such as "layers/0/kernel".
        shape: its shape; () for the total.
        weights: how many it has.
        nnz: how many are alive (by the masks), or not zero (without masks).
        bytes: what it takes stored dense, dead weights included.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    nnz: int
    bytes: int

    @property
    def sparsity(self) -> float:
        """Fraction removed; 0 for an empty leaf."""
        return 1 - self.nnz / self.weights if self.weights else 0.0


@dataclasses.dataclass(frozen=True)
class Report(tables.Table):
    """A table with one row a leaf; `str(report)` is the text, and names leaves of which nothing is left."""

    leaves: tuple[Leaf, ...]

    def __str__(self) -> str:
        lines = [super().__str__()]
        if self.emptied:
            lines.append(f"Nothing is left of {', '.join(map(repr, self.emptied))}: a `floor` of `Global` keeps some.")
        return "\n".join(lines)

    @property
    def emptied(self) -> tuple[str, ...]:
        """Names of matrices and the like, no vectors, whose weights are all dead."""
        return tuple(leaf.name for leaf in self.leaves if len(leaf.shape) > 1 and leaf.weights and not leaf.nnz)

    @property
    def total(self) -> Leaf:
        """All leaves together."""
        sums = (sum(getattr(leaf, field) for leaf in self.leaves) for field in ("weights", "nnz", "bytes"))
        return Leaf("total", (), *sums)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: {"leaves": [{name, shape, weights, nnz, sparsity, bytes}, ...], "total": {...}}."""

        def plain(leaf: Leaf) -> dict[str, Any]:
            return {**dataclasses.asdict(leaf), "shape": list(leaf.shape), "sparsity": leaf.sparsity}

        return {"leaves": [plain(leaf) for leaf in self.leaves], "total": plain(self.total)}

    @property
    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]], int]:
        """Header, rows, and how many of the first columns hold words."""
        rows = [
            (
                leaf.name,
                "x".join(map(str, leaf.shape)),
                f"{leaf.weights:,}",
                f"{leaf.nnz:,}",
                f"{leaf.sparsity:.2%}",
                f"{leaf.bytes:,}",
            )
            for leaf in (*self.leaves, self.total)
        ]
        return HEADER, rows, 2


def summarize(params: Params, masks: Masks | None = None) -> Report:
    """Shape, weights, survivors, sparsity and bytes of every leaf.

    Args:
        params: any pytree of arrays.
        masks: survivors are counted by these; without, what is not zero.

    Raises:
        ValueError: the masks have other leaves or shapes than the params.
    """
    if masks is not None:
        tree.check_like("The masks", masks, params)
    alive = tree.named_leaves(masks if masks is not None else nonzero_masks(params))
    leaves = tree.named_leaves(params)
    counts = {name: jnp.count_nonzero(alive[name]) for name in leaves}
    return Report(
        tuple(
            Leaf(name, tuple(leaf.shape), math.prod(leaf.shape), int(counts[name]), leaf.size * leaf.dtype.itemsize)
            for name, leaf in leaves.items()
        )
    )
