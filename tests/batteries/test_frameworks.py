"""Every framework's own training loop with one line changed: the optimizer.

The loops below are written as the frameworks' documentation writes them. Nothing in them knows of pruning: not the
loss, not the step, not the state that travels. What comes out must have exact zeros all the same.
"""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn, drawn_nnx
from flax import linen, nnx
from flax.training.train_state import TrainState

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("relaxed", "quick")  # frameworks and optax promote dtypes themselves

N_IN, WIDTH, N_OUT = 8, 12, 4
WEIGHTS = N_IN * WIDTH + WIDTH * N_OUT
STEPS = 4
SPARSITY = 0.75
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, N_IN)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(5, N_OUT)), jnp.float32)


def error(prediction):
    return jnp.mean((prediction - Y) ** 2)


# ---- the loops: make_tx(params) is the line that changes; each gives params before, params after, masks


def train_nnx(make_tx):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(N_IN, WIDTH, rngs=rngs)
            self.second = nnx.Linear(WIDTH, N_OUT, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    model = drawn_nnx(lambda: Model(nnx.Rngs(0)))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, make_tx(nnx.state(model, nnx.Param)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: error(model(X)))(model)
        optimizer.update(model, grads)

    for _ in range(STEPS):
        step(model, optimizer)
    masks = optax.tree.get(optimizer.opt_state, "masks")
    return before, nnx.to_pure_dict(nnx.state(model, nnx.Param)), masks


def train_linen(make_tx):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(N_OUT)(linen.relu(linen.Dense(WIDTH)(x)))

    model = Model()
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), X))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=make_tx(params))

    @jax.jit
    def step(state):
        grads = jax.grad(lambda params: error(state.apply_fn({"params": params}, X)))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(STEPS):
        state = step(state)
    return params, state.params, optax.tree.get(state.opt_state, "masks")


def train_equinox(make_tx):
    model = drawn(eqx.filter_eval_shape(eqx.nn.MLP, N_IN, N_OUT, WIDTH, depth=1, key=jax.random.key(0)))
    before = eqx.filter(model, eqx.is_inexact_array)
    tx = make_tx(before)
    state = tx.init(before)

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda model: error(jax.vmap(model)(X)))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for _ in range(STEPS):
        model, state = step(model, state)
    return before, eqx.filter(model, eqx.is_inexact_array), optax.tree.get(state, "masks")


def train_haiku(make_tx):
    def forward(x):
        return hk.Linear(N_OUT)(jax.nn.relu(hk.Linear(WIDTH)(x)))

    model = hk.without_apply_rng(hk.transform(forward))
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    return train_functions(make_tx, params, model.apply)


def make_layers(seed=0):
    rng = np.random.default_rng(seed)
    sizes = [(N_IN, WIDTH), (WIDTH, N_OUT)]
    return [(jnp.asarray(rng.normal(size=size), jnp.float32), jnp.zeros(size[1], jnp.float32)) for size in sizes]


def train_dicts(make_tx):
    params = [{"w": w, "b": b} for w, b in make_layers()]

    def apply(params, x):
        first, second = params
        return jax.nn.relu(x @ first["w"] + first["b"]) @ second["w"] + second["b"]

    return train_functions(make_tx, params, apply)


def train_lists(make_tx):
    params = [leaf for layer in make_layers() for leaf in layer]
    return train_functions(make_tx, params, lambda p, x: jax.nn.relu(x @ p[0] + p[1]) @ p[2] + p[3])


def train_functions(make_tx, params, apply):
    before, tx = params, make_tx(params)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: error(apply(params, X)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    return before, params, optax.tree.get(state, "masks")


# ---- the line


def gradual(method, sparsity=SPARSITY):
    ramp = jp.cubic(sparsity, begin=0, end=2)
    return lambda params: jp.prune(optax.adamw(0.01), method, sparsity=ramp, update_when=jp.every(1))


def fixed(method, sparsity=SPARSITY):
    def make_tx(params):
        return optax.chain(optax.adamw(0.01), jp.keep_params_sparse(jp.compute_masks(method, params, sparsity)))

    return make_tx


LOOPS = {
    "nnx": (train_nnx, jp.FLAX),
    "linen": (train_linen, jp.FLAX),
    "equinox": (train_equinox, jp.TORCH),
    "haiku": (train_haiku, jp.FLAX),
    "dicts": (train_dicts, jp.FLAX),
    "lists": (train_lists, jp.FLAX),
}
DISTRIBUTIONS = {"global": jp.Global(), "per_output": jp.PerOutput()}


@functools.cache
def trained(framework, line, distribution):
    """Params before, params after, masks; for all who look at them, since every step is a program to compile."""
    loop, layout = LOOPS[framework]
    return loop(line(jp.Method(distribution=DISTRIBUTIONS[distribution], layout=layout)))


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_promises(before, after, masks):
    """Same structure; the dead are +0 to the bit; everything else has moved."""
    assert len(arrays(before)) == len(arrays(after)) == len(arrays(masks))
    for old, new, mask in zip(arrays(before), arrays(after), arrays(masks), strict=True):
        assert mask.dtype == bool
        assert mask.shape == new.shape == old.shape
        assert new.dtype == old.dtype
        assert not np.any(new.view(np.uint32)[~mask])
        assert np.mean(new[mask] != old[mask]) > 0.5
        assert new.ndim > 1 or np.all(mask)


# All pairs of framework, line and distribution, since each case is a training step to compile: the two lines in every
# framework, the two distributions too; the third pair of line and distribution in one framework of either layout.
CASES = [(name, *case) for name in LOOPS for case in ((gradual, "global"), (fixed, "per_output"))]
CASES += [(name, gradual, "per_output") for name in ("nnx", "equinox")]


@pytest.mark.parametrize(("framework", "line", "distribution"), CASES)
def test_one_line_of_the_loop_changes(framework, line, distribution):
    before, after, masks = trained(framework, line, distribution)
    assert_promises(before, after, masks)
    assert sum(np.sum(~mask) for mask in arrays(masks)) == SPARSITY * WEIGHTS
    if distribution == "per_output":
        for mask in (mask for mask in arrays(masks) if mask.ndim > 1):
            alive = mask.sum(axis=LOOPS[framework][1].axes("", mask.shape).inputs)
            assert np.all(alive == mask.size / len(alive) * (1 - SPARSITY))


@pytest.mark.parametrize("framework", LOOPS)
def test_the_masks_are_the_tree_that_the_library_takes(framework):
    """What the optimizer's state holds goes into `apply_masks` and into the next optimizer, as it is."""
    _, after, masks = trained(framework, gradual, "global")
    again = jp.apply_masks(after, masks)
    assert all(np.array_equal(a, b) for a, b in zip(arrays(again), arrays(after), strict=True))
    before, tuned, kept = LOOPS[framework][0](lambda params: optax.chain(optax.sgd(0.1), jp.keep_params_sparse(masks)))
    assert_promises(before, tuned, kept)
    assert all(np.array_equal(a, b) for a, b in zip(arrays(kept), arrays(masks), strict=True))


# ---- tied weights: one leaf, used twice


class TiedNnx(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(N_IN, N_IN, rngs=rngs)
        self.decoder = nnx.Linear(N_IN, N_IN, use_bias=False, rngs=rngs)
        self.decoder.kernel = self.encoder.kernel

    def __call__(self, x):
        return self.decoder(nnx.relu(self.encoder(x)))


def test_tied_weights_in_nnx_are_pruned_once_and_stay_tied():
    model = drawn_nnx(lambda: TiedNnx(nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, gradual(jp.Method())(None), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(X) - X) ** 2))(model))

    for _ in range(STEPS):
        step(model, optimizer)
    assert model.encoder.kernel is model.decoder.kernel
    masks = optax.tree.get(optimizer.opt_state, "masks")
    assert sorted(mask.size for mask in arrays(masks)) == [N_IN, N_IN * N_IN]
    assert np.sum(np.asarray(model.decoder.kernel[...]) == 0) == SPARSITY * N_IN * N_IN


def test_tied_weights_in_equinox_are_pruned_once_and_stay_tied():
    shapes = eqx.filter_eval_shape(eqx.nn.Linear, N_IN, N_IN, key=jax.random.key(0))
    encoder, decoder = (drawn(shapes, seed=i) for i in range(2))
    model = eqx.nn.Shared((encoder, decoder), lambda pair: pair[1].weight, lambda pair: pair[0].weight)
    tx = gradual(jp.Method(layout=jp.TORCH))(None)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    def loss(model):
        encoder, decoder = model()
        return jnp.mean((jax.vmap(decoder)(jax.nn.relu(jax.vmap(encoder)(X))) - X) ** 2)

    @eqx.filter_jit
    def step(model, state):
        updates, state = tx.update(eqx.filter_grad(loss)(model), state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for _ in range(STEPS):
        model, state = step(model, state)
    encoder, decoder = model()
    assert np.sum(~np.concatenate([mask.ravel() for mask in arrays(state.masks)])) == SPARSITY * N_IN * N_IN
    assert np.sum(np.asarray(encoder.weight) == 0) == SPARSITY * N_IN * N_IN
    assert np.array_equal(encoder.weight, decoder.weight)


def test_tied_weights_in_a_dict_are_pruned_once():
    params = {"embedding_and_head": make_layers()[0][0], "bias": jnp.zeros(N_IN, jnp.float32)}

    def apply(params, x):
        return jax.nn.relu(x @ params["embedding_and_head"]) @ params["embedding_and_head"].T + params["bias"]

    tx = gradual(jp.Method())(params)
    state = tx.init(params)
    grads = jax.jit(jax.grad(lambda params: jnp.mean((apply(params, X) - X) ** 2)))(params)
    for _ in range(STEPS):
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert np.sum(np.asarray(params["embedding_and_head"]) == 0) == SPARSITY * N_IN * WIDTH


# ---- stacked layers: one leaf, many layers

LAYERS = 3
STACKED = jp.FLAX.with_rules({"*kernel": jp.layout.Axes(layers=(0,), inputs=(1,), outputs=(2,))})


def stacked_masks_equal_unrolled(stacked, masks):
    """Every layer loses its share, and the same weights as if it were a leaf of its own."""
    dead = round(N_IN * N_IN * SPARSITY)
    for i in range(LAYERS):
        layer = jnp.asarray(np.asarray(stacked)[i])
        alone = jp.compute_masks(jp.Method(distribution=jp.Uniform()), {"kernel": layer}, SPARSITY)
        assert np.array_equal(alone["kernel"], masks[i])
        assert np.sum(~masks[i]) == dead


def test_stacked_layers_in_nnx():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return nnx.Linear(N_IN, N_IN, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def apply(layer, x):
        return nnx.tanh(layer(x))

    model = drawn_nnx(lambda: make(nnx.Rngs(0).split(LAYERS)))
    start = np.array(model.kernel[...])
    method = jp.Method(distribution=jp.Uniform(), layout=STACKED)
    tx = jp.prune(optax.adamw(0.01), method, sparsity=SPARSITY, update_when=jp.schedules.at(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean((apply(model, X) - X) ** 2))(model))

    for _ in range(STEPS):
        step(model, optimizer)
    by_size = {mask.size: mask for mask in arrays(optax.tree.get(optimizer.opt_state, "masks"))}
    mask = by_size[LAYERS * N_IN * N_IN]
    assert np.all(by_size[LAYERS * N_IN])  # stacked biases look like a matrix, and are none
    stacked_masks_equal_unrolled(start, mask)
    assert not np.any(np.asarray(model.kernel[...]).view(np.uint32)[~mask])
    assert np.all(np.asarray(model.kernel[...])[mask] != 0)


def test_stacked_layers_in_linen():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return linen.tanh(linen.Dense(N_IN)(x)), None

    scan = linen.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
    model = scan()
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), X, None))["params"]
    method = jp.Method(distribution=jp.Uniform(), layout=STACKED)
    tx = jp.prune(optax.adamw(0.01), method, sparsity=SPARSITY, update_when=jp.schedules.at(0))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        loss = lambda params: jnp.mean((state.apply_fn({"params": params}, X, None)[0] - X) ** 2)  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(STEPS):
        state = step(state)
    mask = np.asarray(state.opt_state.masks["Dense_0"]["kernel"])
    stacked_masks_equal_unrolled(params["Dense_0"]["kernel"], mask)
    assert not np.any(np.asarray(state.params["Dense_0"]["kernel"]).view(np.uint32)[~mask])
