"""Pooling, bias, residual and ReLU in the kernel's call: which steps join, which must not, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quax
from drawn import drawn
from flax import linen
from jax.extend.core import jaxprs_in_params
from quick import quick_jit
from sparse_helpers import compress_one, make_leaf, make_x, needs_kernels, put

from jaxprune import sparse
from jaxprune.sparse.fuse import find_chains

TARGET = 'custom_call_target="jaxprune_product"'

pytestmark = [pytest.mark.filterwarnings("error"), needs_kernels]


def relu(x):
    return jnp.maximum(x, 0)


def row(bias):
    return jnp.broadcast_to(bias, (5, 8))


def chains(fn, *args):
    """(bias, residual, relu) of each chain in a function, and how many steps each has."""
    found = find_chains(jax.make_jaxpr(quax.quaxify(fn))(*args).jaxpr)
    return [(chain.bias is not None, chain.residual is not None, chain.relu) for chain in found]


def assert_close(got, want, rtol=1e-4):
    jax.tree.map(lambda y, z: np.testing.assert_allclose(y, z, rtol=rtol, atol=1e-5), got, want)


def assert_equals_dense(fn, weight, *rest, rtol=1e-5):
    """The results of a function of (weight, ...), compiled, with the weight and with its leaf; gives the latter."""
    both = quick_jit(lambda weight, leaf, *rest: (sparse.apply(fn)(weight, *rest), fn(leaf, *rest)))
    got, want = both(weight, weight.decompress(), *rest)
    assert_close(got, want, rtol)
    return want


def operands(dtype="float32"):
    """w (6, 8), x (5, 6), a bias (1, 8), a residual (5, 8)."""
    weight = compress_one(make_leaf((6, 8), 0.5, dtype), "native")
    return weight, make_x((5, 6), dtype), make_x((1, 8), dtype, 2), make_x((5, 8), dtype, 3)


BIAS, RESIDUAL, RELU = (True, False, False), (False, True, False), (False, False, True)
JOIN = {
    "bias": (lambda w, x, b, r: x @ w + b, [BIAS]),
    "bias first": (lambda w, x, b, r: b + x @ w, [BIAS]),
    "residual": (lambda w, x, b, r: r + x @ w, [RESIDUAL]),
    "jax.nn.relu": (lambda w, x, b, r: jax.nn.relu(x @ w), [RELU]),
    "jnp.maximum": (lambda w, x, b, r: jnp.maximum(x @ w, 0), [RELU]),
    "jnp.maximum, 0 first": (lambda w, x, b, r: jnp.maximum(0, x @ w), [RELU]),
    "all": (lambda w, x, b, r: jax.nn.relu(x @ w + b + r), [(True, True, True)]),
    "all, residual first": (lambda w, x, b, r: jax.nn.relu(r + x @ w + b), [(True, True, True)]),
    "linen.relu in jit": (lambda w, x, b, r: jax.jit(linen.relu)(x @ w), [RELU]),
    "reshaped": (lambda w, x, b, r: (x @ w).reshape(1, 5, 8) + r[None], [RESIDUAL]),
    "two layers": (lambda w, x, b, r: relu(relu(x @ w + b)[:, :6] @ w + r), [(True, False, True), (False, True, True)]),
    "product of a product": (lambda w, x, b, r: x @ w + (x + 1) @ w, [RESIDUAL]),
    "one row": (lambda w, x, b, r: x[:1] @ w + b + r[:1], [(True, True, False)]),
    "broadcast by the user": (lambda w, x, b, r: relu(x @ w + row(b)), [(False, True, True)]),
}


@pytest.mark.parametrize("case", JOIN)
def test_steps_that_join(case):
    fn, want = JOIN[case]
    assert chains(fn, *operands()) == want
    assert_equals_dense(fn, *operands())


def twice(w, x, b, r):
    y = x @ w
    return y + b, y


def kept_sum(w, x, b, r):
    y = x @ w + b
    return jax.nn.relu(y) + y


APART = {
    "product used twice": (twice, []),
    "product returned": (lambda w, x, b, r: (lambda y: (y, jax.nn.relu(y)))(x @ w), []),
    "sum used twice": (kept_sum, [BIAS]),
    "with itself": (lambda w, x, b, r: (lambda y: y + y)(x @ w), []),
    "relu of something else": (lambda w, x, b, r: relu(r)[:, :6] @ w, []),
    "maximum with 1": (lambda w, x, b, r: jnp.maximum(x @ w, 1), []),
    "maximum with an array": (lambda w, x, b, r: jnp.maximum(x @ w, r), []),
    "relu in between": (lambda w, x, b, r: relu(x @ w) + b, [RELU]),
    "a number": (lambda w, x, b, r: x @ w + 1.0, []),
    "a column": (lambda w, x, b, r: x @ w + r[:, :1], []),
    "result smaller than what is added": (lambda w, x, b, r: x[:1] @ w + r, []),
    "another dtype": (lambda w, x, b, r: (x @ w).astype(jnp.bfloat16) + b.astype(jnp.bfloat16), []),
    "subtraction": (lambda w, x, b, r: x @ w - b, []),
    "third addition": (lambda w, x, b, r: x @ w + b + r + r, [(True, True, False)]),
    "outputs not last": (lambda w, x, b, r: (x @ w).T + r.T, []),
    "another reshape": (lambda w, x, b, r: (x @ w).reshape(10, 4) + r.reshape(10, 4), []),
}


@pytest.mark.parametrize("case", APART)
def test_steps_that_must_not_join(case, relaxed):
    fn, want = APART[case]
    assert chains(fn, *operands()) == want
    assert_equals_dense(fn, *operands())


def convolve(w, x, strides=1):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (strides, strides), "SAME", dimension_numbers=names)


def pool(x, window=(2, 2), strides=None, padding="VALID"):
    return linen.max_pool(x, window, strides or window, padding)


def image_operands(format="native", channels=3, dtype="float32"):
    """w (3, 3, channels, 8), x (3, 9, 10, channels), a bias (1, 1, 1, 8), a residual (3, 4, 5, 8)."""
    weight = compress_one(make_leaf((3, 3, channels, 8), 0.5, dtype), format)
    return weight, make_x((3, 9, 10, channels), dtype), make_x((1, 1, 1, 8), dtype, 2), make_x((3, 4, 5, 8), dtype, 3)


# What to compute, and (pool, bias, residual, relu) of the chain.
POOLS = {
    "relu, pool": (lambda w, x, b, r: pool(relu(convolve(w, x) + b)), ((2, 2), True, False, True)),
    "pool, relu": (lambda w, x, b, r: relu(pool(convolve(w, x) + b)), ((2, 2), True, False, True)),
    "pool, bias": (lambda w, x, b, r: pool(convolve(w, x)) + b, ((2, 2), True, False, False)),
    "pool, residual": (lambda w, x, b, r: relu(pool(convolve(w, x) + b) + r), ((2, 2), True, True, True)),
    "relu twice": (lambda w, x, b, r: relu(pool(relu(convolve(w, x)))), ((2, 2), False, False, True)),
    "pool alone": (lambda w, x, b, r: pool(convolve(w, x)), ((2, 2), False, False, False)),
    "3 x 1": (lambda w, x, b, r: pool(relu(convolve(w, x)), (3, 1)), ((3, 1), False, False, True)),
    "strides": (lambda w, x, b, r: pool(convolve(w, x, 2) + b), ((2, 2), True, False, False)),
    "padding of nothing": (
        lambda w, x, b, r: pool(convolve(w, x[:, 1:]), (2, 5), None, "SAME"),
        ((2, 5), False, False, False),
    ),
    "first pool of two": (lambda w, x, b, r: pool(pool(convolve(w, x))), ((2, 2), False, False, False)),
    "overlapping": (lambda w, x, b, r: pool(relu(convolve(w, x)), (3, 3), (2, 2)), ((1, 1), False, False, True)),
    "padded": (lambda w, x, b, r: pool(relu(convolve(w, x)), (2, 2), None, "SAME"), ((1, 1), False, False, True)),
    "too large": (lambda w, x, b, r: pool(relu(convolve(w, x)), (9, 9)), ((1, 1), False, False, True)),
    "residual, then pool": (lambda w, x, b, r: pool(convolve(w, x[:, :4, :5]) + r), ((1, 1), False, True, False)),
    "bias after relu and pool": (lambda w, x, b, r: pool(relu(convolve(w, x))) + b, ((2, 2), False, False, True)),
    "mean": (lambda w, x, b, r: linen.avg_pool(relu(convolve(w, x)), (2, 2), (2, 2)), ((1, 1), False, False, True)),
    "of channels": (lambda w, x, b, r: jnp.max(relu(convolve(w, x)), -1), ((1, 1), False, False, True)),
    "pixels in another order": (
        lambda w, x, b, r: pool(relu(convolve(w, x)).reshape(3, 10, 9, 8)),
        ((1, 1), False, False, True),
    ),
}


@pytest.mark.parametrize("case", POOLS)
def test_pools_that_join_and_that_must_not(case, relaxed):
    fn, want = POOLS[case]
    found = find_chains(jax.make_jaxpr(quax.quaxify(fn))(*image_operands()).jaxpr)
    assert [(c.pool, c.bias is not None, c.residual is not None, c.relu) for c in found] == [want]
    assert_equals_dense(fn, *image_operands())


@pytest.mark.parametrize("format", ["native", "native_block", "native_int8"])
@pytest.mark.parametrize("channels", [1, 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pools_of_each_format_equal_those_apart(relaxed, format, channels, dtype):
    weight, x, b, _ = image_operands(format, channels, dtype)
    if format == "native_int8":  # an output whose scale is negative: its smallest sum is the largest number
        weight = weight.replace(scale=weight.scale.at[::2].multiply(-1))
    layer = lambda w, x, b: pool(relu(convolve(w, x) + b), (3, 2))  # noqa: E731
    both = quick_jit(lambda *args: (quax.quaxify(layer)(*args), sparse.apply(layer)(*args)))
    want, got = map(np.float32, both(weight, x, b))
    # Apart, 16-bit sums of up to 8 are rounded before the bias is added, too.
    rtol, atol = (2.0**-7, 8 * 2.0**-8) if dtype == "bfloat16" else (1e-6, 1e-6)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def test_pools_have_derivatives_and_batches():
    weight, x, b, _ = image_operands()
    layer = lambda w, x, b: pool(relu(convolve(w, x) + b))  # noqa: E731
    loss = lambda fn: lambda *args: jnp.sum(jnp.sin(fn(*args)))  # noqa: E731

    def of_layer(fn, w):
        return jax.grad(loss(fn), (1, 2))(w, x, b), jax.vmap(fn, (None, 0, None))(w, jnp.stack([x, 2 * x, -x]), b)

    both = quick_jit(lambda w: (of_layer(sparse.apply(layer), w), of_layer(layer, w.decompress())))
    assert_close(*both(weight))


def test_a_nan_is_the_largest_of_its_pool():
    weight = compress_one(jnp.asarray(np.eye(2)[None, None], jnp.float32), "native")
    x = np.ones((1, 4, 4, 2), np.float32)
    x[0, [1, 2, 0], [1, 2, 0], [0, 1, 1]] = np.nan, np.nan, np.inf
    y = np.asarray(jax.jit(sparse.apply(lambda w, x: pool(convolve(w, x))))(weight, x))
    np.testing.assert_array_equal(y[0, ..., 0], [[np.nan, 1], [1, 1]])
    np.testing.assert_array_equal(y[0, ..., 1], [[np.inf, 1], [1, np.nan]])


# Under whatever transformation.


def layer(w, x, b, r):
    return jax.nn.relu(x @ w + b + r)


def grad_of_all(fn):
    return jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), (1, 2, 3))


def twice_by_scan(fn):
    return lambda w, x, b, r: jax.lax.scan(lambda carry, _: (fn(w, x, b, carry), None), r, None, length=2)[0]


AROUND = {
    "nothing": lambda fn: fn,
    "jit inside": lambda fn: lambda *args: jax.jit(fn)(*args),
    "grad inside": grad_of_all,
    "jvp inside": lambda fn: lambda w, *args: jax.jvp(lambda *args: fn(w, *args), args, args),
    "scan": twice_by_scan,
    "grad of scan": lambda fn: grad_of_all(twice_by_scan(fn)),
    "checkpoint": lambda fn: grad_of_all(jax.checkpoint(fn)),
    "cond": lambda fn: lambda *args: jax.lax.cond(args[1][0, 0] > 0, fn, lambda w, x, b, r: -fn(w, x, b, r), *args),
}


@pytest.mark.parametrize("around", AROUND)
def test_transformations_inside_equal_dense(around):
    args, fn = operands(), AROUND[around](layer)
    dense = assert_equals_dense(fn, *args, rtol=1e-4)
    assert_close(sparse.apply(fn)(*args), dense)


def test_transformations_outside_equal_dense():
    def of_layer(fn, w, x, b, r):
        many = [jnp.stack([arg, 2 * arg, -arg]) for arg in (x, b, r)]
        return (
            jax.jvp(lambda *args: fn(w, *args), (x, b, r), (x, b, r)),
            jax.vmap(fn, (None, 0, 0, 0))(w, *many),
            jax.vmap(fn, (None, 0, None, None))(w, many[0], b, r),
            jax.vmap(fn, (None, None, None, 2))(w, x, b, jnp.moveaxis(many[2], 0, 2)),
            grad_of_all(fn)(w, x, b, r),
            jax.vmap(grad_of_all(fn), (None, 0, 0, 0))(w, *many),
            jax.jacfwd(lambda x: fn(w, x, b, r))(x),
            jax.lax.map(lambda x: fn(w, x, b, r), many[0]),
        )

    both = quick_jit(lambda w, *args: (of_layer(sparse.apply(layer), w, *args), of_layer(layer, w.decompress(), *args)))
    assert_close(*both(*operands()))


def test_values_have_gradients_through_the_chain():
    weight, *args = operands()
    loss = lambda w, *args: jnp.sum(jnp.sin(layer(w, *args)))  # noqa: E731

    @quick_jit
    def gradients(weight):
        got = jax.grad(lambda values: sparse.apply(loss)(weight.with_values(values), *args))(weight.values)
        return got, jax.grad(loss)(weight.decompress(), *args), weight.coordinates()

    got, want, places = jax.device_get(gradients(weight))
    assert_close(got, want[places[::-1]])


def test_nan_and_infinities_pass_relu_as_in_jax():
    weight, x, b, r = operands()
    r = np.array(r)
    r[2, 3], r[1, 1], r[0, 0] = np.nan, np.inf, -np.inf
    y = np.asarray(jax.jit(sparse.apply(layer))(weight, x, b, r))
    assert np.argwhere(np.isnan(y)).tolist() == [[2, 3]]
    assert (y[1, 1], y[0, 0]) == (jnp.inf, 0)


def test_16_bit_chains_are_rounded_once():
    args = operands("bfloat16")
    got = jax.jit(sparse.apply(layer))(*args)
    w, x, b, r = (np.asarray(part).astype(np.float64) for part in (args[0].decompress(), *args[1:]))
    want = np.maximum(x @ w + b + r, 0)
    assert got.dtype == jnp.bfloat16
    scale = np.abs(x) @ np.abs(w) + np.abs(b) + np.abs(r)
    assert np.all(np.abs(np.asarray(got).astype(np.float64) - want) <= 2.0**-8 * want + 1e-6 * scale)


# Models.


def count(jaxpr, names):
    """Equations of these primitives, those of inner jaxprs counted, those of a chain apart not."""
    own = sum(eqn.primitive.name in names for eqn in jaxpr.eqns)
    inner = [eqn for eqn in jaxpr.eqns if eqn.primitive.name != "native_fused_product"]
    return own + sum(count(sub, names) for eqn in inner for sub in jaxprs_in_params(eqn.params))


class Mlp(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(linen.relu(linen.Dense(16)(linen.relu(linen.Dense(16)(x)))))


class Block(linen.Module):
    """A residual block, with a bias in the place of a norm that was folded; its input is the residual."""

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Conv(8, (3, 3))(x))
        y = linen.relu(linen.Conv(8, (3, 3))(x))
        y = linen.relu(linen.Conv(8, (3, 3), use_bias=False)(y) + x)
        return linen.relu(linen.Conv(8, (1, 1), strides=2)(y) + linen.Conv(8, (1, 1), strides=2)(x))


@pytest.mark.parametrize(("model", "shape", "products"), [(Mlp(), (5, 12), 3), (Block(), (2, 8, 8, 3), 5)])
def test_models_are_products_and_nothing_else(relaxed, model, shape, products):
    x = make_x(shape)
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    # Biases, which are zero at first, become 0.1.
    params = jax.tree.map(lambda p: put(np.where(np.abs(p) > 0.1, p, 0.1 * (p.ndim == 1)), "float32"), params)
    compressed, predict = sparse.compress(params, "native"), sparse.apply(model.apply)
    jaxpr = jax.make_jaxpr(predict)(compressed, x).jaxpr
    assert count(jaxpr, ["native_fused_product", "native_product"]) == products
    assert count(jaxpr, ["add", "add_any", "max", "custom_jvp_call"]) == 0
    program = jax.jit(predict).lower(compressed, x).compile()
    text = program.as_text()
    assert text.count(TARGET) == products
    assert text.count(" add(") == text.count(" maximum(") == text.count(" transpose(") == 0
    np.testing.assert_allclose(program(compressed, x), quick_jit(model.apply)(params, x), rtol=1e-4, atol=1e-4)
    unfused = quax.quaxify(model.apply)
    np.testing.assert_allclose(program(compressed, x), quick_jit(unfused)(compressed, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "layout", "transposes"),
    # With channels first one before the first layer and one after the last; XLA cancels those between.
    [(("NHWC", "HWIO", "NHWC"), "in_out", 0), (("NCHW", "OIHW", "NCHW"), "out_in", 2)],
)
def test_convolutions_have_no_transposes_between_them(names, layout, transposes):
    kernels = [make_leaf((3, 3, 8, 8) if layout == "in_out" else (8, 8, 3, 3), 0.3, "float32", i) for i in range(3)]
    weights = [compress_one(kernel, "native", layout) for kernel in kernels]
    x = make_x((2, 9, 10, 8) if layout == "in_out" else (2, 8, 9, 10))

    def net(weights, x):
        for weight in weights:
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=names))
        return x

    predict = jax.jit(sparse.apply(net))
    program = predict.lower(weights, x).compile().as_text()
    assert (program.count(TARGET), program.count(" transpose(")) == (3, transposes)
    np.testing.assert_allclose(predict(weights, x), net(kernels, x), rtol=1e-4, atol=1e-4)
