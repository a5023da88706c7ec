"""Names for the few kinds of pytree that everything here passes around.

Each is a pytree of one structure, that of the user's parameters; only the leaves differ.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, PyTree, Shaped

Params: TypeAlias = PyTree[Shaped[Array, "..."]]
"""Weights, any pytree of arrays."""

Leaves: TypeAlias = PyTree[Shaped[Array, "..."] | jax.ShapeDtypeStruct]
"""Weights, or their shapes and dtypes alone."""

Masks: TypeAlias = PyTree[Bool[Array, "..."]]
"""One bool a weight, True = alive; structure, shapes and shardings of the params, no leaf missing."""

Scores: TypeAlias = Mapping[str, Float[Array, "..."]]
"""Leaf name -> non-negative float32, larger = keep; weights (*layers, spatial, in, out) or groups of them."""

Sparsity: TypeAlias = Any
"""Fraction removed, in [0, 1): a Python float, or a scalar float32 array under tracing."""

Schedule: TypeAlias = Callable[[Any], Sparsity]
"""Step (scalar integer) -> sparsity at that step."""

UpdateWhen: TypeAlias = Callable[[Any], Any]
"""Step (scalar integer) -> bool, True where masks are computed anew."""


@runtime_checkable
class Criterion(Protocol):
    """How much does each weight matter?"""

    def __call__(self, params: Mapping[str, Array], /, **evidence: Any) -> Scores:
        """Scores of every leaf, shaped like the leaf."""
        ...
