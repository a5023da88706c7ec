"""Training on compressed params while masks move: sparse steps between two updates of the masks, dense ones at them.

    steps = SparseSteps(loss, optax.adam(1e-3), around, update_when=jp.every(100))
    state = steps.init(params)
    for batch in batches:
        state, lost = steps(state, batch)
    params, masks = steps.dense(state)

At an update the scores of all weights and the gradients of dead ones are needed, so that this one step is the masked
dense one; then the living weights, and what the optimizer remembers of them, are packed, and every step up to the next
update costs what the non-zeros cost. A weight that has just come to life is stored, at zero.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from jaxprune import native, schedules, sparse, tree
from jaxprune.layout import BY_NAME, Layout
from jaxprune.sparse.formats import matrix_of
from jaxprune.sparse.trained import take_apart
from jaxprune.training.transformation import land
from jaxprune.types import Masks, Params, UpdateWhen

Around = Callable[..., optax.GradientTransformationExtraArgs]


class SparseState(NamedTuple):
    """A model in training; of its trees only those of the form it is in are there.

    Attributes:
        step: updates so far.
        values: what is trained, see `jaxprune.sparse.trainable`; the params themselves where nothing is compressed.
        rest: where the values belong.
        inner_state: the inner optimizer's, of the values.
        outer: the state of what is around the optimizer, without that and without masks.
        masks: of leaves that are not compressed and have dead weights, by name.
    """

    step: int
    values: Params
    rest: Params
    inner_state: Any
    outer: Any
    masks: dict[str, Bool[Array, "..."]]


class SparseSteps:
    """Steps of an optimizer that prunes, on compressed params wherever masks stay as they are.

    A matrix is compressed while at least `least` of its weights are dead, its dtype is float32 or bfloat16, and the
    native kernels run here; every other leaf stays dense and is masked, as `prune` does it. The results are those of
    the masked dense training to within the order of sums, but for one thing: of a dead weight the optimizer remembers
    nothing, so one that comes back begins with moments of zero, as in the code of RigL's authors. In the masked dense
    training its old ones have gone on decaying.

    Args:
        loss: (params, *batch) -> scalar; pure, any JAX function.
        inner: the optimizer, its whole chain.
        around: (inner, update_when=...) -> what prunes, as
            `functools.partial(jp.regrow, method=method, sparsity=0.95, key=key)`, or of `jp.prune`.
        update_when: step -> bool, when masks move; as in `prune`. Rare updates pay: each is a dense step and a packing.
        least: fraction of dead weights from which on a leaf is compressed.
        layout: which axis of a matrix is summed over, see `jaxprune.sparse.compress`.

    Raises:
        ValueError: `least` is no fraction; at the first call, packed masks, or a criterion that looks at every step.
    """

    def __init__(
        self,
        loss: Callable[..., Float[Array, ""]],
        inner: optax.GradientTransformation,
        around: Around,
        *,
        update_when: UpdateWhen | bool,
        least: float = 0.5,
        layout: Layout = BY_NAME,
    ) -> None:
        if not 0 <= least <= 1:
            raise ValueError(
                f"`least` is the fraction of dead weights from which on a leaf is compressed, got {least}."
            )
        when = schedules.as_update_when(update_when)
        self.inner, self.outer = optax.with_extra_args_support(inner), around(inner, update_when=when)
        self.least, self.layout = least, layout
        self._due = lambda step: step == 0 or bool(when(jnp.int32(step)))
        self._move = jax.jit(functools.partial(_dense_step, loss, self.outer))
        self._go_on = jax.jit(functools.partial(_sparse_step, sparse.apply(loss), self.inner))

    def init(self, params: Params) -> SparseState:
        """The model before its first step, which is a dense one: masks come to the params with it.

        Raises:
            ValueError: see above; what `around(...)` refuses.
        """
        outer: Any = self.outer.init(params)
        if any(mask.dtype != bool for mask in jax.tree.leaves(outer.masks)):
            raise ValueError("`SparseSteps` keeps masks in the pattern of the weights: leave `packed=True` out.")
        if jax.tree.leaves(getattr(outer, "statistics", ())):
            raise ValueError(
                "A criterion that remembers looks at the gradients of all weights at every step, so that no step would "
                "be sparse. Take one that looks at the moment, such as `magnitude` or `gradient`."
            )
        return self._taken_apart(0, params, outer, {})

    def __call__(self, state: SparseState, *batch: Any) -> tuple[SparseState, Float[Array, ""]]:
        """One step: the state after it, and the loss before it."""
        if not self._due(state.step):
            values, inner_state, lost = self._go_on(state.values, state.rest, state.inner_state, state.masks, batch)
            return state._replace(step=state.step + 1, values=values, inner_state=inner_state), lost
        params, outer = self._put_together(state)
        params, outer, lost = self._move(params, outer, batch)
        return self._taken_apart(state.step + 1, params, outer, self._weights(params, outer.masks)), lost

    def dense(self, state: SparseState) -> tuple[Params, Masks]:
        """Params with zeros, and masks, each of the structure that `init` was given."""
        params, outer = self._put_together(state)
        return params, outer.masks

    def _weights(self, params: Params, masks: Masks) -> dict[str, sparse.TrainableWeight]:
        """The leaves that are compressed, with what is alive in them, zeros too."""
        found = {}
        alive = tree.named_leaves(masks)
        for name, leaf in tree.named_leaves(params).items():
            mask = np.asarray(alive[name])
            if leaf.ndim != 2 or leaf.dtype not in (jnp.float32, jnp.bfloat16) or native.why_missing():
                continue
            if mask.all() or 1 - mask.mean() < self.least:
                continue
            outputs_last = self.layout.axes(name, leaf.shape).outputs == (1,)
            rows, cols = np.nonzero(matrix_of(mask, outputs_last))
            values = matrix_of(np.asarray(leaf), outputs_last)[rows, cols]
            fields = {"outputs_last": outputs_last, "name": name}
            found[name] = sparse.TrainableWeight.pack(values, rows, cols, leaf.shape, **fields)
        return found

    def _taken_apart(
        self, step: int, params: Params, outer: Any, weights: dict[str, sparse.TrainableWeight]
    ) -> SparseState:
        picked = tree.map_named(lambda name, leaf: weights.get(name, leaf), params)
        values, rest = take_apart(picked)
        inner_state = optax.tree.map_params(self.inner, _gathered, outer.inner_state, picked)
        masks = {
            name: mask
            for name, mask in tree.named_leaves(outer.masks).items()
            if name not in weights and not bool(jnp.all(mask))
        }
        return SparseState(step, values, rest, inner_state, outer._replace(masks=None, inner_state=None), masks)

    def _put_together(self, state: SparseState) -> tuple[Params, Any]:
        """Dense params, and the state of what is around the optimizer as if every step had been a dense one."""
        joined = sparse.join(state.values, state.rest)
        weights = {one.name: one for one in jax.tree.leaves(joined, is_leaf=_is_weight) if _is_weight(one)}
        params = sparse.decompress(joined)
        masks = tree.map_named(
            lambda name, leaf: _alive(weights[name]) if name in weights else _mask(state.masks, name, leaf), params
        )
        inner_state = jax.tree.map(
            lambda node: weights[node.name].with_values(node.values).decompress() if _is_weight(node) else node,
            state.inner_state,
            is_leaf=_is_weight,
        )
        step = {"step": jnp.int32(state.step)} if hasattr(state.outer, "step") else {}
        return params, state.outer._replace(masks=masks, inner_state=inner_state, **step)


def _dense_step(loss: Any, outer: Any, params: Params, state: Any, batch: tuple[Any, ...]) -> Any:
    lost, grads = jax.value_and_grad(loss)(params, *batch)
    updates, state = outer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, lost


def _sparse_step(
    loss: Any, inner: Any, values: Params, rest: Params, state: Any, masks: dict[str, Array], batch: tuple[Any, ...]
) -> Any:
    lost, grads = jax.value_and_grad(lambda values: loss(sparse.join(values, rest), *batch))(values)

    def masked(name: str, grad: Array) -> Array:
        return jnp.where(masks[name], grad, jnp.zeros((), grad.dtype)) if name in masks else grad

    updates, state = inner.update(tree.map_named(masked, grads), state, values)
    params = tree.named_leaves(values)
    updates = tree.map_named(
        lambda name, update: land(update, params[name], masks[name]) if name in masks else update, updates
    )
    return optax.apply_updates(values, updates), state, lost


def _gathered(kept: Array, leaf: Any) -> Any:
    """What an optimizer keeps of a leaf, where the leaf has values, in the form of `values`."""
    if not _is_weight(leaf):
        return kept
    rows, cols = leaf.coordinates()
    place = (cols, rows) if leaf.outputs_last else (rows, cols)
    return take_apart(leaf.with_values(kept[place]))[0]


def _alive(weight: sparse.TrainableWeight) -> Bool[Array, "*axes"]:
    return weight.with_values(jnp.ones_like(weight.values)).decompress() != 0


def _mask(masks: dict[str, Array], name: str, leaf: Array) -> Bool[Array, "..."]:
    return masks[name] if name in masks else jnp.ones_like(leaf, dtype=bool)


def _is_weight(node: Any) -> bool:
    return isinstance(node, sparse.TrainableWeight)
