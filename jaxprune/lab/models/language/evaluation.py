"""What a language model is worth on texts: perplexity, and how far it is from another.

    perplexity(apply, params, windows)
    compare(apply, pruned, params, windows)     # both perplexities, the divergence a token, how often both say the same
    loss(apply, params, tokens)                 # what calibration weighs outputs by

Windows are (n, length) tokens, each a text by itself; of its tokens all but the first are predicted. Logits are those
of the model, in its own precision; what is summed over tokens is summed in float64.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxprune.types import Params

Apply = Callable[[Any, Any], Any]
"""(params, tokens (batch, length)) -> logits (batch, length, vocabulary)."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model beside the one it was made of.

    Attributes:
        perplexity: of the model.
        dense: perplexity of the other one.
        divergence: nats a token, the mean of $KL(dense || model)$.
        agreement: share of tokens for which both think the same token the most likely.
    """

    perplexity: float
    dense: float
    divergence: float
    agreement: float


def loss(apply: Apply, params: Params, tokens: Int[Array, "batch length"]) -> Float[Array, ""]:
    """The negative log-likelihood of the tokens of a batch, all but the first of each text, in nats.

    Text by text, and each again for its derivatives, so that these take the memory of one text.
    """

    @jax.checkpoint
    def of_text(text: Int[Array, " length"]) -> Float[Array, ""]:
        return jnp.sum(_loss(_log_probabilities(apply, params, text[None]), text[None]))

    return jnp.sum(lax.map(of_text, tokens))


def perplexity(apply: Apply, params: Params, windows: Int[np.ndarray, "n length"], *, batch: int = 8) -> float:
    r"""$\exp(-\frac{1}{N} \sum \log p(token \mid those before it))$ over all predicted tokens.

    Args:
        apply: the model.
        params: its arrays, compressed ones as well, where `apply` takes them.
        windows: tokens, two or more in a row.
        batch: texts that are computed at once.

    Raises:
        ValueError: there is no token to predict.
    """
    losses = [_losses(apply, params, tokens)[:n] for tokens, n in _batches(windows, batch)]
    return float(np.exp(_mean(losses)))


def compare(
    apply: Apply, params: Params, dense: Params, windows: Int[np.ndarray, "n length"], *, batch: int = 8
) -> Comparison:
    """A pruned model beside the dense one, in one pass.

    Args:
        apply: the model, of both.
        params: pruned.
        dense: what was pruned.
        windows: tokens, two or more in a row.
        batch: texts that are computed at once.

    Raises:
        ValueError: there is no token to predict.
    """
    found = [[x[:n] for x in _both(apply, params, dense, tokens)] for tokens, n in _batches(windows, batch)]
    loss, of_dense, divergence, agreed = (_mean(each) for each in zip(*found, strict=True))
    return Comparison(float(np.exp(loss)), float(np.exp(of_dense)), divergence, agreed)


def windows_of(tokens: Int[np.ndarray, "n_tokens"], length: int) -> Int[np.ndarray, "n length"]:
    """A text cut into windows that do not overlap; the rest at its end is left out.

    Raises:
        ValueError: the text is shorter than one window.
    """
    if len(tokens) < length:
        raise ValueError(f"A text of {len(tokens)} tokens has no window of {length}.")
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def _batches(windows: Int[np.ndarray, "n length"], batch: int) -> Iterator[tuple[Array, int]]:
    """Batches of one size, the last filled up, and how many texts of each count."""
    if windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"Windows {windows.shape} have no token to predict: (texts, two or more tokens) was expected.")
    batch = min(batch, len(windows))
    for start in range(0, len(windows), batch):
        some = windows[start : start + batch]
        yield jnp.asarray(np.resize(some, (batch, windows.shape[1]))), len(some)


def _mean(parts: Any) -> float:
    return float(np.mean(np.concatenate([np.asarray(part, np.float64).reshape(-1) for part in parts])))


def _log_probabilities(apply: Apply, params: Params, tokens: Array) -> Float[Array, "batch predicted vocabulary"]:
    logits = apply(params, tokens)[:, :-1]
    return jax.nn.log_softmax(logits.astype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32), axis=-1)


def _loss(log_probabilities: Array, tokens: Array) -> Float[Array, "batch predicted"]:
    return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)[..., 0]


@functools.partial(jax.jit, static_argnums=0)
def _losses(apply: Apply, params: Params, tokens: Array) -> Float[Array, "batch predicted"]:
    return _loss(_log_probabilities(apply, params, tokens), tokens)


@functools.partial(jax.jit, static_argnums=0)
def _both(apply: Apply, params: Params, dense: Params, tokens: Array) -> tuple[Array, Array, Array, Array]:
    ours, theirs = (_log_probabilities(apply, each, tokens) for each in (params, dense))
    divergence = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
    return _loss(ours, tokens), _loss(theirs, tokens), divergence, jnp.argmax(ours, -1) == jnp.argmax(theirs, -1)
