"""Codes that stay codes between products of integers: where they do, and that nothing else comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_helpers import assert_simulated
from jax import lax
from quick import quick_jit
from sparse_helpers import INSTRUCTION_SETS, LAYOUTS, check_under, make_leaf, make_x, needs_kernels

from jaxprune import sparse
from jaxprune.quantize.int8 import calibrate

pytestmark = [pytest.mark.filterwarnings("error"), needs_kernels]

WIDE, NARROW = (-3.0, 5.0), (0.0, 2.0)
relu = jax.nn.relu


def conv(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pool(x, window=(1, 3, 3, 1), strides=(1, 2, 2, 1), padding="SAME"):
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def drawn(shape, names="abcd"):
    """A leaf for each name, and a bias."""
    leaves = {name: make_leaf(shape, 0.5, "float32", seed) for seed, name in enumerate(names)}
    return leaves | {"bias": make_x((1,) * (len(shape) - 1) + shape[-1:], seed=9)}


def block(p, x):
    y = relu(x @ p["a"] + p["bias"])
    return relu(relu(y @ p["b"]) @ p["c"] + p["bias"] + y)


def of_two(p, x):
    y = x @ p["a"]
    return y @ p["b"] + y @ p["c"]


def returned(p, x):
    y = x @ p["a"]
    return jnp.concatenate([y @ p["b"], y])


def own_residual(p, x):
    y = relu(x @ p["a"])
    return relu(y @ p["b"] + y)


def reshaped_and_not(p, x):
    y = relu(x @ p["a"])
    return (y.reshape(2, 2, 6) @ p["b"]).reshape(4, 6) + jnp.sin(y)


def pooled_and_not(p, x):
    y = relu(conv(x, p["a"]))
    return conv(pool(y), p["b"]), pool(y, (1, 1, 2, 1))


# What a product reads and writes.
FIRST, BETWEEN, LAST = ("numbers", "codes"), ("codes", "codes"), ("codes", "numbers")
BOTH, APART = ("numbers", "numbers, codes"), ("numbers", "numbers")
PRODUCTS = {
    "alone": (lambda p, x: x @ p["a"], [APART]),
    "one after the other": (lambda p, x: x @ p["a"] @ p["b"] @ p["c"], [FIRST, BETWEEN, LAST]),
    "with steps": (lambda p, x: relu(x @ p["a"] + p["bias"] + x) @ p["b"] + p["bias"], [FIRST, LAST]),
    "a block": (block, [BOTH, BETWEEN, LAST]),
    "also returned": (returned, [BOTH, LAST]),
    "also its own residual": (own_residual, [BOTH, LAST]),
    "for two": (of_two, [FIRST, LAST, LAST]),
    "something in between": (lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], [APART, APART]),
    "reshaped": (lambda p, x: (x @ p["a"]).reshape(2, 2, 6) @ p["b"], [FIRST, LAST]),
    "reshaped, and as it was": (reshaped_and_not, [BOTH, LAST]),
    "other channels": (lambda p, x: (x @ p["a"]).reshape(2, 12)[:, :6] @ p["b"], [APART, APART]),
    "transposed": (lambda p, x: jnp.tile((x @ p["a"]).T, 2)[:, :6] @ p["b"], [APART, APART]),
}
CONVOLUTIONS = {
    "one after the other": (lambda p, x: conv(relu(conv(x, p["a"]) + p["bias"]), p["b"]), [FIRST, LAST]),
    "pooled": (lambda p, x: conv(pool(relu(conv(x, p["a"]) + p["bias"])), p["b"]), [FIRST, LAST]),
    "pooled by the kernel": (
        lambda p, x: conv(pool(conv(x, p["a"]), (1, 2, 2, 1), padding="VALID"), p["b"]),
        [FIRST, LAST],
    ),
    "pooled, and as it was": (lambda p, x: sum(map(jnp.sum, pooled_and_not(p, x))), [BOTH, LAST]),
    "a residual, then a pool": (lambda p, x: conv(pool(conv(x, p["a"]) + x), p["b"]), [APART, APART]),
    "a pool of channels": (
        lambda p, x: conv(pool(conv(x, p["a"]), (1, 1, 1, 3), (1, 1, 1, 1)), p["b"]),
        [APART, APART],
    ),
}


def products(fn, params, ranges, x):
    """What each product of the program reads and writes."""
    selected = {"select": lambda name, _: name in ranges, "layout": LAYOUTS["in_out"]}
    small = sparse.compress(params, "int8", ranges=ranges, **selected)
    kinds = lambda vars: ", ".join("codes" if v.aval.dtype == jnp.uint8 else "numbers" for v in vars)  # noqa: E731
    eqns = jax.make_jaxpr(sparse.apply(fn))(small, x).jaxpr.eqns
    return [(kinds(e.invars[5:6]), kinds(e.outvars)) for e in eqns if e.primitive.name == "native_fused_product"]


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_that_hand_codes_on(case):
    fn, want = PRODUCTS[case]
    params, x = drawn((6, 6)), make_x((4, 6))
    ranges = {name: [WIDE] for name in "abcd"[: len(want)]}
    assert products(fn, params, ranges, x) == want
    assert_simulated(fn, params, ranges, x)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_that_hand_codes_on(case):
    fn, want = CONVOLUTIONS[case]
    params, x = drawn((3, 3, 6, 6)), make_x((2, 7, 6, 6))
    ranges = {name: [WIDE] for name in "abcd"[: len(want)]}
    assert products(fn, params, ranges, x) == want
    assert_simulated(fn, params, ranges, x)


def test_the_most_frequent_range_is_written():
    def of_three(p, x):
        y = relu(x @ p["a"])
        return jnp.concatenate([y @ p["b"], y @ p["c"], y @ p["d"]])

    params, x = drawn((6, 6)), make_x((4, 6))
    for odd, want in (("b", [BOTH, APART, LAST, LAST]), ("d", [BOTH, LAST, LAST, APART])):
        ranges = {name: [WIDE] for name in "abcd"} | {odd: [NARROW]}
        assert products(of_three, params, ranges, x) == want
        assert_simulated(of_three, params, ranges, x)


def test_numbers_of_16_bits_are_rounded_before_their_codes():
    params = {name: leaf.astype(jnp.bfloat16) for name, leaf in drawn((6, 6)).items()}
    x, ranges = make_x((4, 6), "bfloat16"), {name: [WIDE] for name in "ab"}
    assert products(returned, params, ranges, x) == [BOTH, LAST]
    for fn in (returned, own_residual, lambda p, x: relu(x @ p["a"]) @ p["b"]):
        assert_simulated(fn, params, ranges, x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_no_code_is_near_goes_where_the_simulation_has_it(bad):
    params, ranges = drawn((6, 6)), {name: [WIDE] for name in "ab"}
    params["bias"] = params["bias"].at[0, 2].set(bad)
    assert_simulated(lambda p, x: (x @ p["a"] + p["bias"]) @ p["b"], params, ranges, make_x((4, 6)))
    assert_simulated(lambda p, x: relu(x @ p["a"] + p["bias"]) @ p["b"], params, ranges, make_x((4, 6)))


def network(p, x):
    """Blocks of convolutions, and what lies between them in known networks."""
    x = pool(relu(conv(x, p["first"]["kernel"]) + p["first"]["bias"]))
    for i in range(2):
        y = relu(conv(x, p[f"a{i}"]["kernel"]) + p[f"a{i}"]["bias"])
        y = conv(y, p[f"b{i}"]["kernel"]) + p[f"b{i}"]["bias"]
        x = relu(y + (x if i else conv(x, p["shortcut"]["kernel"]) + p["shortcut"]["bias"]))
    return x.mean((1, 2)) @ p["last"]["kernel"] + p["last"]["bias"]


def drawn_network(inputs, width, inside, density, seed):
    shapes = {
        "first": (3, 3, inputs, inputs),
        "a0": (1, 1, inputs, inside),
        "b0": (3, 3, inside, width),
        "shortcut": (1, 1, inputs, width),
        "a1": (3, 3, width, inside),
        "b1": (1, 1, inside, width),
        "last": (width, 3),
    }
    return {
        name: {
            "kernel": make_leaf(shape, density, "float32", seed + i),
            "bias": make_x((1,) * (len(shape) - 1) + shape[-1:]),
        }
        for i, (name, shape) in enumerate(shapes.items())
    }


@settings(max_examples=6)  # each two programs to compile
@given(
    inputs=st.integers(1, 9),
    width=st.integers(1, 40),
    inside=st.integers(1, 20),
    batch=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 99),
)
def test_networks_equal_their_simulation(inputs, width, inside, batch, density, seed):
    params, x = drawn_network(inputs, width, inside, density, seed), make_x((batch, 6, 7, inputs), seed=seed)
    assert_simulated(network, params, calibrate(network, params, [x], percentile=99), x)


@pytest.mark.parametrize("batch", [0, 1, 70])
def test_a_network_of_any_batch_and_of_each_image(batch):
    params, x = drawn_network(3, 5, 6, 0.5, 0), make_x((batch, 6, 7, 3))
    ranges = calibrate(network, params, [make_x((2, 6, 7, 3))])
    y = assert_simulated(network, params, ranges, x)
    small = sparse.compress(params, "int8", ranges=ranges)
    each = quick_jit(jax.vmap(sparse.apply(network), (None, 0)))(small, x[:, None])
    assert np.array_equal(each[:, 0], y)


def test_more_inputs_than_whole_runs_may_have_are_read_as_numbers():
    window = make_leaf((1, 22103, 3, 2), 0.01, "float32")  # 66309 inputs, which in whole runs of four are too many
    params = {"a": make_leaf((1, 1, 3, 3), 0.5, "float32"), "b": window}
    ranges, x = {name: [WIDE] for name in "ab"}, make_x((1, 1, 5, 3))

    def fn(p, x):
        return lax.conv_general_dilated(
            conv(x, p["a"]), p["b"], (1, 1), [(0, 0), (22100, 0)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert products(fn, params, ranges, x) == [APART, APART]
    assert_simulated(fn, params, ranges, x)


CHECK = """
import test_encoded as tests
from jaxprune import sparse
tests.test_products_that_hand_codes_on("a block")
tests.test_convolutions_that_hand_codes_on("pooled by the kernel")
tests.test_numbers_of_16_bits_are_rounded_before_their_codes()
tests.test_a_network_of_any_batch_and_of_each_image(70)
print(sparse.native.instruction_set())
"""


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_equals_the_simulation(isa, tmp_path):
    check_under(isa, CHECK, tmp_path)


def test_there_is_no_derivative():
    small = sparse.compress(drawn((6, 6)), "int8", ranges={name: [WIDE] for name in "abcd"}, layout=LAYOUTS["in_out"])
    with pytest.raises(TypeError, match=r'"int8" has no derivative'):
        jax.grad(lambda x: sparse.apply(block)(small, x).sum())(make_x((4, 6)))
