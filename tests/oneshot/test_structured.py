"""Channels chosen by what their readers get, and the fit behind: float64, couplings, refusals. Layers left out."""

import functools
import itertools

import jax
import jax.numpy as jnp
import language_helpers as helpers
import numpy as np
import pytest
from jax import lax
from trace_helpers import normal

import jaxprune as jp
from jaxprune.lab.models import language
from jaxprune.lab.models.language import decoder, gguf, hugging_face, llama2c
from jaxprune.lab.models.language.config import Config
from jaxprune.oneshot import (
    ActivationImportance,
    CompensatedImportance,
    LeastSquares,
    OutputImportance,
    Reader,
    Wanda,
    WeightImportance,
    layer_importance,
    prune,
    prune_channels,
    prune_layers,
    without_layers,
)

pytestmark = pytest.mark.usefixtures("quick")

# ---------------------------------------------------------------- importance

CHANNELS = np.asarray([2, 0, -1, 1, 1, 0, 2])
"""Of seven inputs, in twos but for one that is no channel."""


def data(seed=0, tokens=40, outputs=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, 7)) @ rng.normal(size=(7, 7))
    return x, rng.normal(size=(7, outputs))


def reader(x, w, channels=CHANNELS, outputs=None):
    told = (w, len(x), np.sum(x**2, 0), np.sum(np.abs(x), 0), x.T @ x, outputs)
    return Reader("w", *(None if one is None else jnp.asarray(one, jnp.float32) for one in told), channels)


def of_channel(c):
    return np.flatnonzero(c == CHANNELS)


ORACLES = {
    "weights": (WeightImportance(), lambda x, w, g: np.sum(w[g] ** 2)),
    "activations": (ActivationImportance(), lambda x, w, g: np.sum(x[:, g] ** 2)),
    "outputs": (OutputImportance(), lambda x, w, g: np.sum((x[:, g] @ w[g]) ** 2)),
}


@pytest.mark.parametrize("name", ORACLES)
def test_scores_are_those_of_float64_summed_over_readers(name):
    importance, oracle = ORACLES[name]
    several = [data(0), data(1, tokens=30)]
    found = importance([reader(*one) for one in several], 3)
    want = [np.sqrt(sum(oracle(*one, of_channel(c)) for one in several)) for c in range(3)]
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_means_are_of_absolute_values():
    x, w = data()
    want = [np.abs(x).mean(0)[of_channel(c)].sum() for c in range(3)]
    np.testing.assert_allclose(ActivationImportance(mean=True)([reader(x, w)], 3), want, rtol=1e-5)


def test_outputs_that_the_loss_does_not_see_do_not_count():
    x, w = data()
    blind = np.diag([1.0, 0, 0])
    found = OutputImportance()([reader(x, w, outputs=blind)], 3)
    want = [np.linalg.norm(x[:, of_channel(c)] @ w[of_channel(c)][:, :1]) for c in range(3)]
    np.testing.assert_allclose(found, want, rtol=0.1)  # the damping of their moments


def by_least_squares(several, count, each):
    """The order in which channels go, each time the one without which the fitted outputs are nearest to the dense."""
    gone = []
    while len(gone) < count:
        errors = {}
        for c in set(range(count)) - set(gone):
            errors[c] = 0
            for (x, w), channels in several:
                held = np.sqrt(0.01 * np.mean(np.sum(x**2, 0))) * np.eye(x.shape[1])
                full, kept = np.concatenate([x, held]), ~np.isin(channels, [*gone, c])
                fit = np.linalg.lstsq(full[:, kept], full @ w, rcond=None)[0]
                errors[c] += np.sum((full[:, kept] @ fit - full @ w) ** 2)
        gone.append(min(errors, key=errors.get))
    return gone


@pytest.mark.parametrize("seed", range(3))
def test_compensated_channels_go_in_the_order_of_exact_least_squares(seed):
    rng = np.random.default_rng(seed)
    several = []
    for inputs, each in ((10, 2), (7, 1)):
        x = rng.normal(size=(60, inputs)) @ rng.normal(size=(inputs, inputs))
        channels = np.concatenate([rng.permutation(np.repeat(np.arange(5), each)), [-1] * (inputs - 5 * each)])
        several.append(((x, rng.normal(size=(inputs, 4))), channels.astype(int)))
    found = CompensatedImportance()([reader(*one, channels) for one, channels in several], 5)
    assert np.argsort(np.asarray(found)).tolist() == by_least_squares(several, 5, 1)


def test_of_two_channels_that_say_the_same_one_goes_first_and_the_other_late():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 5))
    x[:, 4] = x[:, 0] = 3 * x[:, 0]  # the largest two
    found = np.asarray(CompensatedImportance(1e-4)([reader(x, np.ones((5, 2)), np.arange(5))], 5))
    assert sorted(found[[0, 4]])[0] == 0
    assert sorted(found[[0, 4]])[1] > 1
    assert np.argsort(ActivationImportance()([reader(x, np.ones((5, 2)), np.arange(5))], 5))[-2:].tolist() == [0, 4]


def test_channels_of_different_sizes_are_refused_where_blocks_are_needed():
    with pytest.raises(ValueError, match=r"'w' reads have from 1 to 3 inputs there; .* Take `OutputImportance"):
        CompensatedImportance()([reader(*data(), np.asarray([0, 0, 0, 1, 1, 2, -1]))], 3)


# ---------------------------------------------------------------- channels of a model


def mlp(params, x):
    return jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None]) @ params["b"]["kernel"]


def mlp_params():
    return {"a": {"kernel": normal(5, 8), "bias": normal(8, seed=1)}, "b": {"kernel": normal(8, 3, seed=2)}}


def batches(count=2):
    return [normal(30, 5, seed=10 + i) for i in range(count)]


def hidden():
    x = np.concatenate(batches()).astype(np.float64)
    first = mlp_params()["a"]
    return np.maximum(x @ np.asarray(first["kernel"], np.float64) + np.asarray(first["bias"]), 0)


@pytest.mark.parametrize("refit", [False, True])
def test_the_weights_that_stay_are_those_of_least_squares(refit):
    small = prune_channels(mlp, mlp_params(), batches(), 0.25, importance=ActivationImportance(), refit=refit)
    h, w = hidden(), np.asarray(mlp_params()["b"]["kernel"], np.float64)
    kept = np.sort(np.argsort(np.sum(h**2, 0))[2:])
    moments = h.T @ h + 0.01 * np.mean(np.sum(h**2, 0)) * np.eye(8)
    want = np.linalg.solve(moments[np.ix_(kept, kept)], moments[kept] @ w) if refit else w[kept]
    np.testing.assert_allclose(small.params["b"]["kernel"], want, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(small.params["a"]["kernel"], mlp_params()["a"]["kernel"][:, kept])
    np.testing.assert_array_equal(small.params["a"]["bias"], mlp_params()["a"]["bias"][kept])
    assert not small.refusal


def test_what_a_loss_sees_says_which_channels_stay():
    """A loss of the first output alone, which half of the units do not reach."""
    params = mlp_params()
    reaches = jnp.asarray(np.r_[np.zeros((4, 1)), np.ones((4, 1))], jnp.float32)
    params["b"]["kernel"] = jnp.concatenate([0.1 * reaches, 5 * params["b"]["kernel"][:, 1:]], 1)

    def loss(params, x):
        return jnp.sum(mlp(params, x)[:, 0] ** 2)

    of = functools.partial(prune_channels, mlp, params, batches(), 0.5, importance=OutputImportance(), refit=False)
    gone = [set(small.removed["b/kernel"][0]) for small in (of(loss=loss), of())]
    assert gone[0] != gone[1]


def test_channels_of_convolutions_are_read_tap_by_tap():
    params = {"a": {"kernel": normal(3, 3, 1, 6)}, "b": {"kernel": normal(3, 3, 6, 2, seed=1)}}

    def conv(x, w):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def apply(params, x):
        return conv(jax.nn.relu(conv(x, params["a"]["kernel"])), params["b"]["kernel"])

    x = normal(4, 6, 6, 1, seed=2)
    small = prune_channels(apply, params, [x], {"b/*": 0.5}, importance=ActivationImportance(), refit=False)
    h = np.pad(np.maximum(conv(x, params["a"]["kernel"]), 0).astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    energy = sum(np.sum(h[:, i : i + 6, j : j + 6] ** 2, (0, 1, 2)) for i in range(3) for j in range(3))
    assert small.removed["a/kernel"][3] == tuple(np.sort(np.argsort(energy)[:3]))
    fitted = prune_channels(apply, params, [x], 0.5)
    assert fitted.params["b"]["kernel"].shape == (3, 3, 3, 2)
    masked = jp.uncompact(small.params, small.removed)
    errors = [
        np.sum(np.square(apply(one, x) - apply(params, x)))
        for one in (jp.uncompact(fitted.params, fitted.removed), masked)
    ]
    assert errors[0] < errors[1]


REFUSED = {
    "no rule": ({"c/*": 0.5}, r"names 'c/\*', which matches no layer .* Layers are 'a/kernel:1'"),
    "percent": (50, r"in \[0, 1\); got 50. Did you mean 0.5"),
    "all": (0.97, "0.97 of the 8 channels of 'a/kernel:1' are all of them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_says_why(name):
    sparsity, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        prune_channels(mlp, mlp_params(), batches(), sparsity)


def test_without_data_or_readers_nothing_is_chosen():
    with pytest.raises(ValueError, match="There is no batch"):
        prune_channels(mlp, mlp_params(), [], 0.5)

    def apply(params, x):
        return jnp.sum((x @ params["a"]["kernel"]) ** 2)

    layers = jp.couplings(apply, mlp_params(), batches()[0]).names
    if layers:
        with pytest.raises(ValueError, match="No product with a leaf reads the channels of 'a/kernel:1'"):
            prune_channels(apply, mlp_params(), batches(), 0.5)


# ---------------------------------------------------------------- a decoder

SPARSITY = {"*/down/*": 0.25, "*/out/*": 0.5}


@functools.cache
def small_decoder(stacked=False):
    params = helpers.small()
    texts = [jnp.asarray(helpers.tokens(seed=i)) for i in range(2)]
    apply = functools.partial(decoder.forward, config=helpers.SMALL)
    return prune_channels(apply, decoder.stacked(params) if stacked else params, texts, SPARSITY, refit=not stacked)


def test_a_decoder_becomes_a_smaller_one_of_its_kind(tmp_path):
    small = small_decoder()
    config = helpers.SMALL.resized(small.params)
    assert config == Config(50, 24, 3, 2, 1, 30, head_dim=6, length=32)  # a key for every two queries, as before
    text = helpers.tokens(config, seed=5)
    logits = decoder.forward(small.params, jnp.asarray(text), config)
    np.testing.assert_allclose(logits[0], helpers.logits(small.params, text[0], config), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(small.apply(small.params, jnp.asarray(text)), logits, rtol=1e-4, atol=1e-4)
    hugging_face.write(tmp_path / "folder", small.params, config)
    gguf.write_model(tmp_path / "model.gguf", small.params, config, type="F32")
    for path in (tmp_path / "folder", tmp_path / "model.gguf"):
        back = language.read(path)
        again = decoder.forward(back.params, jnp.asarray(text), back.config)
        np.testing.assert_allclose(again, logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"`head_dim` is 6, a file of llama2.c can only have 12"):
        llama2c.write(tmp_path / "model.bin", small.params, config)


def test_stacked_layers_lose_the_same_channels():
    small = small_decoder(stacked=True)
    assert helpers.SMALL.resized(small.params) == helpers.SMALL.resized(small_decoder().params)
    assert small.params["layers"]["down"]["kernel"].shape == (3, 30, 24)


def test_a_config_of_blocks_of_different_sizes_is_refused():
    params = helpers.small()
    params["layers"][1]["gate"]["kernel"] = params["layers"][1]["gate"]["kernel"][:, :30]
    with pytest.raises(
        ValueError, match=r"hidden\) of \(24, 12, 40\), \(24, 12, 30\), \(24, 12, 40\); .* same fraction"
    ):
        helpers.SMALL.resized(params)
    params = helpers.small()
    params["layers"][2]["down"]["kernel"] = params["layers"][2]["down"]["kernel"][:30]
    with pytest.raises(ValueError, match=r"'layers/2/down/kernel' has shape \(30, 24\), a decoder of these sizes \(40"):
        helpers.SMALL.resized(params)


# ---------------------------------------------------------------- masks handed in


def test_any_mask_is_fitted_product_after_product():
    params = {f"w{i}": normal(a, b, seed=i) for i, (a, b) in enumerate(itertools.pairwise((5, 8, 3)))}
    masks = {name: jnp.abs(leaf) > 0.4 for name, leaf in params.items()}

    def apply(params, x):
        return jax.nn.relu(x @ params["w0"]) @ params["w1"]

    found, kept = prune(apply, params, batches(), LeastSquares(), masks=masks)
    jax.tree.map(np.testing.assert_array_equal, kept, masks)
    ours = dense = np.concatenate(batches()).astype(np.float64)
    for name in ("w0", "w1"):
        w, mask = np.asarray(params[name], np.float64), np.asarray(masks[name])
        held = 0.01 * np.mean(np.sum(ours**2, 0)) * np.eye(len(w))
        moments = ours.T @ ours + held
        wanted = ours.T @ dense @ w + held @ w
        want = np.zeros_like(w)
        for j, s in enumerate(mask.T):
            want[s, j] = np.linalg.solve(moments[np.ix_(s, s)], wanted[s, j])
        np.testing.assert_allclose(found[name], want, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(found[name] != 0, mask)
        ours, dense = np.maximum(ours @ want, 0), np.maximum(dense @ w, 0)


def test_masks_go_with_solvers_that_take_them():
    masks = jax.tree.map(lambda leaf: leaf > 0, mlp_params())
    with pytest.raises(ValueError, match="fits the weights of a mask: say which stay, `masks=`"):
        prune(mlp, mlp_params(), batches(), LeastSquares())
    with pytest.raises(ValueError, match="chooses a mask of its own: leave `masks` out"):
        prune(mlp, mlp_params(), batches(), Wanda(), 0.5, masks=masks)
    with pytest.raises(ValueError, match="The masks have no leaf 'b/kernel'"):
        prune(mlp, mlp_params(), batches(), LeastSquares(), masks={"a": masks["a"]})


# ---------------------------------------------------------------- layers


def residual(params, x):
    for block in params["net"]["blocks"]:
        x = x + jnp.tanh(x @ block["w"])
    return x


def residual_params(stacked=False):
    blocks = [{"w": scale * normal(5, 5, seed=i)} for i, scale in enumerate((1.0, 0.01, 0.6, 0.1))]
    return {"net": {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks) if stacked else blocks}}


def listed(params):
    blocks = params["net"]["blocks"]
    return params if isinstance(blocks, list) else {"net": {"blocks": [{"w": w} for w in blocks["w"]]}}


def loss(params, x):
    return jnp.mean((residual(listed(params), x) - residual(residual_params(), x)) ** 2)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_layers_that_the_loss_misses_least_go(stacked):
    params, where = residual_params(stacked), {"layers": "net/blocks"}
    rises = layer_importance(loss, params, batches(), **where)
    blocks = listed(params)["net"]["blocks"]
    want = [np.mean([loss({"net": {"blocks": blocks[:i] + blocks[i + 1 :]}}, x) for x in batches()]) for i in range(4)]
    np.testing.assert_allclose(rises, want, rtol=1e-4, atol=1e-6)
    small, removed = prune_layers(loss, params, batches(), 2, **where)
    assert removed == (1, 3)
    jax.tree.map(np.testing.assert_array_equal, listed(small)["net"]["blocks"], [blocks[0], blocks[2]])
    jax.tree.map(np.testing.assert_array_equal, without_layers(params, [1, 3], **where), small)


def test_what_are_no_layers_says_why():
    params = residual_params()
    with pytest.raises(ValueError, match="expected at 'layers', but there is 'net'"):
        prune_layers(loss, params, batches(), 1)
    with pytest.raises(ValueError, match="how many of the 4 layers in 'net/blocks' go, one stays; got 4"):
        prune_layers(loss, params, batches(), 4, layers="net/blocks")
    with pytest.raises(ValueError, match=r"numbered from 0 to 3; got \[4\]"):
        without_layers(params, [4], layers="net/blocks")
    with pytest.raises(ValueError, match=r"stacked alike: their first axes are 'a \(5,\)', 'b \(3,\)'"):
        without_layers({"layers": {"a": jnp.ones(5), "b": jnp.ones(3)}}, [0])
    with pytest.raises(ValueError, match="There is no batch"):
        layer_importance(loss, params, [], layers="net/blocks")
