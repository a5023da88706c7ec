r"""Parts that models share: layers as functions of a small dict of arrays, and random weights for them.

    conv      kernel * x + bias                                          kernel HWIO, images NHWC
    affine    x kernel + bias                                            kernel (in, out)
    norms     (x - mean) / sqrt(var + epsilon) * scale + bias            RMS norm: no mean, no bias

A bias that a dict does not have is not added. Vectors are given the rank of what they meet, so that everything here
runs under `jax_numpy_rank_promotion="raise"`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from jaxprune import tree
from jaxprune.types import Params

_SEEN = "seen in this batch"


class Network(NamedTuple):
    """A model taken apart: what is trained, and what is done with it.

    Attributes:
        params: pytree of arrays, or of `jax.ShapeDtypeStruct`, leaf names such as "layers/0/kernel".
        apply: (params, inputs (batch, *sample.shape), key=None, rates=None) -> logits; a key switches dropout on,
            `rates` has other rates than the model's, by the leaf that dropout comes after.
        observe: (params, inputs, key=None) -> logits and statistics of the batch, of a network with batch norms.
        sample: shape and dtype of one input.
    """

    params: Any
    apply: Callable[..., Float[Array, "batch *logits"]]
    observe: Callable[..., tuple[Array, dict[str, Any]]] | None = None
    sample: Any = None


class New(NamedTuple):
    """A statistic as it is after a batch, of a model that moves its own; others are those of the batch alone."""

    value: Array


Layer: TypeAlias = Mapping[str, Array]
Layers: TypeAlias = Mapping[str, Layer]
Shapes: TypeAlias = dict[str, Any]
"""Params with a `jax.ShapeDtypeStruct` for every array."""


class OfImages:
    """What configurations of networks for images share."""

    image: tuple[int, int, int]

    @property
    def sample(self) -> jax.ShapeDtypeStruct:
        """One image."""
        return jax.ShapeDtypeStruct(self.image, jnp.float32)


# ---------------------------------------------------------------- layers


def conv(
    layer: Layer,
    x: Float[Array, "batch h w c"],
    stride: int = 1,
    padding: int | None = None,
    *,
    depthwise: bool = False,
) -> Float[Array, "batch h2 w2 c2"]:
    """Convolution, and bias where there is one.

    Args:
        layer: "kernel" HWIO, perhaps "bias".
        x: images.
        stride: along both sides.
        padding: zeros on each side; None: half the window, so that stride 1 keeps the size.
        depthwise: each channel is convolved with its own kernel; those are (h, w, 1, channels).
    """
    kernel = layer["kernel"]
    around = kernel.shape[0] // 2 if padding is None else padding
    y = lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((around, around), (around, around)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] if depthwise else 1,
    )
    return _biased(layer, y)


def affine(layer: Layer, x: Float[Array, "*rows n_in"]) -> Float[Array, "*rows n_out"]:
    """Product, and bias where there is one."""
    return _biased(layer, x @ layer["kernel"])


def batch_norm(layer: Layer, x: Float[Array, "*rows c"], epsilon: float) -> Float[Array, "*rows c"]:
    """Batch normalisation at inference, by the statistics of training; see `observed` for training itself.

    References:
        Ioffe and Szegedy 2015, arXiv:1502.03167.
    """
    statistics, seen = layer, cast(dict[str, Array] | None, layer.get(_SEEN))
    if seen is not None:
        axes = tuple(range(x.ndim - 1))
        statistics = {"mean": jnp.mean(x, axes), "var": jnp.var(x, axes)}
        seen.update(statistics)
    centred = x - _along_last(statistics["mean"], x)
    scale = _along_last(lax.rsqrt(statistics["var"] + epsilon), x) * _along_last(layer["scale"], x)
    return _biased(layer, centred * scale)


def observed(apply: Callable[[Layers, Array], Array]) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """A model as it is trained: (params, images) -> logits, and the statistics of this batch by the names of leaves.

    Batch norms use these in the place of those in the params, which are to follow them: see `followed`.

    Args:
        apply: of a model whose batch norms are layers of their own.
    """

    def observing(params: Layers, x: Array, key: Any = None) -> tuple[Array, dict[str, Array]]:
        seen: dict[str, dict[str, Array]] = {name: {} for name, layer in params.items() if "var" in layer}
        given = {name: {**layer, _SEEN: seen[name]} if name in seen else layer for name, layer in params.items()}
        logits = apply(given, x)  # pyright: ignore[reportArgumentType]
        return logits, {f"{name}/{kind}": value for name, found in seen.items() for kind, value in found.items()}

    return observing


def followed(params: Params, seen: Mapping[str, Array | New], momentum: float = 0.9) -> Params:
    """Params whose statistics have gone a step towards those of a batch: momentum old + (1 - momentum) new."""

    def moved(name: str, leaf: Array) -> Array:
        found = seen.get(name, New(leaf))
        return found.value if isinstance(found, New) else momentum * leaf + (1 - momentum) * found

    return tree.map_named(moved, params)


def layer_norm(layer: Layer, x: Float[Array, "*rows c"], epsilon: float) -> Float[Array, "*rows c"]:
    """Each row centred and scaled by its own statistics (Ba et al. 2016, arXiv:1607.06450)."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return rms_norm(layer, centred, epsilon)


def rms_norm(layer: Layer, x: Float[Array, "*rows c"], epsilon: float) -> Float[Array, "*rows c"]:
    """Each row scaled by its root mean square (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    square = jnp.mean(x * x, axis=-1, keepdims=True)
    return _biased(layer, x * lax.rsqrt(square + epsilon) * _along_last(layer["scale"], x))


def max_pool(x: Float[Array, "batch h w c"], window: int, padding: int = 0) -> Float[Array, "batch h2 w2 c"]:
    """The largest value of each window, every second one."""
    ends = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, 2, 2, 1), ends)


def attend(
    queries: Float[Array, "batch to groups heads n"],
    keys: Float[Array, "batch of groups n"],
    values: Float[Array, "batch of groups n"],
    *,
    causal: bool = False,
) -> Float[Array, "batch to groups*heads*n"]:
    r"""Scaled dot-product attention; the heads of a group share keys and values.

    $softmax(Q K^T / \sqrt{n}) V$ for every head, heads side by side in the result.

    Args:
        queries: one group and one head or many of both.
        keys: one head for each group.
        values: likewise.
        causal: whether a position sees only itself and those before it.

    References:
        Vaswani et al. 2017, arXiv:1706.03762; groups: Ainslie et al. 2023, arXiv:2305.13245.
    """
    scores = jnp.einsum("btghn,bsgn->bghts", queries * queries.shape[-1] ** -0.5, keys)
    if causal:
        positions = jnp.arange(scores.shape[-1])
        seen = jnp.expand_dims(positions, 1) >= jnp.expand_dims(positions, 0)
        scores = jnp.where(jnp.expand_dims(seen, (0, 1, 2)), scores, -jnp.inf)
    mixed = jnp.einsum("bghts,bsgn->btghn", jax.nn.softmax(scores, axis=-1), values)
    return mixed.reshape(*mixed.shape[:2], -1)


def _biased(layer: Layer, y: Array) -> Array:
    return y + _along_last(layer["bias"], y) if "bias" in layer else y


def _along_last(vector: Array, x: Array) -> Array:
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


# ---------------------------------------------------------------- convolution with batch norm


def conv_norm(
    params: Layers, name: str, x: Array, epsilon: float, stride: int = 1, *, depthwise: bool = False
) -> Array:
    """The named convolution and the batch norm that belongs to it; where that was folded, the convolution alone."""
    y = conv(params[name], x, stride, depthwise=depthwise)
    norm = params.get(norm_name(name))
    return y if norm is None else batch_norm(norm, y, epsilon)


def norm_name(conv: str) -> str:
    """Of the batch norm after a convolution, in torchvision's manner: "bn1" after "conv1"."""
    return conv.removesuffix("0") + "1" if conv.endswith("downsample.0") else conv.replace("conv", "bn")


def fold_batch_norms(params: Layers, epsilon: float) -> dict[str, dict[str, Array]]:
    r"""The same function with every batch norm folded into the kernel and the bias of its convolution.

    With $f = scale / \sqrt{var + epsilon}$ the kernel becomes $f$ kernel, and the bias $bias - f mean$.

    Args:
        params: of a model made of `conv_norm` and `affine`.
        epsilon: of the model.
    """
    norms = {norm_name(name): name for name in params if norm_name(name) != name and norm_name(name) in params}
    folded = {name: dict(layer) for name, layer in params.items() if name not in norms}
    for norm, name in norms.items():
        factor = params[norm]["scale"] * lax.rsqrt(params[norm]["var"] + epsilon)
        kernel, before = params[name]["kernel"], params[name].get("bias", jnp.zeros_like(factor))
        bias = params[norm]["bias"] + (before - params[norm]["mean"]) * factor
        folded[name] = {"kernel": kernel * _along_last(factor, kernel), "bias": bias}
    return folded


# ---------------------------------------------------------------- shapes


def vector(size: int) -> jax.ShapeDtypeStruct:
    """Of one number for each channel."""
    return jax.ShapeDtypeStruct((size,), jnp.float32)


def layer(*shape: int, bias: bool = True) -> Shapes:
    """Of a kernel, HWIO or (in, out), and its bias."""
    kernel = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return kernel | ({"bias": vector(shape[-1])} if bias else {})


def table(rows: int, size: int) -> Shapes:
    """Of an embedding."""
    return {"embedding": jax.ShapeDtypeStruct((rows, size), jnp.float32)}


def norm(size: int, *names: str) -> Shapes:
    """Of a normalisation: the vectors it has."""
    return {name: vector(size) for name in names}


def conv_norm_layers(name: str, *kernel: int) -> Shapes:
    """Of a convolution without bias and of the batch norm after it."""
    return {
        name: layer(*kernel, bias=False),
        norm_name(name): norm(kernel[-1], "scale", "bias", "mean", "var"),
    }


def check_image(model: str, image: tuple[int, int, int], halvings: int) -> None:
    """Refuse images that would be halved away.

    Raises:
        ValueError: a side is shorter than 2^halvings.
    """
    least = 2**halvings
    if min(image[:2]) < least:
        raise ValueError(
            f"{model} halves its images {halvings} times: it needs {least} x {least} pixels or more, "
            f"{min(image[:2])} arrived."
        )


# ---------------------------------------------------------------- random weights


def random_params(shapes: Shapes, key: Key[Array, ""]) -> Params:
    """Random weights by the names of leaves: activations stay finite, and no two channels are alike.

    Kernels have the variance 2 / fan-in; biases and means scatter around 0, scales and variances around 1.

    Args:
        shapes: kernels (h, w, in, out), (in, out) or, for stacked layers, (layers, in, out).
        key: draws everything.

    References:
        He et al. 2015, arXiv:1502.01852.
    """
    rng = host_generator(key)

    def draw(name: str, leaf: jax.ShapeDtypeStruct) -> Array:
        centre, spread = _distribution(name.rsplit("/", 1)[-1], leaf.shape)
        return jnp.asarray(centre + spread * rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return tree.map_named(draw, shapes)


def initial_params(shapes: Shapes, key: Key[Array, ""]) -> Params:
    """Weights to begin training with: kernels as in `random_params`, biases and means 0, scales and variances 1.

    Args:
        shapes: see `random_params`.
        key: draws the kernels.
    """
    drawn = random_params(shapes, key)
    ends = {"scale": 1.0, "var": 1.0, "bias": 0.0, "mean": 0.0}

    def begun(name: str, leaf: Array) -> Array:
        kind = name.rsplit("/", 1)[-1]
        return jnp.full_like(leaf, ends[kind]) if kind in ends else leaf

    return tree.map_named(begun, drawn)


def _distribution(kind: str, shape: tuple[int, ...]) -> tuple[np.float32, np.float32]:
    """Mean and standard deviation."""
    if kind == "kernel":
        fan_in = math.prod(shape[:-1]) if len(shape) == 4 else shape[-2]
        return np.float32(0), np.float32(math.sqrt(2 / fan_in))
    # Five standard deviations keep a variance positive.
    return np.float32(kind in ("scale", "var")), np.float32(0.02 if kind == "embedding" else 0.1)


def host_generator(key: Key[Array, ""]) -> np.random.Generator:
    """NumPy's generator, seeded by a key: fifty shapes drawn in JAX would be fifty programs to compile."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
