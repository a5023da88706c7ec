"""Evidence is the same in every transformation: updates as `grads`, a key folded with the step, and what `update` gets.

What is handed in by keyword goes before what a transformation would say itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick")

KEY = jax.random.key(5)
PARAMS = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)}
GRADS = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32)}
OTHER = {"kernel": jnp.asarray(np.random.default_rng(2).normal(size=(4, 6)), jnp.float32)}
ALL = {
    "prune": lambda method, **key: jp.prune(optax.sgd(0.1), method, sparsity=0.5, update_when=True, **key),
    "splice": lambda method, **key: jp.splice(optax.sgd(0.1), method, sparsity=0.5, update_when=True, **key),
    "growing_penalty": lambda method, **key: jp.training.growing_penalty(
        method, 0.5, rise=0.1, every=1, ceiling=1.0, **key
    ),
    "regrow": lambda method, key: jp.regrow(optax.sgd(0.1), method, sparsity=0.5, update_when=True, key=key),
    "regrow by": lambda method, key: jp.regrow(
        optax.sgd(0.1), jp.Method(), sparsity=0.5, update_when=True, key=key, grow=method.criterion
    ),
}


def spies():
    """Criteria that remember nothing and something, and what they were told last."""
    told = {}

    def plain(params, /, **evidence):
        told.update(plain=evidence)
        return {name: jnp.abs(leaf) for name, leaf in params.items()}

    def moved(statistics, params, /, **evidence):
        told.update(running=evidence)
        return statistics

    def scored(params, /, *, statistics, **evidence):
        told.update(scored=evidence)
        return {name: jnp.abs(leaf) for name, leaf in params.items()}

    zeros = jp.criteria.Running(
        lambda params: {name: jnp.zeros_like(leaf) for name, leaf in params.items()}, moved, scored
    )
    return told, {"plain": plain, "running": zeros}


def same(view, tree):
    return np.array_equal(np.asarray(view["kernel"]).reshape(4, 6), tree["kernel"])


@pytest.mark.parametrize("kind", ["plain", "running"])
@pytest.mark.parametrize("name", ALL)
def test_updates_are_the_gradients_and_keywords_go_before(name, kind):
    told, criteria = spies()
    tx = ALL[name](jp.Method(criteria[kind]), key=KEY)
    start = tx.init(PARAMS)
    steps = range(1) if name == "growing_penalty" else range(2)  # it chooses once
    kinds = ["plain"] if kind == "plain" else ["running", "scored"]

    state, landed = start, []
    for step in steps:
        told.clear()
        updates, state = tx.update(GRADS, state, PARAMS, value=jnp.float32(step))
        landed.append(updates)
        for one in kinds:
            assert same(told[one]["grads"], GRADS)
            assert told[one]["key"] == jax.random.fold_in(KEY, step)
            assert float(told[one]["value"]) == step
    updates, _ = tx.update(GRADS, start, PARAMS, value=jnp.float32(0), grads=OTHER, key=jax.random.key(9))
    for one in kinds:
        assert same(told[one]["grads"], OTHER)
        assert told[one]["key"] == jax.random.key(9)  # as it is
    first, second = (np.asarray(one["kernel"]) for one in (landed[0], updates))
    moved = (first != -PARAMS["kernel"]) & (second != -PARAMS["kernel"])  # alive both times
    assert moved.any()
    np.testing.assert_array_equal(first[moved], second[moved])  # what is trained on stays the updates


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("regrow")])
def test_without_a_key_there_is_none(name):
    told, criteria = spies()
    tx = ALL[name](jp.Method(criteria["plain"]))
    tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert told["plain"].keys() & {"key", "grads"} == {"grads"}


TRANSFORMATIONS = ALL | {
    "keep_params_sparse": lambda method, **_: jp.keep_params_sparse({"kernel": jnp.ones((4, 6), bool)}),
    "l1": lambda method, **_: jp.training.l1(0.1),
    "group_lasso": lambda method, **_: jp.training.group_lasso(0.1),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_all_need_the_params(name):
    tx = TRANSFORMATIONS[name](jp.Method(), key=KEY)
    message = f"`{name.removesuffix(' by')}` needs the params: call `tx.update\\(grads, opt_state, params\\)`."
    with pytest.raises(ValueError, match=message):
        tx.update(GRADS, tx.init(PARAMS))


@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if name != "keep_params_sparse"])
def test_all_but_fixed_masks_refuse_to_find_nothing(name):
    tx = TRANSFORMATIONS[name](jp.Method(), key=KEY)
    with pytest.raises(ValueError, match=r"`select` chooses no leaf to prune\. There are: 'bias'"):
        tx.init({"bias": jnp.ones(3)})
    assert not jax.tree.leaves(optax.tree.get(tx.init({}), "masks", ()))
