"""Generating: a language model from a file goes on with a text, and how many tokens a second it takes, beside dense.

print(generate(load("stories15M.bin"), "Once upon a time", 100))

A file of `jaxprune.save` is a language model if its metadata have, under "decoder", the fields of a `Config`.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab.commands import language_files
from jaxprune.lab.models import language
from jaxprune.lab.models.language.config import Config
from jaxprune.lab.models.language.decoder import empty_cache, step, untied
from jaxprune.lab.models.language.files import Language
from jaxprune.lab.models.language.texts import drawn
from jaxprune.storage import Artifact


@dataclasses.dataclass(frozen=True)
class Generated:
    """A text, and what it took.

    Attributes:
        text: the prompt and what the model made of it.
        tokens: that were generated.
        sparsity: of the weights.
        speeds: "dense", or a sparse format -> tokens a second.
    """

    text: str
    tokens: int
    sparsity: float
    speeds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        speeds = ", ".join(f"{form} {speed:.1f}" for form, speed in self.speeds.items())
        return f"{self.text}\n\n{self.tokens} tokens, {self.sparsity:.1%} sparse; tokens a second: {speeds}"


def load(path: Path, tokenizer: Path | None = None) -> Language:
    """A language model with its tokenizer.

    Args:
        path: as `read` has it.
        tokenizer: likewise.

    Raises:
        ValueError: as `read`; no tokenizer.
    """
    model = read(path, tokenizer)
    if model.tokenizer is None:
        raise ValueError(f"{path} has no tokenizer. Name a file of a model that has it: --tokenizer FILE.")
    return model


def read(path: Path, tokenizer: Path | None = None) -> Language:
    """A language model, with its tokenizer if there is one.

    Args:
        path: a file of `jaxprune.save`, a folder of `jaxprune oneshot`, or what `language.read` takes.
        tokenizer: a file of a model whose tokenizer it is; None: the model's own.

    Raises:
        FileError: damaged, or none of these.
        ValueError: a file of ours that is no language model.
        OSError: it cannot be read.
    """
    if language_files.kind_of(path) != "jaxprune":
        model = language.read(path)
    elif path.is_dir():
        model = _of_artifact(path / language_files.OURS)._replace(tokenizer=language_files.tokenizer_in(path))
    else:
        model = _of_artifact(path)
    if tokenizer is None:
        return model
    other = language_files.tokenizer_in(tokenizer) if tokenizer.is_dir() else language.read(tokenizer).tokenizer
    return model._replace(tokenizer=other)


def _of_artifact(path: Path) -> Language:
    with Artifact(path) as file:
        about = file.metadata
    try:
        config = Config(**about["decoder"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no language model: its metadata should have the fields of a `Config` under 'decoder', "
            f"`jp.save(path, params, metadata={{'decoder': dataclasses.asdict(config)}})`; {error!r}."
        ) from None
    return Language(jp.load(path), config, None, about)


def generate(
    model: Language,
    prompt: str,
    count: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    formats: Sequence[str] = ("native_bits",),
) -> Generated:
    """The text that a model makes, and the time of each form of its weights on the same tokens.

    Args:
        model: with a tokenizer.
        prompt: begins the text.
        count: tokens at most; the model may end the text before.
        temperature: by which logits are divided; 0: the most likely token.
        seed: draws the tokens.
        formats: sparse formats to time; none is where no weight is zero.

    Raises:
        ValueError: nothing to generate, a negative temperature, an empty prompt, or no tokenizer.
    """
    if count < 1 or temperature < 0 or model.tokenizer is None:
        raise ValueError(f"One token or more, a temperature and a tokenizer are needed: {count}, {temperature}.")
    tokenizer, sparsity = model.tokenizer, _sparsity(model.params)
    start = tokenizer.encode(prompt)
    if not start:
        raise ValueError("The prompt is empty, and this model has no token that texts begin with: write something.")
    rng = np.random.Generator(np.random.PCG64(seed))

    def choose(logits: np.ndarray, _: int) -> int:
        if not temperature:
            return int(logits.argmax())
        return int(drawn(logits[None].astype(np.float64) / temperature, rng.random(1))[0])

    model = model._replace(params=untied(model.params))
    tokens, speed = _run(_stepper(model.config), model, start, count, choose, tokenizer.last)
    speeds = {"dense": speed}
    for format in formats if sparsity else ():
        sparse = jp.sparse.compress(model.params, format, unsupported="dense")
        known = tokens[len(start) :]
        advance = _stepper(model.config, jp.sparse.apply)
        _, speeds[format] = _run(
            advance, model._replace(params=sparse), start, len(known), lambda _, i, known=known: known[i], None
        )
    return Generated(tokenizer.decode(tokens), len(tokens) - len(start), sparsity, speeds)


def of_arguments(arguments: argparse.Namespace) -> str:
    """What the command prints."""
    model = load(arguments.file, arguments.tokenizer)
    found = generate(
        model, arguments.prompt, arguments.tokens,
        temperature=arguments.temperature, seed=arguments.seed, formats=arguments.formats,
    )  # fmt: skip
    return json.dumps(found.to_dict(), indent=1) if arguments.json else str(found)


def _stepper(config: Config, wrap: Callable[..., Any] = lambda fn: fn) -> Callable[..., Any]:
    return jax.jit(wrap(functools.partial(step, config=config)), donate_argnums=1)


def _run(
    advance: Callable[..., Any],
    model: Language,
    start: list[int],
    count: int,
    choose: Callable[[np.ndarray, int], int],
    last: int | None,
) -> tuple[list[int], float]:
    """The prompt and the tokens chosen after it; tokens a second, programs compiled before."""
    size = len(start) + count
    for length in (len(start), 1):
        warm = jnp.zeros((1, length), jnp.int32)
        jax.block_until_ready(advance(model.params, empty_cache(model.config, 1, size), warm))
    cache, tokens = empty_cache(model.config, 1, size), list(start)
    logits, cache = advance(model.params, cache, jnp.asarray([start], jnp.int32))
    began = time.perf_counter()
    for i in range(count):
        tokens.append(choose(np.asarray(logits[0, -1]), i))
        if tokens[-1] == last:
            break
        logits, cache = advance(model.params, cache, jnp.asarray([tokens[-1:]], jnp.int32))
    jax.block_until_ready(logits)
    return tokens, (len(tokens) - len(start)) / (time.perf_counter() - began)


def _sparsity(params: Any) -> float:
    weights = [np.asarray(leaf) for name, leaf in tree.named_leaves(params).items() if jp.weights(name, leaf)]
    return float(1 - sum(map(np.count_nonzero, weights)) / max(sum(leaf.size for leaf in weights), 1))
