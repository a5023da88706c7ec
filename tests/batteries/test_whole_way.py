"""One small model in every framework, all the way: select, train, checkpoint, restore, save, load, compact, deploy."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from drawn import drawn, drawn_nnx
from flax import linen, nnx

import jaxprune as jp
from jaxprune import tree

pytestmark = pytest.mark.usefixtures("relaxed", "quick")

N_IN, WIDTH, N_OUT = 8, 12, 4
MATRICES = N_IN * WIDTH + WIDTH * N_OUT
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, N_IN)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(5, N_OUT)), jnp.float32)


# ---- the models: each gives its params and a function of them


def of_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(N_IN, WIDTH, rngs=rngs), nnx.Linear(WIDTH, N_OUT, rngs=rngs)
            self.norm, self.dropout = nnx.LayerNorm(N_OUT, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.second(self.dropout(nnx.relu(self.first(x)))))

    model = drawn_nnx(lambda: Model(nnx.Rngs(0)))
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return params, lambda params, x: nnx.merge(graph, params, rest)(x)


def of_linen():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.LayerNorm()(linen.Dense(N_OUT)(linen.relu(linen.Dense(WIDTH)(x))))

    model = Model()
    return drawn(jax.eval_shape(model.init, jax.random.key(0), X)), model.apply


def of_equinox():
    def make(key):
        first, second = jax.random.split(key)
        layers = [eqx.nn.Linear(N_IN, WIDTH, key=first), eqx.nn.Lambda(jax.nn.relu)]
        return eqx.nn.Sequential([*layers, eqx.nn.Linear(WIDTH, N_OUT, key=second), eqx.nn.LayerNorm(N_OUT)])

    params, rest = eqx.partition(drawn(eqx.filter_eval_shape(make, jax.random.key(0))), eqx.is_inexact_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, rest))(x)


def of_haiku():
    def forward(x):
        return hk.LayerNorm(-1, True, True)(hk.Linear(N_OUT)(jax.nn.relu(hk.Linear(WIDTH)(x))))

    model = hk.without_apply_rng(hk.transform(forward))
    return drawn(jax.eval_shape(model.init, jax.random.key(0), X)), model.apply


def of_plain_trees():
    shapes = [{"w": (N_IN, WIDTH), "b": (WIDTH,)}, {"w": (WIDTH, N_OUT), "b": (N_OUT,)}, {"gain": (N_OUT,)}]
    params = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=_is_shape)

    def apply(params, x):
        first, second, norm = params
        x = jax.nn.relu(x @ first["w"] + first["b"])
        return (x @ second["w"] + second["b"]) * (1 + norm["gain"])

    return drawn(params), apply


def _is_shape(node):
    return isinstance(node, tuple)


FRAMEWORKS = {
    "nnx": (of_nnx, jp.FLAX),
    "linen": (of_linen, jp.FLAX),
    "equinox": (of_equinox, jp.TORCH),
    "haiku": (of_haiku, jp.FLAX),
    "plain trees": (of_plain_trees, jp.FLAX),
}
each = pytest.mark.parametrize("framework", FRAMEWORKS)


def to_the_bit(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    same = all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    return same and jax.tree.structure(one) == jax.tree.structure(other)


@functools.cache
def trained(framework, folder):
    """Params and the optimizer's state after two steps, through Orbax, and two more; beside those without Orbax."""
    make, layout = FRAMEWORKS[framework]
    params, fn = make()
    method = jp.Method(layout=layout)
    tx = jp.prune(optax.adamw(0.01), method, sparsity=jp.cubic(0.5, begin=0, end=3), update_when=jp.every(1))

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: jnp.mean((fn(params, X) - Y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    now = params, tx.init(params)
    for _ in range(2):
        now = step(*now)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / framework, now)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / framework, jax.tree.map(jnp.zeros_like, now))
    at_rest = to_the_bit(now, restored)
    for _ in range(2):
        now, restored = step(*now), step(*restored)
    return now, restored, at_rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@each
def test_the_default_selects_the_matrices_alone(framework):
    make, _ = FRAMEWORKS[framework]
    sizes = sorted(leaf.size for leaf in tree.selected_leaves(jp.weights, make()[0]).values())
    assert sizes == [WIDTH * N_OUT, N_IN * WIDTH]


@each
def test_a_checkpoint_in_the_middle_changes_no_bit(framework, folder):
    now, restored, at_rest = trained(framework, folder)
    assert at_rest
    assert to_the_bit(now, restored)
    masks = optax.tree.get(restored[1], "masks")
    dead = sum(int(np.sum(~mask)) for mask in jax.tree.leaves(masks))
    assert dead == MATRICES // 2
    assert dead == sum(int(np.sum(leaf == 0)) for leaf in jax.tree.leaves(restored[0]) if leaf.ndim > 1)


@each
def test_saved_and_loaded_to_the_bit(framework, folder, tmp_path):
    (params, _), _, _ = trained(framework, folder)
    jp.save(tmp_path / "model.jaxprune", params)
    assert to_the_bit(params, jp.load(tmp_path / "model.jaxprune", like=params))


@each
def test_compacted(framework, folder):
    make, layout = FRAMEWORKS[framework]
    (params, _), fn = trained(framework, folder)[0], make()[1]
    channels = jp.Channels(jp.couplings(fn, params, X))
    masks = jp.compute_masks(jp.Method(granularity=channels, layout=layout, distribution=jp.Uniform()), params, 0.5)
    small = jp.compact(fn, params, masks, X)
    assert jax.tree.structure(small.params) == jax.tree.structure(params)
    assert max(max(leaf.shape) for leaf in jax.tree.leaves(small.params)) < WIDTH
    wanted = jax.jit(fn)(jp.apply_masks(params, masks), X)
    assert np.allclose(jax.jit(small.apply)(small.params, X), wanted, atol=1e-5)


@each
@pytest.mark.parametrize("form", ["native", "bcoo"])
def test_compressed_and_deployed(framework, form, folder, tmp_path):
    make, layout = FRAMEWORKS[framework]
    (params, _), fn = trained(framework, folder)[0], make()[1]
    jp.save(tmp_path / "model.jaxprune", params)
    loaded = jp.load(tmp_path / "model.jaxprune", to=form, like=params, layout=layout)
    compressed = jp.sparse.compress(params, form, layout=layout)
    predict, wanted = jax.jit(jp.sparse.apply(fn)), jax.jit(fn)(params, X)
    for sparse in (loaded, compressed):
        assert sum(isinstance(leaf, jp.sparse.SparseWeight) for leaf in _weights_of(sparse)) == 2
        assert np.allclose(predict(sparse, X), wanted, atol=1e-5)


def _weights_of(params):
    return jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, jp.sparse.SparseWeight))
