r"""Quantization: weights in few bits, as integers with a scale or as codes of shared values. Masks survive exactly.

    Affine      w = (codes - zero) * scale          int8 or int4, one scale for each output or one for the leaf
    Codebook    w = values[codes]                   k-means, 1 to 8 bits

Quantized leaves lie in host memory, and each is one leaf of the params: what is written to files, and `dequantize`
makes arrays of. Which weights are alive is kept beside the codes, so that a living weight whose code means 0 stays
alive, and a dead one is +0 exactly.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Float, Float32, Int8, UInt8

from jaxprune import tree
from jaxprune.layout import BY_NAME, Layout
from jaxprune.quantize.codebooks import k_means, nearest
from jaxprune.quantize.scales import asymmetric_grid, scale_of, symmetric_scale, to_codes

LARGEST = 1e38
"""No weight may be larger: float32 must hold the code after it too."""

Host: TypeAlias = np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """Integers and what they count: $w = (c - z) s$ in float32, in this order.

    Attributes:
        codes: c.
        scale: s, positive; of shape () or such that it broadcasts to the codes.
        zero: z, the code of 0; shaped like `scale`.
        bits: 4 or 8; codes are in $[-2^{bits-1}, 2^{bits-1})$.
        alive: the mask.
        dtype: of the weights that this stands for.
    """

    codes: Int8[Host, "*shape"]
    scale: Float32[Host, "..."]
    zero: Int8[Host, "..."]
    bits: int
    alive: Bool[Host, "*shape"]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        return self.codes.shape

    def dequantize(self) -> Float[Host, "..."]:
        """The weights, dead ones +0."""
        weights = (self.codes.astype(np.float32) - self.zero.astype(np.float32)) * self.scale
        return np.where(self.alive, weights, np.float32(0)).astype(self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
    """Shared values and which weight has which: $w = v_c$.

    Attributes:
        codes: c; 0 where dead.
        values: v, in the dtype of the weights that this stands for.
        bits: 1 to 8, of a code.
        alive: the mask.
    """

    codes: UInt8[Host, "*shape"]
    values: Float[Host, " values"]
    bits: int
    alive: Bool[Host, "*shape"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the weights."""
        return self.values.dtype

    def dequantize(self) -> Float[Host, "..."]:
        """The weights, dead ones +0."""
        return np.where(self.alive, self.values[self.codes], np.zeros((), self.dtype))


def to_integers(
    params: Any,
    masks: Any = None,
    *,
    bits: int = 8,
    symmetric: bool = True,
    per_output: bool = True,
    exact: bool = False,
    select: tree.Select = tree.weights,
    layout: Layout = BY_NAME,
) -> Any:
    r"""Selected leaves as `Affine`: the nearest multiple of a scale.

    $c = round(w / s) + z$, half to even, so that no weight moves by more than s / 2. With n bits, over the living
    weights of an output (or of the leaf),

        symmetric    s = max |w| / (2^(n-1) - 1)                    z = 0,  c in [-(2^(n-1) - 1), 2^(n-1) - 1]
        asymmetric   s = (max(w, 0) - min(w, 0)) / (2^n - 1)        z = -2^(n-1) - round(min(w, 0) / s)

    Args:
        params: pytree of arrays, of NumPy or JAX; leaves may be quantized already, as long as they are not selected.
        masks: True where a weight is alive; None: where it is not 0.
        bits: 8 or 4.
        symmetric: see above.
        per_output: a scale for each output (and each of stacked layers), or one for the leaf. A vector has one.
        exact: the weights lie on such a grid, as `jp.oneshot.SparseGPT(quantize="int4")` leaves them: its scales, of
            seven binary digits, are found from them, and no weight changes; symmetric alone.
        select: which leaves, as a function (name, leaf) -> bool or name rules.
        layout: which axes are outputs.

    Returns:
        The params with an `Affine` for every selected leaf.

    Raises:
        ValueError: a living weight is not finite or beyond 1e38; `bits` is neither 4 nor 8; masks do not fit; nothing
            is selected; `exact` and weights on no such grid, or not symmetric.
        TypeError: a selected leaf is traced, or quantized already.

    References:
        Jacob et al. 2018, arXiv:1712.05877; symmetric per output: Krishnamoorthi 2018, arXiv:1806.08342.
    """
    if bits not in (4, 8):
        raise ValueError(f"`bits` of integers is 4 or 8, got {bits}. For other widths there is `to_codebooks`.")
    if exact and not symmetric:
        raise ValueError("`exact` finds symmetric grids: leave `symmetric=False` out.")

    def one(name: str, weights: Host, alive: Host) -> Affine:
        if float(np.abs(weights).max(initial=0)) > LARGEST:
            raise ValueError(
                f"{name!r} has weights beyond {LARGEST:g}, too close to the end of float32. Leave it out with `select`."
            )
        numbers = weights.astype(np.float32)
        _, spatial, inputs, outputs = layout.axes(name, weights.shape)
        over = (spatial + inputs or outputs) if per_output else None
        low, high = (extreme(axis=over, keepdims=per_output, initial=0) for extreme in (numbers.min, numbers.max))
        if exact:
            scale = _found_scale(name, weights, over, bits).reshape(low.shape)
            zero = np.zeros_like(scale)
        elif symmetric:
            scale = symmetric_scale(np.maximum(high, -low), bits)
            zero = np.zeros_like(scale)
        else:
            scale, zero = asymmetric_grid(low, high, bits)
        codes = to_codes(numbers, scale, zero, bits).astype(np.int8)
        return Affine(codes, np.asarray(scale), np.asarray(zero, np.int8), bits, alive, weights.dtype)

    return _quantized(params, masks, select, one)


def to_codebooks(
    params: Any,
    masks: Any = None,
    *,
    bits: int = 4,
    select: tree.Select = tree.weights,
    iterations: int = 300,
) -> Any:
    """Selected leaves as `Codebook`: k-means with 2^bits clusters over the living weights of each leaf.

    Lloyd's iterations, exact to rounding in float64, from centres that are spread evenly between the smallest and the
    largest weight; nothing is drawn. A leaf with at most 2^bits different weights is kept exactly.

    Args:
        params: see `to_integers`.
        masks: see `to_integers`.
        bits: 1 to 8.
        select: see `to_integers`.
        iterations: at most so many; they end when no weight changes its cluster.

    Returns:
        The params with a `Codebook` for every selected leaf.

    Raises:
        ValueError: a living weight is not finite; `bits` is out of range; masks do not fit; nothing is selected.
        TypeError: a selected leaf is traced, or quantized already.

    References:
        Han, Mao and Dally 2016, Deep Compression, arXiv:1510.00149, which finds even spreading the best start.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"`bits` of a code is 1 to 8, got {bits}.")

    def one(name: str, weights: Host, alive: Host) -> Codebook:
        centres = k_means(weights[alive].astype(np.float64), 2**bits, iterations)
        codes = np.where(alive, nearest(centres, weights), np.uint8(0))
        return Codebook(codes, centres.astype(weights.dtype), bits, alive)

    return _quantized(params, masks, select, one)


def dequantize(params: Any) -> Any:
    """Plain params: every quantized leaf as the array that it stands for, the others as they are.

    Args:
        params: pytree with leaves of `Affine`, `Codebook` and arrays.
    """
    return tree.map_named(lambda _, leaf: jnp.asarray(leaf.dequantize()) if is_quantized(leaf) else leaf, params)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is `Affine` or `Codebook`."""
    return isinstance(leaf, Affine | Codebook)


def cast(params: Any, dtype: Any, *, select: tree.Select = tree.weights) -> Any:
    """Selected leaves in a smaller floating dtype, rounded to nearest; what is not zero stays so.

    A weight that is too small for the dtype becomes its smallest number instead of 0, which would be dead.

    Args:
        params: pytree of arrays.
        dtype: "bfloat16", "float16" or another floating one.
        select: see `to_integers`.

    Raises:
        ValueError: a weight is not finite, or too large for the dtype; nothing is selected.
        TypeError: the dtype is not floating; a selected leaf is traced, or quantized already.
    """
    info = jnp.finfo(dtype)  # refuses what is not floating

    def one(name: str, weights: Host, alive: Host) -> Any:
        with np.errstate(over="ignore"):
            small = weights.astype(info.dtype)
        if not np.isfinite(small).all():
            raise ValueError(
                f"{name!r} has weights up to {np.abs(weights).max():g}, {info.dtype} ends at {info.max}. Take another "
                "dtype, or leave the leaf out with `select`."
            )
        least = np.copysign(info.smallest_subnormal, weights).astype(info.dtype)
        return jnp.asarray(np.where(alive & (small == 0), least, small))

    return _quantized(params, None, select, one)


def _quantized(params: Any, masks: Any, select: tree.Select, one: Callable[[str, Host, Host], Any]) -> Any:
    """The params with `one(name, weights, alive)` for every selected leaf; dead weights are handed over as 0."""
    shapes = tree.map_named(lambda _, leaf: _shape_of(leaf) if is_quantized(leaf) else leaf, params)
    chosen = tree.selected_leaves(select, shapes)
    if masks is not None:
        tree.check_like("The masks", masks, shapes)
    alive_of = {} if masks is None else tree.named_leaves(masks)

    def each(name: str, leaf: Any) -> Any:
        if name not in chosen:
            return leaf
        if isinstance(leaf, Tracer) or is_quantized(leaf):
            state = "traced, and quantized leaves lie in host memory" if isinstance(leaf, Tracer) else "quantized"
            way_out = "Quantize outside of `jit`" if isinstance(leaf, Tracer) else "Call `dequantize` first"
            raise TypeError(f"{name!r} is {state} already. {way_out}, or leave it out with `select`.")
        weights = np.asarray(leaf)
        alive = np.asarray(alive_of[name]) if alive_of else weights != 0
        weights = np.where(alive, weights, np.zeros((), weights.dtype))
        if not np.isfinite(weights).all():
            raise ValueError(
                f"{name!r} has {int(np.sum(~np.isfinite(weights)))} NaN or infinite weights of {weights.size}. Mend "
                "the training, or leave the leaf out with `select`."
            )
        return one(name, weights, alive)

    return tree.map_named(each, params)


def _found_scale(name: str, weights: Host, over: tuple[int, ...] | None, bits: int) -> Host:
    """The scales, one after the other, of weights that lie on the grid."""
    over = tuple(range(weights.ndim)) if over is None else over
    moved = np.moveaxis(weights, over, range(len(over)))
    scale, off = scale_of(moved.reshape(math.prod(moved.shape[: len(over)]), math.prod(moved.shape[len(over) :])), bits)
    if off.size:
        raise ValueError(
            f"Weights of {off.size} of the {scale.size} outputs of {name!r} are no multiples, up to "
            f"{2 ** (bits - 1) - 1}, of a scale. Leave `exact` out to have them rounded, or check `bits` and `layout`."
        )
    return scale


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
