"""Models with convolutions, from every framework and unchanged: products of the kernels, and equal to dense."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn, drawn_nnx
from flax import linen, nnx
from quick import quick_jit
from sparse_helpers import make_x, needs_kernels, sparse_leaves

from jaxprune import sparse
from jaxprune.layout import TORCH

X = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
TARGET = 'custom_call_target="jaxprune_product"'

pytestmark = [pytest.mark.filterwarnings("error"), needs_kernels, pytest.mark.usefixtures("quick")]


def linen_model():
    second = linen.Conv(4, (3, 1), strides=2, padding="VALID", kernel_dilation=2)
    layers = [linen.Conv(8, (3, 3)), linen.relu, second, lambda x: x.mean((1, 2)), linen.Dense(4)]
    model = linen.Sequential(layers)
    return model.apply, drawn(jax.eval_shape(model.init, jax.random.key(0), X)), 3


def nnx_model():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
            self.second = nnx.Conv(8, 4, (1, 1), use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    graph, params = nnx.split(drawn_nnx(lambda: Net(nnx.Rngs(0))))
    return lambda params, x: nnx.merge(graph, params)(x), params, 2


def haiku_model():
    def net(x):
        x = hk.Conv2D(8, 3, data_format="NHWC")(x)
        return hk.Conv1D(4, 3, stride=2, padding="VALID")(jax.nn.relu(x).reshape(x.shape[0], -1, 8))

    model = hk.without_apply_rng(hk.transform(net))
    return model.apply, drawn(jax.eval_shape(model.init, jax.random.key(0), X)), 2


def equinox_model():
    def net(key):
        return eqx.nn.Sequential([eqx.nn.Conv2d(3, 8, 3, padding=1, key=key), eqx.nn.Conv2d(8, 4, 3, 2, key=key)])

    arrays, rest = eqx.partition(drawn(eqx.filter_eval_shape(net, jax.random.key(0))), eqx.is_array)
    return lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(jnp.moveaxis(x, -1, 1)), arrays, 2


@pytest.mark.parametrize(
    ("model", "format"),
    [
        (linen_model, "native"),
        (nnx_model, "native_block"),
        (haiku_model, "native"),
        (equinox_model, "native"),
    ],
)
def test_models_run_unchanged(relaxed, model, format):
    fn, params, count = model()
    params = jax.tree.map(lambda leaf: jnp.asarray(np.where(np.abs(leaf) > 0.1, leaf, 0), leaf.dtype), params)
    compressed = sparse.compress(params, format, **({"layout": TORCH} if model is equinox_model else {}))
    assert len(sparse_leaves(compressed)) == count
    x = make_x(X.shape)
    predict = jax.jit(sparse.apply(fn)).lower(compressed, x).compile()
    assert predict.as_text().count(TARGET) == count
    got, want = predict(compressed, x), quick_jit(lambda tree, x: fn(sparse.decompress(tree), x))(compressed, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
