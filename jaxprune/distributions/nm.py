"""N:M: a contest for every few groups in a row."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array

from jaxprune.distributions.contest import Dims, Groups, Kept, required
from jaxprune.exact.numerics import rounded_share
from jaxprune.exact.ranking import top_k_mask
from jaxprune.types import Sparsity

_AXES = {"inputs": -2, "outputs": -1, "window": -3}
_WORDS = {-2: ("input", "inputs"), -1: ("output", "outputs"), -3: ("window's", "taps")}


@dataclasses.dataclass(frozen=True)
class NM:
    """`n` survivors in every run of `m` groups along an axis; each run is a contest of its own.

    Without a sparsity, n of m survive. With one (a gradual schedule) max(n, m - round(m * sparsity)) do.

    Attributes:
        n: survivors, 0 < n <= m.
        m: length of a run; it must divide the axis.
        along: the axis of the view: "inputs", "outputs" or "window".

    References:
        Mishra et al. 2021, arXiv:2104.08378 (2:4 on the input axis, as sparse tensor cores want it).
    """

    looks_at_axes: ClassVar[bool] = True
    is_pattern: ClassVar[bool] = True

    n: int
    m: int
    along: Literal["inputs", "outputs", "window"] = "inputs"

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise ValueError(f"`NM(n, m)` keeps n of m, with 0 < n <= m; got NM({self.n}, {self.m}).")
        if self.along not in _AXES:
            raise ValueError(f"`NM(along=...)` is one of {', '.join(_AXES)}, got {self.along!r}.")

    def __call__(self, groups: Groups, sparsity: Sparsity | None, *, dims: Dims) -> Kept:
        """One contest a run."""
        k = self._survivors(sparsity)
        return {name: self._runs(name, scores, k) for name, scores in groups.items()}

    def _survivors(self, sparsity: Sparsity | None) -> Any:
        if sparsity is None:
            return self.n
        share = required(sparsity, self)
        if isinstance(share, float):
            if round(self.m * share) > self.m - self.n:
                raise ValueError(
                    f"`NM({self.n}, {self.m})` removes at most {1 - self.n / self.m:g}; sparsity {share:g} is more."
                )
            return max(self.n, self.m - round(self.m * share))
        return jnp.maximum(jnp.uint32(self.n), self.m - rounded_share(self.m, share))

    def _runs(self, name: str, scores: Array, k: Any) -> Array:
        axis = _AXES[self.along]
        size = scores.shape[axis]
        if size % self.m:
            raise ValueError(
                f"`NM({self.n}, {self.m})` needs runs of {self.m} along the {_WORDS[axis][0]} axis, but {name!r} has "
                f"{size} {_WORDS[axis][1]}. Leave it out with `select`, or check `layout`."
            )
        at = scores.ndim + axis
        runs = scores.reshape(*scores.shape[:at], size // self.m, self.m, *scores.shape[at + 1 :])
        return top_k_mask(runs, k, (axis,)).reshape(scores.shape)
