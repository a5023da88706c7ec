"""INT8: every form of product and convolution against integers of NumPy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from int8_helpers import RANGE, convolved, normal, on_codes
from jax import lax

from jaxprune.quantize.int8 import MOST_TERMS, int8

pytestmark = pytest.mark.usefixtures("quick")


def integers(x_shape, w_shape, over):
    """Activations that are integers, some beyond the range, and those in it; weights that are integers times a power of
    two for each output, and both of these. Sums over many are large on the way, and small in the end.
    """
    rng = np.random.default_rng(0)
    x = rng.integers(-80, 230, x_shape)
    w = rng.integers(-127, 128, w_shape)
    if x.shape[-1] > 500:
        x = rng.integers(190, 230, x_shape)
        w = np.sort(rng.integers(-127, 128, w_shape), axis=-2)
    first = tuple(slice(0, 1) if axis in over else slice(None) for axis in range(w.ndim))
    w[first] = -127
    scale = 2.0 ** rng.integers(-3, 4, w[first].shape)
    return x.astype(np.float32), np.clip(x, *map(int, RANGE)), (w * scale).astype(np.float32), w, scale


def run_on_codes(model, inputs):
    """Results of `model`, (weights, activations) -> results, all dicts; of what `integers` gives."""
    weights, activations = ({name: jnp.asarray(of[i]) for name, of in inputs.items()} for i in (2, 0))
    return jax.jit(int8(model, {name: [RANGE] for name in weights}))(weights, activations)


EINSUMS = {
    "matrix": ("bi,io->bo", (3, 7), (7, 5)),
    "result transposed": ("bi,oi->ob", (3, 7), (5, 7)),
    "weight first": ("oi,bi->ob", (3, 7), (5, 7)),
    "weight first, result transposed": ("oi,bi->bo", (3, 7), (5, 7)),
    "heads out": ("bti,ihd->bthd", (2, 3, 7), (7, 2, 5)),
    "heads in": ("bthd,hdo->bto", (2, 3, 2, 5), (2, 5, 7)),
    "heads in, weight first": ("hdo,bthd->otb", (2, 3, 2, 5), (2, 5, 7)),
    "one matrix each": ("bei,eio->beo", (3, 4, 7), (4, 7, 5)),
    "one matrix each, weight first": ("oei,bei->eob", (3, 4, 7), (5, 4, 7)),
    "two batches": ("pqbi,iqpo->pbqo", (2, 3, 4, 7), (7, 3, 2, 5)),
    "vector": ("bi,i->b", (3, 7), (7,)),
    "large sums": ("bi,io->bo", (4, 5001), (5001, 3)),
}


class Form(NamedTuple):
    """An einsum of activations and a weight, taken apart."""

    text: str
    weight_first: bool
    w_names: str
    result: str
    over: tuple[int, ...]

    def of(self, x, w, einsum):
        return einsum(self.text, *((w, x) if self.weight_first else (x, w)))


def form_of(name):
    text = EINSUMS[name][0]
    operands, result = text.split("->")[0].split(","), text.split("->")[1]
    weight_first = "b" in operands[1]
    w_names = operands[0 if weight_first else 1]
    return Form(text, weight_first, w_names, result, tuple(i for i, axis in enumerate(w_names) if axis not in result))


@pytest.fixture(scope="module")
def products():
    """All results, by one program."""
    inputs = {name: integers(*EINSUMS[name][1:], form_of(name).over) for name in EINSUMS}
    return inputs, run_on_codes(
        lambda w, x: {name: form_of(name).of(x[name], w[name], jnp.einsum) for name in w}, inputs
    )


@pytest.mark.parametrize("name", EINSUMS)
def test_products_are_those_of_integers(name, products):
    inputs, results = products
    (x, x_codes, w_codes, scale), form = (inputs[name][i] for i in (0, 1, 3, 4)), form_of(name)
    sums = form.of(x_codes, w_codes, np.einsum)
    kept = "".join(axis for axis in form.w_names if axis in form.result)
    ones = np.ones(sums.shape)
    scales = np.einsum(f"{kept},{form.result}->{form.result}", np.squeeze(scale, form.over), ones)
    np.testing.assert_array_equal(results[name], sums * scales)
    assert np.abs(sums).max() < 2**24  # so the oracle is exact in float32
    if x.shape[-1] > 500:
        assert np.abs(np.cumsum(x_codes[0] * w_codes[:, 0])).max() > 2**24


CONVOLUTIONS = {
    "valid": ({}, (2, 6, 5, 3), (3, 3, 3, 4)),
    "same": ({"padding": ((1, 1), (2, 2))}, (2, 6, 5, 3), (3, 5, 3, 4)),
    "strided, uneven": ({"stride": (2, 3), "padding": ((0, 2), (3, 1))}, (2, 6, 7, 3), (3, 3, 3, 4)),
    "cropped": ({"padding": ((-1, 1), (0, -2))}, (2, 7, 7, 3), (3, 3, 3, 4)),
    "transposed": ({"hole": (2, 2), "padding": ((2, 2), (1, 2))}, (2, 4, 3, 3), (3, 3, 3, 4)),
    "dilated": ({"dilation": (2, 1), "padding": ((2, 2), (0, 0))}, (2, 6, 5, 3), (3, 3, 3, 4)),
    "groups": ({"groups": 2, "padding": ((1, 1), (1, 1))}, (2, 4, 4, 6), (3, 3, 3, 8)),
    "depthwise": ({"groups": 5, "padding": ((1, 1), (1, 1))}, (2, 4, 4, 5), (3, 3, 1, 5)),
    "1 x 1": ({}, (2, 4, 4, 3), (1, 1, 3, 4)),
    "large sums": ({}, (1, 3, 3, 600), (3, 3, 600, 2)),
}


def words_of(name):
    return {
        "stride": (1, 1), "padding": ((0, 0), (0, 0)), "hole": (1, 1), "dilation": (1, 1), "groups": 1,
        **CONVOLUTIONS[name][0],
    }  # fmt: skip


@pytest.fixture(scope="module")
def convolutions():
    """All results, by one program."""
    inputs = {name: integers(*CONVOLUTIONS[name][1:], (0, 1, 2)) for name in CONVOLUTIONS}

    def one(name, w, x):
        stride, padding, hole, dilation, groups = words_of(name).values()
        return lax.conv_general_dilated(x, w, stride, padding, hole, dilation, ("NHWC", "HWIO", "NHWC"), groups)

    return inputs, run_on_codes(lambda w, x: {name: one(name, w[name], x[name]) for name in w}, inputs)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_those_of_integers(name, convolutions):
    inputs, results = convolutions
    _, x_codes, _, w_codes, scale = inputs[name]
    np.testing.assert_array_equal(results[name], convolved(x_codes, w_codes, **words_of(name)) * scale)


LAYOUTS = {
    "NCHW, OIHW": ("NCHW", "OIHW", "NCHW"),
    "NHWC, OHWI": ("NHWC", "OHWI", "NCHW"),
    "CHWN": ("CHWN", "IHWO", "HWNC"),
}


def test_convolutions_of_other_layouts():
    x, x_codes, w, w_codes, scale = integers((2, 5, 5, 3), (3, 3, 3, 4), (0, 1, 2))
    ours, arrays = ("NHWC", "HWIO", "NHWC"), (x, w, convolved(x_codes, w_codes) * scale)
    changed = {
        name: [np.einsum(f"{one}->{other}", array) for array, one, other in zip(arrays, ours, theirs, strict=True)]
        for name, theirs in LAYOUTS.items()
    }

    def model(w, x):
        return {
            name: lax.conv_general_dilated(x[name], w[name], (1, 1), "VALID", dimension_numbers=numbers)
            for name, numbers in LAYOUTS.items()
        }

    found = run_on_codes(model, {name: (x, None, w) for name, (x, w, _) in changed.items()})
    for name, (_, _, expected) in changed.items():
        np.testing.assert_array_equal(found[name], expected)


def test_convolutions_in_one_and_three_dimensions_are_those_in_two():
    x, _, w, _, _ = integers((2, 1, 7, 3), (1, 3, 3, 4), (0, 1, 2))
    numbers = {"plane": ("NHWC", "HWIO", "NHWC"), "line": ("NWC", "WIO", "NWC"), "space": ("NDHWC", "DHWIO", "NDHWC")}
    inputs = {"plane": (x, None, w), "line": (x[:, 0], None, w[0]), "space": (x[:, None], None, w[None])}

    def one(name, w, x):
        return lax.conv_general_dilated(x, w, (2,) * (x.ndim - 2), "SAME", dimension_numbers=numbers[name])

    found = run_on_codes(lambda w, x: {name: one(name, w[name], x[name]) for name in w}, inputs)
    np.testing.assert_array_equal(found["plane"][:, 0], found["line"])
    np.testing.assert_array_equal(found["plane"], found["space"][:, 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_are_those_of_the_range_and_the_outputs(dtype):
    x, w = jnp.asarray(normal(0, 30, 70), dtype), jnp.asarray(normal(1, 70, 50), dtype)
    found = jax.jit(int8(lambda params, x: x @ params["w"], {"w": [(-1.7, 2.3)]}))({"w": w}, x)
    assert found.dtype == dtype
    expected = on_codes(np.asarray(x, np.float32), np.asarray(w, np.float32), -1.7, 2.3).astype(dtype)
    close = {"rtol": 1e-6} if dtype == "float32" else {"rtol": 2**-8}
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), **close)


RANGES = {"nothing": (0.0, 0.0), "above 0": (0.0, 3.0), "below 0": (-3.0, 0.0), "tiny": (-1e-40, 1e-40)}


def test_ranges_of_every_kind():
    x, w = normal(0, 3, 7), normal(1, 7, 5)
    w[:, 0] = 0  # an output without weights
    params = dict.fromkeys(RANGES, jnp.asarray(w))
    each = int8(
        lambda params, x: {name: x @ leaf for name, leaf in params.items()}, {k: [v] for k, v in RANGES.items()}
    )
    for name, found in jax.jit(each)(params, jnp.asarray(x)).items():
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, np.clip(x, *RANGES[name]) @ w, atol=7 * 3 * (1.5 / 127 + 1.5 / 255))
        assert not np.any(np.asarray(found)[:, 0])


def test_the_most_terms_still_fit():
    worst = {"a": jnp.ones((MOST_TERMS, 1))}
    found = jax.jit(int8(lambda p, x: x @ p["a"], {"a": [(0.0, 255.0)]}))(worst, jnp.full((1, MOST_TERMS), 255.0))
    assert MOST_TERMS * 127 * 255 < 2**31 <= (MOST_TERMS + 1) * 127 * 255
    assert found[0, 0] == pytest.approx(MOST_TERMS * 255, rel=1e-6)
