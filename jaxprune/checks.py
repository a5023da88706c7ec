"""Questions asked of what a user hands in, each answered by an error that names the way out.

Values can be looked at only where they are concrete; under a trace (jit, vmap, ...) these checks let them pass.
"""

import difflib
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Bool


def is_concrete(value: Any) -> bool:
    """Whether the value is known now, rather than traced."""
    return not isinstance(value, jax.core.Tracer)


def check_sparsity(sparsity: Any, what: str = "sparsity") -> None:
    """Refuse a sparsity outside [0, 1).

    Raises:
        ValueError: outside, or NaN; a percentage is recognised.
    """
    if not is_concrete(sparsity):
        return
    if jnp.ndim(sparsity) != 0:
        raise ValueError(f"`{what}` is one number, got an array of shape {jnp.shape(sparsity)}.")
    value = float(sparsity)
    if not 0 <= value < 1:
        raise ValueError(f"`{what}` is the fraction removed, in [0, 1); got {value:g}.{percentage(value)}")


def check_number(value: Any, said: str, low: float = 0.0, high: float = math.inf, ends: str = "[)") -> None:
    """Refuse a number outside of an interval.

    Args:
        value: one number; a traced one passes.
        said: what is expected, which begins the message: "`momentum` needs a decay in [0, 1),".
        low: where the interval begins.
        high: where it ends.
        ends: "[]", "[)", "(]" or "()": whether these two are in it.

    Raises:
        ValueError: outside, NaN, or several numbers; a percentage is recognised where the interval ends with 1.
    """
    if not is_concrete(value):
        return
    if jnp.ndim(value) != 0:
        raise ValueError(f"{said} got an array of shape {jnp.shape(value)}.")
    number = float(value)
    above = number >= low if ends[0] == "[" else number > low
    below = number <= high if ends[1] == "]" else number < high
    if not (above and below):
        raise ValueError(f"{said} got {value}.{percentage(number) if high == 1 else ''}")


def percentage(value: float) -> str:
    """ " Did you mean 0.9?" of 90 where a fraction is expected, or "" where it is no percentage."""
    return f" Did you mean {value / 100:g}?" if 1 < value < 100 else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" with the nearest of the known words, or "" if none is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f", did you mean {near[0]!r}?" if near else ""


def check_leaves(what: str, leaves: dict[str, Any], *, non_negative: bool = False) -> None:
    """Refuse NaN and infinity (and, if asked, negative numbers) in named leaves, naming the first such leaf.

    Args:
        what: what the leaves are, for the message: "weight", "score".
        leaves: leaf name -> array.
        non_negative: refuse negative numbers too.

    Raises:
        ValueError: a value is not as asked.
    """
    known = {name: leaf for name, leaf in leaves.items() if is_concrete(leaf)}
    # All leaves are dispatched before the first is looked at: one wait, not one a leaf.
    finite = {name: _all_finite(leaf) for name, leaf in known.items()}
    if not all(is_concrete(flag) for flag in finite.values()):
        return  # known leaves, closed over by a function being traced: what is computed from them is not known
    fine = {name: _none_negative(leaf) for name, leaf in known.items()} if non_negative else finite
    for name, leaf in known.items():
        if not finite[name]:
            kind, count = ("NaN", jnp.isnan(leaf)) if jnp.any(jnp.isnan(leaf)) else ("infinite", jnp.isinf(leaf))
            raise ValueError(
                f"{name!r} has {int(jnp.sum(count))} {kind} {what}(s) of {leaf.size}. Nothing can be ranked against "
                "them: mend the training (learning rate, loss scale), or leave the leaf out with `select`."
            )
        if not fine[name]:
            raise ValueError(f"{name!r} has a negative {what}; scores are >= 0, larger = keep.")


@jax.jit
def _all_finite(leaf: Array) -> Bool[Array, ""]:
    return jnp.all(jnp.isfinite(leaf))


@jax.jit
def _none_negative(leaf: Array) -> Bool[Array, ""]:
    return jnp.all(leaf >= 0)
