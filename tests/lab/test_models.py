"""The networks: parameter counts to the digit, names, randomness that is asked for and no other, strict dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from flax import nnx

from jaxprune import tree
from jaxprune.lab import models
from jaxprune.lab.models import small
from jaxprune.lab.recipe.config import ConfigError, Model

pytestmark = pytest.mark.usefixtures("quick")

KEY = jax.random.key(0)
GREY, COLOUR, SMALL, DIGIT = (28, 28, 1), (32, 32, 3), (16, 16, 1), (8, 8, 1)
CONVS = ["conv1/bias", "conv1/kernel", "conv2/bias", "conv2/kernel", "fc1/bias", "fc1/kernel", "fc2/bias", "fc2/kernel"]


def shapes(model, image, classes=10):
    """The leaves without their values, which take seconds to draw."""
    return tree.named_leaves(jax.eval_shape(lambda: models.build(model, KEY, image, classes).params))


def with_noise(model, image):
    """The network with params of noise, its biases zero."""
    network = models.shapes(model, image, 10)
    return network._replace(params=drawn(network.params, 0.1))


def uniform(*shape):
    return np.random.default_rng(3).random(shape, np.float32)


def kernels_and_biases(leaves):
    return tuple(sum(leaf.size for name, leaf in leaves.items() if name.endswith(end)) for end in ("kernel", "bias"))


# LeNet-300-100 and LeNet-5 as counted by Han et al. 2015 (arXiv:1506.02626, tables 3 and 4) and everyone since.
@pytest.mark.parametrize(
    ("model", "image", "weights", "biases"),
    [
        (Model(name="lenet_300_100"), GREY, 266_200, 410),
        (Model(name="mlp", widths=(512, 512)), GREY, 784 * 512 + 512 * 512 + 512 * 10, 512 + 512 + 10),
        (Model(name="mlp", widths=()), DIGIT, 640, 10),
        (Model(name="lenet_5"), GREY, 430_500, 580),
        (Model(name="lenet_5"), COLOUR, 75 * 20 + 500 * 50 + 1250 * 500 + 5000, 580),
        (Model(name="tf_tutorial_cnn"), GREY, 800 + 51_200 + 3136 * 1024 + 10_240, 32 + 64 + 1024 + 10),
    ],
)
def test_parameter_counts(model, image, weights, biases):
    leaves = shapes(model, image)
    assert kernels_and_biases(leaves) == (weights, biases)

    def logits_of(images):
        network = models.build(model, KEY, image, 10)
        assert models.parameter_count(network.params) == weights + biases
        return network.apply(network.params, images)

    logits = jax.eval_shape(logits_of, jnp.zeros((2, *image)))
    assert logits.shape == (2, 10)
    assert logits.dtype == jnp.float32


def test_shapes_of_the_published_networks():
    leaves = shapes(Model(name="tf_tutorial_cnn"), GREY)
    assert {name: leaf.shape for name, leaf in leaves.items() if name.endswith("kernel")} == {
        "conv1/kernel": (5, 5, 1, 32), "conv2/kernel": (5, 5, 32, 64),
        "fc1/kernel": (3136, 1024), "fc2/kernel": (1024, 10),
    }  # fmt: skip
    leaves = shapes(Model(name="lenet_5"), GREY)
    assert [leaves[name].size for name in CONVS if name.endswith("kernel")] == [500, 25_000, 400_000, 5_000]


def test_leaf_names():
    mlp = shapes(Model(name="mlp", widths=(5, 4)), DIGIT, 3)
    assert sorted(mlp) == [f"layers/{i}/{kind}" for i in range(3) for kind in ("bias", "kernel")]
    for name in ("lenet_5", "tf_tutorial_cnn"):
        assert sorted(shapes(Model(name=name), GREY)) == CONVS


def test_equal_keys_give_equal_weights_and_others_others():
    def leaves(seed):
        return tree.named_leaves(models.build(Model(name="mlp", widths=(8, 8)), jax.random.key(seed), DIGIT, 10).params)

    one, same, other = leaves(1), leaves(1), leaves(2)
    for name in one:
        assert np.array_equal(one[name], same[name])
        assert np.array_equal(one[name], other[name]) == name.endswith("bias"), name  # biases begin at zero
    # the layers draw from different keys, too
    assert not np.array_equal(one["layers/1/kernel"], one["layers/0/kernel"][:8])


def by_hand(params, x):
    """The mlp in NumPy."""
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    for i in range(3):
        layer = params["layers"][i]
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
        x = np.maximum(x, 0) if i < 2 else x
    return x


def test_the_mlp_is_what_it_says():
    network, x = with_noise(Model(name="mlp", widths=(8, 6)), DIGIT), uniform(4, *DIGIT)
    logits = jax.jit(network.apply)(network.params, x)
    np.testing.assert_allclose(logits, by_hand(network.params, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lenet_5", "tf_tutorial_cnn"])
def test_only_the_tutorial_network_has_relu_after_its_convolutions(name):
    network = with_noise(Model(name=name), SMALL)
    padding = {"lenet_5": "VALID", "tf_tutorial_cnn": "SAME"}[name]

    def written_out(p, x):
        for conv in ("conv1", "conv2"):
            x = jax.lax.conv_general_dilated(
                x, p[conv]["kernel"], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = x if name == "lenet_5" else jnp.maximum(x, 0)  # biases are zero
            x = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3]).max((2, 4))
        return jnp.maximum(x.reshape(x.shape[0], -1) @ p["fc1"]["kernel"], 0) @ p["fc2"]["kernel"]

    both = jax.jit(lambda params, x: (network.apply(params, x), written_out(params, x)))
    got, want = both(network.params, uniform(2, *SMALL) - 1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "image"),
    [(Model(name="mlp", widths=(64, 64), dropout=0.5), DIGIT), (Model(name="lenet_5", dropout=0.5), SMALL)],
)
def test_dropout_comes_with_a_key_and_only_then(model, image):
    network, x = with_noise(model, image), uniform(4, *image)
    apply, keys = jax.jit(network.apply), jax.random.split(jax.random.key(4), 2)
    still = apply(network.params, x)
    assert np.array_equal(still, apply(network.params, x))
    drawn = [apply(network.params, x, key) for key in keys]
    assert np.array_equal(drawn[0], apply(network.params, x, keys[0]))
    assert not np.allclose(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], still)
    # dropped activations are made up for: the mean over many draws is near the network without dropout
    if model.name == "lenet_5":  # one dropout, and what comes after it is linear
        many = np.asarray(jax.vmap(apply, (None, None, 0))(network.params, x, jax.random.split(KEY, 800)))
        np.testing.assert_allclose(many.mean(0), still, atol=0.15 * np.abs(still).max())


def test_without_dropout_a_key_changes_nothing():
    network, x = with_noise(Model(name="mlp", widths=(8,)), DIGIT), np.ones((2, *DIGIT), np.float32)
    apply = jax.jit(network.apply)
    assert np.array_equal(apply(network.params, x), apply(network.params, x, KEY))


@pytest.mark.parametrize("image", [DIGIT, (28, 15, 1), (15, 28, 1), (4, 4, 1)])
def test_too_small_images_are_refused(image):
    with pytest.raises(ConfigError, match=rf"16 x 16 pixels or more, got {image[0]} x {image[1]}"):
        shapes(Model(name="lenet_5"), image)
    assert shapes(Model(name="lenet_5"), SMALL)


def test_the_tutorial_network_takes_smaller_ones():
    with pytest.raises(ConfigError, match="4 x 4 pixels or more, got 3 x 4"):
        shapes(Model(name="tf_tutorial_cnn"), (3, 4, 1))
    assert shapes(Model(name="tf_tutorial_cnn"), (4, 4, 1))


@pytest.mark.parametrize("name", ["mlp", "lenet_5", "tf_tutorial_cnn"])
def test_gradients_under_jit_and_strict_promotion(name):
    """conftest makes dtype and rank promotion strict: a float64 or a weak type that slips in raises."""
    model = Model(name=name, widths=(16,), dropout=0.1) if name == "mlp" else Model(name=name, dropout=0.1)
    network = with_noise(model, SMALL)
    assert jax.config.jax_numpy_dtype_promotion == "strict"

    @jax.jit
    def gradients(params, images, key):
        return jax.grad(lambda p: jnp.mean(network.apply(p, images, key) ** 2))(params)

    grads = gradients(network.params, jnp.ones((2, *SMALL)), KEY)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, network.params)


@pytest.mark.parametrize("side", [4, 7])
def test_the_derivative_of_max_pooling_is_that_of_the_pooling_it_replaces(side):
    x = jax.random.normal(jax.random.key(0), (3, side, side + 1, 2))
    y, pull = jax.vjp(small.max_pool, x)
    expected, pull_back = jax.vjp(lambda x: nnx.max_pool(x, (2, 2), (2, 2)), x)
    np.testing.assert_array_equal(y, expected)
    g = jax.random.normal(jax.random.key(1), y.shape)
    np.testing.assert_array_equal(*pull(g), *pull_back(g))


@pytest.mark.parametrize(("name", "leaf"), [("lenet_5", "fc1/kernel"), ("lenet_300_100", "layers/1/kernel")])
def test_rates_stand_for_the_dropout_of_their_leaf(name, leaf):
    model = Model(name=name, dropout=0.9)
    network = models.build(model, jax.random.key(0), (28, 28, 1), 10)
    x, key = jax.random.uniform(jax.random.key(1), (4, 28, 28, 1)), jax.random.key(2)
    none = dict.fromkeys(("fc1/kernel", "layers/0/kernel", "layers/1/kernel"), 0.0)
    np.testing.assert_array_equal(network.apply(network.params, x, key, none), network.apply(network.params, x))
    some = network.apply(network.params, x, key, none | {leaf: 0.5})
    assert not np.allclose(some, network.apply(network.params, x))
