"""Work on several tensors, or parts of one, at once."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 8  # memory has no more to give


def each(work: Callable[[Item], Result], items: Iterable[Item], *, at_once: bool = True) -> list[Result]:
    """`[work(item) for item in items]`, on as many threads as there are cores.

    NumPy, zlib and the codecs in C++ let other threads run. Of several errors the first item's is raised.

    Args:
        work: may run on another thread.
        items: what it is called with.
        at_once: if False, one after the other, on this thread.
    """
    todo = list(items)
    workers = min(len(todo), os.cpu_count() or 1, _MOST)
    if workers < 2 or not at_once:
        return [work(item) for item in todo]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, todo))
