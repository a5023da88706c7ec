r"""Calibration: what every weight of any function meets on some data, in one pass over it.

    seen = of_activations(apply_fn, params, batches)          seen.input_norms    seen.output_means    seen.moments

For a leaf that is multiplied, with inputs $X$ (tokens, features): $\sum_t X_{ti}^2$, $\sum_t |X_{ti}|$, how many
$X_{ti}$ are zero, and on request the second moments $X^\top X$; for the activations $A$ (tokens, outputs) that its
outputs become, $\sum_t |A_{tj}|$ and how many $A_{tj}$ are zero. Features and outputs are those of the leaf's view, as
`jaxprune.tracing.features` finds them. Sums within a batch are pairwise, of batches compensated: float32, in pairs.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxprune import tree
from jaxprune.checks import is_concrete
from jaxprune.criteria.seen import Inputs, Outputs, Seen
from jaxprune.exact.numerics import ordered_sum
from jaxprune.tracing.features import batch_axes, inputs_of, layers_of, output_axes, places, results_of, share_of
from jaxprune.tracing.finder import arrays_of, jaxpr_of
from jaxprune.tracing.outputs import Became, Scale
from jaxprune.tracing.products import Product, Products
from jaxprune.tracing.sites import Site
from jaxprune.types import Leaves, Params

Sums: TypeAlias = dict[str, tuple[Any, Any]]
"""What is summed -> (sum, what rounding took from it), each (layers, ...)."""


class Totals(NamedTuple):
    """What is gathered for a leaf: sums over its inputs, over what its outputs became, and what scales these."""

    inputs: Sums
    outputs: Sums
    scales: Float[Array, "layers outputs"]


class Met(NamedTuple):
    """What shapes say of a leaf: its first product, and the leaves that scale its outputs, None where none does."""

    site: Site
    scaled_by: frozenset[str | None]


def of_activations(
    apply_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    select: tree.Select = tree.weights,
    moments: bool = False,
) -> Seen:
    r"""Statistics of what every product with a selected leaf meets and makes, in one pass over the batches.

    Any function of JAX will do: products are found in its jaxpr, also under `jit`, `vmap`, `remat`, in `scan`, `while`
    and `cond`. Stacked layers have a statistic each. A leaf that is used more than once has the sum over its uses, one
    that is split between products along its outputs that of the average output. Each batch is one call under jit, data
    may be sharded; under a jit of yours it is pure, and what is not finite stays so.

    Of an output its *activation* is looked at: what the product's result is after bias, batch norm and nonlinearity,
    however these are written (ReLU's zeros are those that Hu et al. 2016 count, before any pooling). It is followed as
    long as it is a function of this output at this place alone, of weights and constants, and as all of it goes the
    same way; so it ends where a residual or a gate joins, where channels or positions are mixed or taken apart, at the
    end of a loop's body or a branch, and after the nonlinearity where weights come in again. Where there is no
    nonlinearity before, the last value is taken: the output of a layer with its bias.

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
    met: dict[str, Met] = {}
    totals: dict[str, Totals] = {}
    for batch in batches:
        if not totals:
            met = _met(apply_fn, params, batch, names)
            totals = {name: _zeros(one.site, moments) for name, one in met.items()}
        totals = observe(params, batch, totals)
    if not totals:
        raise ValueError("There is no batch, or no product with a selected leaf, so there is nothing to look at.")
    inputs, outputs = {}, {}
    for name, (site, scaled_by) in met.items():
        had, became = ({word: high + low for word, (high, low) in sums.items()} for sums in totals[name][:2])
        for word, sums in (("Inputs", had["squares"]), ("Outputs", became["magnitudes"])):
            fine = jnp.isfinite(sums).all()
            if is_concrete(fine) and not fine:
                raise ValueError(f"{word} of {name!r} are not finite in float32. Mend the model, or the batch.")
        axes = places(site).axes
        inputs[name] = Inputs(site.leaf_shape, axes, **{"moments": None, **had})
        outputs[name] = Outputs(site.leaf_shape, axes, **became, scales=totals[name].scales, scaled_by=scaled_by)
    return Seen(inputs, outputs)


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
    met = _met(apply_fn, params, batch, tree.selected_leaves(select, params))
    return {name: 8 * _layers(site) * places(site).order.size ** 2 for name, (site, _) in met.items()}


def _met(apply_fn: Callable[..., Any], params: Leaves, batch: Any, names: Collection[str]) -> dict[str, Met]:
    """The first product of every leaf, in the order of the params; all of a leaf's must agree on its axes."""
    met: dict[str, Site] = {}
    scaled: dict[str, set[str | None]] = defaultdict(set)

    def do(product: Product, state: Any) -> Any:
        site = product.site
        first = met.setdefault(site.name, site)
        if places(site).axes != places(first).axes:
            raise ValueError(
                f"{site.name!r} {site.leaf_shape} is used along {places(first).axes} and along {places(site).axes}: "
                "its inputs here are outputs there. Leave it out with `select`."
            )
        return state, product.plain()

    def after(product: Product, became: Became, state: Any) -> Any:
        found = _scale(product, became)
        scaled[product.site.name].add(found and found.name)
        return state

    program = Products(jaxpr_of(apply_fn, params, batch), params, set(names), do, after)
    values = arrays_of((params, (batch,), {}))[0]
    jax.eval_shape(
        lambda values: program.run(values, ())[1], [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in values]
    )
    return {name: Met(met[name], frozenset(scaled[name])) for name in names if name in met}


def _observed(
    apply_fn: Callable[..., Any], params: Params, batch: Any, names: Collection[str], totals: dict[str, Totals]
) -> dict[str, Totals]:
    def do(product: Product, state: dict[str, Totals]) -> Any:
        name, had = product.site.name, state[product.site.name]
        inputs = added(had.inputs, layers_of(product), sums_of(product, had.inputs))
        return {**state, name: had._replace(inputs=inputs)}, product.plain()

    def after(product: Product, became: Became, state: dict[str, Totals]) -> dict[str, Totals]:
        name, had, layers = product.site.name, state[product.site.name], layers_of(product)
        scales, found = had.scales, _scale(product, became)
        if found is not None:
            values = results_of(product.site, product.weight.ndim, found.values)[:, 0]
            scales = scales.at[layers[:, None], jnp.asarray(places(product.site).outputs)[None]].set(values)
        return {**state, name: Totals(had.inputs, added(had.outputs, layers, output_sums(product, became)), scales)}

    program = Products(jaxpr_of(apply_fn, params, batch), params, set(names), do, after)
    return program.run(arrays_of((params, (batch,), {}))[0], totals)[0]


def _scale(product: Product, became: Became) -> Scale | None:
    """The first leaf that scales the outputs of a product, and nothing else of it."""
    y = became.activation.ndim
    outputs = set(output_axes(product.site, product.weight.ndim, y))
    elsewhere = set(range(batch_axes(product.site), y)) - outputs
    return next((one for one in became.scales if one.axes & outputs and not one.axes & elsewhere), None)


def _layers(site: Site) -> int:
    return math.prod(site.leaf_shape[a] for a in places(site).axes.layers)


def _outputs(site: Site) -> int:
    return math.prod(site.leaf_shape[a] for a in places(site).axes.outputs)


def _zeros(site: Site, moments: bool) -> Totals:
    layers, features, outputs = _layers(site), places(site).order.size, _outputs(site)
    shapes = {"tokens": (layers,), **dict.fromkeys(("squares", "magnitudes", "zeros"), (layers, features))}
    shapes |= {"moments": (layers, features, features)} if moments else {}
    both = shapes, dict.fromkeys(("tokens", "magnitudes", "zeros"), (layers, outputs))
    pair = lambda shape: (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))  # noqa: E731
    sums = ({word: pair(shape) for word, shape in one.items()} for one in both)
    return Totals(*sums, scales=jnp.zeros((layers, outputs), jnp.float32))


def sums_of(product: Product, words: Collection[str]) -> dict[str, Array]:
    """What one product adds to the sums of `words`, for the layers that it has."""
    x, share = inputs_of(product), jnp.float32(share_of(product.site))
    sums = {"tokens": lambda: jnp.full(x.shape[0], x.shape[1], jnp.float32), "moments": lambda: second_moments(x, x)}
    single = {"squares": jnp.square, "magnitudes": jnp.abs, "zeros": lambda x: (x == 0).astype(jnp.float32)}
    sums |= {word: lambda of=of: jnp.squeeze(ordered_sum(of(x), (1,)), 1) for word, of in single.items()}
    return {word: sums[word]() * share for word in words}


def output_sums(product: Product, became: Became) -> dict[str, Float[Array, "layers outputs"]]:
    """What one product adds to the sums over what outputs became, for the layers that it has."""
    site, numbers = product.site, places(product.site).outputs
    rows = results_of(site, product.weight.ndim, became.activation)
    none, single = jnp.zeros((len(rows), _outputs(site)), jnp.float32), (jnp.abs(rows), (rows == 0).astype(jnp.float32))
    magnitudes, zeros = (none.at[:, numbers].add(jnp.squeeze(ordered_sum(one, (1,)), 1)) for one in single)
    return {"tokens": none.at[:, numbers].add(rows.shape[1]), "magnitudes": magnitudes, "zeros": zeros}


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
