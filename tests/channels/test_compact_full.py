"""Compaction of the zoo's models at their own size: what is left computes what the masked model computed.

pytest -m slow tests/channels/test_compact_full.py      some minutes; VGG-19 for ImageNet needs 4 GiB
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compact_helpers import by_magnitude, count_dead, error_of, weights

import jaxprune as jp
from jaxprune.lab.models import zoo

NAMES = (
    "vgg16", "vgg19", "cifar_vgg16", "cifar_vgg19", "resnet20", "resnet32", "resnet56", "resnet50", "mobilenet_v1",
    "vit", "decoder",
)  # fmt: skip


def one_of(sample, seed=1):
    """A batch of one: pixels, or tokens."""
    rng, shape = np.random.default_rng(seed), (1, *sample.shape)
    if jnp.issubdtype(sample.dtype, jnp.integer):
        return jnp.asarray(rng.integers(0, 32_000, shape), sample.dtype)
    return jnp.asarray(rng.standard_normal(shape, np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_models_of_the_zoo(name, sparsity):
    network = zoo.build(name, jax.random.key(0))
    fn, params, x = network.apply, network.params, one_of(network.sample)
    masks = by_magnitude(fn, params, x, sparsity)
    small = jp.compact(fn, params, masks, x)
    assert error_of(small, fn, params, masks, x) < 1e-4
    assert weights(small.params) == weights(params) - count_dead(masks) < weights(params)
