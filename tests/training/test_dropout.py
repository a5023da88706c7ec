"""Dropout of the pruned: the root of the share of connections that is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick")

SHAPES = {"dense": {"kernel": (6, 5), "bias": (5,)}, "conv": {"kernel": (3, 3, 2, 4)}, "stack": {"kernel": (2, 4, 3)}}


def make_masks(alive=0.3):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.random(s) < alive), SHAPES, is_leaf=lambda s: isinstance(s, tuple))


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5])
def test_it_is_the_papers(rate):
    masks = make_masks()
    for rates in (jp.training.adjusted_dropout(rate, masks), jax.jit(jp.training.adjusted_dropout)(rate, masks)):
        assert list(rates) == ["conv/kernel", "dense/kernel", "stack/kernel"]
        for name, found in rates.items():
            mask = np.asarray(masks[name.split("/")[0]]["kernel"])
            assert found.dtype == jnp.float32
            assert found.shape == ()
            np.testing.assert_allclose(found, rate * np.sqrt(np.count_nonzero(mask) / mask.size), rtol=1e-6)


def test_all_is_as_before_and_nothing_needs_none():
    assert float(jp.training.adjusted_dropout(0.5, make_masks(1.0))["dense/kernel"]) == 0.5
    assert float(jp.training.adjusted_dropout(0.5, make_masks(0.0))["dense/kernel"]) == 0.0


def test_select_is_that_of_methods():
    masks = make_masks()
    assert list(jp.training.adjusted_dropout(0.5, masks, "dense/*")) == ["dense/bias", "dense/kernel"]
    assert list(jp.training.adjusted_dropout(0.5, masks, {"conv/*": False, "*/kernel": True})) == [
        "dense/kernel",
        "stack/kernel",
    ]
    assert list(jp.training.adjusted_dropout(0.5, masks, lambda name, leaf: leaf.ndim == 1)) == ["dense/bias"]


@pytest.mark.parametrize("rate", [-0.1, 1.0, 50, float("nan")])
def test_a_rate_is_a_fraction(rate):
    with pytest.raises(ValueError, match=rf"`adjusted_dropout` needs a rate in \[0, 1\), got {rate:g}"):
        jp.training.adjusted_dropout(rate, make_masks())


@pytest.mark.parametrize(
    ("select", "message"),
    [(lambda name, leaf: False, "`select` chooses no leaf"), (["first/*"], "names 'first/\\*', which matches no leaf")],
)
def test_nothing_selected_is_refused(select, message):
    with pytest.raises(ValueError, match=message):
        jp.training.adjusted_dropout(0.5, make_masks(), select)
