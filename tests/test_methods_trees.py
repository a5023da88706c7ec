"""Masks of any pytree: every framework's parameters, and evidence that comes as trees of its own."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxprune as jp
from jaxprune import tree


class Net(eqx.Module):
    layers: list
    name: str

    def __init__(self):
        self.layers = [eqx.nn.Linear(4, 8, key=jax.random.key(0)), eqx.nn.Linear(8, 2, key=jax.random.key(1))]
        self.name = "net"


class Model(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1))])


MLP = hk.transform(lambda x: hk.nets.MLP([8, 2])(x))
X = jax.ShapeDtypeStruct((1, 4), jnp.float32)
KEY = jax.random.key(0)


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


# Shapes alone, equal ones: initializers, and contests of other sizes, would only be compiled.
TREES = {
    "nnx": lambda: nnx.state(nnx.eval_shape(Model), nnx.Param),
    "nnx pure": lambda: nnx.as_pure(nnx.state(nnx.eval_shape(Model), nnx.Param)),
    "linen": lambda: jax.eval_shape(linen.Dense(8).init, KEY, X),
    "equinox": lambda: eqx.filter(eqx.filter_eval_shape(Net), tree.is_array),
    "haiku": lambda: jax.eval_shape(MLP.init, KEY, X),
    "list": lambda: [struct(4, 8), struct(8), [struct(8, 2)]],
    "tuple": lambda: (struct(4, 8), {"v": struct(8, 2)}),
    "bare": lambda: struct(4, 8),
    "bfloat16": lambda: {"a": struct(4, 8, dtype=jnp.bfloat16), "b": struct(8, 2, dtype=jnp.float16)},
}


def rand(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


def draw(name):
    return jax.tree.map(lambda leaf: rand(*leaf.shape, dtype=leaf.dtype), TREES[name]())


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("criterion", [jp.magnitude, jp.taylor])
def test_any_pytree(name, criterion):
    """With grads and earlier masks as trees too: evidence goes leaf by leaf, whatever the tree is made of."""
    params = draw(name)
    method = jp.Method(criterion, layout=jp.TORCH if name == "equinox" else jp.FLAX)
    everyone = jax.tree.map(lambda leaf: jnp.asarray(np.ones(leaf.shape, bool)), params)
    masks = jp.compute_masks(method, params, 0.5, masks=everyone, grads=params, key=KEY)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    for mask, leaf in zip(jax.tree.leaves(masks), jax.tree.leaves(params), strict=True):
        assert mask.shape == leaf.shape
        assert mask.dtype == bool
        assert leaf.ndim > 1 or np.asarray(mask).all()
    sizes = [leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    dead = sum(np.count_nonzero(~np.asarray(mask)) for mask in jax.tree.leaves(masks))
    assert dead == round(sum(sizes) * 0.5)
    jp.apply_masks(params, masks)


def test_grads_may_be_wrapped_otherwise_than_the_params():
    """NNX hands out Variables here and arrays there."""
    params = draw("nnx")
    method = jp.Method(jp.taylor)
    pure = jp.compute_masks(method, params, 0.5, grads=nnx.to_pure_dict(params))
    same = jp.compute_masks(method, params, 0.5, grads=params)
    assert jax.tree.structure(pure) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(pure), jax.tree.leaves(same)))


def test_evidence_that_is_no_tree_of_the_params_is_handed_on_as_it_is():
    seen = {}

    def criterion(params, /, *, flag, norms, **_):
        seen.update(flag=flag, norms=norms)
        return jp.magnitude(params)

    params = {"a": rand(4, 8), "b": rand(8, 2)}
    norms = {"a": rand(4), "b": rand(8)}  # by name, shapes of its own
    jp.compute_masks(jp.Method(criterion), params, 0.5, flag="text", norms=norms)
    assert seen["flag"] == "text"
    assert {name: leaf.shape for name, leaf in seen["norms"].items()} == {"a": (4,), "b": (8,)}
