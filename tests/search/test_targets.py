"""Targets: the least sparsity within a bound."""

import jax
import pytest
from compact_helpers import all_alive
from compact_models import MODELS, make_input

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick")


def model(name="flattened"):
    params, fn, shape = MODELS[name]()
    x = make_input(shape)
    channels = jp.Channels(jp.couplings(fn, params, x))
    return params, fn, x, jp.Method(granularity=channels, distribution=jp.Uniform())


@pytest.mark.parametrize(("of", "name"), [("macs", "flattened"), ("weights", "mlp")])
def test_the_cost_is_within_and_a_little_less_sparse_is_not(of, name):
    params, fn, x, method = model(name)
    cost = jp.search.compacted_cost(fn, params, x, of=of)
    bound = 0.45 * cost(all_alive(params))
    found = jp.masks_within(method, params, cost, bound, steps=3, most=0.8)
    assert found.cost == cost(found.masks) <= bound
    assert cost(jp.compute_masks(method, params, found.sparsity - 0.8 / 2**3)) > bound
    small = jp.compact(fn, params, found.masks, x)
    sites = jp.trace(small.apply, small.params, x)
    weights = sum(leaf.size for leaf in jax.tree.leaves(small.params))
    assert found.cost == (sum(site.macs for site in sites) if of == "macs" else weights)


def test_seconds_are_measured():
    params, fn, x, _ = model("mlp")
    assert 0 < jp.search.compacted_cost(fn, params, x, of="seconds")(all_alive(params)) < 1


def test_a_bound_that_dense_meets():
    params, _, _, method = model("mlp")
    found = jp.masks_within(method, params, lambda masks: 3.0, 3.0)
    assert found.sparsity == 0
    assert all(bool(mask.all()) for mask in jax.tree.leaves(found.masks))


def test_a_bound_out_of_reach_says_how_far_it_went():
    params, _, _, method = model("mlp")
    with pytest.raises(
        ValueError, match="bound 1 cannot be reached: the cost is 5 without pruning and 5 at a sparsity"
    ):
        jp.masks_within(method, params, lambda masks: 5.0, 1.0, most=0.5)
