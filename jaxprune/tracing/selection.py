"""What the sites say of the leaves: which are weights, and which of their axes are input, output, spatial, stacked.

    select = weights_of(sites)      # instead of names and ranks:  `jaxprune.weights`
    layout = layout_of(sites)       # instead of a framework's:    `FLAX`, `TORCH`

Names need no meaning then, and a kernel may lie in memory as it likes.
"""

import dataclasses
import glob
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxprune.layout import Axes, Layout
from jaxprune.tracing.sites import PRODUCTS, Site


@dataclasses.dataclass(frozen=True)
class Named:
    """A selection of leaves by their names, as `select` takes it.

    Attributes:
        names: of the selected leaves.
    """

    names: frozenset[str]

    def __call__(self, name: str, leaf: Any) -> bool:
        """Whether the leaf is selected."""
        return name in self.names


def weights_of(sites: Sequence[Site], *, embeddings: bool = False) -> Named:
    """The leaves that are weights: floating, and consumed by products and convolutions.

    Biases and scales are not, nor is a table that is looked up in, also where its transpose is the last product (tied
    embeddings).

    Args:
        sites: of `trace`.
        embeddings: True to take embedding tables too.

    Returns:
        A function (name, leaf) -> bool, for `Method(select=...)`.

    Example:
        >>> sites = jp.trace(model.apply, params, x)
        >>> method = jp.Method(select=jp.weights_of(sites), layout=jp.layout_of(sites))
    """
    floating = [site for site in sites if jnp.issubdtype(site.leaf_dtype, jnp.floating)]
    tables = frozenset(site.name for site in floating if site.kind == "embedding")
    products = frozenset(site.name for site in floating if site.kind in PRODUCTS)
    return Named(products | tables if embeddings else products - tables)


def layout_of(sites: Sequence[Site]) -> Layout:
    """A layout with one rule for every leaf that is in a site: the axes that its use gives it.

    A leaf that is used more than once follows its first product or convolution, so that of a tied embedding the axis
    that is summed over is its input; a leaf that is in none follows its first use.

    Args:
        sites: of `trace`.

    Raises:
        ValueError: the axes of a leaf cannot be told.
    """
    uses: dict[str, list[Site]] = {}
    for site in sites:
        uses.setdefault(site.name, []).append(site)
    return Layout(rules=tuple((glob.escape(name), _axes(name, found)) for name, found in uses.items()))


def _axes(name: str, uses: list[Site]) -> Axes:
    products = [site for site in uses if site.kind in PRODUCTS]
    told = [site.axes for site in products or uses if site.axes is not None]
    if told:
        return told[0]
    site = (products or uses)[0]
    raise ValueError(
        f"The axes of {name!r} {site.leaf_shape} cannot be told: on its way to `{site.op}` one of them is split "
        "between inputs and outputs. Take the sites of this leaf out, and add a rule with `Layout.with_rules`."
    )
