"""The teacher's loss: the formula in float64, the cross entropy's gradient, no gradient to the teacher."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.training import distillation

pytestmark = pytest.mark.usefixtures("quick")

both = jax.jit(jax.value_and_grad(lambda z, other, t: jp.distillation_loss(z, other, temperature=t), (0, 1)))


def draw(seed, shape=(5, 7), dtype="float32"):
    return jnp.asarray(3 * np.random.default_rng(seed).normal(size=shape), dtype)


def softmax(z, t):
    z = np.asarray(z, np.float64) / t
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oracle(z, other, t):
    p, q = softmax(other, t), softmax(z, t)
    return t**2 * (p * np.log(p / q)).sum(-1).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4), (6,)])
def test_it_is_the_formula(shape, temperature):
    z, other = draw(0, shape), draw(1, shape)
    loss, (slope, none) = both(z, other, temperature)
    np.testing.assert_allclose(loss, oracle(z, other, temperature), rtol=1e-3)
    samples = max(int(np.prod(shape[:-1])), 1)
    # The paper's eq. 2, times T^2: the gradient of the cross entropy with soft targets.
    want = temperature * (softmax(z, temperature) - softmax(other, temperature)) / samples
    np.testing.assert_allclose(slope, want, rtol=1e-3, atol=1e-5)
    assert not np.any(none)


def test_it_is_optax_s_divergence():
    z, other = draw(0), draw(1)
    want = optax.losses.kl_divergence(jax.nn.log_softmax(z), jax.nn.softmax(other)).mean()
    np.testing.assert_allclose(jp.distillation_loss(z, other), want, rtol=1e-5)


def test_who_agrees_loses_nothing():
    z = draw(0)
    loss, (slope, _) = both(z, z + 5.0, 2.0)  # a shift of all logits is no difference
    assert abs(float(loss)) < 1e-5
    np.testing.assert_allclose(slope, np.zeros(z.shape), atol=1e-6)


def test_hot_teachers_compare_logits():
    """The paper's section 2.1: for high T and centred logits, the gradient is (z - z') / (N classes)."""
    z, other = (leaf - leaf.mean(-1, keepdims=True) for leaf in (draw(0), draw(1)))
    _, (slope, _) = both(z, other, 1000.0)
    np.testing.assert_allclose(slope, (z - other) / z.size, atol=2e-3)


def test_classes_left_out_have_no_say():
    z, other = draw(0), draw(1)
    gone = jnp.asarray([[-jnp.inf]] * 5)
    wide, wider = jnp.concatenate([z, gone], -1), jnp.concatenate([other, gone], -1)
    loss, (slope, _) = both(wide, wider, 2.0)
    np.testing.assert_allclose(loss, oracle(z, other, 2.0), rtol=1e-4)
    np.testing.assert_allclose(slope, np.concatenate([both(z, other, 2.0)[1][0], np.zeros((5, 1))], -1), rtol=1e-5)
    assert np.isnan(jp.distillation_loss(z, other.at[0, 0].set(jnp.nan)))


def test_bfloat16_logits_are_summed_in_float32():
    z, other = draw(0, dtype="bfloat16"), draw(1, dtype="bfloat16")
    loss, (slope, _) = both(z, other, 2.0)
    assert loss.dtype == jnp.float32
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, oracle(z.astype(jnp.float32), other.astype(jnp.float32), 2.0), rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_is_above_zero(temperature):
    with pytest.raises(ValueError, match=f"needs a finite temperature > 0, got {temperature:g}"):
        jp.distillation_loss(draw(0), draw(1), temperature=temperature)


@pytest.mark.parametrize(("one", "other"), [((5, 7), (7,)), ((5, 7), (5, 6)), ((0, 7), (0, 7))])
def test_other_shapes_are_refused(unchecked, one, other):
    with pytest.raises(ValueError, match=r"at least one; got shapes .*7\) and"):
        jp.distillation_loss(jnp.ones(one), jnp.ones(other))


def test_features_count_by_their_size():
    ours, theirs = ({"a": 100 * draw(i), "b": [draw(i + 2, (2, 3, 4), "bfloat16")]} for i in (0, 1))
    loss, (slope, none) = jax.jit(jax.value_and_grad(jp.feature_loss, (0, 1)))(ours, theirs)
    pairs = [(np.float64(f), np.float64(t)) for f, t in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True)]
    np.testing.assert_allclose(loss, sum(((f - t) ** 2).sum() / (t**2).sum() for f, t in pairs), rtol=1e-4)
    f, t = pairs[0]
    np.testing.assert_allclose(slope["a"], 2 * (f - t) / (t**2).sum(), rtol=1e-4, atol=1e-9)
    assert loss.dtype == jnp.float32
    assert not any(map(np.any, jax.tree.leaves(none)))


def test_features_of_a_dead_layer():
    loss, slope = jax.value_and_grad(jp.feature_loss)(jnp.ones(3), jnp.zeros(3))
    assert loss == 3
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("other", [{"b": jnp.ones(3)}, {"a": jnp.ones((3, 1))}, [jnp.ones(3)], {}])
def test_other_features_are_refused(unchecked, other):
    with pytest.raises(ValueError, match=r"the same arrays .* got shapes \{'a': \(3,\)\}, "):
        jp.feature_loss({"a": jnp.ones(3)}, other)
    with pytest.raises(ValueError, match="at least one"):
        jp.feature_loss({}, {})


@pytest.mark.parametrize("function", [jp.distillation_loss, jp.feature_loss])
def test_the_example_runs(relaxed, function):
    found = doctest.DocTestFinder().find(function, module=distillation)
    results = [doctest.DocTestRunner().run(test) for test in found]
    assert sum(r.attempted for r in results) > 2
    assert sum(r.failed for r in results) == 0


def test_the_teacher_helps_the_pruned(relaxed):
    """Trained with the teacher's logits alone, a student at half the weights comes near it on what it never saw."""
    rng = np.random.default_rng(0)
    x, unseen = (jnp.asarray(rng.normal(size=(n, 8)), jnp.float32) for n in (64, 256))
    teacher = jnp.asarray(rng.normal(size=(8, 4)) * (rng.random((8, 4)) < 0.5), jnp.float32)
    params = teacher + jnp.asarray(0.5 * rng.normal(size=(8, 4)), jnp.float32)
    tx = jp.prune(optax.adam(0.05), jp.Method(), sparsity=0.5, update_when=jp.schedules.at(50))

    def step(carry, _):
        w, state = carry
        grads = jax.grad(lambda w: jp.distillation_loss(x @ w, x @ teacher, temperature=2.0))(w)
        updates, state = tx.update(grads, state, w)
        return (optax.apply_updates(w, updates), state), None

    (trained, state), _ = jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), None, 150))(params)
    start = jp.apply_masks(params, optax.tree.get(state, "masks"))
    before, after = (
        float(jp.distillation_loss(unseen @ w, unseen @ teacher, temperature=2.0)) for w in (start, trained)
    )
    assert np.sum(np.asarray(trained) != 0) == 16
    assert after < before / 10
