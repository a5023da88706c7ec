"""Tokenizers: text to the numbers of its pieces and back.

    tokenizer = of_llama2c(data)                        # llama2.c's tokenizer.bin
    tokenizer = of_gguf(metadata)                       # that of a GGUF file
    tokenizer.decode(tokenizer.encode("Once upon a time"))

Both kinds join neighbouring parts of a text for as long as there is a piece for two of them, the best first: by the
score of the piece (SentencePiece), or the rank of the pair (byte-level BPE, within the words that a pattern finds).

Python's `re` knows no categories of Unicode, so the classes of letters and numbers are written out from `unicodedata`,
and no package is needed. Characters assigned after Python's edition of Unicode count as punctuation.

References:
    Sennrich et al. 2016, arXiv:1508.07909; Kudo and Richardson 2018, arXiv:1808.06226; Radford et al. 2019 (GPT-2).
"""

import dataclasses
import functools
import heapq
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np

from jaxprune.lab.models.language.llama2c import read_tokenizer

T = TypeVar("T", str, bytes)

_SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""Unicode's White_Space; that of `re` has four separators of ASCII besides."""
_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?[L]+| ?[N]+| ?[^SLN]+|[S]+(?![^S])|[S]+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nLN]?[L]+|[N]| ?[^SLN]+[\r\n]*|[S]*[\r\n]+|[S]+(?![^S])|[S]+"
_PATTERNS = {"gpt-2": _GPT2, "smollm": _GPT2, "qwen2": _QWEN2, "llama-bpe": _QWEN2.replace("|[N]|", "|[N]{1,3}|")}
"""By the name that a GGUF file has of it; L, N and S stand for letters, numbers and spaces."""
_DIGITS_APART = ("smollm",)
_CONTROL, _USER, _BYTE = 3, 4, 6  # GGUF's kinds of tokens
_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's space


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """SentencePiece's way: a text, with a space before it, is joined from its characters; one without a piece is bytes.

    Attributes:
        pieces: in UTF-8, by number.
        scores: likewise.
        byte_zero: number of the token for the byte 0; the other 255 follow.
        special: tokens that are no text, such as those of beginning and end.
        first: token that texts begin with.
        last: token that ends a text.
    """

    pieces: Sequence[bytes]
    scores: Sequence[float]
    byte_zero: int = 3
    special: frozenset[int] = frozenset({0, 1, 2})
    first: int = 1
    last: int = 2

    @functools.cached_property
    def _numbers(self) -> dict[bytes, int]:
        apart = self.special | set(range(self.byte_zero, self.byte_zero + 256))
        return {piece: i for i, piece in reversed(list(enumerate(self.pieces))) if i not in apart}

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, `first` before them."""
        numbers = self._numbers

        def rank(left: bytes, right: bytes) -> float | None:
            found = numbers.get(left + right)
            return None if found is None else -self.scores[found]

        parts = joined([character.encode() for character in f" {text}"], rank) if text else []
        found = [self.first]
        for part in parts:
            number = numbers.get(part)
            found += [self.byte_zero + byte for byte in part] if number is None else [number]
        return found

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; special ones are left out, bytes that are no UTF-8 become U+FFFD."""
        found = b"".join(
            bytes([token - self.byte_zero]) if 0 <= token - self.byte_zero < 256 else self.pieces[token]
            for token in map(int, tokens)
            if token not in self.special
        )
        return found.removeprefix(b" ").decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True, eq=False)
class ByteLevel:
    """GPT-2's way: a pattern cuts a text into words, each is joined from its bytes.

    Attributes:
        tokens: by number, each byte of them written as a printable character.
        merges: pairs of such parts, "a b", best first.
        pattern: name of the pattern: gpt-2, smollm, qwen2 or llama-bpe.
        special: tokens that stand for themselves in a text, and that `decode` leaves out.
        first: token that texts begin with; None: none is set before them.
        last: token that ends a text.

    Raises:
        ValueError: a pattern that is not known.
    """

    tokens: Sequence[str]
    merges: Sequence[str]
    pattern: str = "gpt-2"
    special: frozenset[int] = frozenset()
    first: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        if self.pattern not in _PATTERNS:
            raise ValueError(
                f"Words are not known to be cut the way of {self.pattern!r}. There are: {', '.join(_PATTERNS)}."
            )

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @functools.cached_property
    def _ranks(self) -> dict[tuple[str, ...], int]:
        return {tuple(merge.split(" ")): rank for rank, merge in enumerate(self.merges)}

    @functools.cached_property
    def _of_word(self) -> Callable[[str], list[int]]:
        def rank(left: str, right: str) -> int | None:
            return self._ranks.get((left, right))

        @functools.lru_cache(2**16)
        def of_word(word: str) -> list[int]:
            return [self._numbers[part] for part in joined([_WRITTEN[byte] for byte in word.encode()], rank)]

        return of_word

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, `first` before them where there is one; special tokens written out in it are found.

        Raises:
            KeyError: a byte has no token.
        """
        found = [] if self.first is None else [self.first]
        special = {self.tokens[i]: i for i in sorted(self.special)}
        between = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        for part in re.split(f"({between})", text) if special else [text]:
            found += [special[part]] if part in special else self._of_text(part)
        return found

    def _of_text(self, text: str) -> list[int]:
        runs = _pattern("[N]|[^N]+").findall(text) if self.pattern in _DIGITS_APART else [text]
        words = (word for run in runs for word in _pattern(_PATTERNS[self.pattern]).findall(run))
        return [token for word in words for token in self._of_word(word)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; special ones are left out, bytes that are no UTF-8 become U+FFFD."""
        written = "".join(self.tokens[token] for token in map(int, tokens) if token not in self.special)
        return b"".join(_BYTES.get(each) or each.encode() for each in written).decode("utf-8", "replace")


Tokenizer: TypeAlias = Pieces | ByteLevel


def joined(parts: list[T], rank: Callable[[T, T], float | None]) -> list[T]:
    """Parts joined in pairs, always the pair of the lowest rank, the leftmost of equals, until none has one.

    Args:
        parts: of a text.
        rank: of a pair; None: it is not joined.
    """
    after = [*range(1, len(parts)), -1] if parts else []
    before = list(range(-1, len(parts) - 1))
    found: list[T | None] = list(parts)
    heap: list[tuple[float, int, T, T]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            one, other = found[left], found[right]
            if one is not None and other is not None and (of_pair := rank(one, other)) is not None:
                heapq.heappush(heap, (of_pair, left, one, other))

    for left in range(len(parts) - 1):
        offer(left, left + 1)
    while heap:
        _, left, one, other = heapq.heappop(heap)
        right = after[left]
        if found[left] != one or right < 0 or found[right] != other:
            continue  # one of them has been joined with another since
        found[left], found[right], after[left] = one + other, None, after[right]
        if after[left] >= 0:
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [part for part in found if part is not None]


def of_llama2c(data: bytes) -> Pieces:
    """The tokenizer of llama2.c's file: 0, 1 and 2 are special, the 256 tokens after them bytes.

    Its models end a text with the token that the next one begins with.

    Raises:
        FileError: the bytes are no such file.
    """
    return Pieces(*read_tokenizer(data), last=1)


def of_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        ValueError: there is none, or one of another kind, or it cuts words in a way that is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"The file's tokenizer is {kind!r}, 'gpt2' (byte-level BPE) or 'llama' was expected.")

    def number(name: str, default: bool) -> int | None:
        asked = metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        return int(metadata[f"tokenizer.ggml.{name}_token_id"]) if asked else None

    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = np.asarray(metadata.get("tokenizer.ggml.token_type", np.ones(len(tokens))))
    special = frozenset(np.flatnonzero((kinds == _CONTROL) | (kinds == _USER)).tolist())
    last = int(metadata.get("tokenizer.ggml.eos_token_id", -1))
    if kind == "gpt2":
        pattern, merges = str(metadata.get("tokenizer.ggml.pre", "gpt-2")), metadata["tokenizer.ggml.merges"]
        return ByteLevel(tokens, merges, pattern, special, number("bos", False), last)
    pieces = [token.replace(_MARK, " ").encode() for token in tokens]
    scores, first = np.asarray(metadata["tokenizer.ggml.scores"]).tolist(), number("bos", True)
    start = int(np.argmax(kinds == _BYTE))
    return Pieces(pieces, scores, start, special | {0}, 1 if first is None else first, last)


# ---------------------------------------------------------------- characters


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    """A pattern in which [L], [N], [S] and [^SLN] stand for classes of Unicode."""

    def written(found: re.Match[str]) -> str:
        # Escapes such as \r are no classes; N and L are not among them.
        return re.sub(r"(?<!\\)[LNS]", lambda kind: _SPACES if kind[0] == "S" else _ranges(kind[0]), found[0])

    return re.compile(re.sub(r"\[[^\]]*\]", written, text))


@functools.cache
def _ranges(kind: str) -> str:
    """All characters of a general category, as the inside of a class: "\\u0041-\\u005a..."."""
    codes = np.array([i for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i))[0] == kind])
    ends = np.flatnonzero(np.diff(codes) > 1)
    starts, stops = codes[np.r_[0, ends + 1]], codes[np.r_[ends, -1]]
    return "".join(f"\\U{start:08x}-\\U{stop:08x}" for start, stop in zip(starts, stops, strict=True))


def _written_bytes() -> dict[int, str]:
    """GPT-2's printable character of each byte: itself, or one from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_WRITTEN = _written_bytes()
_BYTES = {written: bytes([byte]) for byte, written in _WRITTEN.items()}
