"""`splice`: dead weights learn on behind the model's back, and come back at what they have become."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick")

METHOD = jp.Method(distribution=jp.Uniform())
WEIGHTS = np.array([[0.1, -0.5], [0.9, 0.2], [-0.3, 0.7]], np.float32)


def run(tx, grads, params):
    state, history = tx.init(params), []
    step = jax.jit(lambda params, state, grad: tx.update(grad, state, params))
    for grad in grads:
        updates, state = step(params, state, {"w": jnp.asarray(grad)})
        params = optax.apply_updates(params, updates)
        history.append((np.asarray(params["w"]), np.asarray(optax.tree.get(state, "masks")["w"])))
    return history, state


def oracle(grads, kept, rate, margin, decay, every):
    """The same in float64 NumPy: latent weights, of which the model sees the best."""
    latent, mask, history = WEIGHTS.astype(np.float64), np.ones(WEIGHTS.shape, bool), []
    for i, grad in enumerate(grads):
        if i % every == 0:
            scores = np.abs(latent) * np.where(mask, 1 + margin, 1)
            mask = np.zeros(mask.size, bool)
            mask[np.argsort(-scores.ravel(), kind="stable")[:kept]] = True
            mask = mask.reshape(WEIGHTS.shape)
        latent = latent - rate * (grad + np.where(mask, 0, decay * latent))
        history.append((np.where(mask, latent, 0), mask))
    return history


@pytest.mark.parametrize(("margin", "decay", "every"), [(0.0, 0.0, 1), (0.4, 0.0, 1), (0.0, 0.5, 2), (0.2, 0.1, 1)])
def test_latent_weights_in_numpy(relaxed, margin, decay, every):
    grads = np.random.default_rng(3).normal(size=(12, 3, 2)).astype(np.float32)
    tx = jp.splice(optax.sgd(0.2), METHOD, sparsity=0.5, update_when=jp.every(every), margin=margin, decay=decay)
    history, _ = run(tx, grads, {"w": jnp.asarray(WEIGHTS)})
    for (params, mask), (want, alive) in zip(history, oracle(grads, 3, 0.2, margin, decay, every), strict=True):
        np.testing.assert_array_equal(mask, alive)
        np.testing.assert_allclose(params, want, atol=1e-5)
        assert not params[~mask].view("uint32").any()


def test_a_weight_comes_back_at_the_value_it_came_to(relaxed):
    """0.1 is cut, is told to grow by 0.3 a step, and returns as 1.0; a pruned one would have stayed at zero."""
    grads = np.zeros((4, 3, 2), np.float32)
    grads[:, 0, 0] = -0.3
    (first, *_, last), _ = run(jp.splice(optax.sgd(1.0), METHOD, sparsity=0.5, update_when=jp.every(1)), grads,
                              {"w": jnp.asarray(WEIGHTS)})  # fmt: skip
    assert first[0][0, 0] == 0
    np.testing.assert_allclose(last[0][0, 0], 1.3, rtol=1e-6)


def test_a_margin_keeps_masks_from_flickering(relaxed):
    """Two weights that take turns in being the larger: without a margin the mask follows them."""
    weights = {"w": jnp.asarray([[1.0], [0.95]])}
    grads = [np.array([[sign * 0.1], [0.0]], np.float32) for sign in (1, -1) * 4]
    changes = {}
    for margin in (0.0, 0.2):
        tx = jp.splice(optax.sgd(1.0), METHOD, sparsity=0.5, update_when=jp.every(1), margin=margin)
        masks = [mask for _, mask in run(tx, grads, weights)[0]]
        changes[margin] = sum((a != b).any() for a, b in itertools.pairwise(masks))
    assert changes[0.0] >= 6
    assert changes[0.2] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -1.0}, r"splice\(margin"),
        ({"decay": float("nan")}, r"splice\(decay"),
        ({"sparsity": 90}, "fraction"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jp.splice(optax.sgd(0.1), METHOD, **{"sparsity": 0.5, **options})


def test_params_are_asked_for():
    tx = jp.splice(optax.sgd(0.1), METHOD, sparsity=0.5)
    with pytest.raises(ValueError, match="`splice` needs the params"):
        tx.update({"w": jnp.ones((3, 2))}, tx.init({"w": jnp.asarray(WEIGHTS)}))
