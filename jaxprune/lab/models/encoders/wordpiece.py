"""BERT's tokenizer: words, each cut into the longest pieces that there are.

    tokenizer = read("all-MiniLM-L6-v2")                 # a folder with tokenizer.json
    tokens, seen = tokenizer.batch(["A text.", "Another one, which is longer."])

References:
    Devlin et al. 2018, arXiv:1810.04805; Wu et al. 2016, arXiv:1609.08144.
"""

import dataclasses
import functools
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from jaxprune.lab.models.language.hugging_face import read_json
from jaxprune.storage.container import FileError

_CHINESE = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip
"""Characters that are words of their own."""
_ASCII_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


@dataclasses.dataclass(frozen=True, eq=False)
class WordPiece:
    """Text to the numbers of its pieces and back.

    Attributes:
        pieces: by number; those that go on with a word begin with "##".
        lowercase: whether letters lose their case, and their accents.
        longest: characters of a word; a longer one is unknown.

    Raises:
        ValueError: [PAD], [UNK], [CLS] or [SEP] is none of the pieces.
    """

    pieces: Sequence[str]
    lowercase: bool = True
    longest: int = 100

    def __post_init__(self) -> None:
        if missing := [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if name not in self._numbers]:
            raise ValueError(f"{missing[0]!r} is none of the pieces, but is needed.")

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, [CLS] before and [SEP] after them; names of special tokens in a text are mere text."""
        found = [token for word in _words(text, self.lowercase) for token in self._of_word(word)]
        return [self._numbers["[CLS]"], *found, self._numbers["[SEP]"]]

    def batch(
        self, texts: Sequence[str], length: int | None = None
    ) -> tuple[Int[np.ndarray, "batch length"], Bool[np.ndarray, "batch length"]]:
        """Tokens of several texts, [PAD] behind the shorter ones, and which of them are not [PAD].

        Args:
            texts: one or more.
            length: tokens of each, longer ones are cut before [SEP]; None: as many as the longest has.
        """
        found = [self.encode(text) for text in texts]
        length = max(map(len, found)) if length is None else length
        tokens = np.full((len(found), length), self._numbers["[PAD]"], np.int32)
        for row, text in zip(tokens, found, strict=True):
            row[: len(text)] = text if len(text) <= length else [*text[: length - 1], text[-1]]
        return tokens, np.arange(length) < np.asarray([len(text) for text in found])[:, None]

    def _of_word(self, word: str) -> list[int]:
        found: list[int] = []
        start = 0
        while start < len(word) <= self.longest:
            parts = ("##" * (start > 0) + word[start:stop] for stop in range(len(word), start, -1))
            piece = next((part for part in parts if part in self._numbers), None)
            if piece is None:
                break
            found.append(self._numbers[piece])
            start += len(piece) - 2 * (start > 0)
        return found if start == len(word) else [self._numbers["[UNK]"]]


def read(folder: str | os.PathLike[str]) -> WordPiece:
    """The tokenizer of a folder's tokenizer.json.

    Raises:
        FileError: it is of another kind, or damaged.
        OSError: it cannot be read.
    """
    path = Path(folder) / "tokenizer.json"
    said = read_json(path)
    try:
        model, normal = said["model"], said["normalizer"]
        kinds = model["type"], normal["type"], said["pre_tokenizer"]["type"]
        if kinds != ("WordPiece", "BertNormalizer", "BertPreTokenizer"):
            raise FileError(f"{path} holds a tokenizer of the kinds {kinds}, BERT's WordPiece was expected.")
        if normal["strip_accents"] not in (None, normal["lowercase"]) or not normal["handle_chinese_chars"]:
            raise FileError(f"{path}: its normalizer {normal} is not BERT's own.")
        pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
        return WordPiece(pieces, normal["lowercase"], model["max_input_chars_per_word"])
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path} is damaged: {error!r}.") from None


def _words(text: str, lowercase: bool) -> list[str]:
    """Words between spaces; marks of punctuation and Chinese characters are words of their own."""
    text = "".join(_spaced(text))
    if lowercase:
        # One by one: `str.lower` of a whole text writes a sigma at the end of a word in another way.
        text = "".join(c.lower() for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    return "".join(f" {c} " if _is_punctuation(c) else c for c in text).split()


def _spaced(text: str) -> Iterator[str]:
    """Characters without control ones; Chinese ones have spaces around."""
    for c in text:
        if c in "\t\n\r" or unicodedata.category(c) == "Zs":
            yield " "
        elif c not in "\0\ufffd" and unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs"):
            yield f" {c} " if any(low <= ord(c) <= high for low, high in _CHINESE) else c


def _is_punctuation(character: str) -> bool:
    return character in _ASCII_PUNCTUATION or unicodedata.category(character).startswith("P")
