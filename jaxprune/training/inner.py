"""What an optimizer inside one that prunes gets to see: the model as it is once the dead weights are zero.

Its params and gradients are masked, and so are the functions of params that it calls, such as the `value_fn` of a line
search: what it remembers of a point is true of the point where the update lands. Weights that it keeps in its state are
zero where they are dead, so that averages of params have the zeros of the params.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.extend.core import Literal

from jaxprune import tree
from jaxprune.checks import is_concrete
from jaxprune.types import Masks, Params

T = TypeVar("T")
View = Callable[[Params], Params]

OF_PARAMS = ("value_fn", "obj_fn")
"""Keywords under which optax's optimizers take functions params -> number: line searches, Sophia."""


def model_of(params: Params) -> Params:
    """The weights that gradients are taken at: of `optax.lookahead`'s two copies the fast one."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def copies(masks: Masks, params: Params) -> Masks:
    """Masks of the model in the structure of `params`, one for each of `optax.lookahead`'s two copies."""
    return optax.LookaheadParams(masks, masks) if isinstance(params, optax.LookaheadParams) else masks


def masked(values: Any, masks: Masks) -> Any:
    """Zero where dead, in the dtype of each leaf; no check, since this runs in every step."""
    return jax.tree.map(lambda value, mask: jnp.where(mask, value, jnp.zeros((), value.dtype)), values, masks)


def update_inner(
    inner: Any, updates: Any, inner_state: Any, params: Params, masks: Masks, extra: dict[str, Any], due: Any
) -> tuple[Any, Any]:
    """The inner optimizer's step on the pruned model.

    Args:
        inner: the optimizer, with support for extra arguments.
        updates: gradients.
        inner_state: its state.
        params: weights, the dead not yet at zero where masks are new.
        masks: survivors from now on, of the model.
        extra: keyword arguments of `update`; functions of params are masked, also `grad` and what `grad_fn` gives.
        due: whether masks may be new, so that a line search needs value and gradient anew.

    Returns:
        Its updates, to be landed, and its state.
    """
    view = functools.partial(masked, masks=masks)
    seen, known = masked(params, copies(masks, params)), functions_of(extra, view)
    if "grad_fn" in known:
        known["grad_fn"] = _then(view, known["grad_fn"])
    fresh = _kept_weights(inner.init, seen)
    inner_state = _fresh_where_dead(fresh, inner_state, params, masks)  # for masks that are new
    alive, inner_state, known = evaluated(view(updates), inner_state, model_of(seen), known, due)
    known |= {"grad": view(known["grad"])} if "grad" in known else {}
    steps, state = inner.update(alive, inner_state, seen, **known)
    return steps, _fresh_where_dead(fresh, state, params, masks)  # for optimizers that move all weights


def functions_of(extra: dict[str, Any], view: View) -> dict[str, Any]:
    """Keyword arguments whose functions of params look at `view(params)`, with the signatures that they had."""
    seen = {name: _before(view, extra[name]) for name in (*OF_PARAMS, "grad_fn") if callable(extra.get(name))}
    return {**extra, **seen}


def evaluated(
    updates: Any, inner_state: Any, params: Params, extra: dict[str, Any], due: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Where masks may be new, value and gradient of a line search's function at the point that it starts from.

    L-BFGS learns curvature from the difference of two gradients. Across a change of masks they are of two functions, so
    that this one pair is left out.

    Returns:
        Gradients, the inner state, and the keyword arguments; as they came without a line search.
    """
    if not {"value_fn", "value"} <= extra.keys():
        return updates, inner_state, extra
    value_fn = extra["value_fn"]
    arguments = {name: extra[name] for name in inspect.signature(value_fn).parameters if name in extra}

    def anew() -> Any:
        value, grads = jax.value_and_grad(value_fn)(params, **arguments)
        grads = optax.tree.cast_like(grads, updates)
        return jnp.asarray(value, jnp.result_type(extra["value"])), grads, _moved(inner_state, params, grads)

    value, updates, inner_state = if_due(due, anew, (jnp.asarray(extra["value"]), updates, inner_state))
    return updates, inner_state, {**extra, "value": value, **({"grad": updates} if "grad" in extra else {})}


def dense_gradients(updates: Any, params: Params, extra: dict[str, Any], due: Any) -> Any:
    """Gradients, those of dead weights too, which `optax.value_and_grad_from_state` gives as zero."""
    return evaluated(updates, (), params, extra, due)[0]


def _moved(state: Any, params: Params, grads: Any) -> Any:
    """L-BFGS as if it had been here before."""

    def moved(node: Any) -> Any:
        if not isinstance(node, optax.ScaleByLBFGSState):
            return node
        return node._replace(
            params=optax.tree.cast_like(params, node.params), updates=optax.tree.cast_like(grads, node.updates)
        )

    return jax.tree.map(moved, state, is_leaf=lambda node: isinstance(node, optax.ScaleByLBFGSState))


def _kept_weights(init: Callable[[Params], Any], params: Params) -> dict[Any, Any]:
    """Path -> leaf of the states that are made from the values of the params: averages, starting points.

    Moments begin with the same zeros whatever the params are. They are left alone: gradients of the dead are zero.
    """
    jaxpr = jax.make_jaxpr(init)(params).jaxpr
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(operand in reached for operand in eqn.invars if not isinstance(operand, Literal)):
            reached |= set(eqn.outvars)
    made = [not isinstance(out, Literal) and out in reached for out in jaxpr.outvars]
    if not any(made):
        return {}
    leaves = jax.tree_util.tree_leaves_with_path(init(params))
    return {path: leaf for (path, leaf), from_params in zip(leaves, made, strict=True) if from_params}


def _fresh_where_dead(fresh: dict[Any, Any], state: Any, params: Params, masks: Masks) -> Any:
    """The state, with fresh values where a weight is dead in leaves that have the name and shape of a param's."""
    if not fresh:
        return state
    shapes = {name: jnp.shape(leaf) for name, leaf in tree.named_leaves(model_of(params)).items()}
    alive = tree.named_leaves(masks)

    def mixed(path: Any, old: Any) -> Any:
        name = _ending(tree.leaf_name(path), shapes)
        if name is None or path not in fresh or not jnp.issubdtype(jnp.result_type(old), jnp.inexact):
            return old
        if not jnp.shape(old) == jnp.shape(fresh[path]) == shapes[name]:
            return old
        return jnp.where(alive[name], old, jnp.asarray(fresh[path], jnp.result_type(old)))

    return jax.tree_util.tree_map_with_path(mixed, state)


def _ending(name: str, names: Any) -> str | None:
    """The longest of the names with which this one ends."""
    while name not in names:
        if not name:
            return None
        name = name.partition("/")[2]
    return name


def _before(view: View, fn: Callable[..., T]) -> Callable[..., T]:
    return functools.wraps(fn)(lambda params, *args, **kwargs: fn(view(params), *args, **kwargs))


def _then(view: View, fn: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(fn)(lambda *args, **kwargs: view(fn(*args, **kwargs)))


def if_due(due: Any, compute: Callable[[], T], masks: T) -> T:
    """`compute()` where it is due, the masks there are, packed or not, where it is not; traced once in either case."""
    # Outside jit a branch of Python's: `lax.cond` would be compiled anew at every step.
    if is_concrete(due):
        return compute() if due else masks
    return lax.cond(due, compute, lambda: masks)
