r"""Calibration: what every weight of any function meets on some data, in one pass over it.

    seen = of_activations(apply_fn, params, batches)          seen.input_norms    seen.moments    seen.for_(method)

For a leaf that is multiplied, with inputs $X$ (tokens, features): $\sum_t X_{ti}^2$, $\sum_t |X_{ti}|$, how many
$X_{ti}$ are zero, and on request the second moments $X^\top X$. Features are those of the leaf's view, as
`jaxprune.tracing.features` finds them. Sums within a batch are pairwise, of batches compensated: float32, in pairs.
"""

import dataclasses
import glob
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxprune import tree
from jaxprune.checks import is_concrete
from jaxprune.exact.numerics import ordered_sum
from jaxprune.layout import BY_NAME, Axes, Layout
from jaxprune.tracing.features import inputs_of, layers_of, places, share_of
from jaxprune.tracing.finder import arrays_of, jaxpr_of
from jaxprune.tracing.products import Product, Products
from jaxprune.tracing.sites import Site
from jaxprune.types import Leaves, Params

Sums: TypeAlias = dict[str, tuple[Any, Any]]
"""What is summed -> (sum, what rounding took from it), each (layers, ...)."""


class Inputs(NamedTuple):
    """What one leaf met: `layers` are its stacked layers, `features` its window and its inputs, each flattened.

    Attributes:
        shape: of the leaf.
        axes: of the leaf, as its product uses them.
        tokens: how many rows were multiplied by it; of a use of some of its outputs, in proportion.
        squares: sums of squares.
        magnitudes: sums of absolute values.
        zeros: how many were zero.
        moments: $X^\\top X$; None where nobody asked for them.
    """

    shape: tuple[int, ...]
    axes: Axes
    tokens: Float[Array, "layers"]
    squares: Float[Array, "layers features"]
    magnitudes: Float[Array, "layers features"]
    zeros: Float[Array, "layers features"]
    moments: Float[Array, "layers features features"] | None

    def shaped(self, values: Float[Array, "layers features"]) -> Float[Array, "..."]:
        """Numbers of features as criteria have them, (*layers, in), or (*layers, window, in) of a convolution."""
        parts = [tuple(self.shape[a] for a in part) for part in (self.axes.layers, self.axes.spatial, self.axes.inputs)]
        layers, spatial, inputs = (*parts[0],), math.prod(parts[1]), math.prod(parts[2])
        return values.reshape(*layers, *([spatial] if spatial > 1 else []), inputs)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What every leaf met, by its name; of `of_activations`.

    Attributes:
        leaves: name -> sums.
    """

    leaves: Mapping[str, Inputs]

    @property
    def input_norms(self) -> dict[str, Array]:
        """L2 norm of every input over all tokens, (*layers, in), of a convolution (window, in): for `wanda`."""
        return {name: one.shaped(jnp.sqrt(one.squares)) for name, one in self.leaves.items()}

    @property
    def input_means(self) -> dict[str, Array]:
        """Mean absolute value of every input, shaped as `input_norms`."""
        return {name: one.shaped(_ratio(one.magnitudes, one.tokens)) for name, one in self.leaves.items()}

    @property
    def input_zero_fractions(self) -> dict[str, Array]:
        """Fraction of zeros of every input, shaped as `input_norms`."""
        return {name: one.shaped(_ratio(one.zeros, one.tokens)) for name, one in self.leaves.items()}

    @property
    def moments(self) -> dict[str, Array]:
        r"""$X^\top X$, (*layers, features, features) with features (window, in) flattened.

        Raises:
            ValueError: they were not asked for.
        """
        found = {name: one.moments for name, one in self.leaves.items()}
        if any(one is None for one in found.values()):
            raise ValueError("No second moments were gathered: `of_activations(..., moments=True)` does.")
        layers = {name: [one.shape[a] for a in one.axes.layers] for name, one in self.leaves.items()}
        return {name: one.reshape(*layers[name], *one.shape[1:]) for name, one in found.items() if one is not None}

    @property
    def layout(self) -> Layout:
        """The axes of the leaves that were met, for `Method(layout=...)`."""
        return dataclasses.replace(
            BY_NAME, rules=tuple((glob.escape(name), one.axes) for name, one in self.leaves.items())
        )

    def for_(self, method: Any) -> dict[str, dict[str, Array]]:
        """The evidence that a method's criterion takes: `compute_masks(method, params, s, **seen.for_(method))`.

        Args:
            method: `Method`, or whatever has a `criterion` and a `layout`.

        Raises:
            ValueError: the method's layout takes other axes of a leaf for its outputs than its product does.
        """
        words = inspect.signature(method.criterion).parameters
        return {word: self._laid_out(word, method.layout) for word in _EVIDENCE if word in words}

    def _laid_out(self, word: str, layout: Layout) -> dict[str, Array]:
        values = getattr(self, word)
        return {name: _in_axes(name, one, values[name], layout) for name, one in self.leaves.items()}


_EVIDENCE = ("input_norms", "input_means", "input_zero_fractions")


def of_activations(
    apply_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    select: tree.Select = tree.weights,
    moments: bool = False,
) -> Seen:
    r"""Statistics of the inputs of every product with a selected leaf, in one pass over the batches.

    Any function of JAX will do: products are found in its jaxpr, also under `jit`, `vmap`, `remat`, in `scan`, `while`
    and `cond`. Stacked layers have a statistic each. A leaf that is used more than once has the sum over its uses, one
    that is split between products along its outputs that of the average output. Each batch is one call under jit, data
    may be sharded; under a jit of yours it is pure, and what is not finite stays so.

    Args:
        apply_fn: the model, (params, batch) -> anything.
        params: the weights.
        batches: inputs, one call each; pytrees of arrays.
        select: leaves to look at; those of them that are in no product are left out.
        moments: whether to add up $X^\top X$ too, which takes 8 bytes for each pair of a leaf's features, see
            `bytes_of_moments`.

    Raises:
        ValueError: a leaf cannot be followed to its products, or the inputs it meets there are not told apart; it is
            in a convolution by groups; inputs are not finite; there is no batch, or no product.

    Example:
        >>> seen = jp.evidence.of_activations(apply_fn, params, batches)
        >>> masks = jp.compute_masks(method, params, 0.5, **seen.for_(method))
    """
    names = tree.selected_leaves(select, params)
    observe = jax.jit(lambda params, batch, totals: _observed(apply_fn, params, batch, names, totals))
    sites: dict[str, Site] = {}
    totals: dict[str, Sums] = {}
    for batch in batches:
        if not totals:
            sites = _met(apply_fn, params, batch, names)
            totals = {name: _zeros(site, moments) for name, site in sites.items()}
        totals = observe(params, batch, totals)
    if not totals:
        raise ValueError("There is no batch, or no product with a selected leaf, so there is nothing to look at.")
    leaves = {}
    for name, sums in totals.items():
        found = {word: high + low for word, (high, low) in sums.items()}
        fine = jnp.isfinite(found["squares"]).all()
        if is_concrete(fine) and not fine:
            raise ValueError(f"Inputs of {name!r} are not finite in float32. Mend the model, or the batch.")
        site = sites[name]
        leaves[name] = Inputs(site.leaf_shape, places(site).axes, **{"moments": None, **found})
    return Seen(leaves)


def bytes_of_moments(
    apply_fn: Callable[..., Any], params: Leaves, batch: Any, *, select: tree.Select = tree.weights
) -> dict[str, int]:
    """Bytes that second moments take in `of_activations(..., moments=True)`, leaf name -> bytes. Nothing is computed.

    Args:
        apply_fn: the model, (params, batch) -> anything.
        params: weights, or their shapes and dtypes.
        batch: a batch, or its shapes and dtypes.
        select: leaves to look at.

    Raises:
        ValueError: as `of_activations`, where shapes tell it.
    """
    sites = _met(apply_fn, params, batch, tree.selected_leaves(select, params))
    return {name: 8 * _layers(site) * places(site).order.size ** 2 for name, site in sites.items()}


def _met(apply_fn: Callable[..., Any], params: Leaves, batch: Any, names: Collection[str]) -> dict[str, Site]:
    """The first product of every leaf, in the order of the params; all of a leaf's must agree on its axes."""
    met: dict[str, Site] = {}

    def do(product: Product, state: Any) -> Any:
        site = product.site
        first = met.setdefault(site.name, site)
        if places(site).axes != places(first).axes:
            raise ValueError(
                f"{site.name!r} {site.leaf_shape} is used along {places(first).axes} and along {places(site).axes}: "
                "its inputs here are outputs there. Leave it out with `select`."
            )
        return state, product.plain()

    program = Products(jaxpr_of(apply_fn, params, batch), params, set(names), do)
    values = arrays_of((params, (batch,), {}))[0]
    jax.eval_shape(
        lambda values: program.run(values, ())[1], [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in values]
    )
    return {name: met[name] for name in names if name in met}


def _observed(
    apply_fn: Callable[..., Any], params: Params, batch: Any, names: Collection[str], totals: dict[str, Sums]
) -> dict[str, Sums]:
    def do(product: Product, state: dict[str, Sums]) -> Any:
        name = product.site.name
        return {**state, name: added(state[name], layers_of(product), sums_of(product, state[name]))}, product.plain()

    program = Products(jaxpr_of(apply_fn, params, batch), params, set(names), do)
    return program.run(arrays_of((params, (batch,), {}))[0], totals)[0]


def _layers(site: Site) -> int:
    return math.prod(site.leaf_shape[a] for a in places(site).axes.layers)


def _zeros(site: Site, moments: bool) -> Sums:
    layers, features = _layers(site), places(site).order.size
    vectors = dict.fromkeys(("squares", "magnitudes", "zeros"), (layers, features))
    shapes = {"tokens": (layers,), **vectors, **({"moments": (layers, features, features)} if moments else {})}
    return {word: (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)) for word, shape in shapes.items()}


def sums_of(product: Product, words: Collection[str]) -> dict[str, Array]:
    """What one product adds to the sums of `words`, for the layers that it has."""
    x, share = inputs_of(product), jnp.float32(share_of(product.site))
    sums = {"tokens": lambda: jnp.full(x.shape[0], x.shape[1], jnp.float32), "moments": lambda: second_moments(x, x)}
    single = {"squares": jnp.square, "magnitudes": jnp.abs, "zeros": lambda x: (x == 0).astype(jnp.float32)}
    sums |= {word: lambda of=of: jnp.squeeze(ordered_sum(of(x), (1,)), 1) for word, of in single.items()}
    return {word: sums[word]() * share for word in words}


def second_moments(
    x: Float[Array, "layers tokens features"], y: Float[Array, "layers tokens features"]
) -> Float[Array, "layers features features"]:
    """Sums over tokens of products of features, in float32 throughout."""
    return jnp.einsum("lti,ltj->lij", x, y, precision=lax.Precision.HIGHEST)


def added(totals: Sums, layers: Int[Array, "some"], sums: Mapping[str, Array]) -> Sums:
    """Totals with sums of some layers added to theirs, the rounding error of each addition kept beside it."""
    new = {}
    for word, (high, low) in totals.items():
        old = high[layers]
        total = old + sums[word]
        back = total - old  # what was added really: Knuth's two-sum
        lost = (old - (total - back)) + (sums[word] - back)
        new[word] = high.at[layers].set(total), low.at[layers].add(lost)
    return new


def _ratio(sums: Float[Array, "layers features"], tokens: Float[Array, "layers"]) -> Float[Array, "layers features"]:
    return sums / jnp.maximum(tokens, 1)[:, None]


def _in_axes(name: str, one: Inputs, values: Array, layout: Layout) -> Array:
    """Numbers of features, laid out along the axes that a method takes for the leaf's layers, window and inputs."""
    ours, theirs = one.axes, layout.axes(name, one.shape)
    if set(ours.outputs) != set(theirs.outputs):
        raise ValueError(
            f"The method's layout says {theirs} of {name!r} {one.shape}, its product sums over axes "
            f"{(*ours.spatial, *ours.inputs)}. Hand the method `layout=seen.layout`."
        )
    before, after = ([axis for part in axes[:3] for axis in part] for axes in (ours, theirs))
    values = values.reshape([one.shape[axis] for axis in before])
    values = jnp.transpose(values, [before.index(axis) for axis in after])
    layers, spatial, inputs = ([one.shape[axis] for axis in part] for part in theirs[:3])
    return values.reshape(*layers, *([math.prod(spatial)] if theirs.spatial else []), math.prod(inputs))
