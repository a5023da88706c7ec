r"""How much every channel matters to the products that read it, by what they get there.

A *reader* is a product y = x W; some of its inputs are a channel g, such as the one input that is a hidden unit, or all
those of an attention head. With inputs X (tokens, in), H = X^T X and W (in, out):

| importance | score of g |
|---|---|
| `WeightImportance` | $\lVert W_g \rVert_F$ |
| `ActivationImportance` | $\lVert X_g \rVert_F$, or the mean absolute value |
| `OutputImportance` | $\lVert X_g W_g \rVert_F$, the error without g |
| `CompensatedImportance` | the same once the other weights make up for it, one channel after the other |

A channel with several readers has the sum of squares (of means: the sum) over them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxprune.oneshot.layerwise import Moments, OutputMoments, Weight, damped

Channel = Float[Array, "channels"]


class Reader(NamedTuple):
    """A product that reads channels.

    Attributes:
        name: of its leaf.
        weight: W, float32.
        tokens: rows of X.
        squares: $\\sum_t X_{ti}^2$.
        magnitudes: $\\sum_t |X_{ti}|$.
        moments: H; None for an importance that does not look at them.
        outputs: second moments of a loss's derivatives by y; None: all outputs count the same.
        channels: the number of each input's channel, from 0; -1 where it is none of those in question.
    """

    name: str
    weight: Weight
    tokens: Float[Array, ""]
    squares: Float[Array, "inputs"]
    magnitudes: Float[Array, "inputs"]
    moments: Moments | None
    outputs: OutputMoments | None
    channels: Int[np.ndarray, "inputs"]


@runtime_checkable
class Importance(Protocol):
    """Scores of channels side by side, of which the lowest go.

    Attributes:
        looks_at_moments: whether it needs H.
    """

    looks_at_moments: ClassVar[bool]

    def __call__(self, readers: Sequence[Reader], count: int) -> Channel:
        """The scores, larger = keep.

        Args:
            readers: all that read these channels.
            count: number of channels.
        """
        ...


@dataclasses.dataclass(frozen=True)
class WeightImportance:
    """By the weights that read a channel, without data: what the others are measured by."""

    looks_at_moments: ClassVar[bool] = False

    def __call__(self, readers: Sequence[Reader], count: int) -> Channel:
        """See `Importance`."""
        return jnp.sqrt(_total(readers, count, lambda one: jnp.sum(_weighed(one) ** 2, axis=1)))


@dataclasses.dataclass(frozen=True)
class ActivationImportance:
    r"""By the activations of a channel alone.

    Attributes:
        mean: by mean absolute values; without, by the L2 norm over all tokens, of a head over its features as well.

    References:
        Muralidharan et al. 2024, arXiv:2407.14679, section 2.2. The paper aggregates over texts and over tokens apart,
        and of hidden units takes what the first product gives before its nonlinearity; here it is what the next one
        gets.
    """

    mean: bool = False
    looks_at_moments: ClassVar[bool] = False

    def __call__(self, readers: Sequence[Reader], count: int) -> Channel:
        """See `Importance`."""
        if self.mean:
            return _total(readers, count, lambda one: one.magnitudes / jnp.maximum(one.tokens, 1.0))
        return jnp.sqrt(_total(readers, count, lambda one: one.squares))


@dataclasses.dataclass(frozen=True)
class OutputImportance:
    r"""By the error of the outputs without a channel, $\sqrt{tr(W_g^T H_{gg} W_g)}$."""

    looks_at_moments: ClassVar[bool] = True

    def __call__(self, readers: Sequence[Reader], count: int) -> Channel:
        """See `Importance`."""

        def parts(one: Reader) -> Float[Array, "inputs"]:
            together = one.channels[:, None] == one.channels
            weight = _weighed(one)
            return jnp.sum(jnp.where(together, _moments(one) * (weight @ weight.T), 0.0), axis=1)

        return jnp.sqrt(jnp.maximum(_total(readers, count, parts), 0.0))


@dataclasses.dataclass(frozen=True)
class CompensatedImportance:
    r"""By the error of the outputs once the other weights make up for a channel, $tr(W_g^T ((H^{-1})_{gg})^{-1} W_g)$.

    The least channel goes, the others' weights and $H^{-1}$ become those without it, and so on: a channel's score is
    the step at which it goes. Of two that say the same one goes early and the other late.

    Attributes:
        damping: see `jaxprune.oneshot.layerwise.damped`.

    Raises:
        ValueError: channels of a reader have different numbers of inputs.

    References:
        Kurtic, Frantar and Alistarh 2023, ZipLM, arXiv:2302.04089, algorithm 1.
    """

    damping: float = 0.01
    looks_at_moments: ClassVar[bool] = True

    def __call__(self, readers: Sequence[Reader], count: int) -> Channel:
        """See `Importance`."""
        places = [_places(one, count) for one in readers]
        states = [(_weighed(one), jnp.linalg.inv(damped(_moments(one), self.damping))) for one in readers]
        return _steps_of_removal(places, states, count)


@functools.partial(jax.jit, static_argnums=2)
def _steps_of_removal(places: list[Any], states: list[tuple[Array, Array]], count: int) -> Channel:
    """For each channel the step at which it goes."""

    def step(number: Any, carry: Any) -> Any:
        gone_at, states = carry
        here = jnp.isinf(gone_at)
        errors = sum(_errors(weight, inverse, at, here) for (weight, inverse), at in zip(states, places, strict=True))
        least = jnp.argmin(jnp.where(here, errors, jnp.inf))
        states = [_without(*state, at[least]) for state, at in zip(states, places, strict=True)]
        return gone_at.at[least].set(jnp.asarray(number, jnp.float32)), states

    return lax.fori_loop(0, count, step, (jnp.full(count, jnp.inf, jnp.float32), states))[0]


def _errors(weight: Weight, inverse: Moments, places: Int[Array, "channels each"], here: Array) -> Channel:
    """The error of every channel that is still there; of others a number without meaning."""
    rows = weight[places]
    if places.shape[1] == 1:  # hidden units: no systems of equations, which are slow by the thousand
        diagonal = jnp.diagonal(inverse)[places[:, 0]]
        return jnp.sum(rows**2, axis=(1, 2)) / jnp.where(here, diagonal, 1.0)
    blocks = inverse[places[:, :, None], places[:, None, :]]
    blocks = jnp.where(here[:, None, None], blocks, jnp.eye(places.shape[1], dtype=blocks.dtype)[None])
    return jnp.sum(rows * jnp.linalg.solve(blocks, rows), axis=(1, 2))


def _without(weight: Weight, inverse: Moments, group: Int[Array, "each"]) -> tuple[Weight, Moments]:
    """The weights that make up best for a channel's, and the inverse of the moments of the inputs that are left.

    What is left of the channel itself is zero but for rounding.
    """
    rows, block, columns = (weight[group], inverse[group]), inverse[group][:, group], inverse[:, group]
    if len(group) == 1:  # in one pass over both, in place
        return weight - columns * (rows[0] / block), inverse - columns * (rows[1] / block)
    weights, inverses = (jnp.linalg.solve(block, row) for row in rows)
    return weight - columns @ weights, inverse - columns @ inverses


def _places(reader: Reader, count: int) -> Int[np.ndarray, "channels each"]:
    """The inputs of each channel."""
    counts = np.bincount(reader.channels[reader.channels >= 0], minlength=count)
    if len(set(counts.tolist())) > 1:
        raise ValueError(
            f"Channels that {reader.name!r} reads have from {counts.min()} to {counts.max()} inputs there; as many of "
            "each were expected. Take `OutputImportance()`."
        )
    order = np.argsort(reader.channels, kind="stable")
    return order[(reader.channels < 0).sum() :].reshape(count, -1)


def _total(readers: Sequence[Reader], count: int, of: Callable[[Reader], Float[Array, "inputs"]]) -> Channel:
    """Numbers of inputs, added up for each channel."""
    parts = [
        jax.ops.segment_sum(jnp.where(one.channels < 0, 0.0, of(one)), jnp.maximum(one.channels, 0), count)
        for one in readers
    ]
    return jnp.sum(jnp.stack(parts), axis=0)


def _weighed(reader: Reader) -> Weight:
    """W, or W times a root of the outputs' moments: sums of its squares are then those that the loss sees."""
    if reader.outputs is None:
        return reader.weight
    return reader.weight @ jnp.linalg.cholesky(damped(reader.outputs, 0.01))


def _moments(reader: Reader) -> Moments:
    assert reader.moments is not None
    return reader.moments
