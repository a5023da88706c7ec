r"""How sparse every matrix becomes, from the errors that a solver makes of it at some sparsities.

minimise  sum of E_l(s_l)     so that     sum of n_l s_l = s x sum of n_l

At the minimum one more weight costs the same everywhere. Errors of outputs weighed by a loss's derivatives are in the
units of the loss, and comparable as they are; without a loss they are taken relative to the outputs.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune import tree
from jaxprune.checks import check_sparsity
from jaxprune.criteria.calibration import of_activations
from jaxprune.criteria.derivatives import of_outputs
from jaxprune.distributions import Distribution
from jaxprune.layout import Axes
from jaxprune.oneshot.layerwise import Solver, error, matrix
from jaxprune.oneshot.sparsegpt import SparseGPT
from jaxprune.oneshot.walk import Walk, solved_in
from jaxprune.types import Params

_QUICK = SparseGPT()

Curves = Mapping[str, Float[np.ndarray, "layers points"]]
"""Leaf name -> error of each of its layers at some sparsities."""


def allocation(
    apply_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    sparsity: float,
    *,
    solver: Solver = _QUICK,
    spread: float = 0.15,
    select: tree.Select = tree.weights,
    order: Literal["blocks", "layers"] = "blocks",
    loss: Callable[..., Any] | None = None,
    diagonal: bool = False,
) -> dict[str, Float[np.ndarray, "layers"]]:
    """How sparse every matrix becomes, by its errors at five sparsities: `error_curves`, then `allocate`.

    Args:
        apply_fn: as `prune` has it, with `params`, `batches`, `select`.
        params: trained weights.
        batches: calibration inputs.
        sparsity: of all together.
        solver: makes the errors; a quick one will do.
        spread: how far from `sparsity` a matrix may be, at most to 0 and to 0.95.
        select: leaves to look at.
        order: see `error_curves`.
        loss: likewise.
        diagonal: likewise.

    Returns:
        Leaf name -> sparsity of each layer: `prune` takes it in the place of one number.

    Raises:
        ValueError: see `allocate` and `error_curves`; what `of_outputs` refuses.

    Example:
        >>> shares = jp.oneshot.allocation(apply_fn, params, batches, 0.5)
        >>> params, masks = jp.oneshot.prune(apply_fn, params, batches, jp.oneshot.SparseGPT(), shares)
    """
    check_sparsity(sparsity)
    points = np.linspace(max(sparsity - spread, 0.01), min(sparsity + spread, 0.95), 5).tolist()
    curves = error_curves(
        apply_fn, params, batches, solver, points, select=select, order=order, loss=loss, diagonal=diagonal
    )
    leaves = tree.named_leaves(params)
    return allocate(curves, points, {name: leaves[name].size // len(curve) for name, curve in curves.items()}, sparsity)


def error_curves(
    apply_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    solver: Solver,
    sparsities: Sequence[float],
    *,
    pattern: Distribution | None = None,
    select: tree.Select = tree.weights,
    order: Literal["blocks", "layers"] = "blocks",
    loss: Callable[..., Any] | None = None,
    diagonal: bool = False,
) -> dict[str, Float[np.ndarray, "layers points"]]:
    r"""$\lVert XW - XW_s \rVert^2$ of every matrix, on the dense model's inputs, at each sparsity s.

    In order "blocks" the moments of one block are there at a time, and the batches wait in the host's memory before it.

    Args:
        apply_fn: as `prune` has it, with `params`, `batches`, `pattern`, `select`.
        params: trained weights.
        batches: calibration inputs.
        solver: a quick one will do.
        sparsities: s, rising.
        pattern: of the contests; None: the solver's way.
        select: leaves to look at.
        order: "layers" has the moments of all at once, and follows leaves that `prune` follows in that order alone.
        loss: (params, batch) -> scalar: errors count by its derivatives, see `prune`. None: they are divided by
            $\lVert XW \rVert^2$.
        diagonal: errors of outputs count each by itself, see `of_outputs`; takes less memory and time.

    Returns:
        Leaf name -> errors of each of its layers at each sparsity.

    Raises:
        ValueError: another order; what `prune` refuses in it.
    """
    if order not in ("blocks", "layers"):
        raise ValueError(f"`order` is 'blocks' or 'layers'; {order!r} arrived.")
    batches = list(batches)
    outputs = None if loss is None else of_outputs(loss, params, batches, select=select, diagonal=diagonal)
    leaves, errors = tree.selected_leaves(select, params), _errors(solver, pattern)
    rows: dict[str, dict[int, list[Array]]] = {}

    def look(name: str, axes: Axes, layers: Iterable[int], sums: Array) -> None:
        for layer, moments in zip(layers, sums, strict=True):
            weighs = outputs and outputs[name][layer]
            curve = [errors(axes, leaves[name], layer, moments, weighs, s) for s in sparsities]
            rows.setdefault(name, {})[layer] = curve

    if order == "layers":
        for name, one in of_activations(apply_fn, params, batches, select=select, moments=True).leaves.items():
            assert one.moments is not None
            look(name, one.axes, range(len(one.moments)), one.moments)
    else:
        walk = Walk(apply_fn, params, batches, leaves, order)
        for piece in walk.pieces:
            for part in piece:
                sums = walk.moments(part)
                for name, axes, layers in solved_in(part):
                    look(name, axes, layers, sums[name]["moments"])
            walk.behind(piece)
    return {
        name: np.array([rows[name][i] for i in range(len(rows[name]))], np.float64) for name in leaves if name in rows
    }


def _errors(solver: Solver, pattern: Distribution | None) -> Callable[..., Array]:
    weighs = "outputs" in inspect.signature(solver).parameters

    def errors(
        axes: Axes, leaf: Array, layer: Array, moments: Array, outputs: Array | None, sparsity: Array
    ) -> Float[Array, ""]:
        weight = matrix(axes, leaf, layer).astype(jnp.float32)
        weighed = {"outputs": outputs} if weighs and outputs is not None else {}
        found = solver(weight, moments, sparsity, pattern, **weighed).weight
        lost = error(found, weight, moments, outputs)
        return lost if outputs is not None else lost / error(jnp.zeros_like(weight), weight, moments)

    return jax.jit(errors, static_argnums=0)


def allocate(
    curves: Curves, sparsities: Sequence[float], sizes: Mapping[str, int], sparsity: float, *, steps: int = 64
) -> dict[str, Float[np.ndarray, "layers"]]:
    r"""Sparsities with the least sum of errors, between the first and the last of those that were looked at.

    The logarithm of an error is straight between two sparsities. Weights are removed a step at a time, where the next
    step costs least for each weight.

    Args:
        curves: of `error_curves`.
        sparsities: theirs, rising.
        sizes: leaf name -> weights of one of its layers.
        sparsity: s, of all together.
        steps: between two sparsities.

    Returns:
        Leaf name -> sparsity of each layer: `prune(..., sparsity=...)` takes it.

    Raises:
        ValueError: s is not between the first and the last sparsity, or errors are not finite.
    """
    check_sparsity(sparsity)
    points = np.asarray(sparsities, np.float64)
    if len(points) < 2 or (np.diff(points) <= 0).any() or not points[0] <= sparsity <= points[-1]:
        raise ValueError(f"`allocate` needs rising sparsities around {sparsity:g}; {list(sparsities)} arrived.")
    for name, errors in curves.items():
        if not np.isfinite(errors).all():
            raise ValueError(f"Errors of {name!r} are not all finite, so that nothing can be compared.")
    rows = np.concatenate(list(curves.values()))
    rows = np.log(np.maximum(rows, max(1e-30 * rows.max(initial=0), 1e-300)))  # those without an error go first
    weights = np.concatenate([np.full(len(errors), sizes[name], np.float64) for name, errors in curves.items()])
    grid = np.interp(np.arange((len(points) - 1) * steps + 1) / steps, np.arange(len(points)), points)
    fine = np.exp([np.interp(grid, points, row) for row in rows])
    removed = weights[:, None] * np.diff(grid)
    prices = np.maximum.accumulate(np.diff(fine) / removed, axis=1)
    order = np.argsort(prices, axis=None, kind="stable")
    left = (sparsity - points[0]) * weights.sum()
    before = np.cumsum(removed.flat[order]) - removed.flat[order]
    taken = np.zeros(removed.size)
    taken[order] = np.clip(left - before, 0, removed.flat[order])
    found = points[0] + taken.reshape(removed.shape).sum(1) / weights
    ends = np.cumsum([len(errors) for errors in curves.values()])[:-1]
    return dict(zip(curves, np.split(np.minimum(found, points[-1]), ends), strict=True))
