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

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from jaxprune import tree
from jaxprune.criteria.calibration import of_activations
from jaxprune.criteria.derivatives import of_outputs
from jaxprune.distributions import Distribution
from jaxprune.layout import Axes, from_view, to_view
from jaxprune.oneshot.arguments import check_runs, check_solver, check_words, share_of_layer
from jaxprune.oneshot.cuts import Segment
from jaxprune.oneshot.layerwise import Solver, error, fitted, matrices, matrix
from jaxprune.oneshot.walk import Walk, solved_in
from jaxprune.types import Masks, Params, Sparsity

Place: TypeAlias = tuple[str, int]
"""A leaf, and which of its layers; 0 where it has no stack of them."""
Progress: TypeAlias = Callable[[int, int, Place, float], None]
"""(matrices done, matrices in all, the one done last, its relative error)."""


class Solution(NamedTuple):
    r"""A matrix that is solved.

    Attributes:
        weight: in the leaf's dtype.
        mask: True = alive.
        error: $\lVert X W - X T \rVert_F / \lVert X T \rVert_F$, T the target.
    """

    weight: Shaped[Array | np.ndarray, "inputs outputs"]
    mask: Bool[Array | np.ndarray, "inputs outputs"]
    error: float


Kept: TypeAlias = MutableMapping[Place, Solution]
"""What is solved already, and where more is put as soon as it is."""


def prune(
    apply_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    solver: Solver,
    sparsity: Sparsity | Mapping[str, Any] | None = None,
    *,
    pattern: Distribution | None = None,
    select: tree.Select = tree.weights,
    masks: Masks | None = None,
    order: Literal["products", "blocks", "layers"] = "products",
    fit: Literal["dense", "own"] | None = None,
    loss: Callable[..., Any] | None = None,
    progress: Progress | None = None,
    kept: Kept | None = None,
    donate: bool = False,
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
        sparsity: fraction of each matrix to remove, in [0, 1), or leaf name -> fraction of each of its layers, as
            `allocate` gives it; None where the pattern says it.
        pattern: `NM(2, 4)`, `PerOutput()`, `Uniform()`; None: the solver's way, `PerOutput()` of `Wanda()`, `Uniform()`
            of the others. A layer of a stack is a matrix of its own, a convolution is one of (window x inputs,
            outputs).
        select: leaves that are pruned; those of them that are in no product stay as they are.
        masks: True where a weight may stay, for a solver that takes a mask, such as `LeastSquares()`; None: everywhere.
        order: see above.
        fit: see above; in order "layers" both are the same. None: "dense" in order "products", else "own". In order
            "blocks" the outputs of the dense model would be aimed at from inputs that still change, each product making
            up for what the ones before it will make up for themselves: a warning, since models have collapsed by it.
        loss: (params, batch) -> scalar, a sum over tokens: errors of a product's outputs then count by the second
            moments of its derivatives there, see `jp.evidence.of_outputs`; for solvers that can weigh outputs, such as
            `AlternatingDirections()`. None: all outputs count the same.
        progress: told of every matrix when it is solved, or was kept.
        kept: such as a dict; every matrix is put there when it is solved. One that is there already is taken as it is:
            a call that was interrupted goes on where it stopped if all other arguments are the same, which is not
            checked, and ends with the same weights. Moments of a segment are skipped if all of its matrices are kept.
        donate: the selected leaves of `params` are deleted one by one when they are pruned and needed no more, as
            `donate_argnums` of `jax.jit` does: the dense and the pruned weights are then never there together.

    Returns:
        Params with zeros, each leaf in its dtype, and masks (True = alive) of the same structure.

    Raises:
        ValueError: naming the leaf: it cannot be followed to its products, or is used otherwise too; in two stages; its
            inputs are not finite, or its moments not positive definite; `NM` does not divide its inputs. Also batches
            of different shapes, none at all, words that are none of the above, a loss for a solver that takes none, and
            a kept matrix of another shape or dtype.

    References:
        Frantar and Alistarh 2023, arXiv:2301.00774: blocks, own.
    """
    fit = fit or ("dense" if order == "products" else "own")
    check_solver(solver, masks, loss, params)
    check_words(order, fit, sparsity, pattern, masks)
    leaves = tree.selected_leaves(select, params)
    batches = list(batches)
    diagonal = getattr(solver, "diagonal", False)
    outputs = (
        None
        if loss is None
        else functools.cache(lambda: of_outputs(loss, params, batches, select=select, diagonal=diagonal))
    )
    work = _Work(solver, sparsity, pattern, masks, outputs, progress, kept, donate)
    if order == "layers":
        work.layers(apply_fn, params, batches, leaves)
    else:
        work.in_turn(apply_fn, params, batches, leaves, order, fit)
    new = tree.map_named(lambda name, leaf: _like(work.leaves.get(name, leaf), leaf), params)
    found = tree.map_named(lambda name, leaf: _like(work.mask(name, jnp.shape(leaf)), leaf), params)
    return new, found


class _Work:
    """The selected leaves while they are pruned.

    Attributes:
        leaves: name -> weights so far.
        bits: name -> mask so far, of leaves that are in a product: eight weights a byte, while batches wait beside.
        left: name -> how many of its layers are still to be solved.
        given: name -> where weights may stay, for solvers that take it.
    """

    def __init__(
        self,
        solver: Solver,
        sparsity: Any,
        pattern: Distribution | None,
        given: Masks | None,
        outputs: Callable[[], Mapping[str, Array]] | None,
        progress: Progress | None,
        kept: Kept | None,
        donate: bool,
    ) -> None:
        self.leaves: dict[str, Any] = {}
        self.bits: dict[str, np.ndarray] = {}
        self.given = tree.named_leaves(given)
        self.pattern, self.outputs, self.progress = pattern, outputs, progress
        self.kept, self.donate = kept, donate
        self.left: Counter[str] = Counter()
        self.done = 0
        self.each = sparsity if isinstance(sparsity, Mapping) else None
        self._solve = _solving(solver, sparsity, pattern)

    def layers(
        self, apply_fn: Callable[..., Any], params: Params, batches: Iterable[Any], leaves: Mapping[str, Any]
    ) -> None:
        """Every product on the dense model's inputs."""
        seen = of_activations(apply_fn, params, batches, select=_named(leaves), moments=True)
        self.leaves = dict(leaves)
        self.count((name, one.tokens.size) for name, one in seen.leaves.items())
        for name, one in seen.leaves.items():
            assert one.moments is not None
            self.solve(name, one.axes, range(len(one.moments)), {"moments": one.moments})
            self.give_up(leaves)

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
        walk = Walk(apply_fn, params, batches, leaves, order, beside=fit == "dense")
        self.count((place.name, len(place.layers)) for part in walk.parts for place in solved_in(part))
        self.leaves = walk.leaves
        for piece in walk.pieces:
            for part in piece:
                found = {} if self._knows(part) else walk.moments(part)
                for name, axes, layers in solved_in(part):
                    self.solve(name, axes, layers, found.get(name, {}))
            walk.behind(piece)
            self.give_up(leaves)

    def give_up(self, dense: Mapping[str, Any]) -> None:
        """Deletes the dense leaves of which all layers are pruned, if they are donated."""
        for name in [name for name, count in self.left.items() if not count] if self.donate else ():
            if isinstance(dense[name], jax.Array) and self.leaves[name] is not dense[name]:
                dense[name].delete()

    def _knows(self, part: Segment) -> bool:
        known = self.kept
        return known is not None and all((name, i) in known for name, _, layers in solved_in(part) for i in layers)

    def count(self, layers: Iterable[tuple[str, int]]) -> None:
        """Notes how many layers of each leaf there are to solve."""
        for name, count in layers:
            self.left[name] += count
        self.total = self.left.total()

    def solve(self, name: str, axes: Axes, layers: Iterable[int], sums: Mapping[str, Array]) -> None:
        """Some layers of a leaf, each by its own moments, or as it was kept."""
        leaf = self.leaves[name]
        check_runs(name, axes, leaf.shape, self.pattern)
        mask = self.mask(name, leaf.shape)
        for place, layer in enumerate(layers):
            found = self._solution(name, axes, layer, {word: one[place] for word, one in sums.items()})
            leaf, mask = _with_layer(axes, leaf, mask, layer, found.weight, found.mask)
            self.done, self.left[name] = self.done + 1, self.left[name] - 1
            if self.progress is not None:
                self.progress(self.done, self.total, (name, layer), found.error)
        self.leaves[name], self.bits[name] = leaf, np.packbits(mask)

    def mask(self, name: str, shape: tuple[int, ...]) -> Bool[np.ndarray, "..."]:
        """The mask so far of a leaf; where it is in no product, all are alive."""
        if name not in self.bits:
            return np.ones(shape, bool)
        return np.unpackbits(self.bits[name], count=math.prod(shape)).reshape(shape).view(bool)

    def _solution(self, name: str, axes: Axes, layer: int, known: dict[str, Array]) -> Solution:
        """The kept one, or a new one, which is kept from now on."""
        dense = _matrix(axes, self.leaves[name], layer)
        if self.kept is not None and (old := self.kept.get((name, layer))) is not None:
            _check_kept(name, layer, old, dense)
            return old
        known |= {} if self.outputs is None else {"outputs": self.outputs()[name][layer]}
        known |= {"mask": _matrix(axes, self.given[name], layer)} if self.given else {}
        known |= {} if self.each is None else {"sparsity": share_of_layer(self.each, name, layer)}
        weight, mask, relative, fine = self._solve(dense, known)
        if not fine[0]:
            raise ValueError(
                f"Inputs of {name!r} are not finite, or too large for float32. Mend the model, or the batch."
            )
        if not fine[1]:
            raise ValueError(
                f"The moments of {name!r} are not positive definite in float32, so that no weights can be found. "
                "Take more calibration data, or more damping in the solver."
            )
        new = Solution(weight, mask, float(relative))
        if self.kept is not None:
            self.kept[name, layer] = new._replace(weight=np.asarray(weight), mask=np.asarray(mask))
        return new


def _solving(solver: Solver, sparsity: Any, pattern: Distribution | None) -> Callable[..., Any]:
    """(matrix, known) -> weight, mask, relative error, and whether sums and weights are finite."""
    sparsity = None if isinstance(sparsity, Mapping) else sparsity
    try:
        return _compiled(solver, sparsity, pattern)
    except TypeError:  # one of them has no hash
        return _compiled.__wrapped__(solver, sparsity, pattern)


@functools.lru_cache(maxsize=16)
def _compiled(solver: Solver, sparsity: Any, pattern: Distribution | None) -> Callable[..., Any]:
    def solve(matrix: Array, known: Mapping[str, Array]) -> Any:
        weight, moments = matrix.astype(jnp.float32), known["moments"]
        target = fitted(known["cross"] @ weight, weight, moments, solver.damping) if "cross" in known else weight
        given = {word: known[word] for word in ("outputs", "mask") if word in known}
        found, kept = solver(target, moments, known.get("sparsity", sparsity), pattern, **given)
        found = jnp.where(kept, found, 0)
        fine = jnp.stack([jnp.isfinite(moments).all(), jnp.isfinite(found).all()])
        size = error(jnp.zeros_like(target), target, moments)
        relative = jnp.where(size > 0, jnp.sqrt(jnp.maximum(error(found, target, moments), 0) / size), 0)
        return found.astype(matrix.dtype), kept, relative, fine

    return jax.jit(solve)


@functools.partial(jax.jit, static_argnums=0)
def _with_layer(axes: Axes, leaf: Array, mask: Array, layer: Any, weight: Array, alive: Array) -> tuple[Array, Array]:
    """A leaf and its mask with another matrix as one of the layers."""
    pairs = [(to_view(leaf, axes), weight), (to_view(mask, axes), alive)]
    new = [matrices(view).at[layer].set(matrix).reshape(view.shape) for view, matrix in pairs]
    return from_view(new[0], axes, leaf.shape), from_view(new[1], axes, leaf.shape)


_matrix = jax.jit(matrix, static_argnums=0)


def _named(leaves: Mapping[str, Any]) -> Callable[[str, Any], bool]:
    return lambda name, leaf: name in leaves


def _like(value: Any, leaf: Any) -> Any:
    """The value, lying as the leaf does."""
    return jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value


def _check_kept(name: str, layer: int, old: Solution, matrix: Array) -> None:
    for what, one, dtype in (("weight", old.weight, matrix.dtype), ("mask", old.mask, np.dtype(bool))):
        if (one.shape, one.dtype) != (matrix.shape, dtype):
            raise ValueError(
                f"`kept` has a {what} {one.shape} {one.dtype} for layer {layer} of {name!r}, {matrix.shape} {dtype} "
                "was expected: it is of another model. Begin with an empty one."
            )
