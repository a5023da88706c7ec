r"""The order of one-shot pruning: which product is solved when, on what inputs, and to whose outputs it is fitted.

| order | inputs X of a product |
|---|---|
| layers | the dense model's |
| blocks | those that the pruned blocks before it give |
| products | those that all pruned products before it give |

| fit | target T of the weight W |
|---|---|
| dense | outputs of the dense model: $T = (X^\top X + \lambda I)^{-1} (X^\top X_\mathrm{dense} W + \lambda W)$ |
| own | T = W |
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune import tree
from jaxprune.checks import check_sparsity
from jaxprune.criteria.calibration import of_activations
from jaxprune.criteria.derivatives import of_outputs
from jaxprune.distributions import NM, Distribution, Uniform
from jaxprune.layout import Axes, from_view, to_view
from jaxprune.oneshot.cuts import Segment, segments
from jaxprune.oneshot.layerwise import Solver, fitted
from jaxprune.oneshot.program import flat
from jaxprune.oneshot.streams import Runner, to_host, units
from jaxprune.tracing.features import places
from jaxprune.tracing.finder import arrays_of
from jaxprune.types import Masks, Params, Sparsity

Progress: TypeAlias = Callable[[int, int, str], None]
"""(products done, products in all, leaf that is next)."""


def prune(
    apply_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    solver: Solver,
    sparsity: Sparsity | None = None,
    *,
    pattern: Distribution | None = None,
    select: tree.Select = tree.weights,
    masks: Masks | None = None,
    order: Literal["products", "blocks", "layers"] = "products",
    fit: Literal["dense", "own"] = "dense",
    loss: Callable[..., Any] | None = None,
    progress: Progress | None = None,
) -> tuple[Params, Masks]:
    r"""Prunes a trained model on some calibration data, moving the weights that stay.

    In order "products" and "blocks" the batches wait in the host's memory before the next segment of the model, and go
    through it twice: for the moments of its products, and, these solved, with the pruned weights; with `fit="dense"`
    the dense model's arrays go beside them. Products of which none reaches another, as q, k and v, are solved on the
    same inputs. Blocks end where the fewest bytes are alive. Scans over selected leaves are written out; segments that
    are alike are compiled once.

    Args:
        apply_fn: the model, (params, batch) -> anything.
        params: trained weights; any pytree of arrays.
        batches: calibration inputs of one shape; pytrees of arrays.
        solver: such as `SparseGPT()`.
        sparsity: fraction of each matrix to remove, in [0, 1); None where the pattern says it.
        pattern: `NM(2, 4)`, `PerOutput()`; None: any weights of a matrix. A layer of a stack is a matrix of its own,
            a convolution is one of (window x inputs, outputs).
        select: leaves that are pruned; those of them that are in no product stay as they are.
        masks: True where a weight may stay, for a solver that takes a mask, such as `LeastSquares()`; None: everywhere.
        order: see above.
        fit: see above; in order "layers" both are the same. "dense" is meant for order "products": from within a block
            not pruned yet, outputs of the dense model are aimed at from inputs that will change.
        loss: (params, batch) -> scalar, a sum over tokens: errors of a product's outputs then count by the second
            moments of its derivatives there, see `jp.evidence.of_outputs`; for solvers that can weigh outputs, such as
            `AlternatingDirections()`. None: all outputs count the same.
        progress: told of every leaf before it is solved.

    Returns:
        Params with zeros, each leaf in its dtype, and masks (True = alive) of the same structure.

    Raises:
        ValueError: naming the leaf: it cannot be followed to its products, or is used otherwise too; in two stages; its
            inputs are not finite, or its moments not positive definite; `NM` does not divide its inputs. Also batches
            of different shapes, none at all, words that are none of the above, and a loss for a solver that takes none.

    References:
        Frantar and Alistarh 2023, arXiv:2301.00774: blocks, own.
    """
    _check_masks(solver, masks, params)
    _check_words(order, fit, sparsity, pattern, masks)
    if loss is not None and "outputs" not in inspect.signature(solver).parameters:
        raise ValueError(f"`{solver}` cannot weigh outputs: leave `loss` out, or take `AlternatingDirections()`.")
    leaves = tree.selected_leaves(select, params)
    batches = list(batches)
    outputs = None if loss is None else of_outputs(loss, params, batches, select=select)
    work = _Work(solver, sparsity, Uniform() if pattern is None else pattern, outputs, progress)
    work.given = tree.named_leaves(masks)
    if order == "layers":
        work.layers(apply_fn, params, batches, leaves)
    else:
        work.in_turn(apply_fn, params, batches, leaves, order, fit)
    new = tree.map_named(lambda name, leaf: _like(work.leaves.get(name, leaf), leaf), params)
    found = tree.map_named(
        lambda name, leaf: _like(work.masks.get(name, jnp.ones(jnp.shape(leaf), bool)), leaf), params
    )
    return new, found


class _Work:
    """The selected leaves while they are pruned.

    Attributes:
        leaves: name -> weights so far.
        masks: name -> mask so far, of leaves that are in a product.
        given: name -> where weights may stay, for solvers that take it.
    """

    def __init__(
        self,
        solver: Solver,
        sparsity: Any,
        pattern: Distribution,
        outputs: Mapping[str, Array] | None,
        progress: Progress | None,
    ) -> None:
        self.leaves: dict[str, Any] = {}
        self.masks: dict[str, Any] = {}
        self.given: dict[str, Any] = {}
        self.pattern, self.outputs, self.progress = pattern, outputs, progress
        self.done = self.total = 0
        self._solve = _solving(solver, sparsity, pattern)

    def layers(
        self, apply_fn: Callable[..., Any], params: Params, batches: Iterable[Any], leaves: Mapping[str, Any]
    ) -> None:
        """Every product on the dense model's inputs."""
        seen = of_activations(apply_fn, params, batches, select=_named(leaves), moments=True)
        self.leaves = dict(leaves)
        self.total = len(seen.leaves)
        for name, one in seen.leaves.items():
            assert one.moments is not None
            self.solve(name, one.axes, range(len(one.moments)), {"moments": one.moments})

    def in_turn(
        self,
        apply_fn: Callable[..., Any],
        params: Params,
        batches: list[Any],
        leaves: Mapping[str, Any],
        order: str,
        fit: str,
    ) -> None:
        """Segment after segment, on what the pruned ones before give."""
        arrays = _alike(batches)
        program = flat(apply_fn, params, batches[0], set(leaves))
        parts = segments(program, order)
        _check_once(parts)
        self.total = sum(len(units(part)) for part in parts)
        self.leaves, runner = dict(leaves), Runner(program.fixed)
        first = [program.inputs.index(var) for var in parts[0].before]
        ours = [to_host([batch[i] for i in first]) for batch in arrays]
        dense: list[Any] = list(ours) if fit == "dense" else [None] * len(ours)
        for part in parts:
            found = runner.moments(part, leaves, list(zip(ours, dense, strict=True)))
            for name, unit in units(part).items():
                axes = next(places(s.site).axes for s in part.products if s.site is not None and s.site.name == name)
                self.solve(name, axes, unit.layers, found[name])
            if part is not parts[-1]:
                ours = runner.advanced(part, self.leaves, ours)
                dense = runner.advanced(part, leaves, dense) if fit == "dense" else dense

    def solve(self, name: str, axes: Axes, layers: Iterable[int], sums: Mapping[str, Array]) -> None:
        """Some layers of a leaf, each by its own moments."""
        if self.progress is not None:
            self.progress(self.done, self.total, name)
        self.done += 1
        leaf = self.leaves[name]
        _check_runs(name, axes, leaf.shape, self.pattern)
        mask = self.masks.get(name, self.given.get(name, np.ones(leaf.shape, bool)))
        for place, layer in enumerate(layers):
            known = {word: one[place] for word, one in sums.items()}
            known |= {} if self.outputs is None else {"outputs": self.outputs[name][layer]}
            leaf, mask, fine = self._solve(axes, leaf, mask, layer, known)
            if not fine[0]:
                raise ValueError(
                    f"Inputs of {name!r} are not finite, or too large for float32. Mend the model, or the batch."
                )
            if not fine[1]:
                raise ValueError(
                    f"The moments of {name!r} are not positive definite in float32, so that no weights can be found. "
                    "Take more calibration data, or more damping in the solver."
                )
        self.leaves[name], self.masks[name] = leaf, mask


def _solving(solver: Solver, sparsity: Any, pattern: Distribution) -> Callable[..., Any]:
    """(axes, leaf, mask, layer, sums) -> leaf and mask with this layer solved, whether sums and weights are finite."""

    takes_mask = "mask" in inspect.signature(solver).parameters

    def solve(axes: Axes, leaf: Array, mask: Array, layer: Array, sums: Mapping[str, Array]) -> Any:
        view, alive = (to_view(one, axes) for one in (leaf, mask))
        matrices, masks = (one.reshape(-1, view.shape[-3] * view.shape[-2], view.shape[-1]) for one in (view, alive))
        weight, moments = matrices[layer].astype(jnp.float32), sums["moments"]
        target = fitted(sums["cross"] @ weight, weight, moments, solver.damping) if "cross" in sums else weight
        weighed = {"outputs": sums["outputs"]} if "outputs" in sums else {}
        given = {"mask": masks[layer]} if takes_mask else {}
        found, kept = solver(target, moments, sparsity, pattern, **weighed, **given)
        found = jnp.where(kept, found, 0)
        fine = jnp.stack([jnp.isfinite(moments).all(), jnp.isfinite(found).all()])
        matrices, masks = matrices.at[layer].set(found.astype(leaf.dtype)), masks.at[layer].set(kept)
        new = (from_view(one.reshape(view.shape), axes, leaf.shape) for one in (matrices, masks))
        return *new, fine

    return jax.jit(solve, static_argnums=0)


def _named(leaves: Mapping[str, Any]) -> Callable[[str, Any], bool]:
    return lambda name, leaf: name in leaves


def _like(value: Any, leaf: Any) -> Any:
    """The value, lying as the leaf does."""
    return jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value


def _alike(batches: list[Any]) -> list[list[Any]]:
    """The arrays of every batch."""
    if not batches:
        raise ValueError("There is no batch, so there is nothing to calibrate on.")
    arrays = [arrays_of(batch)[0] for batch in batches]
    shapes = [[(jnp.shape(one), one.dtype) for one in batch] for batch in arrays]
    for i, one in enumerate(shapes):
        if one != shapes[0]:
            raise ValueError(f"Batches must be alike: the first has {shapes[0]}, number {i} has {one}. Cut or pad it.")
    return arrays


def _check_masks(solver: Solver, masks: Masks | None, params: Params) -> None:
    takes = "mask" in inspect.signature(solver).parameters
    if masks is None and takes:
        raise ValueError(f"`{solver}` fits the weights of a mask: say which stay, `masks=`.")
    if masks is not None and not takes:
        raise ValueError(f"`{solver}` chooses a mask of its own: leave `masks` out, or take `LeastSquares()`.")
    if masks is not None:
        tree.check_like("The masks", masks, params)


def _check_words(order: str, fit: str, sparsity: Any, pattern: Any, masks: Any) -> None:
    for what, word, words in (("order", order, ("products", "blocks", "layers")), ("fit", fit, ("dense", "own"))):
        if word not in words:
            raise ValueError(f"`{what}` is one of {', '.join(map(repr, words))}; {word!r} arrived.")
    if sparsity is not None:
        check_sparsity(sparsity)
    elif not isinstance(pattern, NM) and masks is None:
        raise ValueError("`sparsity` is the fraction removed, in [0, 1); only `NM` and `masks` go without.")


def _check_once(parts: list[Segment]) -> None:
    """Refuse a leaf whose weights would be needed before all of its inputs are known."""
    met: dict[tuple[str, int], int] = {}
    for number, part in enumerate(parts):
        for unit in units(part).values():
            for layer in unit.layers:
                if met.setdefault((unit.name, layer), number) != number:
                    raise ValueError(
                        f"{unit.name!r} is used in products that come one after the other, and the second one's inputs "
                        "are known only when it is pruned. Leave it out with `select`, or take `order='layers'`."
                    )


def _check_runs(name: str, axes: Axes, shape: tuple[int, ...], pattern: Distribution) -> None:
    if isinstance(pattern, NM) and (inputs := _size(shape, axes.inputs)) % pattern.m:
        raise ValueError(
            f"`NM({pattern.n}, {pattern.m})` needs runs of {pattern.m} along the input axis, but {name!r} has {inputs} "
            "inputs. Leave it out with `select`."
        )


def _size(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    size = 1
    for axis in axes:
        size *= shape[axis]
    return size
