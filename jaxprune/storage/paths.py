"""Paths: how the keys that lead to a leaf stand in a file, and trees made of them again.

"name"          a key of a dict, or an attribute
3               an index of a list
["tuple", 3]    an index of a tuple              ["key", 3]    a key of a dict that is a number
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey, keystr

from jaxprune import tree
from jaxprune.storage.container import require

Keys = tuple[Any, ...]


def flattened(params: Any) -> dict[str, tuple[Keys, Any]]:
    """Leaf name -> (its keys, the leaf). Flax NNX's Variables stand for their arrays, as in its pure dicts.

    Raises:
        ValueError: two leaves have the same name.
    """
    names = tree.named_leaves(params)  # refuses doubles
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    under = Counter(path[:end] for path in paths for end in range(len(path)))
    keys = [_keys(params, path, alone=under[tree.unwrapped(path)] < 2) for path in paths]
    return {name: (one, leaf) for (name, leaf), one in zip(names.items(), keys, strict=True)}


def _keys(node: Any, path: tuple[Any, ...], *, alone: bool) -> Keys:
    keys, own = [], len(tree.unwrapped(path))
    for place, key in enumerate(path):
        if place == own and alone and not isinstance(node, tuple):
            break  # the "value" of a Variable
        match key:
            case SequenceKey(idx=index):
                keys.append(("tuple", index) if type(node) is tuple else index)
            case DictKey(key=number) | FlattenedIndexKey(key=number) if type(number) is int:
                keys.append(("key", number))
            case _:
                keys.append(keystr((key,), simple=True))
        node = _child(node, key)
    return tuple(keys)


def _child(node: Any, key: Any) -> Any:
    """What stands there, if it is a plain container's; only whether it is a tuple will be asked."""
    match key:
        case SequenceKey(idx=index) if isinstance(node, list | tuple):
            return node[index]
        case DictKey(key=name) if isinstance(node, Mapping):
            return node[name]
        case GetAttrKey(name=name):  # of named tuples; others are asked for no property, which may warn
            return getattr(node, name) if isinstance(node, tuple) else getattr(node, "__dict__", {}).get(name)
    return None


def check(keys: Keys, name: str) -> None:
    """Refuse keys that mean nothing, or not this leaf.

    Raises:
        Problem: such keys.
    """
    require(len(keys) <= 100, f"its path has {len(keys)} keys, 100 are the most")
    for key in keys:
        kind, index = key if type(key) is tuple and len(key) == 2 else ("list", key)
        counts = type(index) is int and (kind == "key" or (kind in ("list", "tuple") and 0 <= index < 2**31))
        require(type(key) is str or counts, f"its path has the key {str(key)[:50]}")
    plain = [str(key[1] if type(key) is tuple else key) for key in keys]
    unwrapped = plain[:-1] if plain[-1:] == ["value"] else plain  # Flax NNX's Variables, see `jaxprune.tree`
    named = name in ("/".join(plain), "/".join(unwrapped))
    require(named, f"its path {'/'.join(plain)[:200]!r} is not its name")


def nested(leaves: Mapping[Keys, Any]) -> Any:
    """The tree with these leaves.

    Raises:
        Problem: keys that cannot belong to one tree.
    """
    if list(leaves) == [()]:
        return leaves[()]
    children: dict[Any, dict[Keys, Any]] = {}
    for keys, leaf in leaves.items():
        require(keys, "a leaf stands where others have a branch")
        children.setdefault(keys[0], {})[keys[1:]] = leaf
    kinds = {
        "list" if type(key) is int else key[0] if type(key) is tuple and key[0] == "tuple" else "dict"
        for key in children
    }
    require(len(kinds) < 2, f"leaves of {' and a '.join(sorted(kinds))} stand in one place")
    made = {key[1] if type(key) is tuple else key: nested(child) for key, child in children.items()}
    # Lists with gaps come from trees some of whose entries hold no arrays: those stay dicts.
    if kinds <= {"dict"} or sorted(made) != list(range(len(made))):
        return made
    items = [made[i] for i in range(len(made))]
    return items if kinds == {"list"} else tuple(items)
