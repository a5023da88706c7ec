"""Tokenizers: joined as by hand, to the tokens of the reference, and back; and the command that makes a model write."""

import dataclasses
import itertools
import json
import os
import random
from pathlib import Path

import language_helpers as helpers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.lab.commands import generate
from jaxprune.lab.commands import main as cli
from jaxprune.lab.models import language
from jaxprune.lab.models.language import gguf, llama2c, tokenizers
from jaxprune.lab.models.language.config import Config

pytestmark = pytest.mark.usefixtures("quick")

DATA = Path(os.environ.get("JAXPRUNE_DATA", "nowhere"))
STORIES = DATA / "stories15m" / "llama2.data"
SMOLLM2 = DATA / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES = list(tokenizers._WRITTEN.values())


def slowly(parts, rank):
    """Every pair looked at again after every joining."""
    while True:
        ranks = [rank(*pair) for pair in itertools.pairwise(parts)]
        if all(each is None for each in ranks):
            return parts
        at = min((each, i) for i, each in enumerate(ranks) if each is not None)[1]
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]


@given(st.text("ab", max_size=20), st.integers(0, 2**32))
def test_the_best_pair_is_joined_first_and_the_leftmost_of_equals(text, seed):
    drawn = random.Random(seed)
    pieces = {"".join(drawn.choices("ab", k=drawn.randint(2, 4))): drawn.randint(0, 3) for _ in range(6)}

    def rank(left, right):
        return pieces.get(left + right)

    assert tokenizers.joined(list(text), rank) == slowly(list(text), rank)


def pieces():
    words = [b" ", b"a", b"b", b"n", b"an", b" an", b"ana", "é".encode()]
    return tokenizers.Pieces(
        [b"<unk>", b"<s>", b"</s>", *(bytes([i]) for i in range(256)), *words],
        [0.0] * 259 + [-1.0 * i for i in range(8)],
    )


def test_pieces_are_joined_by_their_scores_and_strange_characters_are_bytes():
    tokenizer = pieces()
    assert tokenizer.encode("anna") == [1, 264, 262, 262 - 2]  # " an" "n" "a"
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("é☃")[2:] == [266, *(3 + byte for byte in "☃".encode())]
    assert tokenizer.decode(tokenizer.encode("banana é☃")) == "banana é☃"
    assert tokenizer.decode([1, 3 + 0xFF, 2]) == "\ufffd"


def byte_level(pattern, merges=(), special=()):
    tokens = [*special, *BYTES, *(merge.replace(" ", "") for merge in merges)]
    return tokenizers.ByteLevel(tokens, merges, pattern, frozenset(range(len(special))))


def words(pattern, text):
    """Where a text is cut: with all pairs of a word merged, each word is a token."""
    found = []
    tokenizer = byte_level(pattern)
    object.__setattr__(tokenizer, "_of_word", lambda word: [found.append(word) or 0])
    tokenizer.encode(text)
    return found


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("gpt-2", "Hello world's  end\n\n 2024!", ["Hello", " world", "'s", " ", " end", "\n\n", " 2024", "!"]),
        ("smollm", "in 2024 ½", ["in", " ", "2", "0", "2", "4", " ", "½"]),
        ("qwen2", "I'LL\tgo, 12\r\n", ["I", "'LL", "\tgo", ",", " ", "1", "2", "\r\n"]),
        ("llama-bpe", "12345 a", ["123", "45", " a"]),
        ("gpt-2", "a\x1c b\x85\u3000c", ["a", "\x1c", " b", "\x85", "\u3000", "c"]),
    ],
)
def test_words_are_cut_as_the_pattern_says(pattern, text, expected):
    assert words(pattern, text) == expected


@given(st.text(), st.sampled_from(["gpt-2", "smollm", "qwen2", "llama-bpe"]))
def test_every_text_comes_back(text, pattern):
    tokenizer = byte_level(pattern, ["a b", "Ġ a"])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_stand_for_themselves():
    tokenizer = byte_level("gpt-2", ["a b"], ["<s>", "<s>x"])
    assert tokenizer.encode("ab<s>xab<s>") == [258, 1, 258, 0]
    assert tokenizer.decode([258, 1, 258, 0]) == "abab"


def test_tokenizers_of_gguf_come_back_through_a_file(tmp_path):
    said = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.tokens": ["<s>", *BYTES, "ab"], "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.token_type": np.array([3] + [1] * 257, np.int32),
    }  # fmt: skip
    gguf.write(tmp_path / "a.gguf", said, {})
    tokenizer = tokenizers.of_gguf(gguf.read(tmp_path / "a.gguf").metadata)
    assert (tokenizer.encode("ab<s>"), tokenizer.first, tokenizer.last) == ([257, 0], None, 0)
    with pytest.raises(ValueError, match="Words are not known to be cut the way of 'dots'"):
        tokenizers.of_gguf(said | {"tokenizer.ggml.pre": "dots"})
    with pytest.raises(ValueError, match="tokenizer is 'bert'"):
        tokenizers.of_gguf({"tokenizer.ggml.model": "bert"})
    marks = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a"]
    kinds = np.array([2, 3, 3] + [6] * 256 + [1] * 3, np.int32)
    theirs = {"model": "llama", "tokens": marks, "token_type": kinds, "scores": np.zeros(262, np.float32)}
    of_llama = tokenizers.of_gguf({f"tokenizer.ggml.{name}": value for name, value in theirs.items()} | {
        "tokenizer.ggml.bos_token_id": np.uint32(1), "tokenizer.ggml.eos_token_id": np.uint32(2)})  # fmt: skip
    assert of_llama.encode("a☃") == [1, 261, *(3 + byte for byte in "☃".encode())]
    assert of_llama.decode(of_llama.encode("a☃")) == "a☃"


@pytest.mark.skipif(not SMOLLM2.exists(), reason="JAXPRUNE_DATA names no folder with smollm2/ in it")
def test_tokens_of_smollm2_are_those_of_the_tokenizers_package():
    """Its 0.23.3 with the same merges, Digits(individual_digits=True) and ByteLevel gave these."""
    tokenizer = tokenizers.of_gguf(gguf.read(SMOLLM2).metadata)
    text = (
        "Hello world! It's 2024, isn't   it?\n\n  naïve 你好 12½ x\x1c\x85 \u200b٣٤ \U0001d7d8 😀 "
        " \t\tfoo'll  \r\n\r\n don\u2019t I'LL"
    )
    assert tokenizer.encode(text) == [
        *(19556, 905, 17, 657, 506, 216, 34, 32, 34, 36, 28, 3247, 982, 256, 357, 47, 8866, 15486, 46494, 216, 18645),
        *(250, 48392, 138, 216, 33, 34, 16738, 1792, 213, 141, 223, 459, 229, 164, 113, 164, 114, 216, 23159, 249, 242),
        *(40303, 218, 256, 197, 197, 15236, 3060, 256, 18682, 1326, 417, 100, 339, 23, 16421),
    ]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.skipif(not STORIES.exists(), reason="JAXPRUNE_DATA names no folder with stories15m/ in it")
def test_stories15m_tells_its_story():
    """Its likeliest story, as in llama2.c's own pages."""
    model = generate.load(STORIES)
    assert model.tokenizer.encode("Once upon a time,") == [1, 9038, 2501, 263, 931, 29892]
    found = generate.generate(model, "Once upon a time", 16, temperature=0)
    assert found.text == "Once upon a time, there was a little girl named Lily. She loved to play outside in"


# ---------------------------------------------------------------- the command


@pytest.fixture
def story(tmp_path):
    """A file of llama2.c with its tokenizer behind it."""
    config, tokenizer = Config(267, 24, 2, 4, 2, 40, length=32), pieces()
    llama2c.write(tmp_path / "a.bin", helpers.small(config), config)
    written = llama2c.write_tokenizer(list(tokenizer.pieces), list(tokenizer.scores))
    with (tmp_path / "a.bin").open("ab") as file:
        file.write(written)
    return tmp_path / "a.bin"


def test_a_model_goes_on_with_a_text(story, capsys):
    words = ["generate", str(story), "anna", "--tokens", "5", "--json"]
    assert cli.main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert cli.main(words) == 0
    assert first["text"] == json.loads(capsys.readouterr().out)["text"]
    assert first["text"].startswith("anna")
    assert (first["sparsity"], list(first["speeds"])) == (0, ["dense"])
    assert cli.main([*words[:3], "--tokens", "5", "--seed", "1"]) == 0
    assert "tokens a second: dense" in capsys.readouterr().out


def test_pruned_weights_run_sparse_beside_dense(story, tmp_path, capsys):
    params, config, *_ = language.read(story)
    params = jp.apply_masks(params, jp.compute_masks(jp.Method(), params, 0.5))
    path = tmp_path / "a.jaxprune"
    jp.save(path, params, metadata={"decoder": dataclasses.asdict(config)})
    words = ["generate", str(path), "anna", "--tokens", "4", "--formats", "bcsr"]
    assert cli.main([*words, "--tokenizer", str(story), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert list(found["speeds"]) == ["dense", "bcsr"]
    assert min(found["speeds"].values()) > 0
    assert cli.main(words) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    jp.save(path, params)
    assert cli.main(words) == 2
    assert "is no language model" in capsys.readouterr().err
