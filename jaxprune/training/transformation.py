"""The skeleton of optax transformations that hold masks: what each of them does in the same way.

    init(params):                      leaves to prune are there; counts begin at 0, the key is copied
    update(grads, state, params):      evidence is gathered, statistics go on, masks are computed where they are due,
                                       and the update lands on exact zero

`prune`, `regrow`, `splice`, `keep_params_sparse` and the penalties are made of it; what differs is in them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, Shaped

from jaxprune import tree
from jaxprune.exact.meshes import placed
from jaxprune.methods import Method, update_statistics
from jaxprune.training.inner import copies, model_of
from jaxprune.types import Masks, Params


def transformation(
    name: str, init: Callable[[Params], Any], update: Callable[..., Any], select: tree.Select | None = None
) -> optax.GradientTransformationExtraArgs:
    """A transformation that asks for what it needs: at `init` leaves that are selected, at `update` the params.

    Args:
        name: of the function that makes it, for the messages.
        init: params -> state.
        update: (updates, state, params, **extra) -> (updates, state).
        select: in any form of `Method.select`; None asks for no leaf.
    """

    def begin(params: Params) -> Any:
        if select is not None and jax.tree.leaves(params):  # `optax.tree.map_params` comes with a tree without leaves
            tree.selected_leaves(select, model_of(params))
        return init(params)

    def step(updates: Any, state: Any, params: Params | None = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(f"`{name}` needs the params: call `tx.update(grads, opt_state, params)`.")
        return update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(begin, step)


def begun(inner: optax.GradientTransformation, params: Params, key: Any) -> dict[str, Any]:
    """Fields of a state before the first step: its number, the key, and what the inner optimizer remembers."""
    # A copy: a donated state must not take the caller's key with it.
    own_key = () if key is None else jnp.copy(key)
    return {"step": jnp.zeros((), jnp.int32), "key": own_key, "inner_state": inner.init(params)}


def evidence(key: Any, step: Int[Array, ""], grads: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """What criteria are told at a step, by keyword.

    Args:
        key: that the transformation was made with, None or () if none; it is folded with the step.
        step: updates so far.
        grads: the updates that arrive.
        extra: keyword arguments of `update`, all of them evidence. What is handed in here goes before: `key=` as it is,
            and `grads=` where the updates are no gradients any more, being clipped, averaged or with a penalty.
    """
    drawn = {"key": jax.random.fold_in(key, step)} if jax.tree.leaves(key) else {}
    return {**drawn, "grads": grads, **extra}


def remembered(method: Method, statistics: Any, params: Params, known: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a `Running` criterion remembers after a step, and the evidence with it; nothing new for any other."""
    statistics = update_statistics(method, statistics, params, **known)
    return statistics, {**known, "statistics": statistics} if statistics else known


def filled(alive: bool, params: Params) -> Masks:
    """Masks that are the same for every weight, where the params lie."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, alive, dtype=bool), params)


def owned(masks: Masks, params: Params) -> Masks:
    """Masks in the structure of the params and where they lie, copied: a donated state must not take the caller's.

    Raises:
        ValueError: they have other leaves or shapes.
    """
    if not jax.tree.leaves(params):
        return params
    tree.check_like("The masks", masks, params)
    copied = jax.tree.map(lambda mask: jnp.array(mask, copy=True), tree.match(masks, params))
    return jax.tree.map(placed, copied, params)


def after(step: Int[Array, ""]) -> Int[Array, ""]:
    """The next step; the largest integer stays."""
    return jnp.asarray(optax.safe_increment(step))


def landed(updates: Any, params: Params, masks: Masks) -> Any:
    """Updates after which dead weights are zero, and the others where `updates` brings them."""
    return jax.tree.map(land, updates, params, copies(masks, params))


def land(update: Shaped[Array, "..."], param: Shaped[Array, "..."], mask: Bool[Array, "..."]) -> Shaped[Array, "..."]:
    """The update where alive, minus the param where dead, in a dtype that holds both exactly."""
    exact = jnp.promote_types(update.dtype, param.dtype)
    return jnp.where(mask, update.astype(exact), -param.astype(exact))
