"""Leaves of three axes: the layers of a scan, where the model says so or a rule; refused by name where nothing does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_helpers import FORMATS

import jaxprune as jp
from jaxprune import sparse

X = jnp.ones((2, 6))
PARAMS = {"layers": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 6)), "float32")}}


def scanned(params, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"]["kernel"])[0]


SITES = jp.trace(scanned, PARAMS, X)
BY_AXES = {
    "output": jp.Method(granularity=jp.Output()),
    "input": jp.Method(granularity=jp.Input(), distribution=jp.Uniform()),
    "head": jp.Method(granularity=jp.Head(2)),
    "per output": jp.Method(distribution=jp.PerOutput()),
    "by rule": jp.Method(granularity=jp.granularity.ByRule({"*": jp.Output()}), distribution=jp.Uniform()),
    "torch": jp.Method(granularity=jp.Output(), layout=jp.TORCH),
}
MESSAGE = r"Leaf 'layers/kernel' \(3, 6, 6\) may be stacked layers.*trace.*with_rules\(\{'layers/kernel': Axes\("


@pytest.mark.parametrize("name", BY_AXES)
def test_axes_that_nothing_tells_are_refused_by_name(name):
    with pytest.raises(ValueError, match=MESSAGE):
        jax.eval_shape(lambda params: jp.compute_masks(BY_AXES[name], params, 0.5), PARAMS)


def test_single_weights_and_convolutions_by_name_need_no_word():
    for method in (jp.Method(), jp.Method(granularity=jp.Block(2, 2)), jp.Method(distribution=jp.NM(1, 2))):
        jax.eval_shape(lambda params, method=method: jp.compute_masks(method, params, 0.5), PARAMS)
    convolution = {"Conv_0": PARAMS["layers"]}
    jax.eval_shape(lambda params: jp.compute_masks(jp.Method(granularity=jp.Output()), params, 0.5), convolution)


def test_the_model_says_that_they_are_layers():
    """Each layer loses outputs of its own, as if the model were unrolled."""
    method = jp.Method(granularity=jp.Output(), distribution=jp.Uniform(), layout=jp.layout_of(SITES))
    mask = np.asarray(jp.compute_masks(method, PARAMS, 0.5)["layers"]["kernel"])
    for layer, one in enumerate(PARAMS["layers"]["kernel"]):
        alone = jp.Method(granularity=jp.Output(), distribution=jp.Uniform())
        np.testing.assert_array_equal(mask[layer], jp.compute_masks(alone, {"kernel": one}, 0.5)["kernel"])


@pytest.mark.parametrize("format", FORMATS)
def test_compress_takes_no_layers_for_a_convolution(format):
    with pytest.raises(ValueError, match=MESSAGE):
        sparse.compress(PARAMS, format)
    with pytest.raises(ValueError, match=r"'layers/kernel' \(3, 6, 6\) is stacked layers"):
        sparse.compress(PARAMS, format, layout=jp.layout_of(SITES))
    kept = sparse.compress(PARAMS, format, layout=jp.layout_of(SITES), unsupported="dense")
    assert kept["layers"]["kernel"] is PARAMS["layers"]["kernel"]
