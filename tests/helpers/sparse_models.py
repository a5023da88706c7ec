"""A small model of every framework: dtype -> (apply_fn, params, layout, names of the leaves that are compressed)."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from drawn import drawn, drawn_nnx
from flax import linen, nnx
from sparse_helpers import make_x

from jaxprune.layout import FLAX, TORCH


def nnx_model(dtype):
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(6, 8, rngs=rngs, dtype=dtype), nnx.Linear(8, 3, rngs=rngs, dtype=dtype)])

        def __call__(self, x):
            return self.layers[1](nnx.relu(self.layers[0](x)))

    graph, params = nnx.split(drawn_nnx(lambda: Mlp(nnx.Rngs(0))))
    return lambda params, x: nnx.merge(graph, params)(x), params, FLAX, ["layers/0/kernel", "layers/1/kernel"]


def nnx_module(dtype):
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 3, rngs=rngs, dtype=dtype)

        def __call__(self, x):
            return jnp.tanh(self.first(x))

    return lambda model, x: model(x), drawn_nnx(lambda: Mlp(nnx.Rngs(0))), FLAX, ["first/kernel"]


def linen_model(dtype):
    model = linen.Sequential([linen.Dense(8, dtype=dtype), linen.relu, linen.Dense(3, dtype=dtype)])
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 6))))
    return model.apply, params, FLAX, ["params/layers_0/kernel", "params/layers_2/kernel"]


def haiku_model(_):
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 3], name="mlp")(x)))
    names = ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 6))))
    return model.apply, params, FLAX, names


def equinox_model(_):
    shapes = eqx.filter_eval_shape(eqx.nn.MLP, 6, 3, 8, 1, key=jax.random.key(0))
    arrays, rest = eqx.partition(drawn(shapes), eqx.is_array)
    names = ["layers/0/weight", "layers/1/weight"]
    return lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x), arrays, TORCH, names


def plain_model(_):
    params = [(make_x((6, 8), seed=1), make_x((8,), seed=2)), (make_x((8, 3), seed=3), make_x((3,), seed=4))]

    def fn(params, x):
        (w0, b0), (w1, b1) = params
        return jnp.maximum(x @ w0 + b0[None], 0) @ w1 + b1[None]

    return fn, params, FLAX, ["0/0", "1/0"]


MODELS = [nnx_model, nnx_module, linen_model, haiku_model, equinox_model, plain_model]
