"""Any JAX function on compressed weights, unchanged."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import quax

from jaxprune.compat import present_forms
from jaxprune.sparse import conv, derivatives, products  # noqa: F401  (they register their rules with quax)
from jaxprune.sparse.formats import SparseUseError, SparseWeight, Unsupported, check_unsupported
from jaxprune.sparse.fuse import fused

F = TypeVar("F", bound=Callable[..., Any])
_NO_RULE = {
    "custom_vjp": "The function calls a `jax.custom_vjp` function, and quax has no rule for those. Wrap that one in "
    "`jax.jit`: it then runs as it is, as long as no compressed leaf goes into it. A leaf that does stays dense with "
    "`compress(..., select=...)`.",
    "process_shard_map": "The function calls `jax.shard_map`, and quax has no rule for that. Put `apply` inside: "
    "`jax.shard_map(apply(apply_fn), in_specs=(PartitionSpec(), ...), ...)`, with compressed leaves whole on every "
    "device.",
}
"""What quax says of a primitive that it knows no rule for -> what we say."""


def apply(apply_fn: F, *, unsupported: Unsupported = "refuse") -> F:
    """`apply_fn`, whose arguments may now hold compressed leaves.

    Every product of activations with a compressed leaf runs on its non-zeros, in the native formats convolutions too;
    casts, transposes, copies and barriers go through, `jit`, `vmap`, `grad`, `scan`, `cond`, `while_loop` and
    `checkpoint` inside `apply_fn` too. `shard_map` goes around it, with compressed leaves whole on every device. The
    result is plain arrays, except where `apply_fn` returns a leaf itself. Under `jit`, pools, bias, residual and ReLU
    after a native product are computed by its kernel (`jaxprune.sparse.fuse`).

    Args:
        apply_fn: any function of pytrees. Weights must be arguments: a compressed leaf it closes over is not seen.
        unsupported: what becomes of a compressed leaf that is used in any other way (added, indexed):
            "refuse", or "dense" to decompress it there, inside the program.

    Returns:
        A function of the same arguments, to be jitted: `jax.jit(apply(apply_fn))(sparse_params, x)`.

    Raises:
        SparseUseError: while tracing, naming leaf and operation; also for a `jax.shard_map` in `apply_fn`, and a
            `jax.custom_vjp` function outside of an inner `jit`, which quax cannot carry.

    Example:
        >>> predict = jax.jit(jp.sparse.apply(model.apply))
        >>> y = predict(jp.sparse.compress(params, "bcsr", unsupported="dense"), x)
    """
    check_unsupported(unsupported)

    @functools.wraps(apply_fn)
    def on_compressed(*args: Any, **kwargs: Any) -> Any:
        if unsupported == "refuse":
            return _quaxified(apply_fn, args, kwargs)
        args, kwargs = _mark((args, kwargs), "dense")
        return _mark(_quaxified(apply_fn, args, kwargs), "refuse")

    return on_compressed  # pyright: ignore[reportReturnType]


def _quaxified(fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    try:
        with present_forms():
            return fused(_quaxify(fn))(*args, **kwargs)
    except (NotImplementedError, AttributeError) as error:
        way = next((way for word, way in _NO_RULE.items() if word in str(error)), None)
        if way is None:
            raise
        raise SparseUseError(way) from error


def _quaxify(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`quax.quaxify(fn)`, with arguments and results taken apart before quax and put together after it.

    Quax sets no trace while it puts pytrees together, and NNX variables ask for the current one when they are made.
    """

    def on_values(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=_is_value)
        results: list[Any] = []

        def on_leaves(*leaves: Any) -> list[Any]:
            args, kwargs = jax.tree.unflatten(structure, leaves)
            found, of_results = jax.tree.flatten(fn(*args, **kwargs), is_leaf=_is_value)
            results.append(of_results)
            return found

        found = quax.quaxify(on_leaves)(*leaves)
        return jax.tree.unflatten(results[-1], found)

    return on_values


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, quax.Value)


def _mark(leaves: Any, unsupported: Unsupported) -> Any:
    def one(leaf: Any) -> Any:
        return leaf.replace(unsupported=unsupported) if isinstance(leaf, SparseWeight) else leaf

    return jax.tree.map(one, leaves, is_leaf=lambda leaf: isinstance(leaf, SparseWeight))
