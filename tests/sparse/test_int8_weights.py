"""The format "int8": to the bit what `int8` simulates, whatever the weights, the range and the instruction set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from int8_helpers import assert_simulated, convolved, normal, on_codes
from jax import lax
from quick import quick_jit
from sparse_helpers import INSTRUCTION_SETS, LAYOUTS, check_under, make_leaf, make_x, needs_kernels, put

import jaxprune as jp
from jaxprune import sparse
from jaxprune.granularity import Block
from jaxprune.quantize.int8 import MOST_TERMS, calibrate

pytestmark = [pytest.mark.filterwarnings("error"), needs_kernels]

# The code of 0 is in the middle, the first, the last; activations all below 0; beyond the codes; a range of nothing.
RANGES = [(-2.0, 2.0), (0.0, 3.0), (-3.0, 0.0), (-0.01, 0.7), (-1e-40, 1e-39), (0.0, 0.0), (-1e37, 1e38)]


def compressed(leaf, range, layout="in_out", name="kernel"):
    return sparse.compress({name: leaf}, "int8", ranges={name: [range]}, layout=LAYOUTS[layout])


# Products.

usual = {"n_in": 30, "n_out": 12, "batch": 5, "density": 0.3, "range": RANGES[0], "layout": "in_out", "seed": 0}


@settings(max_examples=20)  # each two programs to compile
@example(**usual | {"n_in": 0})
@example(**usual | {"n_out": 0})
@example(**usual | {"batch": 0})
@example(**usual | {"density": 0.0})
@example(**usual | {"n_in": 2100, "batch": 130, "n_out": 70})  # tiles, panels, and outputs in several parts
@given(
    n_in=st.one_of(st.integers(1, 20), st.sampled_from([63, 511, 512, 513, 700])),
    n_out=st.integers(1, 40),
    batch=st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 100])),
    density=st.sampled_from([0.02, 0.3, 1.0]),
    range=st.sampled_from(RANGES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 2**16),
)
def test_products_equal_numpy_and_the_simulation(n_in, n_out, batch, density, range, layout, seed):
    leaf, x = np.asarray(make_leaf((n_in, n_out), density, "float32", seed)), np.array(make_x((batch, n_in), seed=seed))
    leaf = leaf if layout == "in_out" else leaf.T

    def product(params, x):
        return x @ (params["kernel"] if layout == "in_out" else params["kernel"].T)

    y = assert_simulated(product, {"kernel": put(leaf)}, {"kernel": [range]}, put(x), layout)
    if max(map(abs, range)) > 1e-30:  # else processors take scales for 0 that NumPy does not
        assert np.array_equal(y, on_codes(x, leaf if layout == "in_out" else leaf.T, *range))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, 1e-42])
def test_activations_that_no_code_is_near_go_where_the_simulation_has_them(bad):
    x = np.array(make_x((3, 30)))
    x[1, 7] = bad
    params = {"kernel": make_leaf((30, 7), 0.5, "float32")}
    for range in RANGES[:3]:
        assert_simulated(lambda params, x: x @ params["kernel"], params, {"kernel": [range]}, x)


@pytest.mark.parametrize("half", [0.5, 1.5, 2.5, -0.5, -1.5])
def test_ties_go_to_even_codes(half):
    leaf, x = np.eye(3, dtype=np.float32), np.full((1, 3), half, np.float32)
    small = compressed(put(leaf * 127), (-51.0, 204.0))  # scales of 1
    y = quick_jit(sparse.apply(lambda params, x: x @ params["kernel"]))(small, x)
    assert np.array_equal(y, np.rint(x) * 127)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_of_16_bits_are_rounded_where_the_simulation_rounds(dtype):
    leaf, x, bias = make_leaf((30, 7), 0.5, dtype), make_x((9, 30), dtype), make_x((1, 7), dtype)

    def model(params, x):
        return jax.nn.relu((x * x) @ params["kernel"] + bias + x[:, :7])

    assert_simulated(model, {"kernel": leaf}, {"kernel": [(0.0, 4.0)]}, x)


def test_weights_that_are_nothing_to_a_processor_are_nothing():
    params = {"kernel": put(np.array([[1e-39, 1.0, 1e-39], [-2e-38, 1e-39, -1e-40]]).T)}
    assert_simulated(lambda params, x: x @ params["kernel"], params, {"kernel": [RANGES[0]]}, make_x((2, 3)))


@pytest.mark.parametrize("axes", [(None, 0), (None, 1), (0, None)])
def test_vmap_is_the_product_of_each(axes):
    leaf, x = make_leaf((8, 5), 0.5, "float32"), make_x((3, 4, 8))
    small = compressed(leaf, (-2.0, 2.0))
    product = sparse.apply(lambda params, x: x @ params["kernel"])
    if axes[0] == 0:
        stacked = jax.tree.map(lambda part: jnp.stack([part] * 2), small)
        got = quick_jit(jax.vmap(product, axes))(stacked, x[0])
        assert np.array_equal(got, [quick_jit(product)(small, x[0])] * 2)
        return
    got = quick_jit(jax.vmap(product, axes, axes[1]))(small, x)
    want = [quick_jit(product)(small, one) for one in np.moveaxis(np.asarray(x), axes[1], 0)]
    assert np.array_equal(np.moveaxis(np.asarray(got), axes[1], 0), want)


# Convolutions.

CONVOLUTIONS = {
    "valid": ({}, (2, 6, 5, 3), (3, 3, 3, 4)),
    "1 x 1": ({}, (2, 4, 9, 64), (1, 1, 64, 33)),
    "same": ({"padding": ((1, 1), (2, 2))}, (2, 6, 5, 8), (3, 5, 8, 4)),
    "strided, uneven": ({"stride": (2, 3), "padding": ((0, 2), (3, 1))}, (2, 6, 7, 5), (3, 3, 5, 20)),
    "dilated": ({"dilation": (2, 1), "padding": ((2, 2), (0, 0))}, (2, 6, 5, 17), (3, 3, 17, 4)),
    "all of padding": ({"padding": ((3, 3), (3, 3))}, (1, 1, 1, 1), (3, 3, 1, 2)),
    "several tiles": ({"padding": ((1, 1), (1, 1))}, (2, 5, 5, 70), (3, 3, 70, 9)),
}


@pytest.mark.parametrize("range", RANGES[:4])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_equal_numpy_and_the_simulation(name, range):
    words, x_shape, w_shape = CONVOLUTIONS[name]
    stride, padding = words.get("stride", (1, 1)), words.get("padding", ((0, 0), (0, 0)))
    leaf, x = np.asarray(make_leaf(w_shape, 0.4, "float32")), np.asarray(make_x(x_shape))

    def conv(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        dilation = words.get("dilation")
        return lax.conv_general_dilated(x, params["kernel"], stride, padding, None, dilation, numbers)

    y = assert_simulated(conv, {"kernel": put(leaf)}, {"kernel": [range]}, put(x))
    # By a product over the window: each input of each position, one after the other.
    taps = np.eye(leaf[..., 0].size, dtype=np.float32).reshape(*w_shape[:3], -1)
    inputs = convolved(x, taps, **words).reshape(-1, taps.shape[-1])
    assert np.array_equal(y.reshape(-1, w_shape[3]), on_codes(inputs, leaf.reshape(-1, w_shape[3]), *range))


def test_convolutions_of_other_layouts_and_one_axis():
    range = {"kernel": [(-1.0, 2.0)]}
    image, window = make_x((2, 6, 7, 5)), make_leaf((9, 6, 3, 2), 0.5, "float32")
    assert_simulated(
        lambda params, x: lax.conv(x, params["kernel"], (1, 2), "SAME"), {"kernel": window}, range, image, "out_in"
    )
    line, window = make_x((2, 11, 6)), make_leaf((3, 6, 5), 0.5, "float32")
    names = ("NWC", "WIO", "NWC")
    assert_simulated(
        lambda params, x: lax.conv_general_dilated(x, params["conv"], (2,), "SAME", dimension_numbers=names),
        {"conv": window},
        {"conv": range["kernel"]},
        line,
    )


# Models.


def network(params, x):
    """Every step that joins a product, in the order in which it may, and in another."""
    numbers = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, params["a"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
    x = jax.nn.relu(x + params["a"]["bias"])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    for name in "bc":
        y = lax.conv_general_dilated(x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
        first, last = (params[name]["bias"], x) if name == "b" else (x, params[name]["bias"])
        x = jax.nn.relu(y + first + last)
    return x.mean((1, 2)) @ params["d"]["kernel"] + params["d"]["bias"]


@settings(max_examples=6)
@given(
    width=st.integers(1, 20),
    batch=st.integers(1, 3),
    density=st.sampled_from([0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_models_equal_their_simulation(width, batch, density, seed):
    shapes = {"a": (3, 3, 2, width), "b": (3, 3, width, width), "c": (1, 1, width, width), "d": (width, 7)}
    rng = np.random.default_rng(seed)
    params = {
        name: {
            "kernel": make_leaf(shape, density, "float32", seed + place),
            "bias": jnp.asarray(rng.normal(size=(1,) * (len(shape) - 1) + shape[-1:]), jnp.float32),
        }
        for place, (name, shape) in enumerate(shapes.items())
    }
    x = make_x((batch, 6, 7, 2), seed=seed)
    ranges = calibrate(network, params, [x], percentile=99)
    assert_simulated(network, params, ranges, x)


def test_what_follows_a_product_is_done_by_its_call():
    params = {"kernel": make_leaf((8, 8), 0.5, "float32")}
    bias, x = make_x((1, 8)), make_x((3, 8))

    def calls_and_sums(fn):
        program = jax.jit(sparse.apply(fn)).lower(compressed(params["kernel"], (-2.0, 2.0)), x).as_text()
        return program.count("jaxprune_codes"), program.count("stablehlo.add")

    assert calls_and_sums(lambda params, x: jax.nn.relu(x @ params["kernel"] + bias + x)) == (1, 0)
    assert calls_and_sums(lambda params, x: jax.nn.relu(x @ params["kernel"] + x + bias)) == (1, 1)


CHECK = """
import test_int8_weights as tests
from jaxprune import sparse
for range in tests.RANGES[:4]:
    for n_in, n_out, batch in [(0, 3, 2), (1, 1, 1), (7, 5, 3), (511, 66, 33), (1030, 20, 100)]:
        tests.test_products_equal_numpy_and_the_simulation.hypothesis.inner_test(
            n_in=n_in, n_out=n_out, batch=batch, density=0.3, range=range, layout="in_out", seed=0
        )
for name in tests.CONVOLUTIONS:
    tests.test_convolutions_equal_numpy_and_the_simulation(name, (-1.0, 2.0))
for half in (0.5, 1.5, -0.5):
    tests.test_ties_go_to_even_codes(half)
for dtype in ("float16", "bfloat16"):
    tests.test_numbers_of_16_bits_are_rounded_where_the_simulation_rounds(dtype)
for bad in (float("nan"), float("inf")):
    tests.test_activations_that_no_code_is_near_go_where_the_simulation_has_them(bad)
print(sparse.native.instruction_set())
"""


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_equals_numpy(isa, tmp_path):
    check_under(isa, CHECK, tmp_path)


# How weights lie in memory.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(30, 7), (3, 2, 5, 6)])
def test_runs_of_four_inputs_are_stored_where_one_is_alive(shape, layout):
    leaf = np.asarray(make_leaf(shape, 0.15, "float32"))
    given = leaf if layout == "in_out" else np.moveaxis(leaf, (-1, -2), (0, 1))
    weight = compressed(put(given), (-1.0, 1.0), layout)["kernel"]
    taps = leaf.reshape(-1, *shape[-2:])
    padded = np.zeros((len(taps), -(-shape[-2] // 4) * 4, shape[-1]), np.float32)
    padded[:, : shape[-2]] = taps
    scale = np.abs(leaf).reshape(-1, shape[-1]).max(axis=0) * np.float32(1 / 127)
    codes = np.rint(padded / scale)
    assert weight.index.size == (codes.reshape(-1, 4, shape[-1]) != 0).any(axis=1).sum()
    assert weight.values.dtype == jnp.int8
    assert np.array_equal(weight.totals, codes.sum(axis=(0, 1)))
    back = np.asarray(quick_jit(lambda weight: weight.decompress())(weight))
    assert back.shape == given.shape
    back = back if layout == "in_out" else np.moveaxis(back, (0, 1), (-1, -2))
    assert np.array_equal(back == 0, codes[:, : shape[-2]].reshape(shape) == 0)
    np.testing.assert_allclose(back, leaf, atol=scale.max() / 2)


def test_a_mask_of_four_inputs_stores_no_zeros():
    kept = np.random.default_rng(0).random((1, 8, 20)) < 0.2
    mask = np.asarray(Block(4, 1).expand(jnp.asarray(kept), (1, 32, 20)))[0]
    leaf = np.where(mask, np.abs(normal(0, 32, 20)) + 1, 0)
    weight = compressed(put(leaf), (-1.0, 1.0))["kernel"]
    assert weight.nse == mask.sum()
    assert weight.nbytes == mask.sum() * 5 // 4 + 4 * (21 + 20 + 20)


def test_a_program_is_exported_with_its_call():
    pytest.importorskip("flatbuffers", reason="jax writes programs with flatbuffers, which it does not bring along")
    small, x = compressed(make_leaf((30, 7), 0.5, "float32"), (-2.0, 2.0)), make_x((3, 30))
    predict = quick_jit(sparse.apply(lambda params, x: x @ params["kernel"]))
    checks = [jax.export.DisabledSafetyCheck.custom_call(sparse.native.CODES)]
    blob = jax.export.export(predict, disabled_checks=checks)(small, x).serialize()
    assert np.array_equal(jax.export.deserialize(blob).call(small, x), predict(small, x))


# Refusals.

LEAF = make_leaf((6, 5), 0.5, "float32")
GOOD = {"kernel": [(-1.0, 1.0)]}


@pytest.mark.parametrize(
    ("format", "ranges", "says"),
    [
        ("int8", None, r'"int8" rounds activations too, so it needs their `ranges`'),
        ("native", GOOD, r'`ranges` are for the format "int8"; "native" leaves activations'),
        (None, GOOD, r'`ranges` are for the format "int8"; the default leaves activations'),
        ("int8", {"other": [(-1.0, 1.0)]}, r"'kernel' is not in `ranges`"),
        ("int8", {"kernel": [(-1.0, 1.0)] * 2}, r"'kernel' is in 2 products by `ranges`"),
        ("int8", {"kernel": [(1.0, 2.0)]}, r"range .* 'kernel' has 0 inside, not \(1, 2\)"),
        ("int8", {"kernel": [(-1.0, np.inf)]}, r"'kernel' has 0 inside, not \(-1, inf\)"),
        ("int8", {"kernel": [(-1.0, np.nan)]}, r"'kernel' has 0 inside, not \(-1, nan\)"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(format, ranges, says):
    with pytest.raises(ValueError, match=says):
        sparse.compress({"kernel": LEAF}, format, ranges=ranges, layout=LAYOUTS["in_out"])


def test_sums_that_32_bits_may_not_hold_are_refused():
    leaf = put(np.zeros((MOST_TERMS + 1, 1)))
    with pytest.raises(ValueError, match=r"32 bits surely hold the sum over 66311 inputs, here are 66312"):
        compressed(leaf, (-1.0, 1.0))


def test_it_is_not_tuned_and_not_loaded(tmp_path):
    with pytest.raises(ValueError, match=r'`tune` draws its activations, and has no ranges for the format "int8"'):
        sparse.tune(lambda params, x: x @ params["kernel"], {"kernel": LEAF}, make_x((2, 6)), formats=["int8"])
    with pytest.raises(ValueError, match=r"`to` is dense, .*native_int8, .*'int8' arrived"):
        jp.load(tmp_path / "file", to="int8")


def test_codes_are_not_compressed_again():
    small = compressed(LEAF, (-1.0, 1.0))
    with pytest.raises(TypeError, match=r"'kernel' is compressed already"):
        sparse.compress(small, "int8", ranges=GOOD)


def test_products_over_the_outputs_are_refused_or_dense():
    small, x = compressed(LEAF, (-1.0, 1.0)), make_x((2, 5))

    def product(params, x):
        return x @ params["kernel"].T

    with pytest.raises(sparse.SparseUseError, match=r"'kernel' .* its outputs, whose codes would be others"):
        sparse.apply(product)(small, x)
    y = quick_jit(sparse.apply(product, unsupported="dense"))(small, x)
    np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(small["kernel"].decompress()).T, rtol=1e-5, atol=1e-5)


def test_derivatives_are_refused():
    small, x = compressed(LEAF, (-1.0, 1.0)), make_x((2, 6))
    product = sparse.apply(lambda x, params: jnp.sum(x @ params["kernel"]))
    with pytest.raises(TypeError, match=r'"int8" has no derivative'):
        jax.grad(product)(x, small)


def test_parts_that_do_not_fit_are_refused():
    weight = compressed(LEAF, (-1.0, 1.0))["kernel"]
    fields = {name: getattr(weight, name) for name in ("index", "bounds", "values", "scale", "totals", "grid")}
    fields |= {"leaf_shape": weight.leaf_shape, "tile": weight.tile, "name": "kernel"}
    kind = sparse.Int8Weight
    with pytest.raises(ValueError, match=r"'kernel' has `totals` that are not the sums"):
        kind(**fields | {"totals": weight.totals + 1})
    with pytest.raises(ValueError, match=r"'kernel' needs `grid` \(2,\), \(3,\) arrived"):
        kind(**fields | {"grid": (1.0, 0.0, 0.0)})
    with pytest.raises(ValueError, match=r"'kernel' needs `values`"):
        kind(**fields | {"values": weight.values[:-1]})
    beyond = np.array(weight.values).reshape(-1, 4)
    at = int(np.flatnonzero(np.asarray(weight.index) == 1)[0])  # inputs 4 to 7, of which there are 6
    beyond[at, 2:] = 1, -1
    with pytest.raises(ValueError, match=r"'kernel' has codes beyond the last channel"):
        kind(**fields | {"values": beyond.ravel()})


@pytest.mark.parametrize(
    ("part", "made", "says"),
    [
        ("index", lambda part: part.at[0].set(200), "`index` or `bounds` lead outside"),
        ("bounds", lambda part: part.at[1].set(-5), "`index` or `bounds` lead outside"),
        ("grid", lambda part: (0.0, part[1]), "`grid` must be a scale above 0"),
        ("grid", lambda part: (part[0], 128.0), "`grid` must be a scale above 0 and an integer of 8 bits"),
        ("totals", lambda part: part[1:], "`totals` must have one number for each output"),
        ("values", lambda part: part[4:], "`values` must have 4 numbers for each of `index`"),
        ("scale", lambda part: part[1:], "`scale` must have one number for each output"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_parts_that_do_not_fit_are_found_in_the_call(part, made, says):
    weight = compressed(LEAF, (-1.0, 1.0))["kernel"]
    weight = weight.replace(**{part: made(getattr(weight, part))})
    with pytest.raises(jax.errors.JaxRuntimeError, match=says):
        jax.block_until_ready(sparse.matmul(make_x((2, 6)), weight))
