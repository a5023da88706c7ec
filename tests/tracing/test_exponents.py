"""Arrays with an exponent of their own: exact where nothing leaves its range, right up to a factor where it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("relaxed", "quick")

N, DEEP = 8, 60


def drawn(layers, size, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {"w": jnp.asarray(size * draw(layers, N, N)), "b": jnp.asarray(draw(layers, N))}


def unrolled(layer):
    def fn(p, x):
        for i in range(len(p["w"])):
            x = layer({name: leaf[i] for name, leaf in p.items()}, x)
        return x

    return fn


def scanned(layer):
    def fn(p, x):
        x, firsts = lax.scan(lambda x, one: (layer(one, x), x[0, 0]), x, p)
        return x + 0 * jnp.sum(firsts)

    return fn


def images(p, x):
    """A convolution with a 3 x 3 window, of which pairs are pooled and the edge is padded again."""
    numbers = ("NHWC", "HWIO", "NHWC")
    window = p["w"][:3, :3, None, None]
    y = lax.conv_general_dilated(x.reshape(1, 2, 4, 1), window, (1, 1), "SAME", dimension_numbers=numbers)
    y = lax.reduce_window(jnp.pad(y, ((0, 0), (0, 0), (0, 1), (0, 0))), -jnp.inf, lax.max, (1, 1, 2, 1), (1, 1, 1, 1),
                          "VALID")  # fmt: skip
    return jnp.mean(y, -1).reshape(1, N) + jnp.concatenate([x[:, :4], 2 * x[:, 4:]], -1)


def attention(p, x):
    heads = (x @ p["w"]).reshape(2, 4)
    seen = jnp.where(jnp.eye(2, dtype=bool), heads @ heads.T, jnp.finfo(jnp.float32).min)
    return (jax.nn.softmax(seen, -1) @ heads).reshape(1, N) + x


def normed(p, x):
    x = x @ p["w"] + p["b"]
    centred = x - jnp.mean(x, -1, keepdims=True)
    return x + centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)


def branched(p, x):
    return lax.cond(p["b"][0] > 0.5, lambda x: x @ p["w"], lambda x: jnp.maximum(x, 1.0), x)


@jax.custom_vjp
def passed_through(x):
    return jnp.round(x)


passed_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))

LAYER = {
    "relu": lambda p, x: jax.nn.relu(x @ p["w"]),
    "bias": lambda p, x: jax.nn.leaky_relu(x @ p["w"] + p["b"]),
    "residual": lambda p, x: x + jax.nn.relu(x @ p["w"]) @ p["w"].T,
    "gates": lambda p, x: jax.nn.silu(x @ p["w"]) * jnp.tanh(x + p["b"]) / (1 + jnp.abs(p["b"])),
    "gelu": lambda p, x: jax.checkpoint(jax.nn.gelu)(x @ p["w"] - p["b"]),
    "images": images,
    "attention": attention,
    "norm": normed,
    "cond": branched,
    "own derivative": lambda p, x: x @ passed_through(4 * p["w"]) + jnp.where(p["b"] > 1, 0.0, x),
}
CASES = [(name, unrolled) for name in LAYER] + [(name, scanned) for name in ("residual", "bias", "cond")]


def plain(fn, params):
    absolute = jax.tree.map(jnp.abs, params)
    return jax.jit(jax.grad(lambda p: jnp.sum(fn(p, jnp.ones((1, N), p["w"].dtype)))))(absolute)


def flow(fn, params):
    return jax.jit(lambda p: jp.evidence.flow_grads(fn, p, jax.ShapeDtypeStruct((1, N), p["w"].dtype)))(params)


@pytest.mark.parametrize(("name", "how"), CASES)
def test_in_range_the_derivatives_are_those_of_jax(name, how):
    """By a factor of 1, to the last bits, which a compiler rounds as it likes."""
    fn, params = how(LAYER[name]), drawn(2, 0.4)
    for got, want in zip(*map(jax.tree.leaves, (flow(fn, params), plain(fn, params))), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6 * float(jnp.max(jnp.abs(want))))


OUT_OF_RANGE = [*((name, 3) for name in LAYER), ("relu", 0.01), ("residual", 0.01), ("images", 0.01)]


@pytest.mark.parametrize(("name", "size"), OUT_OF_RANGE)
def test_out_of_range_they_are_those_of_wider_numbers(name, size):
    """By one power of two for all of them. Not in range: too large, or too small to see."""
    fn, params = scanned(LAYER[name]), drawn(DEEP, size, seed=3)
    got = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), flow(fn, params))
    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, plain(fn, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)))
    place = np.argmax(want["w"])
    factor = got["w"].flat[place] / want["w"].flat[place]
    assert np.log2(factor) == pytest.approx(round(np.log2(factor)), abs=1e-4)
    for name, leaf in want.items():
        np.testing.assert_allclose(got[name] / factor, leaf, rtol=2e-4, atol=1e-6 * np.abs(want["w"]).max())


WIDTH = 32
STACK = jp.FLAX.with_rules({"w": jp.layout.Axes(layers=(0,), inputs=(1,), outputs=(2,))})


@pytest.mark.parametrize(("layers", "how"), [(60, unrolled), (120, scanned)])
def test_synflow_leaves_no_layer_empty_however_deep(layers, how):
    """At once, and in a hundred rounds to 99 %, where the flow is first too large for float32, then too small."""
    rng, method = np.random.default_rng(0), jp.Method(criterion=jp.synflow, layout=STACK)
    params = {"w": jnp.asarray(np.sqrt(2 / WIDTH) * rng.normal(size=(layers, WIDTH, WIDTH)), jnp.float32)}

    def evidence(params):
        x = jax.ShapeDtypeStruct((1, WIDTH), jnp.float32)
        return {"flow_grads": jp.evidence.flow_grads(how(LAYER["relu"]), params, x)}

    once = jp.compute_masks(method, params, 0.9, **evidence(params)) if how is scanned else None
    masks = jax.jit(lambda params: jp.iterative_masks(method, params, 0.99, count=100, evidence=evidence))(params)
    assert jp.sparsity_of(masks) == pytest.approx(0.99, abs=1e-5)
    for found in (one for one in (once, masks) if one is not None):
        assert np.asarray(found["w"]).any((1, 2)).all()
