"""Second moments of a loss's derivatives by the outputs of products, against derivatives taken one at a time."""

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


def counted(x, g):
    """Moments of derivatives (tokens, outputs), counted by the squares of the inputs, trace kept; weights of tokens."""
    x, g = np.float64(x), np.float64(g)
    moments = (g * (x**2).sum(1, keepdims=True)).T @ g
    squares = (g**2).sum(1)
    return moments * squares.sum() / np.trace(moments), squares / squares.mean()


def test_they_are_those_of_shifts_of_the_outputs():
    params = {"w0": normal(6, 5), "w1": normal(5, 4, seed=1)}
    batches = [normal(7, 6, seed=s) for s in (2, 3)]

    def apply(params, x):
        return jnp.sum(jnp.sin(jnp.tanh(x @ params["w0"]) @ params["w1"]))

    def shifted(shifts, x):
        h = jnp.tanh(x @ params["w0"] + shifts["w0"])
        return jnp.sum(jnp.sin(h @ params["w1"] + shifts["w1"]))

    found = jp.evidence.of_outputs(apply, params, batches)
    shifts = {"w0": jnp.zeros((7, 5)), "w1": jnp.zeros((7, 4))}
    grads = [jax.grad(shifted)(shifts, x) for x in batches]
    x = np.concatenate(batches)
    for name, inputs in {"w0": x, "w1": np.tanh(x @ params["w0"])}.items():
        moments, tokens = counted(inputs, np.concatenate([one[name] for one in grads]))
        np.testing.assert_allclose(found[name].moments[0], moments, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.concatenate(found[name].tokens, 1)[0], tokens, rtol=1e-4)


def test_moments_and_tokens_have_the_fisher_matrix_s_partial_traces():
    params, x = {"w": normal(6, 5)}, normal(40, 6, seed=1) * np.arange(1, 41)[:, None] ** 0.5
    found = jp.evidence.of_outputs(lambda params, x: jnp.sum(jnp.sin(x @ params["w"])), params, [x[:24], x[24:]])["w"]
    x, g = np.float64(x), np.cos(np.float64(x @ params["w"]))
    fisher = np.einsum("ti,tj,tp,tq->ijpq", x, x, g, g)
    inputs = x.T @ (x * np.concatenate(found.tokens, 1)[0][:, None])
    product = np.einsum("ij,pq->ijpq", inputs, np.float64(found.moments[0]))
    for axes in ("ijpp->ij", "iipq->pq"):
        wanted, ours = np.einsum(axes, fisher), np.einsum(axes, product)
        np.testing.assert_allclose(ours / np.trace(ours), wanted / np.trace(wanted), rtol=1e-4, atol=1e-6)


def test_a_scan_has_those_of_its_layers():
    params = plain_decoder.drawn()
    lists = jp.evidence.of_outputs(loss_of(DECODER), params, TOKENS, select="layers*")
    stacks = jp.evidence.of_outputs(loss_of(DECODER), plain_decoder.stacked(params), TOKENS, select="layers*")
    for word in ("q", "v", "gate", "down"):
        alone = [lists[f"layers/{i}/{word}"] for i in range(3)]
        moments, tokens = (np.concatenate(each) for each in ([x.moments for x in alone], [x.tokens[0] for x in alone]))
        assert np.abs(moments).max() > 1e-3
        np.testing.assert_allclose(stacks[f"layers/{word}"].moments, moments, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(stacks[f"layers/{word}"].tokens[0], tokens, rtol=1e-3, atol=1e-5)


def test_heads_and_uses_in_turn():
    params = {"kernel": normal(6, 2, 3)}
    x = normal(4, 6, seed=1)

    def loss(params, x):
        one = jnp.einsum("bi,iho->hbo", x, params["kernel"])
        return jnp.sum(jnp.sin(one)) + jnp.sum(jnp.cos(jnp.einsum("bi,iho->boh", x, params["kernel"])))

    y = np.float64(x) @ np.float64(params["kernel"]).reshape(6, 6)
    wanted = np.cos(y).T @ np.cos(y) + np.sin(y).T @ np.sin(y)
    found = jp.evidence.of_outputs(loss, params, [x])["kernel"]
    np.testing.assert_allclose(found.moments[0], wanted, rtol=1e-4, atol=1e-5)
    assert found.tokens is None  # two uses: their tokens are not told apart


def test_a_convolution():
    params, x = {"kernel": normal(3, 3, 2, 4)}, normal(2, 5, 5, 2, seed=1)

    def apply(kernel, x):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    found = jp.evidence.of_outputs(lambda params, x: jnp.sum(jnp.sin(apply(params["kernel"], x))), params, [x])
    rows = np.cos(np.float64(apply(params["kernel"], x))).reshape(-1, 4)
    wide = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [wide[:, i : i + 5, j : j + 5].reshape(-1, 2) for i in range(3) for j in range(3)]
    moments, tokens = counted(np.concatenate(patches, 1), rows)
    np.testing.assert_allclose(found["kernel"].moments[0], moments, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["kernel"].tokens[0][0], tokens, rtol=1e-4)


def test_what_is_not_finite_and_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="'kernel' are not finite"):
        jp.evidence.of_outputs(
            lambda p, x: jnp.log(jnp.sum(x @ p["kernel"]) * 0), {"kernel": normal(2, 2)}, [normal(1, 2)]
        )
    with pytest.raises(ValueError, match="There is no batch"):
        jp.evidence.of_outputs(lambda p, x: jnp.sum(x @ p["kernel"]), {"kernel": normal(2, 2)}, [])
