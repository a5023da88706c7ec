"""Files of language models: GGUF and Hugging Face's, bit for bit there and back; types of blocks; what is refused."""

import dataclasses
import functools
import json
import struct

import jax
import language_helpers as helpers
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxprune as jp
from jaxprune.lab.models import language
from jaxprune.lab.models.language import blocks, decoder, gguf, hugging_face, llama2c
from jaxprune.lab.models.language.config import Config

pytestmark = pytest.mark.usefixtures("quick")

WIDE = Config(64, 64, 2, 4, 2, 96, length=32)
QWEN = Config(64, 64, 2, 4, 2, 96, head_dim=32, pairs="halves", tied=False, qkv_bias=True, epsilon=1e-6, theta=1e6)
CONFIGS = {"llama": WIDE, "qwen2": QWEN}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# ---------------------------------------------------------------- blocks


def by_hand(type, data):
    """Values of one block, a weight after the other."""
    scale = np.frombuffer(data[:2], "<f2").astype(np.float32)[0]
    if type == "Q8_0":
        return [scale * np.float32(struct.unpack_from("b", data, 2 + i)[0]) for i in range(32)]
    codes = [data[len(data) - 16 + i % 16] >> (4 * (i // 16)) & 15 for i in range(32)]
    if type == "Q4_0":
        return [scale * np.float32(code - 8) for code in codes]
    minimum = np.frombuffer(data[2:4], "<f2").astype(np.float32)[0]
    return [scale * np.float32(code) + minimum for code in codes]


@pytest.mark.parametrize("type", blocks.BYTES)
def test_blocks_are_read_exactly(type):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (6, blocks.BYTES[type]), dtype=np.uint8)
    data[:, :4] = rng.normal(size=(6, 2)).astype("<f2").view(np.uint8)
    found = blocks.dequantize(type, data.reshape(-1), (2, 96))
    np.testing.assert_array_equal(found, np.reshape([by_hand(type, bytes(row)) for row in data], (2, 96)))


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_blocks_keep_zeros_and_come_back_from_their_own_values(type):
    rng = np.random.default_rng(0)
    array = np.where(rng.random((40, 64)) < 0.5, 0, rng.normal(size=(40, 64))).astype(np.float32)
    array[3] = 0
    data = blocks.quantize(type, array)
    found = blocks.dequantize(type, data, array.shape)
    assert not np.any(found[array == 0])
    largest = np.abs(array.reshape(-1, 32)).max(axis=1)
    step = largest / (127 if type == "Q8_0" else 8)
    error = np.abs(found - array).reshape(-1, 32).max(axis=1)
    # Half a step, but the value opposite to the largest has no code of Q4_0, and scales are rounded to float16.
    assert np.all(error <= step * (0.57 if type == "Q8_0" else 1.01))
    np.testing.assert_array_equal(blocks.dequantize(type, blocks.quantize(type, found), array.shape), found)


def test_the_scale_of_a_block_is_that_of_the_reference():
    row = np.arange(32, dtype=np.float32) - 20  # the largest is -20
    assert np.frombuffer(blocks.quantize("Q4_0", row)[:2].tobytes(), "<f2")[0] == np.float16(20 / 8)
    assert np.frombuffer(blocks.quantize("Q8_0", row)[:2].tobytes(), "<f2")[0] == np.float16(20 / 127)
    # Halves go away from zero.
    halves = blocks.quantize("Q8_0", np.array([127, 0.5, -0.5, 1.5] * 8, np.float32))[2:6].view(np.int8)
    assert halves.tolist() == [127, 1, -1, 2]


@pytest.mark.parametrize(
    ("type", "shape", "words"),
    [
        ("Q4_1", (2, 32), "Q4_1 has a minimum in every block, so zeros would not stay zero. There are: F32, F16"),
        ("Q5_1", (2, 32), "zeros would not stay zero"),
        ("Q6_K", (2, 32), "'Q6_K' are not written"),
        ("Q8_0", (2, 24), "no whole blocks of 32"),
    ],
)
def test_types_that_are_not_written_say_why(type, shape, words):
    with pytest.raises(ValueError, match=words):
        blocks.quantize(type, np.ones(shape, np.float32))


def test_values_beyond_float16_are_refused():
    with pytest.raises(ValueError, match="too large for the float16"):
        blocks.quantize("F16", np.full((1, 32), 1e6, np.float32))
    with pytest.raises(ValueError, match="not finite"):
        blocks.quantize("F32", np.full((1, 32), np.nan, np.float32))


# ---------------------------------------------------------------- GGUF


def test_metadata_come_back_with_their_types(tmp_path):
    said = {
        "a.text": "é", "a.flag": True, "a.int": 5, "a.float": 0.5, "a.wide": np.uint64(2**40), "a.small": np.int8(-3),
        "a.texts": ["x", "", "\udcff"], "a.numbers": np.arange(3, dtype=np.int32), "a.empty": [],
        "a.double": np.float64(0.1),
    }  # fmt: skip
    tensors = {"one": ("F16", np.ones((3, 5), np.float32)), "two": ("BF16", np.ones((2,), np.float32))}
    gguf.write(tmp_path / "a.gguf", said, tensors)
    found = gguf.read(tmp_path / "a.gguf")
    assert list(found.metadata) == list(said)
    for name, value in said.items():
        np.testing.assert_array_equal(found.metadata[name], value)
    assert found.metadata["a.int"].dtype == np.uint32
    assert found.metadata["a.float"].dtype == np.float32
    assert found.metadata["a.double"].dtype == np.float64
    assert found.tensors["one"].shape == (3, 5)
    again = {name: (tensor.type, tensor.values()) for name, tensor in found.tensors.items()}
    gguf.write(tmp_path / "b.gguf", found.metadata, again)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@each_config
def test_a_model_comes_back_from_gguf(tmp_path, config):
    params = helpers.small(config)
    gguf.write_model(tmp_path / "a.gguf", params, config, metadata={"general.name": "small", "llama.old": 1})
    found = language.read(tmp_path / "a.gguf")
    assert found.config == dataclasses.replace(config, theta=found.config.theta, epsilon=found.config.epsilon)
    np.testing.assert_allclose([found.config.theta, found.config.epsilon], [config.theta, config.epsilon], rtol=1e-6)
    assert (found.metadata["general.name"], found.tokenizer) == ("small", None)
    assert "llama.old" not in found.metadata
    same(found.params, params)


@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_0"])
def test_a_pruned_model_keeps_its_zeros_in_gguf(tmp_path, type):
    params = helpers.small(WIDE)
    params = jp.apply_masks(params, jp.compute_masks(jp.Method(), params, 0.5))
    gguf.write_model(tmp_path / "a.gguf", params, WIDE, type=type)
    found = gguf.read_model(tmp_path / "a.gguf")
    for name, leaf in jp.tree.named_leaves(found.params).items():
        before = jp.tree.named_leaves(params)[name]
        assert not np.any(np.asarray(leaf)[np.asarray(before) == 0]), name
        np.testing.assert_allclose(leaf, before, atol=0.2 * np.abs(before).max())
    gguf.write_model(tmp_path / "b.gguf", found.params, found.config, type=type, metadata=found.metadata)
    again = gguf.read_model(tmp_path / "b.gguf")
    same(again.params, found.params)


def test_gguf_refuses_with_the_reason(tmp_path):
    path, params = tmp_path / "a.gguf", helpers.small(WIDE)
    with pytest.raises(ValueError, match=r"Tensor 'token_embd.weight' \(64, 64\): Q4_1 has a minimum"):
        gguf.write_model(path, params, WIDE, type="Q4_1")
    with pytest.raises(TypeError, match="Metadata 'x': a complex"):
        gguf.write(path, {"x": 1j}, {})
    gguf.write_model(path, params, WIDE)
    data = path.read_bytes()
    for damaged, words in [
        (data[:-300], "cut off"),
        (data[:100], "cut off"),
        (b"GGUF" + struct.pack("<I", 2) + data[8:], "no GGUF file of version 3"),
        (data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"), "no tensor 'blk.1.attn_q.weight'"),
        (data.replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0gemma"), "its architecture is 'gemma'"),
        (data.replace(b"llama.block_count", b"llama.block_xount"), "its sizes are not those of a decoder"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=words):
            gguf.read_model(path)


# ---------------------------------------------------------------- Hugging Face


@each_config
@pytest.mark.parametrize("shard", [None, 40_000])
def test_a_model_comes_back_from_a_folder(tmp_path, config, shard):
    params = helpers.small(config)
    hugging_face.write(tmp_path, params, config, shard=shard, metadata={"bos_token_id": 1})
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard is not None)
    assert json.loads((tmp_path / "config.json").read_text())["bos_token_id"] == 1
    found = language.read(tmp_path)
    halves, expected = decoder.with_pairs(params, config, "halves")
    assert found.config == expected
    same(found.params, halves)
    theirs = {name: array for file in files for name, array in load_file(tmp_path / file).items()}
    kernel = theirs["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(kernel, params["layers"][1]["down"]["kernel"].T)


def test_weights_of_16_bits_are_read_as_they_are(tmp_path):
    params = helpers.small(WIDE)
    hugging_face.write(tmp_path, params, WIDE, dtype=ml_dtypes.bfloat16)
    found, (halves, _) = language.read(tmp_path), decoder.with_pairs(params, WIDE, "halves")
    same(found.params, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), halves))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma"}, "a model of the kind 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', this decoder has 'silu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "positions are scaled"),
        ({"num_hidden_layers": 3}, "no tensor 'model.layers.2"),
        ({"hidden_size": 32}, r"should hold 'embed/embedding' \(64, 32\), \(64, 64\) arrived"),
        ({"hidden_size": None}, "not those of a decoder"),
    ],
)
def test_folders_of_other_models_are_refused(tmp_path, change, words):
    hugging_face.write(tmp_path, helpers.small(WIDE), WIDE)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | change))
    with pytest.raises(ValueError, match=words):
        language.read(tmp_path)


def test_an_index_names_no_files_elsewhere(tmp_path):
    hugging_face.write(tmp_path, helpers.small(WIDE), WIDE, shard=40_000)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(ValueError, match="it names files elsewhere"):
        language.read(tmp_path)


def test_one_model_in_all_formats_has_the_same_logits(tmp_path):
    params, tokens = helpers.small(WIDE), helpers.tokens(WIDE)
    llama2c.write(tmp_path / "a.bin", params, WIDE)
    gguf.write_model(tmp_path / "a.gguf", params, WIDE)
    hugging_face.write(tmp_path / "a", params, WIDE)
    expected = np.stack([helpers.logits(params, text, WIDE) for text in tokens])
    for name in ("a.bin", "a.gguf", "a"):
        found = language.read(tmp_path / name)
        apply = jax.jit(functools.partial(decoder.forward, config=found.config))
        np.testing.assert_allclose(apply(found.params, tokens), expected, rtol=1e-4, atol=1e-4)
