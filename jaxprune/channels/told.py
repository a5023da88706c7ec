"""Couplings in words: a line for each layer of channels, then what must stay and why, then what was not followed.

layer          channels  goes with
conv/kernel:3         8  conv/bias:0, fc/kernel:0 (9 each)

stays, since it is an output of the function: fc/bias:0, fc/kernel:1
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxprune.tables import columns

Members = Sequence[Sequence[tuple[str, int]]]
MOST = 6
"""How many members of a layer, or axes with one reason, a line names."""


def table(
    channels: Mapping[str, Sequence[np.ndarray]], layers: Sequence[Sequence[int]], names: Sequence[str],
    members: Members, reasons: Mapping[tuple[str, int], str], barriers: Sequence[str],
) -> str:  # fmt: skip
    """The couplings for a terminal.

    Args:
        channels: leaf -> for each of its axes the channel of every index.
        layers: channels side by side.
        names: of the layers.
        members: of every channel: the (leaf, axis) that it has indices of.
        reasons: (leaf, axis) -> why some of it must stay.
        barriers: operations that could not be followed.
    """

    def line(name: str, layer: Sequence[int]) -> list[str]:
        found = [_member(leaf, axis, channels[leaf][axis], layer) for leaf, axis in members[layer[0]]]
        return [name, str(len(layer)).rjust(len("channels")), _listed([word for word in found if word != name])]

    rows = [line(name, layer) for name, layer in zip(names, layers, strict=True)]
    table = columns(("layer", "channels", "goes with"), rows, 3) if rows else "No channel can be removed."
    why: dict[str, list[str]] = {}
    for (leaf, axis), reason in reasons.items():
        why.setdefault(reason, []).append(f"{leaf}:{axis}")
    stays = [f"stays, since {reason}: {_listed(found)}" for reason, found in why.items()]
    return "\n".join([table, *([""] if stays or barriers else []), *stays, *(f"not followed: {b}" for b in barriers)])


def _member(leaf: str, axis: int, ids: np.ndarray, layer: Sequence[int]) -> str:
    each = int(np.isin(ids, layer).sum()) / len(layer)
    return f"{leaf}:{axis}" if each == 1 else f"{leaf}:{axis} ({each:g} each)"


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - MOST} more" if len(words) > MOST else ""
    return ", ".join(words[:MOST]) + more
