"""Compressed convolution kernels: what the definition says, or a refusal; test_conv_models.py has the models."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quick import quick_jit
from sparse_helpers import LAYOUTS, compress_one, make_leaf, make_x, needs_kernels, sparse_leaves

from jaxprune import sparse
from jaxprune.layout import FLAX

NATIVE = ["native", "native_row", "native_block", "native_int8"]
# Spatial axes and layout: the orders of x, of the kernel, and of the result.
ORDERS = {
    (2, "in_out"): ("NHWC", "HWIO", "NHWC"),
    (2, "out_in"): ("NCHW", "OIHW", "NCHW"),
    (1, "in_out"): ("NHC", "HIO", "NHC"),
    (1, "out_in"): ("NCH", "OIH", "NCH"),
}
TARGET = 'custom_call_target="jaxprune_product"'

pytestmark = [pytest.mark.filterwarnings("error"), needs_kernels, pytest.mark.usefixtures("quick")]


def to_numpy(array):
    return np.asarray(array).astype(np.float64)


def stored_kernel(kernel, format):
    """What a format makes of a kernel (*window, in, out), in float64: the kernel itself, unless it rounds."""
    kernel = to_numpy(kernel)
    if format != "native_int8":
        return kernel
    scale, rounded = oracle.rounded_to_8_bits(kernel.reshape(-1, kernel.shape[-1]).T)
    return (rounded.T.astype(np.float64) * scale).reshape(kernel.shape)


def check_convolution(format, dtype, layout, x_shape, kernel_shape, padding, strides, dilation, density, seed):
    """One problem, its shapes (n, *pixels, in) and (*window, in, out), its weights and x in the order of `layout`."""
    spatial = len(x_shape) - 2
    x, kernel = make_x(x_shape, dtype, seed), make_leaf(kernel_shape, density, dtype, seed)
    channels_first = np.moveaxis(x, -1, 1), np.moveaxis(kernel, (-1, -2), (0, 1))
    own_x, own_kernel = jax.device_put(channels_first) if layout == "out_in" else (x, kernel)
    weight = compress_one(own_kernel, format, layout)
    numbers = {"rhs_dilation": dilation, "dimension_numbers": ORDERS[spatial, layout]}
    conv = sparse.apply(lambda x, w: jax.lax.conv_general_dilated(x, w, strides, padding, **numbers))
    y = quick_jit(conv)(own_x, weight)
    if padding == "SAME":
        padding = oracle.same_padding(x_shape[1:-1], kernel_shape[:-2], strides, dilation)
    pads = [(0, 0)] * spatial if padding == "VALID" else padding
    w = stored_kernel(kernel, format)
    want = oracle.convolution(to_numpy(x), w, strides, pads, dilation)
    scale = oracle.convolution(np.abs(to_numpy(x)), np.abs(w), strides, pads, dilation)
    y, got_dtype = to_numpy(y) if layout == "in_out" else np.moveaxis(to_numpy(y), 1, -1), y.dtype
    assert (y.shape, got_dtype) == (want.shape, dtype)
    once = jnp.finfo(dtype).eps / 2 if dtype != "float32" else 0  # sums are float32, rounded once
    assert np.all(np.abs(y - want) <= once * np.abs(want) + 3e-6 * scale + 1e-30)


def check(format, dtype):
    """A few problems beyond one panel and one vector; for every instruction set by test_native_formats.py."""
    rest = {"format": format, "dtype": dtype, "density": 0.3, "seed": 0}
    for shape, kernel, padding, strides, dilation in (
        ((2, 9, 11, 5), (3, 3, 5, 12), "SAME", (1, 1), (1, 1)),
        ((1, 20, 17, 16), (3, 5, 16, 8), ((1, 2), (0, 3)), (2, 1), (1, 2)),
        ((3, 14, 14, 3), (7, 7, 3, 4), "VALID", (2, 2), (1, 1)),
        ((5, 40, 9), (1, 9, 20), "SAME", (1,), (1,)),
    ):
        check_convolution(
            layout="in_out",
            x_shape=shape,
            kernel_shape=kernel,
            padding=padding,
            strides=strides,
            dilation=dilation,
            **rest,
        )


sides, pads = st.integers(1, 12), st.tuples(st.integers(0, 3), st.integers(0, 3))
problems = {
    "format": st.sampled_from(NATIVE),
    "spatial": st.sampled_from([1, 2, 2]),
    "layout": st.sampled_from(sorted(LAYOUTS)),
    "n": st.sampled_from([1, 2, 7]),
    "channels": st.sampled_from([1, 3, 8, 17]),
    "outputs": st.sampled_from([4, 8, 20]),
    "pixels": st.tuples(sides, sides),
    "window": st.tuples(st.sampled_from([1, 2, 3, 5]), st.sampled_from([1, 3, 4])),
    "strides": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "dilation": st.tuples(st.sampled_from([1, 1, 2, 3]), st.sampled_from([1, 1, 2])),
    "padding": st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(pads, pads)),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "density": st.sampled_from([0.05, 0.3, 1.0]),
    "seed": st.integers(0, 2**16),
}
usual = {"format": "native", "spatial": 2, "layout": "in_out", "n": 2, "channels": 3, "outputs": 4, "pixels": (6, 5)}
usual |= {"window": (3, 2), "strides": (1, 2), "dilation": (2, 1), "padding": "SAME", "dtype": "float32"}
usual |= {"density": 0.4, "seed": 0}


@settings(max_examples=25)
@example(**usual | {"n": 0})
@example(**usual | {"outputs": 0, "layout": "out_in"})
@example(**usual | {"channels": 0})
@example(**usual | {"density": 0.0, "format": "native_int8"})
@example(**usual | {"padding": "VALID", "pixels": (4, 5)})  # the window is larger than the image
@example(**usual | {"layout": "out_in", "format": "native_block", "dtype": "bfloat16"})
@example(**usual | {"layout": "out_in", "spatial": 1})
@given(**problems)
def test_convolutions_equal_the_definition(spatial, n, channels, outputs, pixels, window, **problem):
    for name in ("strides", "dilation"):
        problem[name] = problem[name][:spatial]
    if not isinstance(problem["padding"], str):
        problem["padding"] = problem["padding"][:spatial]
    shapes = {"x_shape": (n, *pixels[:spatial], channels), "kernel_shape": (*window[:spatial], channels, outputs)}
    check_convolution(**problem, **shapes)


# Transformations. x is NHWC, the kernel HWIO.

NUMBERS = {
    "plain": ((1, 1), "SAME", (1, 1)),
    "strides, dilation and padding": ((2, 3), ((1, 2), (0, 3)), (2, 1)),
    "last pixels that nobody looks at": ((2, 2), ((1, -1), (0, -2)), (1, 1)),
}


def conv2d(case):
    strides, padding, dilation = NUMBERS[case]
    rest = {"rhs_dilation": dilation, "dimension_numbers": ORDERS[2, "in_out"]}
    return lambda x, w: jax.lax.conv_general_dilated(x, w, strides, padding, **rest)


# Every case with one format, every format with the case that has all numbers: they are apart in the program.
@pytest.mark.parametrize(
    ("format", "case"),
    [("native", case) for case in NUMBERS] + [(format, "strides, dilation and padding") for format in NATIVE[1:]],
)
def test_gradients_equal_dense(format, case):
    kernel, x, dx = make_leaf((3, 2, 5, 8), 0.4, "float32"), make_x((2, 9, 10, 5)), make_x((2, 9, 10, 5), seed=3)
    weight = compress_one(kernel, format)
    dense = jnp.asarray(stored_kernel(kernel, format), jnp.float32)

    def loss(x, w):
        return jnp.sum(jnp.sin(conv2d(case)(x, w)))

    def on_values(values, x, weight):
        return sparse.apply(loss)(x, weight.with_values(values))

    @quick_jit
    def derivatives(x, weight, dense):
        got = *jax.jvp(lambda x: sparse.apply(loss)(x, weight), (x,), (dx,)), jax.grad(sparse.apply(loss))(x, weight)
        want = *jax.jvp(lambda x: loss(x, dense), (x,), (dx,)), *jax.grad(loss, (0, 1))(x, dense)
        if format == "native_int8":  # whose values are integers
            return got, want, None
        return got, want, (jax.grad(on_values)(weight.values, x, weight), weight.coordinates())

    got, (*want, want_w), of_values = jax.device_get(derivatives(x, weight, dense))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    if of_values:
        got_values, (rows, cols) = of_values
        np.testing.assert_allclose(got_values, want_w.reshape(-1, 8)[cols, rows], rtol=1e-4, atol=2e-5)


def test_vmap_over_images_is_one_call_and_over_values_right():
    kernel, x = make_leaf((3, 2, 5, 8), 0.4, "float32"), make_x((3, 2, 9, 10, 5))
    weight, case = compress_one(kernel, "native"), "strides, dilation and padding"
    mapped = jax.jit(jax.vmap(sparse.apply(conv2d(case)), (0, None)))
    want = np.asarray(jax.jit(jax.vmap(conv2d(case), (0, None)))(x, kernel))
    program = mapped.lower(x, weight).compile()
    assert program.as_text().count(TARGET) == 1
    np.testing.assert_allclose(program(x, weight), want, rtol=1e-4, atol=1e-5)
    factors = np.array([1, 2, -1], np.float32)
    values = np.outer(factors, weight.values)
    for axis, images in ((0, x), (None, np.asarray(x)[0])):
        on_values = jax.vmap(lambda x, v: sparse.apply(conv2d(case))(x, weight.with_values(v)), (axis, 0))
        wanted = factors.reshape(3, 1, 1, 1, 1) * want[: None if axis == 0 else 1]
        np.testing.assert_allclose(quick_jit(on_values)(images, values), wanted, rtol=1e-4, atol=1e-5)


# What has no sparse form, by name.

REFUSED = {
    "grouped": ((3, 3, 2, 8), {"feature_group_count": 2}),
    "depthwise": ((3, 3, 1, 4), {"feature_group_count": 4}),
    "groups of the batch": ((3, 3, 4, 8), {"batch_group_count": 2}),
    "transposed": ((3, 3, 4, 8), {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))}),
    # Not (-1, 1): with that XLA (jaxlib 0.10.2) reads beyond the image on CPU, sparse weights or not.
    "negative padding": ((3, 3, 4, 8), {"padding": ((-1, -1), (0, 0))}),
    "inputs and outputs exchanged": ((3, 3, 8, 4), {"dimension_numbers": ("NHWC", "HWOI", "NHWC")}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_convolutions_are_refused_or_run_dense(case):
    shape, params = REFUSED[case]
    kernel, x = make_leaf(shape, 0.5, "float32"), make_x((2, 6, 6, 4))
    params = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ORDERS[2, "in_out"], **params}

    def conv(params_of_model, x):
        return jax.lax.conv_general_dilated(x, params_of_model["conv"], **params)

    compressed = [sparse.compress({"conv": kernel}, format, layout=FLAX) for format in ("native", "native_block")]
    refusal = rf"'conv' \({', '.join(map(str, shape))}\).*`conv_general_dilated`.*without groups.*unsupported=\"dense\""
    for params_of_model in compressed:
        with pytest.raises(sparse.SparseUseError, match=refusal):
            jax.jit(sparse.apply(conv))(params_of_model, x)
    dense = sparse.apply(conv, unsupported="dense")
    got, want = quick_jit(lambda both, k, x: ([dense(w, x) for w in both], conv(k, x)))(compressed, {"conv": kernel}, x)
    for y in got:
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_three_spatial_axes_are_refused_or_stay_dense():
    kernel, x = make_leaf((2, 2, 2, 3, 4), 0.5, "float32"), make_x((1, 4, 4, 4, 3))
    with pytest.raises(ValueError, match=r"'k' \(2, 2, 2, 3, 4\) is a convolution kernel.*one or two spatial axes"):
        sparse.compress({"k": kernel}, "native")
    assert sparse.compress({"k": kernel}, "native", select="k", unsupported="dense")["k"] is kernel
    weight = sparse.NativeWeight.from_leaf(np.asarray(kernel), name="k")

    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (1,) * 3, "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))

    with pytest.raises(sparse.SparseUseError, match=r"'k'.*`conv_general_dilated`"):
        sparse.apply(conv)(x, weight)
    got, want = quick_jit(lambda x, w, k: (sparse.apply(conv, unsupported="dense")(x, w), conv(x, k)))(
        x, weight, kernel
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["bcoo", "bcsr", "block"])
def test_formats_without_convolutions_name_those_that_have_them(format):
    params = {"conv": make_leaf((3, 3, 2, 4), 0.5, "float32"), "w": make_leaf((4, 4), 0.5, "float32")}
    able = "int8, native, native_block, native_int8, native_nm, native_row"
    with pytest.raises(
        ValueError, match=rf"'conv' \(3, 3, 2, 4\) is a convolution kernel.*in the formats {able} a conv"
    ):
        sparse.compress(params, format)
    kept = sparse.compress(params, format, unsupported="dense")
    assert kept["conv"] is params["conv"]
    assert [weight.name for weight in sparse_leaves(kept)] == ["w"]
