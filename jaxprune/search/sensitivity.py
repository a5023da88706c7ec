"""Sensitivity: what pruning one leaf alone does to a model, leaf by leaf and sparsity by sparsity.

    accuracy(leaf, s) = evaluate(params with this leaf pruned to sparsity s, all others dense, nothing trained)

Leaves whose accuracy falls late can be pruned far, those whose accuracy falls early should be spared: what a sparsity
for each leaf (`ByRule`) is chosen from, by hand or by `distribution()`.
"""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import tables, tree
from jaxprune.checks import check_sparsity
from jaxprune.distributions import BySensitivity
from jaxprune.granularity import granularities
from jaxprune.masks import apply_masks
from jaxprune.methods import Method, compute_masks
from jaxprune.types import Params


@dataclasses.dataclass(frozen=True)
class Sensitivity(tables.Table):
    """Accuracies of a model with one leaf pruned; `str(sensitivity)` is a table, leaves by sparsities.

    Attributes:
        names: the leaves that were pruned, each alone, in the order of the params.
        sparsities: what they were pruned to.
        accuracies: what `evaluate` gave, for each leaf at each sparsity.
        dense: what it gave of the model as it is.
    """

    names: tuple[str, ...]
    sparsities: tuple[float, ...]
    accuracies: tuple[tuple[float, ...], ...]
    dense: float

    def distribution(self) -> BySensitivity:
        """A sparsity for each leaf by these accuracies: the drop is that from the dense model's, 0 where it rose.

        Raises:
            ValueError: nothing was scanned above sparsity 0, an accuracy is not finite.
        """
        curves = {}
        for name, row in zip(self.names, self.accuracies, strict=True):
            points = dict(zip(self.sparsities, row, strict=True))
            curves[name] = [(s, max(self.dense - accuracy, 0.0)) for s, accuracy in points.items() if s > 0]
        return BySensitivity(curves)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: {"dense": ..., "sparsities": [...], "accuracies": {name: [...], ...}}."""
        accuracies = {name: list(row) for name, row in zip(self.names, self.accuracies, strict=True)}
        return {"dense": self.dense, "sparsities": list(self.sparsities), "accuracies": accuracies}

    def to_csv(self) -> str:
        """Lines leaf,sparsity,accuracy under a header, the dense model first as a leaf without a name at sparsity 0."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerows([("leaf", "sparsity", "accuracy"), ("", 0.0, self.dense)])
        for name, row in zip(self.names, self.accuracies, strict=True):
            lines.writerows((name, *pair) for pair in zip(self.sparsities, row, strict=True))
        return text.getvalue()

    @property
    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]], int]:
        """Header, rows, and how many of the first columns hold words."""
        header = ("leaf", "0%", *(f"{100 * sparsity:.4g}%" for sparsity in self.sparsities))
        pairs = zip(self.names, self.accuracies, strict=True)
        return header, [(name, *(f"{accuracy:.4f}" for accuracy in (self.dense, *row))) for name, row in pairs], 1


def sensitivity(
    method: Method,
    params: Params,
    evaluate: Callable[[Params], Any],
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    **evidence: Any,
) -> Sensitivity:
    """Prune the leaves that the method selects, one at a time, and evaluate the model each time.

    A leaf is pruned by one program for all sparsities. `evaluate` runs outside of it, so it may read files and count in
    Python; one that is jitted is compiled once, since every call has the same shapes.

    Args:
        method: how a leaf is pruned; its distribution is over the one leaf.
        params: any pytree of arrays.
        evaluate: params -> one number, such as the accuracy on held-out data.
        sparsities: fractions removed, each in [0, 1).
        **evidence: what the criterion looks at besides the weights, as `compute_masks` takes it.

    Raises:
        ValueError: a sparsity that is no fraction, none at all, or `evaluate` gives something else than one number.
        TypeError: what comes first is no method, or what comes third no function.

    References:
        Han et al. 2015, arXiv:1506.02626, prune and evaluate layer by layer; Li et al. 2017, arXiv:1608.08710, filters.

    Example:
        >>> print(jp.sensitivity(jp.Method(), params, accuracy))
    """
    if not isinstance(method, Method) or not callable(evaluate):
        raise TypeError(
            "`sensitivity(method, params, evaluate)` needs a `Method` and a function params -> number in this order; "
            f"{type(method).__name__} came first and {type(evaluate).__name__} third."
        )
    if not sparsities:
        raise ValueError("`sparsities` is empty: name one fraction or more, such as (0.5, 0.9).")
    for sparsity in sparsities:
        check_sparsity(sparsity, "sparsities")
    dense = _number(evaluate(params), "as it is")
    names = tuple(tree.selected_leaves(method.select, params))
    by_leaf = granularities(method.granularity, names)
    alone = {name: dataclasses.replace(method, granularity=by_leaf[name]) for name in names}
    accuracies = tuple(_of_leaf(evaluate, params, alone[name], name, sparsities, evidence) for name in names)
    return Sensitivity(names, tuple(map(float, sparsities)), accuracies, dense)


def _of_leaf(
    evaluate: Callable[[Params], Any],
    params: Params,
    method: Method,
    name: str,
    sparsities: Sequence[float],
    evidence: dict[str, Any],
) -> tuple[float, ...]:
    alone = dataclasses.replace(method, select=lambda other, _: other == name)

    @jax.jit
    def pruned(params: Params, sparsity: Float[Array, ""], evidence: dict[str, Any]) -> Float[Array, "..."]:
        masks = compute_masks(alone, params, sparsity, **evidence)
        return tree.named_leaves(apply_masks(params, masks))[name]

    def accuracy(sparsity: float) -> float:
        leaf = pruned(params, jnp.float32(sparsity), evidence)
        changed = tree.map_named(lambda other, old: leaf if other == name else old, params)
        return _number(evaluate(changed), f"with {name!r} pruned to {sparsity:g}")

    return tuple(map(accuracy, sparsities))


def _number(value: Any, model: str) -> float:
    if jnp.ndim(value) != 0:
        raise ValueError(
            f"`evaluate` must give one number, such as an accuracy; of the model {model} it gave shape "
            f"{jnp.shape(value)}. Take its mean."
        )
    return float(value)
