"""INT8 of whole models: ranges against sorting, loops against what they are written out, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from int8_helpers import RANGE, normal, on_codes
from jax import lax

from jaxprune.masks import apply_masks
from jaxprune.quantize.codes import dequantize, to_integers
from jaxprune.quantize.int8 import MOST_TERMS, calibrate, int8

pytestmark = pytest.mark.usefixtures("quick")


def mlp(params, x):
    return jax.nn.relu(x @ params["a"] + jnp.expand_dims(params["bias"], 0)) @ params["b"]


def mlp_params():
    return {name: jnp.asarray(normal(i, 6, 6)) for i, name in enumerate("ab")} | {"bias": jnp.asarray(normal(2, 6))}


def test_ranges_are_those_of_all_batches():
    params = mlp_params()
    batches = [jnp.asarray(normal(i, 50, 6)) * 2.0**i for i in range(3)]
    ranges = calibrate(mlp, params, batches)
    inputs = np.concatenate(batches)
    hidden = np.maximum(inputs @ np.asarray(params["a"]) + np.asarray(params["bias"]), 0)
    assert list(ranges) == ["a", "b"]
    np.testing.assert_allclose(ranges["a"], [(inputs.min(), inputs.max())], rtol=1e-6)
    np.testing.assert_allclose(ranges["b"], [(0.0, hidden.max())], rtol=1e-5)
    assert all(isinstance(end, float) for uses in ranges.values() for use in uses for end in use)


@pytest.mark.parametrize("percentile", [99.0, 60.0])
def test_percentiles_cut_both_ends(percentile):
    batches = [normal(i, 50, 6) for i in range(2)]
    found = calibrate(lambda params, x: x @ params["a"], mlp_params(), batches, percentile=percentile, select="a")
    cut = int(300 * (1 - percentile / 100))
    ends = [(np.sort(batch, axis=None)[cut], np.sort(batch, axis=None)[-1 - cut]) for batch in batches]
    assert found["a"] == ((min(low for low, _ in ends), max(high for _, high in ends)),)


def test_a_model_of_integers_is_close_and_of_other_products_the_same():
    params, x = mlp_params(), jnp.asarray(normal(9, 100, 6))
    ranges = calibrate(mlp, params, [x])
    found, plain = jax.jit(int8(mlp, ranges))(params, x), jax.jit(mlp)(params, x)
    assert 0 < np.abs(found - plain).max() < 0.05 * np.abs(plain).max()
    hidden = np.maximum(
        on_codes(np.asarray(x), np.asarray(params["a"]), *ranges["a"][0]) + np.asarray(params["bias"]), 0
    )
    np.testing.assert_allclose(
        jax.jit(int8(mlp, {"a": ranges["a"]}))(params, x), hidden @ np.asarray(params["b"]), rtol=1e-4, atol=1e-5
    )


def test_quantized_weights_are_rounded_no_further():
    params, x = mlp_params(), jnp.asarray(normal(9, 10, 6))
    masks = jax.tree.map(lambda leaf: leaf > 0, params)
    masked = apply_masks(params, masks)
    ranges = calibrate(mlp, masked, [x])
    apply = jax.jit(int8(mlp, ranges))
    stored = dequantize(to_integers(params, masks))
    stored["bias"] = masked["bias"]
    np.testing.assert_allclose(apply(stored, x), apply(masked, x), rtol=1e-5, atol=1e-5)


def test_a_leaf_used_twice_has_two_ranges():
    params = mlp_params()

    def tied(params, x):
        return (10.0 * (x @ params["a"])) @ params["a"].T

    x = jnp.asarray(normal(9, 20, 6))
    ranges = calibrate(tied, params, [x], select="a")
    first, second = ranges["a"]
    assert second[1] > 5 * first[1]
    found = jax.jit(int8(tied, ranges))(params, x)
    assert np.abs(found - jax.jit(tied)(params, x)).max() < 0.05 * np.abs(found).max()


def layer(x, weights):
    return jnp.tanh(x @ weights)


def written_out(params, x):
    for i in range(3):
        x = layer(x, params["w"][i])
    return x


def scanned(params, x):
    """Carries beside the activations something that is none at first."""

    def step(carry, weights):
        return (carry[0] + carry[1], layer(carry[1], weights)), None

    others, x = lax.scan(step, (jnp.zeros_like(x), x), params["w"])[0]
    return x + 0.0 * others


def counted(params, x):
    return lax.fori_loop(0, 3, lambda i, x: layer(x, params["w"][i]), x)


def whiled(params, x):
    def body(carry):
        return carry[0] + 1, layer(carry[1], lax.dynamic_index_in_dim(params["w"], carry[0], keepdims=False))

    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]


def branched(params, x):
    for i in range(3):
        x = lax.cond(x[0, 0] > -9, lambda x, i=i: layer(x, params["w"][i]), lambda x: x - 1, x)
    return x


def called(params, x):
    once = jax.jit(layer)
    for i in range(3):
        x = jax.checkpoint(once)(x, params["w"][i])
    return x


@pytest.fixture(scope="module")
def three_layers():
    """Params, activations, ranges of each layer and of all together, and the results of codes with either."""
    params, x = {"w": jnp.asarray(normal(0, 3, 6, 6))}, jnp.asarray(normal(1, 20, 6)) * 2
    alone = calibrate(written_out, params, [x])["w"]
    together = ((min(low for low, _ in alone), max(high for _, high in alone)),)
    results = {ranges: jax.jit(int8(written_out, {"w": ranges}))(params, x) for ranges in (alone, 3 * together)}
    return params, x, results


@pytest.mark.parametrize("fn", [scanned, counted, whiled, branched, called])
def test_loops_are_what_they_are_written_out(fn, three_layers):
    params, x, results = three_layers
    ranges = calibrate(fn, params, [x])
    alone, together = results
    expected = alone if fn in (branched, called) else together  # a loop has one range for all steps
    np.testing.assert_allclose(ranges["w"], expected if expected is alone else expected[:1], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(int8(fn, ranges))(params, x), results[expected], rtol=1e-5)


def test_a_leaf_carried_along_is_followed():
    def fn(params, x):
        def body(carry):
            return carry[0] - 1, carry[1], layer(carry[2], carry[1])

        return lax.while_loop(lambda carry: carry[0] > 0, body, (x[0, 0].astype(jnp.int32), params["w"], x))[1:]

    params, x = {"w": jnp.asarray(normal(0, 6, 6))}, jnp.full((2, 6), 2.0)
    ranges = calibrate(fn, params, [x])
    found, plain = jax.jit(int8(fn, ranges))(params, x), jax.jit(fn)(params, x)
    assert 0 < np.abs(found[1] - plain[1]).max() < 0.1


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.BatchNorm(use_running_average=True)(linen.Conv(8, (3, 3))(x)))
        x = linen.relu(linen.Conv(8, (3, 3), feature_group_count=8, strides=2)(x)).mean(axis=(1, 2))
        x = linen.relu(linen.DenseGeneral((2, 4))(x))
        return linen.DenseGeneral(10, axis=(-2, -1))(x)


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 4, (2, 2), strides=(2, 2), rngs=rngs)
        self.out = nnx.Linear(4, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.up(nnx.relu(self.conv(x)))).mean(axis=(1, 2)))


def filled(shapes):
    """Params of these shapes; initialisers of frameworks take long to compile."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(normal(0, *leaf.shape)) if leaf.ndim > 1 else jnp.ones(leaf.shape), shapes
    )


def linen_model(x):
    return Linen().apply, filled(jax.eval_shape(Linen().init, jax.random.key(0), x)), 4


def nnx_model(x):
    graph, state, rest = nnx.split(nnx.eval_shape(Nnx), nnx.Param, ...)
    return lambda params, x: nnx.merge(graph, params, rest)(x), filled(nnx.as_pure(state)), 3


@pytest.mark.usefixtures("relaxed")
@pytest.mark.parametrize("make", [linen_model, nnx_model])
def test_models_of_frameworks(make):
    x = jnp.asarray(normal(0, 8, 8, 8, 3))
    fn, params, count = make(x)
    ranges = calibrate(fn, params, [x])
    assert len(ranges) == count
    found, plain = jax.jit(int8(fn, ranges))(params, x), jax.jit(fn)(params, x)
    assert found.shape == plain.shape
    assert 0 < np.abs(found - plain).max() < 0.1 * np.abs(plain).max()


def test_structures_and_other_arguments_go_through():
    def fn(params, x, *, shift, plain=True):
        return {"y": x @ params["a"] + shift, "params": params} if plain else None

    params = mlp_params()
    found = jax.jit(int8(fn, {"a": [RANGE]}))(params, jnp.ones((2, 6)), shift=jnp.ones((2, 6)))
    assert set(found) == {"y", "params"}
    np.testing.assert_array_equal(found["params"]["a"], params["a"])


def refused(fn, **leaves):
    x, params = jnp.ones((2, 6)), {**mlp_params(), **leaves}
    return lambda: calibrate(fn, params, [x], select="a")


def traced(fn, ranges):
    jax.eval_shape(int8(fn, ranges), mlp_params(), jnp.ones((2, 6)))


def swapped(params, x):
    def body(carry, _):
        a, b, x = carry
        return (b, a, x @ a), None

    return lax.scan(body, (params["a"], params["b"], x), length=2)[0][2]


REFUSED = {
    "changed": (refused(lambda p, x: x @ (1 + p["a"])), "'a', changed by `add`, runs into `dot_general` at .*`select`"),
    "joined": (refused(lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], 1)), "'a' runs into `concatenate` at"),
    "swapped": (refused(swapped), "'a' runs into `scan` at"),
    "chosen": (
        refused(lambda p, x: x @ lax.cond(x[0, 0] > 0, lambda: p["a"], lambda: p["b"])),
        "'a' runs into `cond` at",
    ),
    "tested": (
        refused(lambda p, x: lax.while_loop(lambda x: (x @ p["a"])[0, 0] > 9, lambda x: x - 1, x)),
        "'a' runs into `while` at",
    ),
    "image": (
        lambda: int8(
            lambda p, x: lax.conv(p["a"], x, (1, 1), "SAME"), {"a": [RANGE]}
        )({"a": jnp.ones((1, 2, 4, 4))}, jnp.ones((3, 2, 2, 2))),
        "'a' is the left operand of a convolution",
    ),
    "no product": (refused(lambda p, x: x + p["bias"][0]), "There is no batch, or no product"),
    "no batch": (lambda: calibrate(mlp, mlp_params(), []), "There is no batch, or no product"),
    "not finite": (lambda: calibrate(mlp, mlp_params(), [jnp.full((2, 6), jnp.nan)]), "that meet 'a' are not finite"),
    "hidden": (
        lambda: calibrate(mlp, mlp_params(), [jnp.ones((9, 6)).at[0, 0].set(jnp.nan)], percentile=90.0),
        "that meet 'a' are not finite",
    ),
    "percentile": (lambda: calibrate(mlp, mlp_params(), [], percentile=0.99), "above 50 and at most 100, got 0.99"),
    "fewer": (
        lambda: traced(mlp, {"a": [RANGE, RANGE]}),
        "'a' is in 1 products here, 2 were calibrated",
    ),
    "more": (
        lambda: traced(lambda p, x: x @ p["a"] @ p["a"], {"a": [RANGE]}),
        "'a' is in 2 products here, 1 were calibrated",
    ),
    "other": (
        lambda: traced(mlp, {"c": [RANGE]}),
        "'c' is in 0 products here, 1 were calibrated",
    ),
    "overflow": (
        lambda: jax.eval_shape(
            int8(lambda p, x: x @ p["a"], {"a": [RANGE]}),
            {"a": jax.ShapeDtypeStruct((MOST_TERMS + 1, 1), jnp.float32)},
            jax.ShapeDtypeStruct((1, MOST_TERMS + 1), jnp.float32),
        ),
        f"'a' sums over {MOST_TERMS + 1} products, and int32 surely holds {MOST_TERMS}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_leaf(call, words):
    with pytest.raises(ValueError, match=words):
        call()
