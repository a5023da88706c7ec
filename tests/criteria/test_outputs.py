"""What outputs become: activations and scales, found in jaxprs, against NumPy; and the presets that look at them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from trace_helpers import normal

import jaxprune as jp
from jaxprune import evidence

pytestmark = pytest.mark.usefixtures("quick", "relaxed")

X, BIAS, SLOPES = normal(20, 5, seed=1), normal(6, seed=2), jnp.linspace(0.1, 0.6, 6)
MATRICES = {"select": lambda name, leaf: leaf.ndim > 1}


def of_many(functions):
    """What is seen of one product for each function, (its result with bias, params) -> the rest of a model."""
    params = {name: normal(5, 6, seed=i) for i, name in enumerate(functions)}
    rest = {"bias": BIAS, "slopes": SLOPES, "last": normal(6, 6, seed=9), "other": normal(5, 6, seed=10)}

    def apply(params, x):
        return [function(x @ params[name] + params["bias"], params, x) for name, function in functions.items()]

    seen = evidence.of_activations(apply, params | rest, [X[:8], X[8:]], select=lambda name, _: name in functions)
    results = {
        name: np.asarray(X, np.float64) @ np.asarray(w, np.float64) + np.asarray(BIAS) for name, w in params.items()
    }
    return seen, results


def check(seen, expected):
    for name, rows in expected.items():
        np.testing.assert_allclose(seen.output_means[name], np.abs(rows).mean(0), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(seen.output_zero_fractions[name], (rows == 0).mean(0), rtol=1e-6, err_msg=name)


def relu(y):
    return np.maximum(y, 0)


SIGMOID = lambda y: 1 / (1 + np.exp(-y))  # noqa: E731
WRITTEN = {
    "none": (lambda y: y, lambda y: y),
    "relu": (jax.nn.relu, relu),
    "maximum": (lambda y: jnp.maximum(y, 0), relu),
    "times its sign": (lambda y: y * (y > 0), relu),
    "where": (lambda y: jnp.where(y > 0, y, 0), relu),
    "relu6": (lambda y: jnp.minimum(jax.nn.relu(4 * y), 6), lambda y: np.clip(4 * y, 0, 6)),
    "squared": (lambda y: jnp.square(jax.nn.relu(y)), lambda y: relu(y) ** 2),
    "leaky": (jax.nn.leaky_relu, lambda y: np.where(y > 0, y, 0.01 * y)),
    "silu": (jax.nn.silu, lambda y: y * SIGMOID(y)),
    "gelu": (jax.nn.gelu, lambda y: y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))),
    "softplus": (jax.nn.softplus, lambda y: np.log1p(np.exp(y))),
    "elu": (jax.nn.elu, lambda y: np.where(y > 0, y, np.expm1(y))),
    "in a checkpoint": (jax.checkpoint(lambda y: jax.jit(jax.nn.relu)(y)), relu),
    "turned": (lambda y: jax.nn.relu(y.T.reshape(3, 2, -1)).reshape(6, -1).T, relu),
}


def test_a_nonlinearity_is_found_however_it_is_written():
    seen, results = of_many({name: lambda y, p, x, f=f: f(y) @ p["last"] for name, (f, _) in WRITTEN.items()})
    check(seen, {name: WRITTEN[name][1](y) for name, y in results.items()})


def test_casts_are_followed():
    seen, results = of_many({"w": lambda y, p, x: jnp.tanh(y.astype(jnp.bfloat16).astype(jnp.float32)) @ p["last"]})
    np.testing.assert_allclose(seen.output_means["w"], np.abs(np.tanh(results["w"])).mean(0), rtol=2e-2)


ENDS = {
    "a residual joins": (lambda y, p, x: jax.nn.relu(y + x @ p["other"]), lambda y: y),
    "a gate joins": (lambda y, p, x: jax.nn.silu(y) * (x @ p["other"]), lambda y: y * SIGMOID(y)),
    "it is a gate": (lambda y, p, x: y * jax.nn.silu(x @ p["other"]), lambda y: y),
    "it goes two ways": (lambda y, p, x: (jax.nn.relu(y), y @ p["last"]), lambda y: y),
    "it goes two ways after it": (lambda y, p, x: [(h := jax.nn.relu(y)) @ p["last"], h], relu),
    "channels are mixed": (lambda y, p, x: jax.nn.relu(y - y.mean(-1, keepdims=True)), lambda y: y),
    "classes": (lambda y, p, x: jax.nn.log_softmax(y), lambda y: y),
    "positions are pooled": (lambda y, p, x: jax.nn.relu(y).reshape(-1, 2, 6).max(1), relu),
    "it is taken apart": (lambda y, p, x: [jax.nn.relu(one) for one in jnp.split(y, 2, axis=1)], lambda y: y),
    "weights come after it": (lambda y, p, x: (jax.nn.relu(y) - p["bias"]) * p["slopes"], relu),
    "weights are part of it": (
        lambda y, p, x: jnp.where(y > 0, y, p["slopes"] * y), lambda y: np.where(y > 0, y, np.asarray(SLOPES) * y),
    ),
    "a print": (lambda y, p, x: (jax.debug.callback(len, y), jax.nn.relu(y))[1], relu),
    "a branch": (lambda y, p, x: lax.cond(x[0, 0] > 9, jnp.zeros_like, jax.nn.relu, y), lambda y: y),
    "a mask": (lambda y, p, x: jax.nn.relu(jnp.where(jnp.arange(6) > 2, y, 0)), lambda y: relu(y) * (np.arange(6) > 2)),
}  # fmt: skip


def test_activations_end_where_outputs_meet():
    seen, results = of_many({name: function for name, (function, _) in ENDS.items()})
    check(seen, {name: ENDS[name][1](y) for name, y in results.items()})


@settings(max_examples=6)
@given(st.lists(st.sampled_from(["bias", "scale", "turn", "fold"]), max_size=4), st.data())
def test_affine_steps_and_moves_in_any_order(words, data):
    """Each is done before ReLU, and moves are undone for the oracle."""
    steps = {
        "bias": lambda y, p: y + p["bias"],
        "scale": lambda y, p: y * p["slopes"],
        "turn": lambda y, p: y,
        "fold": lambda y, p: y.reshape(2, -1, 6).reshape(-1, 6),
    }

    def function(y, p, x):
        for word in words:
            y = steps[word](y, p) if word != "turn" else y.T.T
        return jax.nn.relu(y).reshape(2, -1, 6)

    seen, results = of_many({"w": function})
    y = results["w"]
    for word in words:
        y = y + np.asarray(BIAS) if word == "bias" else y * np.asarray(SLOPES) if word == "scale" else y
    check(seen, {"w": relu(y)})


def test_uses_of_one_leaf_and_parts_of_one_are_counted_by_output():
    """Twice whole, and once its first half alone."""
    w, x = normal(4, 4), normal(6, 4, seed=1)

    def apply(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["w"]) @ p["w"]), jnp.tanh(x @ p["w"][:, :2])

    seen = evidence.of_activations(apply, {"w": w}, [x])
    one, two = (np.asarray(a, np.float64) for a in (jax.nn.relu(x @ w), jax.nn.relu(jax.nn.relu(x @ w) @ w)))
    part = np.tanh(np.asarray(x @ w[:, :2]))
    np.testing.assert_array_equal(seen.outputs["w"].tokens, [[18, 18, 12, 12]])
    sums = np.abs(one).sum(0) + two.sum(0) + np.append(np.abs(part).sum(0), [0, 0])
    np.testing.assert_allclose(seen.output_means["w"], sums / [18, 18, 12, 12], rtol=1e-5)


# ---------------------------------------------------------------- convolutions and scales


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), strides=2, rngs=rngs)
        self.norm, self.last = nnx.BatchNorm(6, use_running_average=True, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2)).mean((1, 2)))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=True, name="norm")(linen.Conv(6, (3, 3), strides=2, name="conv")(x))
        return linen.Dense(4, name="last")(linen.max_pool(linen.relu(x), (2, 2), (2, 2)).mean((1, 2)))


IMAGES = normal(5, 9, 9, 3, seed=3)


def nnx_network():
    graph, params, rest = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, ...)
    return lambda params, x: nnx.merge(graph, params, rest)(x), nnx.as_pure(params), ""


def linen_network():
    variables = Linen().init(jax.random.key(0), IMAGES)
    return Linen().apply, variables, "params/"


@pytest.mark.parametrize("network", [nnx_network, linen_network])
def test_convolutions_with_batch_norm(network):
    """Scales by tracing, whether statistics are among the params or not; activations before pooling."""
    apply, params, prefix = network()
    drawn = lambda name, leaf: jnp.linspace(-1, 0.7, 6) if name == f"{prefix}norm/scale" else leaf  # noqa: E731
    params = jp.tree.map_named(drawn, params)
    seen = evidence.of_activations(apply, params, [IMAGES[:2], IMAGES[2:]])
    named, conv = jp.tree.named_leaves(params), f"{prefix}conv/kernel"
    kernel, bias = (np.asarray(named[f"{prefix}conv/{word}"]) for word in ("kernel", "bias"))
    padded = np.pad(np.asarray(IMAGES), ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((5, 5, 5, 6))
    for i, j in np.ndindex(5, 5):
        y[:, i, j] = np.tensordot(padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel, 3) + bias
    a = relu(y / np.sqrt(1 + 1e-5) * np.linspace(-1, 0.7, 6)).reshape(-1, 6)
    np.testing.assert_allclose(seen.output_means[conv], a.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(seen.output_zero_fractions[conv], (a == 0).mean(0), rtol=1e-6)
    np.testing.assert_array_equal(seen.outputs[conv].tokens, np.full((1, 6), 125))
    assert list(seen.scales) == [conv]
    np.testing.assert_array_equal(seen.scales[conv], jnp.linspace(-1, 0.7, 6))
    for name in ("apoz", "activation_mean", "slimming"):
        method = jp.Method(jp.presets()[name].method.criterion, jp.Output(), select=[conv])
        masks = jp.tree.named_leaves(jp.compute_masks(method, params, 0.5, **seen.for_(method)))
        scores = {"apoz": (a != 0).mean(0), "activation_mean": a.mean(0), "slimming": np.abs(np.linspace(-1, 0.7, 6))}
        alive = np.isin(np.arange(6), np.argsort(-scores[name], kind="stable")[:3])
        np.testing.assert_array_equal(masks[conv], np.broadcast_to(alive, kernel.shape))
    with pytest.raises(ValueError, match=rf"`scales` needs .* '{prefix}last/kernel'.*with `select`"):
        jp.compute_masks(method := jp.Method(jp.criteria.norm_scale), params, 0.5, **seen.for_(method))


def test_scales_of_stacked_layers():
    """In a scan each layer has its own, whichever way the leaf lies."""
    params = {"w": normal(3, 4, 4), "scale": normal(3, 4, seed=1), "mean": normal(3, 4, seed=2)}

    def layer(x, p):
        return jax.nn.relu((p["w"] @ x - p["mean"][:, None]) * p["scale"][:, None]), None

    apply = lambda params, x: lax.scan(layer, x.T, params)[0]  # noqa: E731
    seen = evidence.of_activations(apply, params, [normal(6, 4)], select=["w"])
    np.testing.assert_array_equal(seen.scales["w"], params["scale"])
    method = jp.Method(jp.criteria.norm_scale, jp.Output(), select=["w"], layout=seen.layout)
    masks = jp.compute_masks(method, params, 0.5, **seen.for_(method))["w"]
    assert masks.sum() == 24
    np.testing.assert_array_equal(masks.all(2), masks.any(2))
    least = np.sort(np.abs(np.asarray(params["scale"]).ravel()))[6]
    np.testing.assert_array_equal(masks.all(2), np.abs(params["scale"]) >= least)


NO_SCALES = {
    "changed": lambda y, p: y * (1 + p["scale"]),
    "of positions": lambda y, p: y * p["scale"][:, None],
    "of all": lambda y, p: y * p["scale"][0],
    "of others": lambda y, p: (y - y.mean(-1, keepdims=True)) * p["scale"],
    "divides": lambda y, p: y / p["scale"],
}


def test_what_is_no_scale():
    params = {name: normal(4, 4, seed=i) for i, name in enumerate(NO_SCALES)}
    apply = lambda p, x: [function(x @ p[name], p) for name, function in NO_SCALES.items()]  # noqa: E731
    seen = evidence.of_activations(apply, params | {"scale": normal(4)}, [normal(4, 4)], **MATRICES)
    assert seen.scales == {}


def test_two_scales_of_one_leaf_are_refused():
    params = {"w": normal(4, 4), "a": normal(4), "b": normal(4)}
    apply = lambda p, x: ((x @ p["w"]) * p["a"] @ p["w"]) * p["b"]  # noqa: E731
    seen = evidence.of_activations(apply, params, [normal(4, 4)], **MATRICES)
    with pytest.raises(ValueError, match="'w' are scaled by 'a', 'b'"):
        _ = seen.scales


def test_under_jit_and_on_eight_devices_they_are_the_same():
    apply, params, _ = nnx_network()

    def found(params, x):
        seen = evidence.of_activations(apply, params, [x])
        return seen.output_means, seen.output_zero_fractions, seen.scales

    x = normal(16, 9, 9, 3)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
    lying = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    one = found(params, x)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)  # noqa: E731
    jax.tree.map(close, jax.jit(found)(params, x), one)
    jax.tree.map(close, found(params, lying), one)


def test_outputs_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"Outputs of 'w' are not finite"):
        evidence.of_activations(lambda p, x: (x @ p["w"]) / 0, {"w": normal(4, 4)}, [normal(2, 4)])
