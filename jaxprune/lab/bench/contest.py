"""One contest: the same function on the same weights, stored in several ways, timed in turns.

    entries = enter(params, ["native", "bcsr"])      # "dense" is always among them
    outcome = run(fn, entries, x)

Each contestant is lowered, compiled and run, the three timed apart; its answer is held against dense before any run
counts. One that cannot run here is refused with the reason, and the contest goes on.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import sparse, tree
from jaxprune.sparse.tuning import timing
from jaxprune.types import Params

TURN = 0.03
"""Seconds that a contestant runs in a row, as a served model does: its weights are in the caches if they fit."""
HOPELESS = 10.0
"""Times the fastest: whoever takes longer is run twice, so that the others have the time."""
REFUSALS = (TypeError, ValueError, NotImplementedError, RuntimeError)
TOLERANCE = {4: 1e-3, 2: 5e-2, 1: 2e-1}
"""Bytes of a stored weight -> largest difference from dense that passes, as a fraction of the largest answer."""


class WrongAnswer(RuntimeError):
    """A contestant computes something else than dense: there is nothing to time."""


class Entry(NamedTuple):
    """One way to store a model.

    Attributes:
        params: as stored; None if it cannot be stored so.
        stayed: why leaves are dense all the same -> which.
        refused: why it cannot be stored so, "" if it can.
    """

    params: Params | None
    stayed: Mapping[str, Sequence[str]] = {}
    refused: str = ""


class Result(NamedTuple):
    """What became of one contestant; times in seconds.

    Attributes:
        refused: why it did not run, "" if it did.
        lower, compile: tracing and lowering; compiling.
        runs: every run that counts, in the order of the rounds.
        custom_calls: target -> how often the compiled program calls it.
        error: largest difference from dense over the largest magnitude of dense.
    """

    refused: str = ""
    lower: float = 0.0
    compile: float = 0.0
    runs: Sequence[float] = ()
    custom_calls: Mapping[str, int] = {}
    error: float = 0.0


class _Program(NamedTuple):
    call: Callable[[], Any]
    result: Result


def check_formats(formats: Sequence[str]) -> None:
    """Refuse names that are no formats.

    Raises:
        ValueError: there is no such format; those that there are are named.
    """
    for name in formats:
        if name not in sparse.FORMATS:
            known = ", ".join(sparse.FORMATS)
            raise ValueError(f"There is no format {name!r} to measure. There are: {known} (dense always runs).")


def enter(params: Params, formats: Sequence[str]) -> dict[str, Entry]:
    """The model dense and in each format; what a format cannot store stays dense, and is named with the reason."""
    return {"dense": Entry(params)} | {name: _stored(params, name) for name in formats}


def _stored(params: Params, format: str) -> Entry:
    try:
        stored = sparse.compress(params, format, unsupported="dense")
    except REFUSALS as error:
        return Entry(None, refused=str(error))
    return Entry(stored, stayed=stayed_dense(params, stored, format=format))


def stayed_dense(params: Params, stored: Params, *, format: str = "", planned: str = "") -> dict[str, list[str]]:
    """Why matrices and kernels of the model are not compressed in `stored` -> their names.

    Args:
        params: the dense model.
        stored: the same model, compressed.
        format: asked for, for all leaves; or
        planned: why a plan kept leaves dense, in a sentence.
    """
    names = {name for name, leaf in _stored_leaves(stored).items() if not isinstance(leaf, sparse.SparseWeight)}
    reasons: dict[str, list[str]] = {}
    for name, leaf in tree.selected_leaves(tree.weights, params).items():
        if name in names:
            reasons.setdefault(
                _why_dense(name, leaf, format) if format else f"kept dense by the plan: {planned}", []
            ).append(name)
    return reasons


def _why_dense(name: str, leaf: Any, format: str) -> str:
    try:
        sparse.compress({name: leaf}, format, unsupported="refuse")
    except REFUSALS as error:
        # One sentence, without the leaf's own name and shape, so that leaves with one reason come together.
        return re.sub(r"^Leaf '[^']*' (\([\d, ]*\) )?", "", str(error)).partition(". ")[0].rstrip(".")
    return "taken alone, but left dense in the model"


def _stored_leaves(params: Params) -> dict[str, Any]:
    pairs = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, sparse.SparseWeight))
    return {tree.leaf_name(path): leaf for path, leaf in pairs}


def stored_slots(params: Params) -> tuple[int, int]:
    """Slots that the matrices and kernels of a model take, zeros of dense ones included; and compressed leaves."""
    leaves = _stored_leaves(params)
    weights = [leaf for leaf in leaves.values() if isinstance(leaf, sparse.SparseWeight)]
    dense = [leaf.size for name, leaf in leaves.items() if not isinstance(leaf, sparse.SparseWeight)
             and tree.weights(name, leaf)]  # fmt: skip
    return sum(weight.nse for weight in weights) + sum(dense), len(weights)


def run(
    fn: Callable[..., Any], entries: Mapping[str, Entry], x: Any, *, repeats: int | None = None, seconds: float = 2.0
) -> dict[str, Result]:
    """Time `fn(params, x)` for every entry; "dense" must be one of them.

    Args:
        fn: (params, x) -> an array.
        entries: contestant -> the model as stored.
        x: activations.
        repeats: rounds of `timing.interleaved`; without it as many as take `seconds`.
        seconds: aim for all runs together.

    Raises:
        WrongAnswer: a contestant's answer is not that of dense.
    """
    dense = _prepare(fn, entries["dense"].params, x)  # nothing can be said without it: its errors are errors
    expected = np.asarray(dense.call(), np.float64)
    programs, results = {"dense": dense}, {"dense": dense.result}
    for name, entry in entries.items():
        if name == "dense":
            continue
        if entry.refused:
            results[name] = Result(refused=entry.refused)
            continue
        try:
            program = _prepare(sparse.apply(fn), entry.params, x)
            answer = np.asarray(program.call(), np.float64)
        except REFUSALS as error:
            results[name] = Result(refused=str(error))
            continue
        error = difference(name, answer, expected, _narrowest(entry.params))
        programs[name], results[name] = program, program.result._replace(error=error)
    calls = {name: program.call for name, program in programs.items()}
    runs = timing.interleaved(calls, repeats=repeats, seconds=seconds, turn=TURN, hopeless=HOPELESS, always=("dense",))
    return {name: result._replace(runs=runs.get(name, ())) for name, result in results.items()}


def difference(name: str, answer: np.ndarray, expected: np.ndarray, itemsize: int = 4) -> float:
    """Largest difference of two answers, over the largest magnitude expected.

    Raises:
        WrongAnswer: they are not the same, by what weights of `itemsize` bytes can be off.
    """
    scale = max(float(np.abs(expected).max(initial=0)), 1e-30)
    error = float(np.abs(answer - expected).max(initial=0)) / scale
    if answer.shape != expected.shape or not error <= TOLERANCE.get(itemsize, 1e-3):
        raise WrongAnswer(
            f"{name} answers differently from dense: by {error:.2g} of the largest value, shapes {answer.shape} and "
            f"{expected.shape}. Nothing was timed; please report this with the command."
        )
    return error


def _prepare(fn: Callable[..., Any], params: Params, x: Any) -> _Program:
    start = time.perf_counter()
    lowered = jax.jit(lambda params, x: fn(params, x)).lower(params, x)  # a new function: nothing is known of it yet
    between = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    return _Program(lambda: compiled(params, x), Result("", between - start, end - between, (), custom_calls(compiled)))


def custom_calls(compiled: Any) -> dict[str, int]:
    """Target -> how often a compiled program calls it."""
    return dict(Counter(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text() or "")))


def _narrowest(params: Params) -> int:
    weights = [leaf for leaf in _stored_leaves(params).values() if isinstance(leaf, sparse.SparseWeight)]
    return min((weight.values.dtype.itemsize for weight in weights), default=4)
