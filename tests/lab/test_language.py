"""Language models: the decoder against NumPy, with a cache, stacked, turned the other way; measures on texts."""

import functools

import jax
import jax.numpy as jnp
import language_helpers as helpers
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune.lab.models.language import decoder, evaluation, llama2c, module, texts
from jaxprune.lab.models.language.config import Config

pytestmark = pytest.mark.usefixtures("quick")

CONFIGS = {"tied, neighbours": helpers.SMALL, "biases, halves": helpers.QWEN}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def forward(config):
    return jax.jit(functools.partial(decoder.forward, config=config))


@each_config
def test_logits_are_those_of_numpy(config):
    params, tokens = helpers.small(config), helpers.tokens(config)
    expected = np.stack([helpers.logits(params, text, config) for text in tokens])
    np.testing.assert_allclose(forward(config)(params, tokens), expected, rtol=1e-4, atol=1e-4)


@each_config
def test_stacked_blocks_are_scanned_to_the_same(config):
    params, tokens = helpers.small(config), helpers.tokens(config)
    stacked = decoder.stacked(params)
    assert stacked["layers"]["query"]["kernel"].shape[0] == config.layers
    np.testing.assert_allclose(forward(config)(stacked, tokens), forward(config)(params, tokens), rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, decoder.unstacked(stacked), params)


@each_config
@pytest.mark.parametrize("scan", [False, True], ids=["list", "stacked"])
def test_hidden_states_lead_to_the_logits(config, scan):
    params, tokens = helpers.small(config), helpers.tokens(config)
    params = decoder.stacked(params) if scan else params
    states = jax.jit(functools.partial(decoder.hidden, config=config))
    hidden = states(params, tokens)
    assert hidden.shape == (config.layers, *tokens.shape, config.dim)
    found = decoder.logits(params, hidden[-1], config)
    np.testing.assert_allclose(found, forward(config)(params, tokens), rtol=1e-4, atol=1e-4)
    first = {
        **params,
        "layers": jax.tree.map(lambda leaf: leaf[:1], params["layers"]) if scan else params["layers"][:1],
    }
    np.testing.assert_allclose(states(first, tokens)[0], hidden[0], rtol=1e-5, atol=1e-5)


@each_config
@pytest.mark.parametrize("scan", [False, True], ids=["list", "stacked"])
def test_steps_with_a_cache_are_the_whole_text(config, scan):
    params, tokens = helpers.small(config), helpers.tokens(config)
    params = decoder.stacked(params) if scan else params
    step = jax.jit(functools.partial(decoder.step, config=config))
    cache, found = decoder.empty_cache(config, len(tokens), 12), []
    for start, end in [(0, 4), (4, 5), (5, 9)]:
        logits, cache = step(params, cache, tokens[:, start:end])
        found.append(logits)
    assert int(cache.position) == 9
    whole = forward(config)(params, tokens)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=1e-4, atol=1e-4)


@each_config
def test_pairs_are_changed_and_come_back_bit_for_bit(config):
    params, tokens = helpers.small(config), helpers.tokens(config)
    other = "halves" if config.pairs == "neighbours" else "neighbours"
    turned, turned_config = decoder.with_pairs(params, config, other)
    assert turned_config.pairs == other
    assert np.any(turned["layers"][0]["key"]["kernel"] != params["layers"][0]["key"]["kernel"])
    logits = forward(turned_config)(turned, tokens)
    np.testing.assert_allclose(logits, forward(config)(params, tokens), rtol=1e-4, atol=1e-4)
    back, same = decoder.with_pairs(turned, turned_config, config.pairs)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, back, params)


@each_config
def test_a_module_of_nnx_is_the_same_function_under_the_same_names(config):
    params, tokens = helpers.small(config), jnp.asarray(helpers.tokens(config))
    model = module.of_params(params, config)
    found = nnx.jit(lambda model: model(tokens))(model)
    np.testing.assert_allclose(found, forward(config)(params, tokens), rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, module.params_of(model), params)
    assert set(jp.tree.named_leaves(nnx.state(model))) == set(jp.tree.named_leaves(params))
    gradient = nnx.grad(lambda model: jnp.sum(model(tokens) ** 2))(model)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient["layers"][0]["query"]["kernel"]))
    other = helpers.QWEN if config is helpers.SMALL else helpers.SMALL
    with pytest.raises(ValueError, match="Params of the structure"):
        module.of_params(params, other)


@each_config
def test_names_tell_inputs_and_outputs_and_the_model_agrees(config):
    params = helpers.small(config)
    found = jp.layout_of(jp.trace(forward(config), params, helpers.tokens(config)))
    for name, leaf in jp.tree.named_leaves(params).items():
        if jp.weights(name, leaf):
            assert found.axes(name, leaf.shape) == jp.layout.BY_NAME.axes(name, leaf.shape), name
    assert not jp.weights("embed/embedding", params["embed"]["embedding"])


@each_config
def test_compressed_weights_run_in_both(config):
    params, tokens = helpers.small(config), helpers.tokens(config)
    params = jp.apply_masks(params, jp.compute_masks(jp.Method(), params, 0.5))
    sparse = jp.sparse.compress(params, "bcsr")
    expected = forward(config)(params, tokens)
    apply = jax.jit(jp.sparse.apply(functools.partial(decoder.forward, config=config)))
    np.testing.assert_allclose(apply(sparse, tokens), expected, rtol=1e-4, atol=1e-4)
    step = jax.jit(jp.sparse.apply(functools.partial(decoder.step, config=config)))
    logits, _ = step(sparse, decoder.empty_cache(config, 2, 9), jnp.asarray(tokens))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((50, 25, 3, 4, 2, 40), "4 heads do not share a width of 25"),
        ((50, 24, 3, 8, 2, 40), "A head of 3 features has no pairs"),
        ((50, 24, 3, 4, 3, 40), "3 heads of keys cannot serve 4 heads of queries"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        Config(*sizes)


# ---------------------------------------------------------------- llama2.c


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_comes_back_bit_for_bit(tmp_path, tied):
    config = Config(50, 24, 3, 4, 2, 40, length=32, tied=tied)
    params = helpers.small(config)
    llama2c.write(tmp_path / "a.bin", params, config)
    found = llama2c.read(tmp_path / "a.bin")
    assert (found.config, found.rest) == (config, b"")
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    llama2c.write(tmp_path / "b.bin", *decoder.with_pairs(params, config, "halves"))
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_llama2c_refuses_other_files_and_other_models(tmp_path):
    path, params = tmp_path / "a.bin", helpers.small()
    with pytest.raises(ValueError, match=r"`head_dim` is 8, a file of llama2\.c can only have 6"):
        llama2c.write(path, helpers.small(helpers.QWEN), helpers.QWEN)
    with pytest.raises(ValueError, match=r"'embed' should have shape \(51, 24\), \(50, 24\) arrived"):
        llama2c.write(path, params, Config(51, 24, 3, 4, 2, 40))
    llama2c.write(path, params, helpers.SMALL)
    data = path.read_bytes()
    for damaged, words in [
        (data[:-4], "is cut off: 'sin'"),
        (data[:20], "it has 20 bytes"),
        (b"GGUF" + data[4:], "is no model of llama2.c: it begins with"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=words):
            llama2c.read(path)


def test_the_tokenizers_file_comes_back():
    pieces, scores = [b"<unk>", b"\n<s>\n", bytes([255]), "é".encode()], [0.0, 0.0, -1.5, -2.0]
    data = llama2c.write_tokenizer(pieces, scores)
    assert llama2c.read_tokenizer(data) == (pieces, scores)
    with pytest.raises(ValueError, match="cut off within piece 3"):
        llama2c.read_tokenizer(data[:-1])


# ---------------------------------------------------------------- what is measured


def log_probabilities(params, tokens, config=helpers.SMALL):
    logits = np.stack([helpers.logits(params, text, config) for text in tokens])[:, :-1]
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_measures_of_a_pruned_model_are_those_of_numpy(batch):
    dense, tokens = helpers.small(), helpers.tokens(shape=(3, 7))
    pruned = jp.apply_masks(dense, jp.compute_masks(jp.Method(), dense, 0.3))
    ours, theirs = log_probabilities(pruned, tokens), log_probabilities(dense, tokens)
    losses = [-np.take_along_axis(each, tokens[:, 1:, None], axis=-1).mean() for each in (ours, theirs)]
    divergence = (np.exp(theirs) * (theirs - ours)).sum(axis=-1).mean()
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    found = evaluation.compare(forward(helpers.SMALL), pruned, dense, tokens, batch=batch)
    expected = evaluation.Comparison(*map(float, np.exp(losses)), float(divergence), float(agreement))
    assert found.agreement == expected.agreement < 1
    np.testing.assert_allclose(
        [found.perplexity, found.dense, found.divergence],
        [expected.perplexity, expected.dense, expected.divergence],
        rtol=1e-4,
    )
    alone = evaluation.perplexity(forward(helpers.SMALL), pruned, tokens, batch=batch)
    assert alone == pytest.approx(found.perplexity, rel=1e-6)


def test_windows_do_not_overlap_and_leave_the_rest_out():
    assert evaluation.windows_of(np.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="3 tokens has no window of 4"):
        evaluation.windows_of(np.arange(3), 4)
    with pytest.raises(ValueError, match="no token to predict"):
        evaluation.perplexity(forward(helpers.SMALL), helpers.small(), np.zeros((3, 1), np.int32))


# ---------------------------------------------------------------- texts


def test_sampled_texts_are_as_likely_as_the_model_says():
    params, config = helpers.small(), helpers.SMALL
    found = texts.sampled(params, config, count=4000, length=3, seed=0)
    assert np.all(found[:, 0] == 1)
    expected = np.exp(log_probabilities(params, np.array([[1, 0]])))[0, 0]
    counts = np.bincount(found[:, 1], minlength=config.vocabulary)
    deviations = (counts - 4000 * expected) / np.sqrt(4000 * expected + 1)
    assert np.abs(deviations).max() < 4.5
    again = texts.sampled(params, config, count=4000, length=3, seed=0)
    assert texts.digest(found) == texts.digest(again) != texts.digest(found + 1)
    cold = texts.sampled(params, config, count=5, length=3, seed=0, temperature=1e-9)
    assert np.all(cold[:, 1] == expected.argmax())
