"""Figures in words: what several seeds came to, shares in per cent, bytes beside bytes."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (of the sample, n - 1; 0 for a single one) and the values."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": deviation, "values": list(values)}


def percent(share: float, digits: int = 1) -> str:
    """Write a fraction as a percentage, with more digits where fewer would claim all or nothing falsely.

    >>> percent(0.9), percent(0.99996), percent(1.0)
    ('90.0 %', '99.996 %', '100.0 %')
    """
    for places in range(digits, 9):
        text = f"{100 * share:.{places}f}"
        if share in (0.0, 1.0) or float(text) not in (0.0, 100.0):
            return f"{text} %"
    return f"{100 * share!r} %"


def zeros(sparsity: float | str) -> str:
    """How sparse a case is, in words: "90 %", or the name of the profile."""
    return f"{100 * sparsity:.4g} %" if isinstance(sparsity, float) else str(sparsity)


def with_deviation(stat: dict[str, Any]) -> str:
    """A share as `spread` gives it, in per cent; the deviation where there is more than one value."""
    text = percent(stat["mean"], 2)
    return f"{text[:-2]} ± {100 * stat['std']:.2f} %" if len(stat["values"]) > 1 else text


def points(stat: dict[str, Any]) -> str:
    """The same for a column that says per cent in its head."""
    return with_deviation(stat).removesuffix(" %")


def size_text(dense: int, sparse: int) -> str:
    """Say how many bytes became how many, and call larger what is larger."""
    change = f": {factor(dense, sparse)}" if 0 < dense != sparse > 0 else ""
    return f"{dense:,} bytes dense, {sparse:,} bytes sparse{change}"


def factor(dense: float, stored: float) -> str:
    """Say how much smaller, or larger, the stored bytes are."""
    ratio = dense / stored
    return f"{ratio:.2f} times smaller" if ratio > 1 else f"{1 / ratio:.2f} times LARGER"


def bytes_text(value: float, _: object = None) -> str:
    """Bytes in the largest unit that leaves one or more; the second argument is matplotlib's.

    >>> bytes_text(1_500_000), bytes_text(20)
    ('1.5 MB', '20 B')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"
