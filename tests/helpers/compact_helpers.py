"""What the tests of compaction share: masks of channels, and the masked model beside the smaller ones."""

import jax
import jax.numpy as jnp
import numpy as np
from quick import quick_jit

import jaxprune as jp
from jaxprune import tree


def halved(fn, params, *args, sparsity=0.5):
    """Masks without the first half of the channels of every layer, in an order drawn at random."""
    found, rng = jp.couplings(fn, params, *args), np.random.default_rng(0)
    dead = [channel for layer in found.layers for channel in rng.permutation(layer)[: round(sparsity * len(layer))]]

    def mask(name, leaf):
        alive = np.ones(leaf.shape, bool)
        for axis, ids in enumerate(found.channels[name]):
            np.moveaxis(alive, axis, 0)[np.isin(ids, dead)] = False
        return jnp.asarray(alive)

    return tree.map_named(mask, params)


def all_alive(params):
    """Masks of True, without a program to compile for every shape."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.ones(leaf.shape, bool)), params)


def by_magnitude(fn, params, x, sparsity):
    """Masks without the channels of the least magnitude, as many of every layer."""
    method = jp.Method(granularity=jp.Channels(jp.couplings(fn, params, x)), distribution=jp.Uniform())
    return quick_jit(lambda params: jp.compute_masks(method, params, sparsity))(params)


def beside_the_masked_model(fn, params, masks, x, *calls):
    """What the masked model gives, and what (function, params) pairs do; one program for all, which compiles faster."""

    @quick_jit
    def run(params, masks, others):
        return fn(jp.apply_masks(params, masks), x), [call(p, x) for (call, _), p in zip(calls, others, strict=True)]

    return run(params, masks, [other for _, other in calls])


def all_equal_the_masked_model(fn, params, masks, x, *calls):
    """Every (function, params) pair gives what the masked model gives, each number of it."""
    want, got = beside_the_masked_model(fn, params, masks, x, *calls)
    for each in got:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), each, want)


def error_of(small, fn, params, masks, x):
    """The smaller model's largest difference from the masked one, by the latter's largest result.

    Where the function itself takes the smaller params, its own is one of them.
    """
    calls = [(small.apply, small.params), (fn, small.params)][: 1 if small.refusal else 2]
    want, got = beside_the_masked_model(fn, params, masks, x, *calls)
    return max(float(np.max(np.abs(each - np.asarray(want)))) for each in got) / float(np.max(np.abs(want)))


def weights(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def count_dead(masks):
    return sum(int(np.sum(~np.asarray(mask))) for mask in jax.tree.leaves(masks))
