"""Groups: the mean of their weights, and one verdict for all of them."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxprune as jp
from jaxprune import Block, Element, Head, Input, Kernel, Output

# rows, cols of a group (None: the whole axis), and whether it spans the window
ORACLES = {
    Element(): (1, 1, False),
    Block(2, 3): (2, 3, False),
    Block(1, 4): (1, 4, False),
    Block(100, 100): (100, 100, False),
    Input(): (1, None, True),
    Output(): (None, 1, True),
    Kernel(): (1, 1, True),
}
SHAPES = [(1, 4, 6), (4, 5, 7), (3, 1, 5, 4)]

each = pytest.mark.parametrize("granularity", ORACLES, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@each
@shapes
def test_a_group_is_worth_the_mean_of_its_weights(granularity, shape):
    rows, cols, spatial = ORACLES[granularity]
    scores = np.random.default_rng(0).integers(0, 5, shape)
    groups = granularity.pool(jnp.asarray(scores, jnp.float32))
    want = oracle.pool(scores, rows, cols, spatial)
    assert groups.shape == want.shape
    assert groups.dtype == jnp.float32
    np.testing.assert_allclose(groups, want, rtol=2e-7)
    # Sums of small integers are exact, and equal sums of groups of one size stay equal.
    if (want.shape[-2] * (rows or shape[-2]), want.shape[-1] * (cols or shape[-1])) == shape[-2:]:
        assert len(np.unique(groups)) == len(np.unique(want.round(9)))


@each
@shapes
def test_the_verdict_reaches_every_weight_of_the_group(granularity, shape):
    rows, cols, _ = ORACLES[granularity]
    groups = granularity.pool(jnp.zeros(shape))
    kept = np.random.default_rng(0).random(groups.shape) < 0.5
    mask = granularity.expand(jnp.asarray(kept), shape)
    assert mask.shape == shape
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, oracle.expand(kept, rows, cols, shape))


@each
@shapes
def test_pool_undoes_expand(granularity, shape):
    """A group of equal weights is worth what they are worth: sizes at the far edge do not matter."""
    groups = granularity.pool(jnp.zeros(shape)).shape
    kept = np.random.default_rng(1).random(groups) < 0.5
    mask = granularity.expand(jnp.asarray(kept), shape)
    np.testing.assert_array_equal(granularity.pool(mask.astype(jnp.float32)), kept)


@pytest.mark.parametrize(("rows", "cols"), [(0, 1), (1, 0), (-2, 4)])
def test_empty_blocks_are_refused(rows, cols):
    with pytest.raises(ValueError, match=rf"`Block` needs at least 1 row and 1 column, got {rows} x {cols}"):
        Block(rows, cols)


@pytest.mark.parametrize("shape", [(1, 4, 6), (2, 3, 6, 8), (9, 2, 4)], ids=str)
@pytest.mark.parametrize("along", ["outputs", "inputs"])
def test_heads_are_equal_shares_of_an_axis(shape, along):
    scores = np.random.default_rng(0).integers(0, 5, shape).astype(np.float32)
    head, axis = Head(2, along), -1 if along == "outputs" else -2
    halves = np.split(scores, 2, axis)
    groups = np.asarray(head.pool(jnp.asarray(scores)))
    assert groups.shape == (*shape[:-3], *((1, 1, 2) if along == "outputs" else (1, 2, 1)))
    want = np.concatenate([half.mean((-3, -2, -1), keepdims=True) for half in halves], axis)
    np.testing.assert_allclose(groups, want, rtol=1e-6)
    kept = np.random.default_rng(1).random(groups.shape) < 0.5
    mask = np.asarray(head.expand(jnp.asarray(kept), shape))
    for half, verdict in zip(np.split(mask, 2, axis), np.split(kept, 2, axis), strict=True):
        np.testing.assert_array_equal(half, np.broadcast_to(verdict, half.shape))


def test_the_weakest_head_goes_and_experts_are_outputs():
    query = jnp.ones((4, 6)) * jnp.repeat(jnp.asarray([2.0, 1.0, 3.0]), 2)[None]
    masks = jp.compute_masks(jp.Method(granularity=Head(3), distribution=jp.Uniform()), {"wq": query}, 0.33)
    assert masks["wq"].all(0).tolist() == [True, True, False, False, True, True]
    experts = jnp.ones((3, 4, 5)) * jnp.asarray([2.0, 1.0, 3.0])[:, None, None]
    layout = jp.FLAX.with_rules({"experts": jp.layout.Axes(inputs=(1, 2), outputs=(0,))})
    method = jp.Method(granularity=Output(), distribution=jp.Uniform(), layout=layout)
    masks = jp.compute_masks(method, {"experts": experts}, 0.33)
    assert masks["experts"].all((1, 2)).tolist() == [True, False, True]
    assert masks["experts"].any((1, 2)).tolist() == [True, False, True]


def test_heads_that_do_not_divide_are_refused_by_the_leafs_name(unchecked):
    with pytest.raises(
        ValueError, match=r"Leaf 'wq': 6 outputs do not divide into 4 heads. Leave it out with `select`"
    ):
        jp.compute_masks(jp.Method(granularity=Head(4)), {"wq": jnp.ones((4, 6))}, 0.5)
    for heads, along in ((0, "outputs"), (2, "rows")):
        with pytest.raises(ValueError, match=f"got {heads} along {along}"):
            Head(heads, along)
