"""Masks that move: as many weights in every leaf at every step, the lowest out, the highest in, exact zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick")

SHAPES = {"a": (12, 10), "conv": (3, 3, 4, 6), "stack": (2, 6, 8), "bias": (10,)}
LAYOUT = jp.FLAX.with_rules({"stack": jp.layout.Axes(layers=(0,), inputs=(1,), outputs=(2,))})
METHOD = jp.Method(distribution=jp.ERK(), layout=LAYOUT)
GROW = {"set": jp.criteria.random, "rigl": jp.criteria.gradient, "momentum": jp.criteria.momentum(0.5)}


@pytest.fixture(autouse=True)
def as_users_have_it(relaxed):
    """optax promotes dtypes in Adam."""


def draw(seed, lead=()):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=(*lead, *shape)), jnp.float32) for name, shape in SHAPES.items()}


def layers(name, leaf):
    """Layers of a leaf, as flat arrays."""
    leaf = np.asarray(leaf)
    return leaf.reshape(2, -1) if name == "stack" else leaf.reshape(1, -1)


def moved(alive, drop, grow, fraction):
    """Evci et al. 2020, algorithm 1, of one layer."""
    leaving = round(float(np.float32(fraction) * np.float32(alive.sum())))
    order = np.where(alive, drop, -1)
    kept = oracle.top_k(order, int(alive.sum()) - leaving)
    return kept | oracle.top_k(np.where(kept, -1, grow), leaving)


@jax.jit
def random_masks(params, sparsity, key):
    return jp.compute_masks(jp.Method(jp.criteria.random, layout=LAYOUT), params, sparsity, key=key)


@jax.jit
def moved_by_gradient(params, masks, fraction, grads):
    return jp.training.regrow_masks(METHOD, jp.criteria.gradient, params, masks, fraction, grads=grads)


@given(seed=st.integers(0, 5), sparsity=st.sampled_from([0.3, 0.9]), fraction=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_one_step_is_the_papers(seed, sparsity, fraction):
    params, grads = draw(seed), draw(seed + 100)
    masks = random_masks(params, jnp.float32(sparsity), jax.random.key(seed))
    params = jp.apply_masks(params, masks)
    found = moved_by_gradient(params, masks, jnp.float32(fraction), grads)
    for name in SHAPES:
        if name == "bias":
            assert found[name].all()
            continue
        rows = zip(*(layers(name, tree[name]) for tree in (masks, params, grads, found)), strict=True)
        for alive, w, g, got in rows:
            np.testing.assert_array_equal(got, moved(alive, np.abs(w), np.abs(g), fraction))


def test_what_just_died_may_come_back_at_once():
    params, masks = {"w": jnp.asarray([[1.0, 2.0, 0.0, 0.0]])}, {"w": jnp.asarray([[True, True, False, False]])}
    grads = {"w": jnp.asarray([[9.0, 0.0, 1.0, 2.0]])}
    found = jp.training.regrow_masks(jp.Method(), jp.criteria.gradient, params, masks, 0.5, grads=grads)
    assert found["w"].tolist() == [[True, True, False, False]]


def test_living_zeros_are_alive():
    """A weight that grew and has not learned yet is zero, and no less alive than the dead."""
    params, masks = {"w": jnp.zeros((1, 4))}, {"w": jnp.asarray([[False, True, True, False]])}
    found = jp.training.regrow_masks(jp.Method(), jp.criteria.gradient, params, masks, 0.0, grads=params)
    assert found["w"].tolist() == masks["w"].tolist()


def test_blocks_move_whole():
    params, grads = draw(0), draw(1)
    method = jp.Method(granularity=jp.Block(2, 2), layout=LAYOUT)

    @jax.jit
    def before_and_after(params, grads):
        masks = jp.compute_masks(method, params, 0.5)
        return masks, jp.training.regrow_masks(method, jp.criteria.gradient, params, masks, 0.3, grads=grads)["a"]

    masks, found = before_and_after(params, grads)
    tiles = np.asarray(found).reshape(6, 2, 5, 2).sum((1, 3))
    assert set(tiles.ravel().tolist()) == {0, 4}
    assert found.sum() == masks["a"].sum()
    assert (found != masks["a"]).any()


def momentum():
    return optax.sgd(0.1, momentum=0.9)


def adamw():
    return optax.adamw(0.05, weight_decay=0.1)


# Every way to grow, every optimizer, and both for one way: what grows does not look at the optimizer.
@pytest.mark.parametrize(
    ("name", "inner"), [("set", momentum), ("rigl", momentum), ("rigl", adamw), ("momentum", adamw)]
)
def test_training(name, inner):
    """Each leaf keeps its number, dead weights are +0, masks move when due and only then, in one trace."""
    leaves, traces = ("conv", "stack", "bias"), []
    params, grads = ({leaf: tree[leaf] for leaf in leaves} for tree in (draw(0), draw(1, lead=(9,))))
    tx = jp.regrow(
        inner(), METHOD, sparsity=0.8, key=jax.random.key(0), grow=GROW[name], update_when=jp.every(3, begin=3),
        drop_fraction=optax.cosine_decay_schedule(0.5, 9),
    )  # fmt: skip

    @jax.jit
    def step(params, state, grads):
        traces.append(1)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    counts = {name: layers(name, mask).sum(1).tolist() for name, mask in state.masks.items()}
    assert jp.sparsity_of(state.masks, jp.weights) == pytest.approx(0.8, abs=0.02)
    for i in range(9):
        before = state.masks
        params, state = step(params, state, {name: one[i] for name, one in grads.items()})
        assert {name: layers(name, mask).sum(1).tolist() for name, mask in state.masks.items()} == counts
        same = all(np.array_equal(before[name], mask) for name, mask in state.masks.items())
        assert same == (i not in (3, 6))
        for leaf, mask in state.masks.items():
            assert not np.asarray(params[leaf]).view(np.uint32)[~np.asarray(mask)].any()
    assert len(traces) == 1


def test_it_begins_as_the_distribution_has_it():
    params = draw(0)
    state = jp.regrow(optax.sgd(0.1), METHOD, sparsity=0.8, key=jax.random.key(3)).init(params)
    again = jp.regrow(optax.sgd(0.1), METHOD, sparsity=0.8, key=jax.random.key(3)).init(params)
    other = jp.regrow(optax.sgd(0.1), METHOD, sparsity=0.8, key=jax.random.key(4)).init(params)
    wanted = jp.compute_masks(jp.Method(jp.criteria.random, distribution=jp.ERK(), layout=LAYOUT), params, 0.8,
                              key=jax.random.key(3))  # fmt: skip
    for name in SHAPES:
        np.testing.assert_array_equal(state.masks[name], wanted[name])
        np.testing.assert_array_equal(state.masks[name], again.masks[name])
    assert any((state.masks[name] != other.masks[name]).any() for name in SHAPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop_fraction": 1.5}, r"`drop_fraction` is a fraction of the living weights, in \[0, 1\]; got 1.5"),
        ({"sparsity": 90}, "Did you mean 0.9"),
        ({"method": jp.Method(distribution=jp.NM(2, 4))}, "would break the pattern of `NM`"),
        (
            {"method": jp.Method(distribution=jp.distributions.ByRule({"*": jp.NM(2, 4)}))},
            "would break the pattern of `ByRule`",
        ),
    ],
)
def test_refusals(change, message):
    given = {"method": METHOD, "sparsity": 0.5, "key": jax.random.key(0)} | change
    with pytest.raises(ValueError, match=message):
        jp.regrow(optax.sgd(0.1), **given).init(draw(0))


def test_no_params():
    tx = jp.regrow(optax.sgd(0.1), METHOD, sparsity=0.5, key=jax.random.key(0))
    with pytest.raises(ValueError, match="`regrow` needs the params"):
        tx.update(draw(0), tx.init(draw(0)))
