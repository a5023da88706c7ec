"""Leaves by name: "layers/0/kernel", rules over names, maps over selected leaves.

A name is the leaf's path, joined by slashes. Flax NNX hands the same parameters out twice, wrapped in Variables
(`tx.init`) and bare (`tx.update`); the wrapper's trailing "value" is left out of the name, so that both agree.

A rule is a shell pattern over the whole name; `*` also crosses slashes. The first rule that matches wins.
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

T = TypeVar("T")
Select: TypeAlias = Callable[[str, Any], bool] | Mapping[str, bool] | Iterable[str | tuple[str, bool]]
Rules: TypeAlias = Mapping[str, T] | tuple[tuple[str, T], ...]
"""Pattern of leaf names -> value, or pairs of them; the first that matches wins."""

_VECTORS = ("bias", "biases", "scale", "scales")  # ends of a word
_TABLES = ("embed", "embeds", "embedding", "embeddings", "emb", "embs")
_LAST = {"offset", "gain", "gamma", "beta", "slope", "mean", "var", "variance", "sigma"}  # last words
_LOOKED_UP = {"wte", "wpe", "table", "codebook", "token", "tokens", "latents", "probe"}
_PLACES = {"pos", "position", "positions", "positional", "cls"}  # words


def leaf_name(path: tuple[Any, ...]) -> str:
    """Name of the leaf at a key path, such as "layers/0/kernel"; "" for a tree that is a single leaf."""
    return jax.tree_util.keystr(unwrapped(path), simple=True, separator="/")


def unwrapped(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key path without the "value" that Flax NNX's Variables have at its end."""
    wrapped = path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return path[:-1] if wrapped else path


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaf name -> leaf, in the order of the tree.

    Raises:
        ValueError: two leaves have the same name.
    """
    leaves = [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    named = dict(leaves)
    if len(named) != len(leaves):
        names = [name for name, _ in leaves]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two leaves are named {twice!r}. Rename one of the keys on its path.")
    return named


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function is also given the leaf's name: `fn(name, leaf, *leaves_of_rest)`."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(leaf_name(path), *leaves), tree, *rest)


def first_match(rules: Iterable[tuple[str, T]], name: str) -> T | None:
    """Value of the first rule whose pattern matches `name`, or None."""
    return next((value for pattern, value in rules if fnmatch.fnmatchcase(name, pattern)), None)


def pairs(rules: Rules[T]) -> tuple[tuple[str, T], ...]:
    """Rules as (pattern, value) pairs, which can be hashed if the values can."""
    return tuple(rules.items() if isinstance(rules, Mapping) else rules)


def each_by_rule(what: str, rules: Rules[T], names: Iterable[str]) -> dict[str, T]:
    """Leaf name -> value of the first rule that matches it.

    Args:
        what: whose rules they are, for the messages: "ByRule".
        rules: pattern -> value.
        names: of the leaves that are pruned.

    Raises:
        ValueError: a leaf without a rule; a rule whose pattern matches no leaf.
    """
    given, names = pairs(rules), list(names)
    fitting = {name: [value for pattern, value in given if fnmatch.fnmatchcase(name, pattern)] for name in names}
    for name, values in fitting.items():
        if not values:
            raise ValueError(
                f"No rule of `{what}` matches {name!r}. There are: {[pattern for pattern, _ in given]}. "
                'Add one, such as "*", or leave the leaf out with `select`.'
            )
    for pattern, _ in given:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"The rule {pattern!r} of `{what}` matches no pruned leaf. There are: {names}.")
    return {name: values[0] for name, values in fitting.items()}


def weights(name: str, leaf: Any) -> bool:
    """The default of `select`: matrices and convolution kernels, told from all else by name and number of axes.

    True for leaves with two axes or more, no integers, whose last name says nothing else: biases, scales, offsets and
    statistics may be stacked (*layers, out); tables that are looked up in (embeddings, relative positions), position
    embeddings, class tokens and other learnt inputs are no factors of a product. A leaf named `weight` is what the
    module that holds it is called: `norm.weight` and `embed_tokens.weight` are none. Neither are the factors of
    low-rank adapters (`lora_a`), half of which begin at zero, nor a language model's `lm_head`, which often is its
    embedding too. So a model has the same selection in whichever framework it is written.

    Names may mislead: `weights_of(sites)` looks at what the model does with each leaf.
    """
    if jnp.ndim(leaf) < 2 or any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.integer, jax.dtypes.extended)):
        return False
    *path, last = name.lower().replace(".", "/").split("/")
    module = path[-1] if path else ""
    holder = next((word for word in reversed(path) if not word.isdigit()), "")
    words = _words(last)
    return not (
        last.endswith(_VECTORS)
        or words[-1] in _LAST
        or _is_table(last)
        or _is_norm(last)
        or not _PLACES.isdisjoint(words)
        or (last == "b" and module)
        or (last in ("g", "weight_g", "original0", "u") and sum(size > 1 for size in jnp.shape(leaf)) < 2)
        or any(part.startswith("lora_") for part in (*path, last))
        or holder == "lm_head"
        or (
            last == "weight"
            and (_is_norm(holder) or (jnp.ndim(leaf) == 2 and (_is_table(module) or module.endswith("bias"))))
        )
    )


def _words(name: str) -> list[str]:
    """ "layernorm_0" -> ["layernorm"], "rel_pos_h" -> ["rel", "pos", "h"]."""
    return [word for part in name.split("_") if (word := part.rstrip("0123456789"))] or [""]


def _is_table(name: str) -> bool:
    last = _words(name)[-1]
    return last.endswith(_TABLES) or last in _LOOKED_UP


def _is_norm(name: str) -> bool:
    return any(word.endswith(("norm", "norms")) or word in ("ln", "bn", "gn") for word in _words(name))


def hashable(select: Select) -> Any:
    """`select` in a form that can be hashed, and gone through more than once: rules become (pattern, bool) pairs."""
    if callable(select) or isinstance(select, str):
        return select
    return tuple(select.items()) if isinstance(select, Mapping) else tuple(select)


def selector(select: Select) -> Callable[[str, Any], bool]:
    """`select` in any of its forms as one function (name, leaf) -> bool.

    Args:
        select: that function; or patterns, of which one must match; or rules pattern -> bool, a mapping or pairs, of
            which the first match wins; leaves without a match are not selected.
    """
    if callable(select):
        return select
    rules = _rules(select)
    return lambda name, leaf: bool(first_match(rules, name))


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, of whatever kind, or the shape and dtype of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of keys for random numbers, which are no numbers, or the shape and dtype of one."""
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def selected_leaves(select: Select, tree: Any) -> dict[str, Any]:
    """Leaf name -> leaf for the selected leaves, in the order of the tree.

    Raises:
        ValueError: nothing is selected, or a pattern matches no leaf.
        TypeError: a leaf is no array, or a selected one is not floating.
    """
    leaves = named_leaves(tree)
    for name, leaf in leaves.items():
        if not is_array(leaf):
            raise TypeError(
                f"{name!r} is a {type(leaf).__name__}, an array was expected. Hand in the arrays alone, "
                "for Equinox `eqx.filter(model, eqx.is_array)`."
            )
    select = hashable(select)
    if not callable(select):
        for pattern, _ in _rules(select):
            if not fnmatch.filter(leaves, pattern):
                raise ValueError(f"`select` names {pattern!r}, which matches no leaf. There are: {listed(leaves)}.")
    chosen = selector(select)
    selected = {name: leaf for name, leaf in leaves.items() if chosen(name, leaf)}
    if not selected:
        raise ValueError(f"`select` chooses no leaf to prune. There are: {listed(leaves)}.")
    for name, leaf in selected.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{name!r} is {leaf.dtype}, only floating leaves are pruned. Leave it out with `select`.")
    return selected


def check_like(what: str, tree: Any, params: Any) -> None:
    """Refuse a tree whose leaves do not stand where those of `params` stand, naming the first that differs.

    Raises:
        ValueError: a leaf is missing, is extra, or has another shape.
    """
    ours, theirs = named_leaves(tree), named_leaves(params)
    for name, leaf in theirs.items():
        if name not in ours:
            raise ValueError(f"{what} have no leaf {name!r}, the params do. They have: {listed(ours)}.")
        if jnp.shape(ours[name]) != jnp.shape(leaf):
            raise ValueError(f"{what} have shape {jnp.shape(ours[name])} at {name!r}, the params {jnp.shape(leaf)}.")
    extra = [name for name in ours if name not in theirs]
    if extra and not has_masked_nodes(params):
        raise ValueError(f"{what} have a leaf {extra[0]!r}, the params do not. They have: {listed(theirs)}.")


def match(tree: Any, params: Any) -> Any:
    """The leaves of `tree` in the structure of `params`, paired by name (the trees may wrap them differently)."""
    leaves = named_leaves(tree)
    return map_named(lambda name, _: leaves[name], params)


def has_masked_nodes(tree: Any) -> bool:
    """Whether `optax.masked` or `optax.partition` has taken leaves out of this tree."""
    return any(
        isinstance(node, optax.MaskedNode)
        for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    )


def _rules(select: Any) -> tuple[tuple[str, bool], ...]:
    rules = (select,) if isinstance(select, str) else hashable(select)
    return tuple((rule, True) if isinstance(rule, str) else tuple(rule) for rule in rules)


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names for an error: quoted, and how many more there are than are named.

    Args:
        names: any.
        most: of them that are named.
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
