"""Texts to calibrate with and to measure on: those that a model samples itself, and windows of plain text files.

tokens = sampled(params, config, count=128, length=256, seed=1)
tokens = windows(tokenizer, files_of("speeches"), length=512)
digest(tokens)                         # says which texts they are
"""

import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from jaxprune.lab.models.language.config import Config
from jaxprune.lab.models.language.decoder import empty_cache, step
from jaxprune.lab.models.language.evaluation import windows_of
from jaxprune.lab.models.language.tokenizers import Tokenizer
from jaxprune.types import Params


def sampled(
    params: Params, config: Config, count: int, length: int, seed: int, *, first: int = 1, temperature: float = 1.0
) -> Int[np.ndarray, "count length"]:
    """Texts that the model samples itself, each from the token `first` on.

    Everything is computed in float64, so that the same texts come out on every machine: only where a number drawn lies
    within 1e-12 of the border between two tokens could they differ.

    Args:
        params: of the model.
        config: likewise.
        count: number of texts.
        length: tokens of each, the first included.
        seed: of PCG64; one number is drawn for each text, for one token after the other.
        first: token that all texts begin with.
        temperature: by which logits are divided.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    tokens = np.full((count, length), first, np.int32)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        cache = empty_cache(config, count, length, jnp.float64)
        advance = jax.jit(functools.partial(step, config=config), donate_argnums=1)
        for i in range(1, length):
            logits, cache = advance(wide, cache, tokens[:, i - 1 : i])
            tokens[:, i] = drawn(np.asarray(logits[:, 0]) / temperature, rng.random(count))
    return tokens


def drawn(logits: Shaped[np.ndarray, "count vocabulary"], numbers: Shaped[np.ndarray, "count"]) -> np.ndarray:
    """The token of each text in whose share of the probabilities, laid side by side, its number from 0 to 1 falls."""
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    bounds = np.cumsum(shares, axis=-1)
    found = [np.searchsorted(one, number * one[-1], side="right") for one, number in zip(bounds, numbers, strict=True)]
    return np.minimum(found, logits.shape[1] - 1).astype(np.int32)


def files_of(path: Path) -> list[Path]:
    """A text file, or those of a folder that end in .txt, `chapter_2` before `chapter_10`.

    Raises:
        ValueError: the folder has none.
    """
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.txt"), key=lambda file: [(not p.isdigit(), int(p) if p.isdigit() else 0, p)
                                                         for p in re.split(r"(\d+)", file.name)])  # fmt: skip
    if not found:
        raise ValueError(f"{path} has no text files: names that end in .txt were expected.")
    return found


def windows(tokenizer: Tokenizer, files: Iterable[Path], length: int) -> Int[np.ndarray, "n length"]:
    """Windows of text files that do not overlap: of all the texts, a blank line between two of them, as one text.

    Args:
        tokenizer: of the model.
        files: in UTF-8; spaces at their ends are left out.
        length: tokens of a window.

    Raises:
        ValueError: the texts are shorter than one window, or no UTF-8.
    """
    text = "\n\n".join(file.read_text("utf-8").strip() for file in files)
    return windows_of(np.asarray(tokenizer.encode(text), np.int32), length)


def digest(tokens: Int[np.ndarray, "..."]) -> str:
    """The first eight digits of the SHA-256 of tokens as int32."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest()[:8]
