"""Couplings in words: layers named by their matrices, what goes with each, and what is left alone by its name."""

import jax.numpy as jnp
import numpy as np
import pytest
from compact_models import MODELS, couplings_of
from jax import lax
from quick import quick_jit
from trace_helpers import normal

import jaxprune as jp
from jaxprune import tree

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_named_by_matrices(name):
    found = couplings_of(name)
    assert list(jp.Channels(found).layers) == list(found.names)
    for layer, group in zip(found.names, found.layers, strict=True):
        leaf, axis = layer.rsplit(":", 1)
        assert len(found.channels[leaf]) > 1
        assert "bias" not in leaf
        assert (leaf, int(axis.split(".")[0])) in found.members[group[0]]


def heads(p, x):  # biases of heads have two axes, and stand before the kernels
    q, k, v = (jnp.einsum("btd,dhf->bthf", x, p[n]["kernel"]) + p[n]["bias"][None, None] for n in ("key", "query", "v"))
    seen = jnp.einsum("bqhf,bkhf->bhqk", q, k)
    return jnp.einsum("bqhf,hfd->bqd", jnp.einsum("bhqk,bkhf->bqhf", seen, v), p["w_out"])


HEADS = {n: {"bias": normal(4, 3), "kernel": normal(6, 4, 3)} for n in ("key", "query", "v")} | {
    "w_out": normal(4, 3, 6)
}


def test_a_bias_of_several_axes_names_no_layer():
    found = jp.couplings(heads, HEADS, normal(2, 5, 6))
    assert found.names == ("key/kernel:1", "v/kernel:2")


def test_couplings_in_words():
    assert str(couplings_of("flattened")).splitlines() == [
        "layer       channels  goes with",
        "----------  --------  ---------------------------------------------------------------------",
        "a/kernel:3         8  a/bias:0, b/kernel:0 (9 each), n/bias:0, n/mean:0, n/scale:0, n/var:0",
        "b/kernel:1         6  b/bias:0, c/kernel:0",
        "",
        "stays, since it is an axis of pixels: a/kernel:0, a/kernel:1",
        "stays, since it is an input of the function: a/kernel:2",
        "stays, since it is an output of the function: c/bias:0, c/kernel:1",
    ]
    assert repr(couplings_of("flattened")) == "<Couplings: 14 channels of 2 layers, 10 leaves>"
    many = jp.couplings(lambda p, x: jnp.sum(lax.top_k(sum(x @ w for w in p), 3)[0]), [normal(5, 4)] * 9, normal(2, 5))
    told = str(many)
    assert told.startswith("No channel can be removed.\n\n")
    assert "stays, since it is an input of the function: 0:0, 1:0, 2:0, 3:0, 4:0, 5:0 and 3 more\n" in told
    assert "not followed: top_k at " in told


# patterns -> the layers that are left of the model of heads, or of those with a residual
IGNORED = {
    "v/kernel:2": ["key/kernel:1"],  # whole heads, as large as they were
    "*/kernel:2": ["key/kernel:1"],
    "key/*": ["v/kernel:2"],
    "query/bias": ["v/kernel:2"],
    "w_out": [],
    ("key/kernel:1", "v/bias:1"): [],
    (): ["key/kernel:1", "v/kernel:2"],
}


@pytest.mark.parametrize("ignore", IGNORED)
def test_a_layer_that_is_ignored_keeps_its_channels_in_every_leaf(ignore):
    found = jp.couplings(heads, HEADS, normal(2, 5, 6))
    channels = jp.Channels(found, ignore=ignore)
    assert list(channels.layers) == IGNORED[ignore]
    if not IGNORED[ignore]:
        return
    method = jp.Method(granularity=channels, distribution=jp.Uniform())
    masks = quick_jit(lambda params: jp.compute_masks(method, params, 0.5))(HEADS)
    dead = {(name, axis) for name, leaf in tree.named_leaves(masks).items() for axis in range(leaf.ndim)
            if not np.moveaxis(np.asarray(leaf), axis, 0).reshape(leaf.shape[axis], -1).any(1).all()}  # fmt: skip
    assert dead == {member for layer in channels.layers.values() for member in found.members[layer[0]]}


def test_a_pattern_that_ignores_nothing_is_refused():
    found = couplings_of("residual")
    with pytest.raises(ValueError, match=r"names 'fb/bias', which matches no layer and no leaf.*'a/kernel:3'"):
        jp.Channels(found, ignore=("stem/*", "fb/bias"))
    method = jp.Method(granularity=jp.Channels(found, ignore=["stem/*", "fc/bias"]))  # fc/bias stays anyhow
    assert hash(method) == hash(jp.Method(granularity=jp.Channels(found, ignore=("stem/*", "fc/bias"))))
    assert list(method.granularity.layers) == ["a/kernel:3"]
