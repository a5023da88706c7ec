r"""Post-training INT8 of any JAX function, weights and activations, as an integer machine would compute it.

    ranges = calibrate(model.apply, params, batches)
    predict = jax.jit(int8(model.apply, ranges))
    logits = predict(params, x)

Every product and convolution with a weight is done on integers of 8 bits, summed in 32 bits without any rounding:

    y = s_x s_w \sum (q_x - z_x) q_w            w = s_w q_w for each output,   x = s_x (q_x - z_x) for the tensor

Everything between the products stays in float32: biases, normalisations, activations. A result is rounded to its dtype
before anything is added to it, so that `jaxprune.sparse.int8`, which runs on the integers, has the same to the bit.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8, Shaped

from jaxprune import tree
from jaxprune.exact.ranking import kth_largest
from jaxprune.quantize.scales import asymmetric_grid, symmetric_scale, to_codes
from jaxprune.tracing.finder import arrays_of, jaxpr_of
from jaxprune.tracing.products import Product, Products
from jaxprune.tracing.sites import Site
from jaxprune.types import Params

Ranges: TypeAlias = Mapping[str, Sequence[tuple[float, float]]]
"""Leaf -> for each product with it, in the order of execution, the smallest and the largest activation. Plain data."""

MOST_TERMS = (2**31 - 1) // (127 * 255)
"""So many products of codes always fit into an int32."""


def calibrate(
    apply_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    percentile: float = 100.0,
    select: tree.Select = tree.weights,
) -> dict[str, tuple[tuple[float, float], ...]]:
    r"""Ranges of the activations that meet the selected leaves, over all batches; 0 is always inside.

    Args:
        apply_fn: the model, (params, batch) -> results.
        params: pytree of arrays.
        batches: of training data; one shape compiles once.
        percentile: 100 takes the smallest and the largest activation of all; less cuts 100 - percentile percent off at
            either end of each batch, and takes what remains of all batches.
        select: the leaves whose products become integer ones, as a function (name, leaf) -> bool or name rules. Those
            that are in no product are left alone.

    Returns:
        Ranges for `int8`. A product in the body of a scan has one for all its steps.

    Raises:
        ValueError: a selected leaf cannot be followed to its products; there is no product, or no batch; an activation
            is not finite; `percentile` is not in (50, 100].
    """
    if not 50 < percentile <= 100:
        raise ValueError(f"`percentile` is above 50 and at most 100, got {percentile:g}.")
    names = tree.selected_leaves(select, params)
    observe = jax.jit(lambda params, batch: _observed(apply_fn, params, batch, names, percentile))
    ranges: dict[str, Any] = {}
    for batch in batches:
        for name, uses in jax.device_get(observe(params, batch)).items():
            if not np.isfinite(uses).all():
                raise ValueError(f"Activations that meet {name!r} are not finite. Mend the model, or the batch.")
            low, high = np.moveaxis(np.stack([uses, ranges.get(name, uses)]), -1, 0)
            ranges[name] = np.stack([low.min(axis=0), high.max(axis=0)], axis=-1)
    if not ranges:
        raise ValueError("There is no batch, or no product with a selected leaf, so there is nothing to calibrate.")
    return {name: tuple((float(low), float(high)) for low, high in uses) for name, uses in ranges.items()}


def int8(apply_fn: Callable[..., Any], ranges: Ranges) -> Callable[..., Any]:
    r"""`apply_fn` with its calibrated products on integers.

    Weights are rounded as by `to_integers(params)`, symmetric with a scale for each output of the product, as part of
    the function: hand it the params in floating point, or `dequantize` them. Activations are rounded to the 256 codes
    between the ends of their range, and cut off there. Zeros are exact, so masks are kept, and padding too.

    Args:
        apply_fn: the model, (params, *args, **kwargs) -> arrays.
        ranges: of `calibrate` with the same function; products that they do not have stay as they are.

    Returns:
        A function of the same arguments, to be jitted.

    Raises:
        ValueError: while tracing, naming the leaf: it has more or fewer products than were calibrated, cannot be
            followed to them, is the left operand of a convolution, or has so many inputs that int32 could overflow.

    References:
        Jacob et al. 2018, arXiv:1712.05877; here biases are added in float32, and a result is not rounded again
        before the next product reads it.
    """

    @functools.wraps(apply_fn)
    def on_integers(params: Params, *args: Any, **kwargs: Any) -> Any:
        structures: list[Any] = []

        def flat(*given: Any, **named: Any) -> Any:
            leaves, structure = jax.tree.flatten(apply_fn(*given, **named))
            structures.append(structure)
            return leaves

        met: dict[str, set[int]] = {name: set() for name in ranges}

        def do(product: Product, state: Any) -> Any:
            name = product.site.name
            met[name].add(product.number)
            if product.number < len(ranges[name]):
                return state, _on_codes(product, *ranges[name][product.number])
            return state, product.plain()

        program = Products(jaxpr_of(flat, params, *args, **kwargs), params, ranges, do)
        _, results = program.run(arrays_of((params, args, kwargs))[0], ())
        for name, numbers in met.items():
            if len(numbers) != len(ranges[name]):
                raise ValueError(
                    f"{name!r} is in {len(numbers)} products here, {len(ranges[name])} were calibrated. Calibrate the "
                    "same function with the same params."
                )
        return jax.tree.unflatten(structures[-1], results)

    return on_integers


def _observed(
    apply_fn: Callable[..., Any], params: Params, batch: Any, names: Iterable[str], percentile: float
) -> dict[str, Float[Array, "uses 2"]]:
    """The range of every product, found in two rounds: which there are, then their activations."""
    seen: dict[tuple[str, int], None] = {}

    def do(product: Product, state: dict[Any, Array]) -> Any:
        key = product.site.name, product.number
        seen[key] = None
        return {**state, key: _widened(state[key], product.x, percentile)} if state else state, product.plain()

    program = Products(jaxpr_of(apply_fn, params, batch), params, set(names), do)
    values = arrays_of((params, (batch,), {}))[0]
    jax.eval_shape(lambda values: program.run(values, {})[1], values)
    ranges, _ = program.run(values, {key: jnp.zeros(2, jnp.float32) for key in seen})
    uses: dict[str, list[Array]] = {}
    for (name, _), found in sorted(ranges.items()):
        uses.setdefault(name, []).append(found)
    return {name: jnp.stack(found) for name, found in uses.items()}


def _widened(found: Float[Array, "2"], x: Shaped[Array, "..."], percentile: float) -> Float[Array, "2"]:
    x = x.astype(jnp.float32)
    cut = math.floor(x.size * (1 - percentile / 100))
    return jnp.stack([jnp.minimum(found[0], -_largest(-x, cut)), jnp.maximum(found[1], _largest(x, cut))])


def _largest(x: Float[Array, "..."], cut: int) -> Float[Array, ""]:
    """The largest number after so many were cut off, at least 0; NaN if there is one."""
    largest = jnp.max(x, initial=0)
    if not cut:
        return largest
    return jnp.where(jnp.isnan(largest), largest, kth_largest(jnp.maximum(x, 0), cut + 1))


def _on_codes(product: Product, low: float, high: float) -> Float[Array, "..."]:
    """The result of a product, of codes of both operands."""
    site = product.site
    over = _summed(site)
    weight, x = product.weight.astype(jnp.float32), lax.optimization_barrier(product.x).astype(jnp.float32)
    x_scale, x_zero = asymmetric_grid(np.float32(low), np.float32(high), 8)
    w_scale = symmetric_scale(jnp.max(jnp.abs(weight), axis=over, keepdims=True, initial=0), 8)
    w_codes = to_codes(weight, w_scale, 0, 8).astype(jnp.int8)
    x_codes = to_codes(x, x_scale, x_zero, 8).astype(jnp.int8)
    sums = _sums(site, w_codes, x_codes, np.int8(x_zero))
    surplus = int(x_zero) * jnp.sum(w_codes, axis=over, keepdims=True, dtype=jnp.int32)
    exact = sums - _along_outputs(site, surplus, sums.ndim)
    result = exact.astype(jnp.float32) * (_along_outputs(site, _rounded(w_scale), sums.ndim) * x_scale)
    return lax.optimization_barrier(_rounded(result).astype(site.y_dtype))  # or numbers of 16 bits keep more


def _rounded(product: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same, rounded: XLA would multiply two constant factors first, and round a product and a sum only once."""
    return jnp.maximum(product, jnp.finfo(jnp.float32).min)


def _summed(site: Site) -> tuple[int, ...]:
    """The axes of the weight operand that are summed over; refuses what has no such form."""
    numbers = dict(site.params)["dimension_numbers"]
    if site.op == "dot_general":
        over = numbers[0][0 if site.weight_first else 1]
    elif site.weight_first:
        raise ValueError(
            f"{site.name!r} is the left operand of a convolution, as images are. Leave it out with `select`."
        )
    else:
        over = numbers[1][1:]
    return over


def _sums(site: Site, weight: Int8[Array, "..."], x: Int8[Array, "..."], zero: np.int8) -> Shaped[Array, "..."]:
    """Sums of products of codes in int32. Padding is the code of 0, and so are the holes of a dilated input."""
    terms = math.prod(weight.shape[axis] for axis in _summed(site))
    if terms > MOST_TERMS:
        raise ValueError(
            f"{site.name!r} sums over {terms} products, and int32 surely holds {MOST_TERMS} of 8-bit codes. Leave it "
            "out with `select`."
        )
    params = dict(site.params) | {"precision": None, "preferred_element_type": jnp.int32}
    if site.op == "dot_general":
        return lax.dot_general(*((weight, x) if site.weight_first else (x, weight)), **params)
    numbers = lax.ConvDimensionNumbers(*params.pop("dimension_numbers"))
    around = [(0, 0, 0)] * x.ndim
    for axis, ends, hole in zip(numbers.lhs_spec[2:], params["padding"], params["lhs_dilation"], strict=True):
        around[axis] = (*ends, hole - 1)
    none = {"padding": [(0, 0)] * (x.ndim - 2), "lhs_dilation": None}
    return lax.conv_general_dilated(lax.pad(x, zero, around), weight, dimension_numbers=numbers, **(params | none))


def _along_outputs(site: Site, values: Shaped[Array, "..."], ndim: int) -> Shaped[Array, "..."]:
    """Numbers for each output of the weight, its summed axes being of size one, shaped to meet the result."""
    numbers = dict(site.params)["dimension_numbers"]
    shape = [1] * ndim
    if site.op != "dot_general":
        shape[numbers[2][1]] = values.size
        return values.reshape(shape)
    side = 0 if site.weight_first else 1
    over, batch = numbers[0][side], numbers[1][side]
    kept = [*batch, *(axis for axis in range(values.ndim) if axis not in (*over, *batch))]
    first = len(kept) if site.weight_first else len(batch)  # of the axes that are the other operand's alone
    values = jnp.transpose(values, (*over, *kept)).reshape([values.shape[axis] for axis in kept])
    return jnp.expand_dims(values, tuple(range(first, first + ndim - len(kept))))
