r"""Costs: how many weights and multiply-adds a model has, and how many are left under masks.

    macs left of a site = macs x (weights alive that take part) / (weights that take part)

Every weight of a product takes part in as many multiply-adds as every other: one for each position of the output that
it serves. (Of a convolution whose input is dilated, or whose left operand is the weight, that is the mean.) Where a
site uses a part of its leaf, the mask goes the leaf's own way to the operation.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxprune import tables, tree
from jaxprune.tracing.paths import Step, replay
from jaxprune.tracing.sites import Site
from jaxprune.types import Leaves, Masks

HEADER = ("leaf", "shape", "weights", "left", "reduction", "MACs", "left", "reduction", "bytes")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one leaf costs, or all together.

    Attributes:
        name: the leaf's name, or "total".
        shape: its shape; () for the total.
        weights: how many it has; once, however often it is used.
        nnz: how many of them are alive.
        macs: multiply-adds of one call, over all its uses; 0 where no product or convolution uses it.
        macs_left: those of them whose weight is alive.
        bytes: what it takes stored dense; None where nobody said its dtype.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    nnz: int
    macs: int
    macs_left: int
    bytes: int | None

    @property
    def reduction(self) -> float:
        """Weights dense / left; infinite where none is left."""
        return _ratio(self.weights, self.nnz)

    @property
    def macs_reduction(self) -> float:
        """Multiply-adds dense / left; infinite where none is left."""
        return _ratio(self.macs, self.macs_left)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the attributes and both reductions, None where they are infinite."""
        ratios = {"reduction": self.reduction, "macs_reduction": self.macs_reduction}
        finite = {word: ratio if math.isfinite(ratio) else None for word, ratio in ratios.items()}
        return {**dataclasses.asdict(self), "shape": list(self.shape), **finite}


@dataclasses.dataclass(frozen=True)
class Costs(tables.Table):
    """A table with one row a leaf, as they are used first; `str(costs)` is the text."""

    leaves: tuple[Cost, ...]

    @property
    def total(self) -> Cost:
        """All leaves together."""
        words = ("weights", "nnz", "macs", "macs_left")
        sums = {word: sum(getattr(leaf, word) for leaf in self.leaves) for word in words}
        known = [leaf.bytes for leaf in self.leaves if leaf.bytes is not None]
        return Cost("total", (), **sums, bytes=sum(known) if len(known) == len(self.leaves) else None)

    def with_nonzeros(self, counts: Mapping[str, int]) -> "Costs":
        """The costs with so many weights left in each named leaf, wherever in the leaf they stand.

        Of a leaf's multiply-adds the same fraction is left as of its weights, which is exact for a leaf that is
        used whole.

        Args:
            counts: leaf name -> non-zero weights; leaves that are not named stay as they are.

        Raises:
            ValueError: a name that is no leaf, a number below 0 or above the leaf's weights.
        """
        leaves = {leaf.name: leaf for leaf in self.leaves}
        for name, nnz in counts.items():
            if name not in leaves:
                raise ValueError(
                    f"{name!r} is no leaf of these costs. They have: {', '.join(leaves)}. Leave it out, or trace the "
                    "model that these numbers are of."
                )
            if not 0 <= nnz <= leaves[name].weights:
                raise ValueError(
                    f"{name!r} has {leaves[name].weights:,} weights, {nnz:,} of them are said not to be zero. "
                    "Take the numbers of this model, or this size of it."
                )
            macs_left = _share(leaves[name].macs, nnz, leaves[name].weights)
            leaves[name] = dataclasses.replace(leaves[name], nnz=nnz, macs_left=macs_left)
        return Costs(tuple(leaves.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: {"leaves": [{name, shape, weights, ...}, ...], "total": {...}}."""
        return {"leaves": [leaf.to_dict() for leaf in self.leaves], "total": self.total.to_dict()}

    @property
    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]], int]:
        """Header, rows, and how many of the first columns hold words."""
        rows = [
            (
                leaf.name,
                "x".join(map(str, leaf.shape)),
                f"{leaf.weights:,}",
                f"{leaf.nnz:,}",
                f"{leaf.reduction:.2f}x",
                f"{leaf.macs:,}",
                f"{leaf.macs_left:,}",
                f"{leaf.macs_reduction:.2f}x",
                "?" if leaf.bytes is None else f"{leaf.bytes:,}",
            )
            for leaf in (*self.leaves, self.total)
        ]
        return HEADER, rows, 2


def costs(sites: Sequence[Site], masks: Masks | None = None, *, params: Leaves | None = None) -> Costs:
    """Weights, multiply-adds and bytes of every leaf, dense and left under masks.

    Multiply-adds are those of products and convolutions, in the batch that was traced; positions that fall on padding
    count like the rest. A tied leaf counts its weights once and the multiply-adds of all its uses. Of a leaf that is
    sliced first and then taken apart by a loop's counter or by devices, the first part stands for all.

    Args:
        sites: of `jaxprune.trace`.
        masks: bool leaves, True = alive; without, everything is. Leaves that no site uses count their weights too.
        params: pytree of arrays or `jax.ShapeDtypeStruct`. Adds the leaves that no site uses also without masks, and
            their bytes, which masks do not tell.

    Raises:
        ValueError: no sites; masks with other leaves, shapes or dtypes; sites of another model.

    Example:
        >>> sites = jp.trace(apply_fn, params, x)
        >>> print(jp.costs(sites, masks))
        >>> jp.costs(sites, masks).total.macs_reduction
    """
    if not sites:
        raise ValueError(
            "`costs` was given no sites: nothing of the traced function uses a leaf of the params. "
            "A function that closes over its weights has them as constants; hand them over as its first argument."
        )
    if masks is not None and params is not None:
        tree.check_like("The masks", masks, params)
    like = {name: leaf for name, leaf in tree.named_leaves(params).items() if tree.is_array(leaf)}
    alive = {} if masks is None else tree.named_leaves(masks)
    _check_masks(alive)
    for what, leaves in (("params", like), ("masks", alive)):
        if leaves:
            _check_sites(sites, what, leaves)
    uses: dict[str, list[Site]] = {site.name: [] for site in sites}
    for site in sites:
        uses[site.name].append(site)
    names = dict.fromkeys([*uses, *like, *alive])
    return Costs(tuple(_cost(name, uses.get(name, []), like.get(name), alive.get(name)) for name in names))


def mac_costs(sites: Sequence[Site], params: Leaves, select: tree.Select = tree.weights) -> dict[str, float]:
    """Multiply-adds of one call for each weight of a leaf, over all its uses: costs for `Budget`.

    What `costs` counts, divided by the leaf's weights; of a leaf that some use takes a part of, that is the mean.

    Args:
        sites: of `jaxprune.trace`.
        params: pytree of arrays or `jax.ShapeDtypeStruct`.
        select: the leaves that are pruned, as in `Method`.

    Returns:
        Leaf name -> multiply-adds a weight, 0 where no product or convolution uses it.

    Raises:
        ValueError: no sites, sites of another model, no such leaf.

    Example:
        >>> macs = jp.tracing.mac_costs(jp.trace(apply_fn, params, x), params, method.select)
        >>> budget = jp.distributions.Budget(macs, limit=1e5)
    """
    found = {cost.name: cost for cost in costs(sites, params=params).leaves}
    return {name: found[name].macs / max(found[name].weights, 1) for name in tree.selected_leaves(select, params)}


def byte_costs(params: Leaves, select: tree.Select = tree.weights) -> dict[str, float]:
    """Bytes of each weight of a leaf: costs for `Budget`.

    They are those of the survivors' values; what it takes to say where they are depends on the format.

    Args:
        params: pytree of arrays or `jax.ShapeDtypeStruct`.
        select: the leaves that are pruned, as in `Method`.

    Returns:
        Leaf name -> bytes a weight.

    Raises:
        ValueError: no such leaf.
    """
    leaves = tree.selected_leaves(select, params)
    return {name: float(jnp.dtype(leaf.dtype).itemsize) for name, leaf in leaves.items()}


def _cost(name: str, uses: list[Site], param: Any, mask: Any) -> Cost:
    shape = uses[0].leaf_shape if uses else tuple((mask if param is None else param).shape)
    dtype = jnp.dtype(uses[0].leaf_dtype) if uses else getattr(param, "dtype", None)  # of keys it is none of NumPy's
    weights, macs = math.prod(shape), sum(site.macs for site in uses)
    nnz, left = weights, macs
    if mask is not None:
        nnz, left = _count(mask), sum(_macs_left(site, jnp.asarray(mask)) for site in uses)
    return Cost(name, shape, weights, nnz, macs, left, None if dtype is None else weights * dtype.itemsize)


def _macs_left(site: Site, mask: Shaped[Array, "..."]) -> int:
    if not site.macs:
        return 0
    used = mask if site.weights == mask.size else _operands(site.weight_transforms, mask)
    return _share(site.macs, _count(used), used.size)


def _operands(steps: tuple[Step, ...], leaf: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """What the leaf is to its operation; of a stack, all layers, one behind the other."""
    layer = next((place for place, (word, _) in enumerate(steps) if word == "layer"), None)
    if layer is None:
        return replay(steps, leaf)
    return jax.vmap(partial(_operands, steps[layer + 1 :]))(replay(steps[:layer], leaf))


def _count(mask: Any) -> int:
    """Counted on the host, where no number of weights is too large for an integer."""
    return int(np.count_nonzero(np.asarray(mask)))


def _share(macs: int, part: int, whole: int) -> int:
    return macs * part // whole if whole else 0


def _ratio(dense: int, left: int) -> float:
    return 1.0 if dense == left else dense / left if left else math.inf


def _check_masks(alive: Mapping[str, Any]) -> None:
    for name, mask in alive.items():
        if mask.dtype != bool:
            raise ValueError(
                f"The mask of {name!r} is {mask.dtype}, bool was expected: True = alive. For weights that are zero "
                "where they are pruned, `nonzero_masks(params)` gives masks."
            )


def _check_sites(sites: Sequence[Site], what: str, leaves: Mapping[str, Any]) -> None:
    for site in sites:
        shape = tuple(leaves[site.name].shape) if site.name in leaves else None
        if shape != site.leaf_shape:
            found = "it is not there" if shape is None else f"it is {shape}"
            raise ValueError(
                f"The sites use a leaf {site.name!r} of shape {site.leaf_shape}, in the {what} {found}. "
                f"Trace the model that these {what} belong to."
            )
