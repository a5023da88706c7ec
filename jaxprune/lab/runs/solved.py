"""Matrices that one-shot pruning has solved, a file each: a run that is killed goes on with them.

kept = SolvedFiles(folder, stamp, note)
jp.oneshot.prune(..., kept=kept)
"""

from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

import jaxprune as jp
from jaxprune.oneshot.order import Place, Solution
from jaxprune.storage import Artifact, FileError


class SolvedFiles(MutableMapping[Place, Solution]):
    """A folder of solved matrices.

    A file that is damaged, or of a run with another stamp, is deleted, and `note` is told why.

    Attributes:
        folder: where they lie.
        stamp: of all that decides what is solved.
        note: told what is wrong with a file.
    """

    def __init__(self, folder: Path, stamp: str, note: Callable[[str], None]) -> None:
        self.folder, self.stamp, self.note = folder, stamp, note

    def __setitem__(self, place: Place, solution: Solution) -> None:
        arrays = {"weight": np.asarray(solution.weight), "mask": np.asarray(solution.mask)}
        about = {**self._about(place), "error": solution.error}
        jp.save(self._path(place), arrays, encoding="dense", deflate=False, signed_zeros=True, metadata=about)

    def __getitem__(self, place: Place) -> Solution:
        path = self._path(place)
        try:
            with Artifact(path) as file:
                about = dict(file.metadata)
                arrays = {name: np.asarray(array) for name, array in jp.load(path).items()}
            error = float(about.pop("error"))
        except FileNotFoundError:
            raise KeyError(place) from None
        except (FileError, AttributeError, KeyError, TypeError) as problem:
            raise self._gone(place, f"is damaged: {problem}") from None
        if about != self._about(place) or arrays.keys() != {"weight", "mask"}:
            raise self._gone(place, "is of another run.")
        return Solution(arrays["weight"], arrays["mask"], error)

    def _gone(self, place: Place, why: str) -> KeyError:
        self.note(f"{self._path(place)} is deleted, and solved again: it {why}")
        del self[place]
        return KeyError(place)

    def __delitem__(self, place: Place) -> None:
        try:
            self._path(place).unlink()
        except FileNotFoundError:
            raise KeyError(place) from None

    def __iter__(self) -> Iterator[Place]:
        for path in sorted(self.folder.glob("*.jaxprune")):
            name, _, layer = path.stem.rpartition(".")
            if layer.isdecimal() and (place := (unquote(name), int(layer))) in self:
                yield place

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, place: Place) -> Path:
        name, layer = place
        return self.folder / f"{quote(name, safe='')}.{layer}.jaxprune"

    def _about(self, place: Place) -> dict[str, Any]:
        return {"leaf": place[0], "layer": place[1], "run": self.stamp}
