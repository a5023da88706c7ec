"""Weight sharing: clusters move as one weight, under every optimizer here; dead weights do not move at all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxprune.lab.models.parts import affine, conv, max_pool
from jaxprune.quantize.codes import Codebook, dequantize, to_codebooks, to_integers
from jaxprune.quantize.sharing import reshare, share_weights
from jaxprune.tree import named_leaves

pytestmark = pytest.mark.usefixtures("quick")

SHAPES = {"conv": (3, 3, 1, 6), "fc": (96, 32), "out": (32, 4)}
OPTIMIZERS = {
    "adam": lambda: optax.adam(3e-3),
    "momentum": lambda: optax.sgd(0.02, momentum=0.9),
    "adamw": lambda: optax.adamw(3e-3, weight_decay=1e-2),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.9, nesterov=True)),
}


@pytest.fixture(scope="module")
def model():
    """Params pruned to 40 %, masks, and codebooks of 4 bits; "out" stays as it is."""
    rng = np.random.default_rng(0)
    params = {
        name: {
            "kernel": jnp.asarray(rng.standard_normal(shape) * 0.2, jnp.float32),
            "bias": jnp.zeros(shape[-1], jnp.float32),
        }
        for name, shape in SHAPES.items()
    }
    masks = jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape) < (0.4 if leaf.ndim > 1 else 1.1)), params)
    return params, masks, to_codebooks(params, masks, bits=4, select=["conv/kernel", "fc/kernel"])


def loss_of(params, images, labels):
    x = max_pool(jax.nn.relu(conv(params["conv"], images)), 2)
    x = jax.nn.relu(affine(params["fc"], x.reshape(x.shape[0], -1)))
    return optax.softmax_cross_entropy_with_integer_labels(affine(params["out"], x), labels).mean()


def batch(seed):
    """Bright quarters of 8 x 8 images, to be told apart."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, 64)
    images = rng.random((64, 8, 8, 1), np.float32)
    for image, label in zip(images, labels, strict=True):
        image[4 * (label // 2) :][:4, 4 * (label % 2) :][:, :4] += 0.5
    return jnp.asarray(images), jnp.asarray(labels)


def trained(quantized, tx, steps=40):
    @jax.jit
    def step(params, state, images, labels):
        loss, grads = jax.value_and_grad(loss_of)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = dequantize(quantized)
    state, losses = tx.init(params), []
    for i in range(steps):
        params, state, loss = step(params, state, *batch(i))
        losses.append(float(loss))
    return params, losses


@pytest.mark.usefixtures("relaxed")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_moves_clusters_as_one_weight(model, name):
    params, masks, quantized = model
    tuned, losses = trained(quantized, optax.chain(share_weights(quantized), OPTIMIZERS[name]()))
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    for layer in ("conv", "fc"):
        codebook, kernel = quantized[layer]["kernel"], np.asarray(tuned[layer]["kernel"])
        dead = kernel[~codebook.alive]
        assert dead.tobytes() == bytes(dead.nbytes)
        for code in np.unique(codebook.codes[codebook.alive]):
            members = kernel[codebook.alive & (codebook.codes == code)]
            assert members.tobytes() == members[:1].tobytes() * len(members), code
            assert members[0] != codebook.values[code]
    for layer in SHAPES:
        assert not np.array_equal(tuned[layer]["bias"], params[layer]["bias"])
    shared = reshare(quantized, tuned)
    assert np.array_equal(shared["fc"]["kernel"].alive, masks["fc"]["kernel"])
    for name, leaf in named_leaves(dequantize(shared)).items():
        assert np.asarray(leaf).tobytes() == np.asarray(named_leaves(tuned)[name]).tobytes(), name


def test_it_is_training_of_the_shared_values(model):
    """SGD on the values themselves, which the network looks up, takes the same way."""
    _, _, quantized = model
    names = ("conv", "fc")
    codes = {name: jnp.asarray(quantized[name]["kernel"].codes) for name in names}
    alive = {name: jnp.asarray(quantized[name]["kernel"].alive) for name in names}

    def loss_of_values(values, params, *samples):
        kernels = {name: jnp.where(alive[name], values[name][codes[name]], 0.0) for name in names}
        looked_up = {name: {**layer, "kernel": kernels.get(name, layer["kernel"])} for name, layer in params.items()}
        return loss_of(looked_up, *samples)

    params = dequantize(quantized)
    values = {name: jnp.asarray(quantized[name]["kernel"].values) for name in names}

    @jax.jit
    def step(both, *samples):
        grads = jax.grad(lambda both: loss_of_values(*both, *samples))(both)
        return jax.tree.map(lambda leaf, grad: leaf - 0.01 * grad, both, grads)

    for i in range(5):
        values, params = step((values, params), *batch(i))
    tuned, _ = trained(quantized, optax.chain(share_weights(quantized), optax.sgd(0.01)), steps=5)
    shared = reshare(quantized, tuned)
    for name in names:
        np.testing.assert_allclose(shared[name]["kernel"].values, values[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_summed_over_each_cluster(dtype):
    rng = np.random.default_rng(0)
    leaf, grads = (jnp.asarray(rng.standard_normal((20, 30)), dtype) for _ in range(2))
    alive = rng.random((20, 30)) < 0.5
    quantized = {"w": to_codebooks({"w": leaf}, {"w": alive}, bits=3)["w"], "bias": jnp.ones(3)}
    tx = share_weights(quantized)
    state = tx.init(dequantize(quantized))
    found, _ = tx.update({"w": grads, "bias": jnp.arange(3.0)}, state)
    sums = np.zeros(8)
    codes = quantized["w"].codes
    np.add.at(sums, codes[alive], np.asarray(grads, np.float64)[alive])
    assert found["w"].dtype == dtype
    expected = np.where(alive, sums[codes], 0)
    np.testing.assert_allclose(np.asarray(found["w"], np.float64), expected, rtol=1e-5 if dtype == "float32" else 1e-2)
    np.testing.assert_array_equal(found["bias"], np.arange(3.0))


def test_clusters_are_arguments_of_the_step(model):
    _, _, quantized = model
    tx = share_weights(quantized)
    params = dequantize(quantized)
    state = tx.init(params)
    jaxpr = jax.make_jaxpr(tx.update)(params, state)
    assert max((np.size(const) for const in jaxpr.consts), default=0) < 100
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 9 * 6 + 96 * 32


def test_wrapped_and_partial_trees():
    """NNX hands Variables to `init` and bare arrays to `update`; `optax.masked` takes leaves out."""
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    quantized = to_codebooks(nnx.as_pure(state), bits=1)
    tx = share_weights(quantized)
    updates, _ = tx.update(nnx.as_pure(state), tx.init(state))
    assert len(np.unique(updates["kernel"])) <= 2
    masked, plain = optax.masked(tx, {"kernel": False, "bias": True}), dict(nnx.as_pure(state))
    updates, _ = masked.update(plain, masked.init(plain))
    np.testing.assert_array_equal(updates["kernel"], module.kernel[...])


def test_values_without_members_stay():
    codebook = Codebook(np.zeros((2, 2), np.uint8), np.asarray([1.0, 7.0], np.float32), 1, np.ones((2, 2), bool))
    shared = reshare({"w": codebook}, {"w": jnp.full((2, 2), 3.0)})
    assert shared["w"].values.tolist() == [3.0, 7.0]


BOOK = to_codebooks({"w": np.ones((2, 3), np.float32)}, bits=1)
REFUSED = {
    "no codebook": (lambda: share_weights(to_integers({"w": np.ones((2, 3), np.float32)})), "No leaf is a `Codebook`"),
    "nothing to bring back": (lambda: reshare({"w": np.ones(3)}, {"w": jnp.ones(3)}), "No leaf is a `Codebook`"),
    "missing": (lambda: share_weights(BOOK).init({"v": jnp.ones((2, 3))}), "The quantized leaf 'w' is no leaf of the"),
    "shape": (lambda: share_weights(BOOK).init({"w": jnp.ones(3)}), r"'w' was quantized with shape \(2, 3\), in the"),
    "shape back": (lambda: reshare(BOOK, {"w": jnp.ones((3, 2))}), r"'w' .* in the params it has \(3, 2\)"),
    "missing back": (lambda: reshare(BOOK, {"v": jnp.ones((2, 3))}), "The quantized leaf 'w' is no leaf of the params"),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_leaf(call, words):
    with pytest.raises(ValueError, match=words):
        call()
