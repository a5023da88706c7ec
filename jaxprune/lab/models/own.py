"""A model of the user's own, by MODULE:NAME in a config: a Flax NNX class, or a function of any other framework.

class Net(nnx.Module):                                      # model.name = "mine:Net"
    def __init__(self, image, classes, rngs, width=100): ...    # [model.options]: width
    def __call__(self, x): ...                                  # (batch, *image) -> logits (batch, classes)

def net(image, classes, key, width=100):                    # model.name = "mine:net"
    return params, apply                                        # apply(params, x) -> logits, perhaps with key=

What is trained and stored is one pytree: the params, and the statistics of batch norms, which follow the batches.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from jaxprune import tree
from jaxprune.lab.models.parts import Network, New
from jaxprune.lab.recipe import words
from jaxprune.lab.recipe.config import ConfigError, Model
from jaxprune.lab.recipe.problems import reason
from jaxprune.types import Params

KEPT = (nnx.Param, nnx.BatchStat)


def is_own(model: Model) -> bool:
    """Whether a config names a model of the user's own."""
    return ":" in model.name


def build(model: Model, image: tuple[int, ...], classes: int, key: Key[Array, ""] | None) -> Network:
    """The user's model, initialised with `key`.

    Args:
        model: the [model] section.
        image: shape of one input.
        classes: number of logits.
        key: draws the initial weights; None: shapes of params, though all of it is made to know them.

    Raises:
        ConfigError: it cannot be made so, or does not give logits (batch, classes); says what arrived.
    """
    found: Any = words.known("model", model.name)
    given: dict[str, Any] = {"image": image, "classes": classes, **(model.options or {})}
    of_nnx = inspect.isclass(found) and issubclass(found, nnx.Module)
    draws = jax.random.key(0) if key is None else key
    given |= {"rngs": nnx.Rngs(draws)} if of_nnx else {"key": draws}
    try:
        made: Any = found(**given)
    except Exception as error:
        call = f"{model.name.partition(':')[2]}({', '.join(f'{name}={_shown(given[name])}' for name in given)})"
        raise _refusal(model, f"called as {call} it failed, {reason(error)}") from error
    network = _of_module(model, made) if of_nnx else _of_pair(model, made)
    _check(model, network, image, classes)
    return network if key is not None else network._replace(params=jax.eval_shape(lambda: network.params))


def _shown(value: Any) -> str:
    return "..." if isinstance(value, nnx.Rngs | jax.Array) else repr(value)


def _refusal(model: Model, what: str) -> ConfigError:
    return ConfigError(f"model.name: {model.name}: {what}")


def _of_module(model: Model, module: nnx.Module) -> Network:
    """An NNX module as functions of its params and statistics; what it draws comes from the key of the step."""
    module.train()
    training, _ = nnx.split(module)
    module.eval()
    deployed, kept, noise, rest = nnx.split(module, KEPT, nnx.RngState, ...)
    if others := tree.named_leaves(nnx.as_pure(rest)):
        raise _refusal(
            model,
            f"holds {', '.join(others)}, which are no nnx.Param and no statistics of a batch norm, so that a run would "
            "neither train nor store them. Make them nnx.Param, or compute them in __call__.",
        )
    params, noise = nnx.as_pure(kept), nnx.as_pure(noise)
    statistics = set(tree.named_leaves(nnx.as_pure(nnx.state(module, nnx.BatchStat))))

    def merged(params: Params, key: Any) -> Any:
        return nnx.merge(deployed if key is None else training, params, noise if key is None else _drawn(noise, key))

    def apply(params: Params, inputs: Array, key: Any = None, rates: Any = None) -> Array:
        return merged(params, key)(inputs)

    def observe(params: Params, inputs: Array, key: Any = None) -> tuple[Array, dict[str, Any]]:
        trained = merged(params, jax.random.key(0) if key is None else key)
        logits = trained(inputs)
        seen = tree.named_leaves(nnx.as_pure(nnx.state(trained, nnx.BatchStat)))
        return logits, {name: New(seen[name]) for name in statistics}

    return Network(params, apply, observe if statistics else None)


def _drawn(noise: Any, key: Key[Array, ""]) -> Any:
    """The state of a module's random streams, begun anew from the key of a step."""
    numbers = {name: number for number, name in enumerate(tree.named_leaves(noise))}

    def begun(name: str, leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros_like(leaf)
        one = jax.random.fold_in(key, numbers[name])
        return jax.random.split(one, leaf.shape) if leaf.shape else one

    return tree.map_named(begun, noise)


def _of_pair(model: Model, made: Any) -> Network:
    match made:
        case (params, apply) if callable(apply):
            return Network(params, _with_key(apply))
        case nnx.Module():
            raise _refusal(model, "returned an nnx.Module: name its class, which is then made with `rngs`.")
    raise _refusal(model, f"expected it to return (params, apply), arrived {type(made).__name__}.")


def _with_key(apply: Callable[..., Any]) -> Callable[..., Any]:
    takes_key = "key" in inspect.signature(apply).parameters

    def applied(params: Params, inputs: Array, key: Any = None, rates: Any = None) -> Any:
        return apply(params, inputs, key=key) if takes_key else apply(params, inputs)

    return applied


def _check(model: Model, network: Network, image: tuple[int, ...], classes: int) -> None:
    """Refuse what does not train, before anything is trained."""
    leaves: Mapping[str, Any] = tree.named_leaves(network.params)
    odd = [name for name, leaf in leaves.items() if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    if odd or not leaves:
        raise _refusal(model, f"has no params to train, or some that are no floats: {', '.join(odd) or 'none at all'}.")
    inputs, key = jax.ShapeDtypeStruct((2, *image), jnp.float32), jax.random.key(0)
    for train in (False, True):
        try:
            logits = jax.eval_shape(lambda x, t=train: network.apply(network.params, x, key if t else None), inputs)
        except Exception as error:
            when = "in training" if train else "outside training"
            raise _refusal(model, f"fails on inputs {inputs.shape} {when}, {reason(error)}") from error
        one_array = isinstance(logits, jax.ShapeDtypeStruct)
        if not one_array or logits.shape != (2, classes) or not jnp.issubdtype(logits.dtype, jnp.floating):
            arrived = f"{logits.dtype} {logits.shape}" if one_array else type(logits).__name__
            raise _refusal(model, f"expected float logits {(2, classes)} for inputs {inputs.shape}, arrived {arrived}.")
