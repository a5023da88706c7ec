"""Resizing: after compaction the user's own module, on the smaller arrays, with its numbers right.

    apply_fn = lambda model, x: model(x)
    small = compact(apply_fn, model, masks, x)
    model = resized(apply_fn, model, small, x)      # of the same class; model(x) is what the masked model computes
    model.hidden.out_features                 # 37, where it was 64

A module says its sizes in attributes: `out_features`, `num_heads`, `shape`. Whether a number is right is asked of the
module itself: its constructor makes arrays of these sizes of it, and the model computes what `small.apply` computes.
No framework is known here: a module is a pytree whose nodes have attributes, as those of Flax NNX and Equinox are.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import tree
from jaxprune.channels.choices import walk
from jaxprune.channels.compaction import Compacted, apply_compacted, live_without, refusal_of, shape_before
from jaxprune.channels.walk import Removed, Walk
from jaxprune.channels.widths import Number, Widths, axes_made
from jaxprune.compat import ClosedJaxpr
from jaxprune.tracing.finder import jaxpr_of
from jaxprune.tracing.inlined import inlined

Numbers = dict[str, Number]
Shapes = dict[str, tuple[int, ...]]
MOST_LEAVES, MOST_MADE, MOST_ORDERED, MOST_TRACED = 16, 512, 4096, 32
"""Leaves of a layer whose constructor is asked; how often it is; choices that are put in order, and that are traced."""


class Node(NamedTuple):
    """A part of a model that has numbers among its attributes.

    Attributes:
        path: of the node.
        module: the node.
        numbers: attribute -> number.
        leaves: name of an array below, as the node calls it -> as the model does.
    """

    path: tuple[Any, ...]
    module: Any
    numbers: Numbers
    leaves: Mapping[str, str]


def resized(apply_fn: Callable[..., Any], model: Any, small: Compacted, *args: Any, **kwargs: Any) -> Any:
    """The model as a module of its class, with the smaller arrays and the numbers that belong to them.

    Numbers are attributes that are integers, or tuples of integers, without a leading underscore. Where two sizes were
    equal, a number that decides neither the arrays that its module's constructor makes nor what the model computes
    gets the likelier of both. Constructors are called on shapes alone.

    Args:
        apply_fn: the model's own call: `lambda model, x: model(x)`.
        model: as it was before, a pytree whose nodes have attributes (Flax NNX, Equinox): what `compact` was given, or
            the module that those params came from. Leaves are found by their names; an array that the model has at two
            places comes back as two.
        small: of `compact`.
        args: of `apply_fn`, arrays or `jax.ShapeDtypeStruct`; only shapes count.
        kwargs: likewise.

    Returns:
        A new module, with which `apply_fn` does step by step what `small.apply` does with `small.params`.

    Raises:
        TypeError: the model holds no arrays, as a Linen module does not; it says the sizes to build a new one with.
        ValueError: the model is not the one that was made smaller; or no numbers make it compute the same, which says
            the likeliest.

    Example:
        >>> model = jp.resized(lambda model, x: model(x), model, small, x)
    """
    arrays = {name: leaf for name, leaf in tree.named_leaves(model).items() if tree.is_array(leaf)}
    new = _smaller_arrays(model, arrays, small)

    def of_arrays(model: Any) -> Callable[..., Any]:
        return lambda arrays, *args, **kwargs: apply_fn(_with(model, arrays), *args, **kwargs)

    found = _walked(inlined(jaxpr_of(of_arrays(model), arrays, *args, **kwargs)), arrays, small.removed)
    live = live_without(found)
    nodes, made = _nodes(model, small.removed), axes_made(found)
    widths = [Widths(found, live, made, list(node.leaves.values())) for node in nodes]
    wanted = inlined(jaxpr_of(apply_compacted(of_arrays(model), small.removed, arrays), new, *args, **kwargs))
    refused, tried = "", []
    for most in (1, MOST_MADE):  # that a constructor makes these shapes of other numbers too is rare, and slow to find
        options = _all_options(nodes, widths, new, most)
        for choice in _choices(nodes, options):
            if choice in tried:
                continue
            other = _with(model, new)
            for node, numbers in zip(_nodes(other, small.removed), choice, strict=True):
                for word, number in numbers.items():
                    object.__setattr__(node.module, word, number)  # of a frozen dataclass too: nobody else has it yet
            trouble = refusal_of(of_arrays(other), wanted, new, args, kwargs)
            if not trouble:
                return other
            refused = refused or trouble
            tried.append(choice)
    raise ValueError(
        f"No numbers of its modules make the model compute what the smaller one does: {refused}. `small.apply` does it "
        f"all the same; for a new model, these are the likeliest numbers: {_told(nodes, options)}. "
        "`Channels(ignore=...)` keeps what a module cannot say, such as values of another size than queries."
    )


def _smaller_arrays(model: Any, arrays: Mapping[str, Any], small: Compacted) -> dict[str, Any]:
    """The model's arrays by their names, those that are smaller in their places."""
    new = {name: leaf for name, leaf in tree.named_leaves(small.params).items() if name in small.removed}
    if not arrays:
        sizes = [f"{name} {np.shape(leaf)}" for name, leaf in new.items() if any(small.removed[name])]
        raise TypeError(
            f"A {type(model).__name__} holds no arrays, so that nothing of it can be made smaller: build one whose "
            f"constructors get the sizes that there are now, and give it `small.params`. Smaller are "
            f"{', '.join(sizes)}; the last size of a Linen kernel is its `features`."
        )
    for name, leaf in new.items():
        old = shape_before(leaf, small.removed[name])
        if name not in arrays or np.shape(arrays[name]) != old:
            there = f"shape {np.shape(arrays[name])}" if name in arrays else f"leaves {tree.listed(arrays)}"
            raise ValueError(
                f"The model is not the one that was made smaller: a leaf {name!r} of shape {old} was expected, it has "
                f"{there}. Hand in the module as it was before `compact`."
            )
    return {**arrays, **new}


def _walked(jaxpr: ClosedJaxpr, arrays: Mapping[str, Any], removed: Removed) -> Walk:
    try:
        return walk(jaxpr, arrays, removed)
    except ValueError as error:
        unknown = [name for name in arrays if name not in removed]
        if not unknown:
            raise
        raise ValueError(
            f"{error} The params that `compact` was handed had no leaf {unknown[0]!r}: hand it all arrays of the "
            "model, statistics of batches too, and the same function."
        ) from None


def _with(model: Any, new: Mapping[str, Any]) -> Any:
    return tree.map_named(lambda name, leaf: new.get(name, leaf), model)


def _nodes(model: Any, removed: Removed) -> list[Node]:
    """Parts of a model that have numbers, and leaves that are smaller, inner ones first."""

    def below(path: tuple[Any, ...], module: Any) -> Iterator[Node]:
        for key, child in jax.tree_util.tree_leaves_with_path(module, is_leaf=lambda node: node is not module):
            if key:  # else it is a leaf itself
                yield from below((*path, *key), child)
        attributes = vars(module).items() if hasattr(module, "__dict__") else ()
        numbers = {word: value for word, value in attributes if word[0] != "_" and _is_number(value)}
        leaves = {
            tree.leaf_name(key): tree.leaf_name((*path, *key))
            for key, leaf in jax.tree_util.tree_leaves_with_path(module)
            if tree.is_array(leaf) and not tree.is_array(module)
        }
        if numbers and any(any(removed.get(name, ())) for name in leaves.values()):
            yield Node(path, module, numbers, leaves)

    return list(below((), model))


def _is_number(value: Any) -> bool:
    several = value if isinstance(value, tuple | list) and value else (value,)
    return all(isinstance(one, int) and not isinstance(one, bool) for one in several)


def _all_options(
    nodes: Sequence[Node], widths: Sequence[Widths], new: Mapping[str, Any], most: int
) -> list[list[Numbers]]:
    """For each node `_options`; layers that are alike are asked once."""
    known: dict[str, list[Numbers]] = {}
    options = []
    for node, width in zip(nodes, widths, strict=True):
        shapes = {name: np.shape(new[whole]) for name, whole in node.leaves.items()}
        word = f"{type(node.module)} {node.numbers} {shapes} {width.made}"
        if word not in known:
            known[word] = _options(node, width, shapes, most)
        options.append(known[word])
    return options


def _options(node: Node, widths: Widths, wanted: Shapes, most: int) -> list[Numbers]:
    """What the numbers of a node may be now, likeliest first: what its constructor says, or else whatever they may.

    Args:
        node: of the model before.
        widths: of its leaves.
        wanted: shapes of its leaves now.
        most: how many that the constructor says; several are right where sizes are multiplied: eight heads of four are
            four heads of eight.
    """
    before = {name: np.shape(leaf) for name, leaf in tree.named_leaves(node.module).items() if tree.is_array(leaf)}
    may_be = {word: widths.of(number) for word, number in node.numbers.items()}
    asked = {word: may_be[word] for word in node.numbers if word in _arguments(type(node.module))}
    if asked and len(before) <= MOST_LEAVES and _constructed(node.module, {}) == (before, node.numbers):
        made = (_constructed(node.module, numbers) for numbers in itertools.islice(_combined(asked), MOST_MADE))
        fits = (numbers for shapes, numbers in filter(None, made) if shapes == wanted)
        found = list(itertools.islice(fits, most))
        if found:
            return found
    return list(_combined(may_be))


def _combined(values: Mapping[str, list[Number]]) -> Iterator[Numbers]:
    """A value for each word, likeliest first."""
    for places in _places([len(several) for several in values.values()]):
        yield {word: several[at] for (word, several), at in zip(values.items(), places, strict=True)}


def _places(counts: Sequence[int]) -> list[tuple[int, ...]]:
    """A place in each of several rows, first those where few are not the first."""
    every = itertools.islice(itertools.product(*map(range, counts)), MOST_ORDERED)
    return sorted(every, key=lambda places: (sum(map(bool, places)), sum(places)))


def _arguments(kind: type) -> Mapping[str, inspect.Parameter]:
    try:
        named = inspect.signature(kind.__init__).parameters
    except (TypeError, ValueError):  # a constructor written in C
        return {}
    by_word = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {word: one for word, one in list(named.items())[1:] if one.kind in by_word}


def _constructed(module: Any, numbers: Numbers) -> tuple[Shapes, Numbers] | None:
    """Shapes and numbers of a module that is made as this one seems to have been; None if it cannot be.

    Args:
        module: its attributes are the arguments of the same names.
        numbers: those that are to be others.
    """
    given: dict[str, Any] = {}
    for word, argument in _arguments(type(module)).items():
        value = numbers.get(word, vars(module).get(word))
        if word in ("key", "rngs"):
            given[word] = jax.random.key(0) if word == "key" else _Keys()
        elif word in vars(module) and not any(map(tree.is_array, jax.tree.leaves(value))):
            given[word] = value
        elif argument.default is argument.empty:
            return None
    made: list[tuple[Shapes, Numbers]] = []

    def make() -> None:
        one = type(module)(**given)
        leaves = tree.named_leaves(one).items()
        attributes = {word: value for word, value in vars(one).items() if word[0] != "_" and _is_number(value)}
        made.append(({name: tuple(np.shape(leaf)) for name, leaf in leaves if tree.is_array(leaf)}, attributes))

    try:
        jax.eval_shape(make)
    except Exception:  # whatever a constructor raises on numbers that do not go together
        return None
    return made[0]


class _Keys:
    """Stands for `nnx.Rngs`: every stream of it gives the same key."""

    def __getattr__(self, word: str) -> "_Keys":
        if word.startswith("__"):
            raise AttributeError(word)
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return jax.random.key(0)

    def fork(self, *_: Any, **__: Any) -> "_Keys":
        """Another one, where a module keeps one of its own."""
        return self


def _choices(nodes: Sequence[Node], options: Sequence[list[Numbers]]) -> Iterator[list[Numbers]]:
    """Numbers for all nodes, likeliest first; those of one class choose alike."""
    kinds: dict[type, int] = {}
    for node, found in zip(nodes, options, strict=True):
        kinds[type(node.module)] = max(len(found), kinds.get(type(node.module), 0))
    for places in _places(list(kinds.values()))[:MOST_TRACED]:
        place = dict(zip(kinds, places, strict=True))
        each = zip(nodes, options, strict=True)
        yield [found[min(place[type(node.module)], len(found) - 1)] for node, found in each]


def _told(nodes: Sequence[Node], options: Sequence[list[Numbers]]) -> str:
    changed = [
        f"{jax.tree_util.keystr(node.path, simple=True, separator='/') or 'the model'} ({type(node.module).__name__}): "
        + ", ".join(f"{word} {old} -> {found[0][word]}" for word, old in node.numbers.items() if found[0][word] != old)
        for node, found in zip(nodes, options, strict=True) if found[0] != node.numbers
    ]  # fmt: skip
    return "; ".join(changed) or "none"
