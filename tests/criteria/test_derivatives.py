"""Second moments of a loss's derivatives by the outputs of products, against derivatives taken one at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import plain_decoder
import pytest
from jax import lax
from trace_helpers import normal

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick")

DECODER = plain_decoder.decoder(heads=2)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 3, 5)), jnp.int32)


def loss_of(apply):
    def loss(params, tokens):
        scores = jax.nn.log_softmax(apply(params, tokens)[:, :-1])
        return -jnp.sum(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))

    return loss


def by_hand(loss, layers, batches):
    """layers: params, shifts -> loss of a function that adds a shift to each output."""
    found = {}
    for batch in batches:
        for name, g in jax.grad(loss)(layers, batch).items():
            rows = np.asarray(g, np.float64).reshape(-1, g.shape[-1])
            found[name] = found.get(name, 0) + rows.T @ rows
    return found


def test_they_are_those_of_shifts_of_the_outputs():
    params = {"w0": normal(6, 5), "w1": normal(5, 4, seed=1)}
    batches = [normal(7, 6, seed=s) for s in (2, 3)]

    def apply(params, x):
        return jnp.sum(jnp.sin(jnp.tanh(x @ params["w0"]) @ params["w1"]))

    def shifted(shifts, x):
        h = jnp.tanh(x @ params["w0"] + shifts["w0"])
        return jnp.sum(jnp.sin(h @ params["w1"] + shifts["w1"]))

    found = jp.evidence.of_outputs(apply, params, batches)
    wanted = by_hand(shifted, {"w0": jnp.zeros((7, 5)), "w1": jnp.zeros((7, 4))}, batches)
    for name, one in wanted.items():
        np.testing.assert_allclose(found[name][0], one, rtol=1e-4, atol=1e-6)


def test_a_scan_has_those_of_its_layers():
    params = plain_decoder.drawn()
    lists = jp.evidence.of_outputs(loss_of(DECODER), params, TOKENS, select="layers*")
    stacks = jp.evidence.of_outputs(loss_of(DECODER), plain_decoder.stacked(params), TOKENS, select="layers*")
    for word in ("q", "v", "gate", "down"):
        alone = np.stack([lists[f"layers/{i}/{word}"][0] for i in range(3)])
        assert np.abs(alone).max() > 1e-3
        np.testing.assert_allclose(stacks[f"layers/{word}"], alone, rtol=1e-3, atol=1e-5)


def test_of_the_diagonal_alone():
    params = plain_decoder.stacked(plain_decoder.drawn())
    whole, alone = (
        jp.evidence.of_outputs(loss_of(DECODER), params, TOKENS, select="layers*", diagonal=diagonal)
        for diagonal in (False, True)
    )
    assert whole.keys() == alone.keys()
    for name, one in whole.items():
        np.testing.assert_allclose(alone[name], np.diagonal(one, axis1=1, axis2=2), rtol=1e-5, atol=1e-9)


def test_heads_and_uses_in_turn():
    params = {"kernel": normal(6, 2, 3)}
    x = normal(4, 6, seed=1)

    def loss(params, x):
        one = jnp.einsum("bi,iho->hbo", x, params["kernel"])
        return jnp.sum(jnp.sin(one)) + jnp.sum(jnp.cos(jnp.einsum("bi,iho->boh", x, params["kernel"])))

    y = np.float64(x) @ np.float64(params["kernel"]).reshape(6, 6)
    wanted = np.cos(y).T @ np.cos(y) + np.sin(y).T @ np.sin(y)
    np.testing.assert_allclose(jp.evidence.of_outputs(loss, params, [x])["kernel"][0], wanted, rtol=1e-4, atol=1e-5)


def test_a_convolution():
    params, x = {"kernel": normal(3, 3, 2, 4)}, normal(2, 5, 5, 2, seed=1)

    def apply(kernel, x):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    found = jp.evidence.of_outputs(lambda params, x: jnp.sum(jnp.sin(apply(params["kernel"], x))), params, [x])
    rows = np.cos(np.float64(apply(params["kernel"], x))).reshape(-1, 4)
    np.testing.assert_allclose(found["kernel"][0], rows.T @ rows, rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_and_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="'kernel' are not finite"):
        jp.evidence.of_outputs(
            lambda p, x: jnp.log(jnp.sum(x @ p["kernel"]) * 0), {"kernel": normal(2, 2)}, [normal(1, 2)]
        )
    with pytest.raises(ValueError, match="There is no batch"):
        jp.evidence.of_outputs(lambda p, x: jnp.sum(x @ p["kernel"]), {"kernel": normal(2, 2)}, [])


def test_rules_of_derivatives_of_the_function_hold():
    """ReLU's at 0 is 0, and half of the maximum's that it is made of; a rounding that lets everything through."""

    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))
    params, x = {"kernel": normal(6, 5)}, jnp.zeros((7, 6))
    assert not jp.evidence.of_outputs(lambda p, x: jnp.sum(jax.nn.relu(x @ p["kernel"])), params, [x])["kernel"].any()
    found = jp.evidence.of_outputs(lambda p, x: jnp.sum(rounded(x @ p["kernel"])), params, [x])["kernel"]
    np.testing.assert_allclose(found[0], np.full((5, 5), 7.0))


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit, lambda f: jax.checkpoint(jax.checkpoint(f))])
def test_weights_inside_of_what_is_computed_again(wrap):
    params, x = {"layers": normal(3, 6, 6), "last": normal(6, 2, seed=3)}, normal(7, 6, seed=1)

    def loss(params, x, wrap=lambda f: f):
        step = wrap(lambda h, w: (jnp.tanh(h @ w), None))
        return jnp.sum(jnp.sin(lax.scan(step, x, params["layers"])[0] @ params["last"]))

    found, wanted = (jp.evidence.of_outputs(f, params, [x]) for f in (partial(loss, wrap=wrap), loss))
    assert found.keys() == {"layers", "last"}
    for name, one in wanted.items():
        np.testing.assert_allclose(found[name], one, rtol=1e-4, atol=1e-5)


def test_a_custom_rule_that_a_leaf_runs_into_is_written_out():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    params, x = {"kernel": normal(6, 5)}, normal(7, 6, seed=1)
    found, plain = (
        jp.evidence.of_outputs(lambda p, x, f=f: jnp.sum(jnp.sin(f(x, p["kernel"]))), params, [x])["kernel"]
        for f in (product, jnp.matmul)
    )
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-5)


def test_what_is_computed_again_stays_so(monkeypatch):
    """Barriers are what keeps XLA from keeping it instead; whether memory is saved is then up to XLA."""
    params, counts = {f"w{i}": normal(6, 6, seed=i) for i in range(3)}, []

    def loss(params, x, wrap):
        for w in params.values():
            x = wrap(lambda h, w: jnp.sin(jnp.tanh(h @ w)))(x, w)
        return jnp.sum(x)

    def counted(f):
        def call(*args):
            counts.append(jax.jit(f).lower(*args).as_text().count("optimization_barrier"))
            return f(*args)

        return call

    for wrap in (jax.checkpoint, lambda f: f):
        with monkeypatch.context() as patched:
            patched.setattr("jaxprune.criteria.derivatives.jax", type("", (), {**vars(jax), "jit": counted}))
            jp.evidence.of_outputs(lambda p, x, wrap=wrap: loss(p, x, wrap), params, [normal(7, 6)])
    assert counts[0] >= 3
    assert counts[1] == 0
