"""Quantization: every formula against NumPy, the bound on the error, masks to the bit, k-means at its fixed point."""

import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.layout import FLAX, TORCH, Axes
from jaxprune.quantize.codebooks import k_means, nearest
from jaxprune.quantize.codes import Affine, Codebook, cast, dequantize, to_codebooks, to_integers

pytestmark = pytest.mark.usefixtures("quick")

EVERY = "*"
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
WAYS = [
    {"bits": bits, "symmetric": symmetric, "per_output": per_output}
    for bits, symmetric, per_output in itertools.product((4, 8), (True, False), (True, False))
]


@st.composite
def weights(draw):
    """A leaf of one to five axes, and its mask."""
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=5)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from([1.0, 1e-3, 1e4] if dtype == np.float16 else [1.0, 1e-30, 1e36]))
    leaf = (rng.standard_normal(shape) * scale + draw(st.sampled_from([0.0, scale]))).astype(dtype)
    return leaf, rng.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.9, 1.0]))


def bits_of(array):
    return np.asarray(array).tobytes()


def outputs_apart(array):
    """Axis 0 the outputs, as `FLAX` has them; a vector is one row."""
    if array.ndim < 2:
        return array.reshape(1, array.size)
    return np.moveaxis(array, -1, 0).reshape(array.shape[-1], math.prod(array.shape[:-1]))


@settings(max_examples=100)
@given(weights(), st.sampled_from(WAYS))
def test_integers_are_the_nearest(leaf_and_alive, way):
    leaf, alive = leaf_and_alive
    found = to_integers({"w": leaf}, {"w": alive}, select=EVERY, **way)["w"]
    assert (found.shape, found.dtype, found.bits) == (leaf.shape, leaf.dtype, way["bits"])
    assert bits_of(found.alive) == bits_of(alive)
    back = found.dequantize()
    assert back.dtype == leaf.dtype
    assert bits_of(back[~alive]) == bytes(back[~alive].nbytes)
    lowest = -(2 ** (way["bits"] - 1)) + way["symmetric"]
    assert found.codes.size == 0 or lowest <= found.codes.min() <= found.codes.max() < 2 ** (way["bits"] - 1)

    exact = np.where(alive, leaf, 0).astype(np.float64)
    rows = outputs_apart(exact) if way["per_output"] else exact.reshape(1, exact.size)
    low, high = (extreme(rows, axis=1, initial=0) for extreme in (np.min, np.max))
    steps = 2 ** way["bits"] - 1
    scales = np.maximum(high, -low) / (steps // 2) if way["symmetric"] else (high - low) / steps
    np.testing.assert_allclose(found.scale.reshape(-1), np.maximum(scales, 1.17549435e-38), rtol=1e-6)
    step = np.broadcast_to(found.scale.astype(np.float64), leaf.shape)
    rounding = np.abs(exact) * float(ml_dtypes.finfo(leaf.dtype).eps) + float(ml_dtypes.finfo(leaf.dtype).tiny)
    assert np.all(np.abs(back.astype(np.float64) - exact) <= step * (0.5 + 1e-4) + rounding)


@settings(max_examples=100)
@given(weights(), st.integers(1, 8))
def test_codebooks_are_at_their_fixed_point(leaf_and_alive, bits):
    leaf, alive = leaf_and_alive
    found = to_codebooks({"w": leaf}, {"w": alive}, bits=bits, select=EVERY)["w"]
    assert (found.shape, found.dtype, found.values.shape) == (leaf.shape, leaf.dtype, (2**bits,))
    assert bits_of(found.alive) == bits_of(alive)
    back = found.dequantize()
    assert bits_of(back[~alive]) == bytes(back[~alive].nbytes)
    assert not found.codes[~alive].any()
    living, codes = leaf[alive].astype(np.float64), found.codes[alive]
    if len(np.unique(living)) <= 2**bits:
        assert bits_of(back[alive] + np.zeros((), leaf.dtype)) == bits_of(leaf[alive] + np.zeros((), leaf.dtype))
        return
    eps = float(ml_dtypes.finfo(leaf.dtype).eps) * np.abs(living).max()
    values = found.values.astype(np.float64)
    distance = np.abs(living[:, None] - values)
    assert np.all(distance[np.arange(len(living)), codes] <= distance.min(axis=1) + eps)
    for code in np.unique(codes):
        np.testing.assert_allclose(values[code], living[codes == code].mean(), rtol=0, atol=eps)


def lloyd(numbers, clusters):
    """Lloyd's iterations as the textbook has them."""
    centres = [min(numbers) + (max(numbers) - min(numbers)) * i / (clusters - 1) for i in range(clusters)]
    for _ in range(300):
        members = [[] for _ in centres]
        for number in numbers:
            members[min(range(clusters), key=lambda i: abs(number - centres[i]))].append(number)
        centres = [sum(m) / len(m) if m else c for m, c in zip(members, centres, strict=True)]
    return centres


@pytest.mark.parametrize("seed", range(4))
def test_k_means_is_lloyds(seed):
    numbers = np.random.default_rng(seed).standard_normal(60) ** 3
    found = k_means(numbers, 8, 300)
    np.testing.assert_allclose(found, lloyd(numbers.tolist(), 8), rtol=1e-12)
    assert np.array_equal(nearest(found, numbers), np.abs(numbers[:, None] - found).argmin(axis=1))


@pytest.mark.parametrize("seed", range(4))
def test_clusters_far_apart_are_the_best_partition(seed):
    rng = np.random.default_rng(seed)
    numbers = np.sort(np.concatenate([centre + rng.random(3) for centre in (-9.0, 0.0, 8.0, 17.0)]))

    def error(cuts):
        return sum(part.var() * len(part) for part in np.split(numbers, cuts))

    best = min(map(error, itertools.combinations(range(1, len(numbers)), 3)))
    centres = k_means(numbers, 4, 300)
    assert np.sum((numbers - centres[nearest(centres, numbers)]) ** 2) == pytest.approx(best)


def test_small_clusters_beside_large_ones_keep_their_mean():
    """As long as the sums of the large ones do not eat up those of the small ones."""
    numbers = np.concatenate([np.full(200_000, -1e9) - np.arange(200_000) % 7, [1e-3, 2e-3, 3e-3]])
    assert k_means(numbers, 2, 300)[1] == pytest.approx(2e-3, rel=1e-12)


def test_in_the_middle_between_two_centres_the_lower_one_is_nearest():
    numbers = np.asarray([0.0, 1.0, 2.0])
    assert k_means(numbers, 2, 300).tolist() == [0.5, 2.0]
    assert nearest(np.asarray([0.0, 2.0]), numbers).tolist() == [0, 0, 1]


def test_dead_weights_are_zero_whatever_their_code():
    alive = np.asarray([True, False])
    scale, zero = np.ones(1, np.float32), np.zeros(1, np.int8)
    made = Affine(np.asarray([2, 3], np.int8), scale, zero, 8, alive, np.dtype(np.float32))
    assert made.dequantize().tolist() == [2.0, 0.0]
    values = np.asarray([5.0, 7.0], np.float32)
    assert Codebook(np.asarray([1, 1], np.uint8), values, 1, alive).dequantize().tolist() == [7.0, 0.0]


def test_a_million_weights_take_moments():
    weights = np.random.default_rng(0).standard_normal((1000, 1000), np.float32)
    found = to_codebooks({"w": weights}, bits=8)["w"]
    assert np.abs(found.dequantize() - weights).mean() < 0.01


CASES = {
    "by hand": ([[0.8, -0.5], [-2.0, 0.2]], [[51, -127], [-127, 51]], [2 / 127, 0.5 / 127]),
    "all zero": ([[0.0, 0.0], [0.0, 0.0]], [[0, 0], [0, 0]], [2**-126, 2**-126]),
    "one value": ([[0.5, 0.5], [0.5, 0.5]], [[127, 127], [127, 127]], [0.5 / 127, 0.5 / 127]),
    "denormal": ([[1e-40, 1.0], [-1e-40, 0.0]], [[0, 127], [0, 0]], [2**-126, 1 / 127]),
    "large": ([[1e38, -1e38], [4e37, 0.0]], [[127, -127], [51, 0]], [1e38 / 127, 1e38 / 127]),
}


@pytest.mark.parametrize(("weights", "codes", "scales"), CASES.values(), ids=CASES)
def test_integers_by_hand(weights, codes, scales):
    found = to_integers({"w": np.asarray(weights, np.float32)})["w"]
    assert found.codes.tolist() == codes
    assert found.zero.tolist() == [[0, 0]]
    np.testing.assert_allclose(found.scale, [scales], rtol=1e-6)
    assert np.array_equal(found.alive, np.asarray(weights, np.float32) != 0)
    assert np.isfinite(found.dequantize()).all()


def test_an_asymmetric_grid_by_hand():
    found = to_integers({"w": np.asarray([[-1.0, 0.6, 2.0]], np.float32)}, symmetric=False, per_output=False)["w"]
    assert (found.scale.shape, found.scale.item()) == ((), pytest.approx(3 / 255))
    assert (found.zero.item(), found.codes.tolist()) == (-43, [[-128, 8, 127]])  # -85 of the 255 steps lie below 0
    np.testing.assert_allclose(found.dequantize(), [[-1.0, 51 * 3 / 255, 2.0]], rtol=1e-6)


def test_living_weights_that_become_zero_stay_alive_and_nan_under_the_mask_is_gone():
    leaf = np.asarray([[1.0, 1.0], [1e-6, np.nan], [0.0, 0.5]], np.float32)
    alive = np.asarray([[True, True], [True, False], [True, True]])
    for made in (to_integers({"w": leaf}, {"w": alive}), to_codebooks({"w": leaf}, {"w": alive}, bits=1)):
        assert np.array_equal(made["w"].alive, alive)
        assert not np.isnan(made["w"].dequantize()).any()
    assert to_integers({"w": leaf}, {"w": alive})["w"].codes[1].tolist() == [0, 0]


LAYOUTS = {
    "FLAX": ((3, 3, 4, 5), FLAX, (1, 1, 1, 5)),
    "TORCH": ((5, 4, 3, 3), TORCH, (5, 1, 1, 1)),
    "stacked": ((2, 4, 5), FLAX.with_rules({"*": Axes(layers=(0,), inputs=(1,), outputs=(2,))}), (2, 1, 5)),
    "heads": ((4, 3, 5), FLAX.with_rules({"*": Axes(inputs=(0,), outputs=(1, 2))}), (1, 3, 5)),
    "depthwise": ((3, 3, 1, 4), FLAX, (1, 1, 1, 4)),
    "vector": ((7,), FLAX, (1,)),
}


@pytest.mark.parametrize(("shape", "layout", "scales"), LAYOUTS.values(), ids=LAYOUTS)
def test_scales_are_those_of_the_outputs(shape, layout, scales):
    leaf = np.random.default_rng(0).standard_normal(shape, np.float32)
    found = to_integers({"w": leaf}, select=EVERY, layout=layout)["w"]
    assert found.scale.shape == found.zero.shape == scales
    over = tuple(axis for axis, size in enumerate(scales) if size == 1)
    np.testing.assert_allclose(found.scale, np.abs(leaf).max(axis=over, keepdims=True) / 127, rtol=1e-6)


def test_leaves_are_quantized_one_way_and_another():
    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": jnp.asarray(rng.standard_normal((6, 5)), jnp.float32), "bias": jnp.ones(5)} for name in "abc"
    }
    masks = jax.tree.map(lambda leaf: leaf > 0, params)
    made = to_codebooks(params, masks, bits=2, select="a/*l")
    made = to_integers(made, masks, select=["b/kernel"])
    kinds = [type(made[name]["kernel"]) for name in "abc"]
    assert kinds == [Codebook, Affine, type(params["c"]["kernel"])]
    plain = dequantize(made)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(plain))
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    assert plain["c"]["kernel"] is params["c"]["kernel"]
    again = to_codebooks(plain, masks, bits=2, select="a/kernel")
    assert bits_of(dequantize(again)["a"]["kernel"]) == bits_of(plain["a"]["kernel"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_casts_round_to_nearest_and_keep_what_is_not_zero(dtype):
    leaf = np.concatenate([np.random.default_rng(0).standard_normal(100), [1e-10, -1e-10, 0.0]]).astype(np.float32)
    found = cast({"w": jnp.asarray(leaf), "n": jnp.arange(3)}, dtype, select="w")
    assert found["n"].dtype == jnp.int32
    small = np.asarray(found["w"])
    assert small.dtype == dtype
    np.testing.assert_array_equal(small[:100], leaf[:100].astype(small.dtype))
    assert np.array_equal(small != 0, leaf != 0)
    assert np.array_equal(np.signbit(small), np.signbit(leaf))


def nan(value=np.nan):
    return {"layer": {"kernel": np.asarray([[1.0, value]], np.float32)}}


FINE = nan(0.0)
REFUSED = {
    "NaN": (lambda: to_integers(nan()), ValueError, "'layer/kernel' has 1 NaN or infinite weights of 2"),
    "infinite": (lambda: to_codebooks(nan(-np.inf)), ValueError, "'layer/kernel' has 1 NaN or infinite weights of 2"),
    "cast": (lambda: cast(nan(), "float16"), ValueError, "'layer/kernel' has 1 NaN or infinite weights"),
    "too large": (lambda: to_integers(nan(2e38)), ValueError, "'layer/kernel' has weights beyond 1e.38"),
    "too large to cast": (lambda: cast(nan(1e5), "float16"), ValueError, "has weights up to 100000, float16 ends at"),
    "no float": (lambda: cast(FINE, "int8"), ValueError, "int8"),
    "bits": (lambda: to_integers(FINE, bits=5), ValueError, "`bits` of integers is 4 or 8, got 5. .* `to_codebooks`"),
    "code bits": (lambda: to_codebooks(FINE, bits=9), ValueError, "`bits` of a code is 1 to 8, got 9"),
    "masks": (lambda: to_integers(FINE, {"w": np.ones(1, bool)}), ValueError, "no leaf 'layer/kernel'"),
    "nothing": (lambda: to_integers(FINE, select="bias"), ValueError, "names 'bias', which matches no leaf"),
    "again": (lambda: to_integers(to_codebooks(FINE)), TypeError, "'layer/kernel' is quantized already. Call `dequ"),
    "traced": (lambda: jax.eval_shape(to_integers, FINE), TypeError, "'layer/kernel' is traced"),
}


@pytest.mark.parametrize(("call", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_leaf(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
