"""BERT: against NumPy in float64, files there and back, the tokenizer, and vectors as they are published."""

import json
import math
import os
import re
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxprune import tree
from jaxprune.lab.models.language import bert, wordpiece
from jaxprune.lab.models.language.wordpiece import WordPiece
from jaxprune.storage.container import FileError

pytestmark = pytest.mark.usefixtures("quick", "relaxed")

MINILM = Path(os.environ.get("JAXPRUNE_DATA", "nowhere")) / "minilm"
CONFIG = bert.BertConfig(vocabulary=17, dim=12, layers=2, heads=3, hidden=20, length=9, epsilon=1e-6)


@pytest.fixture(scope="module")
def model():
    return bert.Bert(CONFIG, key=jax.random.key(0), pooler=True)


def text(lengths=(7, 4, 1), length=7):
    rng = np.random.default_rng(0)
    return rng.integers(0, 17, (len(lengths), length)), np.arange(length) < np.asarray(lengths)[:, None]


def normed(p, prefix, x):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + CONFIG.epsilon)
    return scaled * p[f"{prefix}.weight"] + p[f"{prefix}.bias"]


def vector(p, tokens):
    """Of one text without anything behind it, from the arrays of a file, in float64."""
    affine = lambda name, x: x @ p[f"{name}.weight"].T + p[f"{name}.bias"]  # noqa: E731
    x = p["embeddings.word_embeddings.weight"][tokens] + p["embeddings.position_embeddings.weight"][: len(tokens)]
    x = normed(p, "embeddings.LayerNorm", x + p["embeddings.token_type_embeddings.weight"][0])
    for i in range(CONFIG.layers):
        layer = f"encoder.layer.{i}."
        q, k, v = (affine(f"{layer}attention.self.{name}", x) for name in ("query", "key", "value"))
        size = CONFIG.dim // CONFIG.heads
        heads = []
        for at in range(0, CONFIG.dim, size):
            scores = np.exp(q[:, at : at + size] @ k[:, at : at + size].T / math.sqrt(size))
            heads.append(scores / scores.sum(1, keepdims=True) @ v[:, at : at + size])
        x = x + affine(f"{layer}attention.output.dense", np.concatenate(heads, 1))
        x = normed(p, f"{layer}attention.output.LayerNorm", x)
        y = affine(f"{layer}intermediate.dense", x)
        y = y / 2 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = normed(p, f"{layer}output.LayerNorm", x + affine(f"{layer}output.dense", y))
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def test_vectors_of_a_written_model_are_those_of_float64(model, tmp_path):
    """From the file's own names; what fills a text up changes nothing."""
    bert.write(tmp_path, model)
    arrays = {name: array.astype(np.float64) for name, array in load_file(tmp_path / "model.safetensors").items()}
    assert arrays["pooler.dense.weight"].shape == (12, 12)
    tokens, seen = text()
    found = bert.sentence_vectors(model, tokens, seen)
    for row, told, vector_found in zip(tokens, seen, found, strict=True):
        np.testing.assert_allclose(vector_found, vector(arrays, row[told]), atol=2e-6)


def test_files_there_and_back(model, tmp_path):
    bert.write(tmp_path, model)
    said = json.loads((tmp_path / "config.json").read_text())
    assert (said["model_type"], said["architectures"], said["num_attention_heads"]) == ("bert", ["BertModel"], 3)
    back = bert.read(tmp_path)
    assert back.config == CONFIG
    same = lambda a, b: np.testing.assert_array_equal(a, b)  # noqa: E731
    jax.tree.map(same, *(eqx.filter(one, tree.is_array) for one in (model, back)))
    arrays = load_file(tmp_path / "model.safetensors")
    save_file({name: one for name, one in arrays.items() if "pooler" not in name}, tmp_path / "model.safetensors")
    assert bert.read(tmp_path).pooler is None


CHANGES = {
    "model_type is 'roberta'": {"model_type": "roberta"},
    "hidden_act is 'relu'": {"hidden_act": "relu"},
    "position_embedding_type is 'relative_key'": {"position_embedding_type": "relative_key"},
    "5 heads do not share a width of 12": {"num_attention_heads": 5},
    "'embeddings.position_embeddings.weight' should hold 'position_embed/weight' (8, 12), (9, 12) arrived": {
        "max_position_embeddings": 8
    },
    "There is no tensor 'encoder.layer.2.attention.self.query.weight'": {"num_hidden_layers": 3},
}


@pytest.mark.parametrize("message", CHANGES)
def test_other_models_are_refused(model, tmp_path, message):
    bert.write(tmp_path, model)
    said = json.loads((tmp_path / "config.json").read_text()) | CHANGES[message]
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(FileError, match=re.escape(message)):
        bert.read(tmp_path)


# ---------------------------------------------------------------- the tokenizer

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "##a", "a", "-", "cafe", "中", "##b"]


@pytest.mark.parametrize(
    ("given", "pieces"),
    [
        ("unaffable", "un ##aff ##able"),
        ("UNAFFABLE\ta", "un ##aff ##able a"),
        ("a-b", "a - [UNK]"),
        ("café a\u0000b", "cafe a ##b"),
        ("a中a", "a 中 a"),
        ("unaffx una", "[UNK] un ##a"),
        ("", ""),
        ("[PAD]", "[UNK] [UNK] [UNK]"),
        ("a" * 101, "[UNK]"),
    ],
)
def test_words_are_cut_into_the_longest_pieces(given, pieces):
    tokenizer = WordPiece(PIECES)
    assert tokenizer.encode(given) == [PIECES.index(one) for one in f"[CLS] {pieces} [SEP]".split()]


def test_shorter_texts_are_filled_up_and_longer_ones_cut():
    tokens, seen = WordPiece(PIECES).batch(["a", "a a a a"], 5)
    np.testing.assert_array_equal(tokens, [[2, 8, 3, 0, 0], [2, 8, 8, 8, 3]])
    np.testing.assert_array_equal(seen, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert WordPiece(PIECES).batch(["a", "a a"])[0].shape == (2, 4)


def test_case_is_kept_where_the_file_says_so(tmp_path):
    said = {
        "model": {"type": "WordPiece", "vocab": {p: i for i, p in enumerate([*PIECES, "A"])},
                  "max_input_chars_per_word": 100},
        "normalizer": {"type": "BertNormalizer", "lowercase": False, "strip_accents": None,
                       "handle_chinese_chars": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    assert wordpiece.read(tmp_path).encode("A a") == [2, 13, 8, 3]
    for change, message in (
        ({"model": said["model"] | {"type": "BPE"}}, "of the kinds .*'BPE'"),
        ({"normalizer": said["normalizer"] | {"strip_accents": True}}, "is not BERT's own"),
        ({"model": said["model"] | {"vocab": {"a": 0}}}, "is damaged.*PAD.*is none of the pieces"),
        ({"pre_tokenizer": None}, "is damaged"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(said | change))
        with pytest.raises(FileError, match=message):
            wordpiece.read(tmp_path)


@pytest.mark.skipif(not MINILM.exists(), reason="all-MiniLM-L6-v2 is not at hand")
def test_published_similarities_of_minilm():
    """Those of the quickstart of sentence-transformers (sbert.net)."""
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    vectors = np.asarray(bert.sentence_vectors(bert.read(MINILM), *wordpiece.read(MINILM).batch(texts)))
    expected = [[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=5e-5)
