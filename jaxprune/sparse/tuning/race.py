"""A contest: one operation as XLA runs it dense, against the same operation on each compressed form of its weight.

Everybody is compiled with the weights as arguments, since a weight closed over would be folded into the program;
everybody must give the dense answer; then they take turns (`jaxprune.sparse.tuning.timing`). Who refuses, or answers
something else, is kept with the reason.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.sparse.dispatch import apply
from jaxprune.sparse.formats import SparseWeight
from jaxprune.sparse.tuning import timing
from jaxprune.sparse.tuning.plan import Timing
from jaxprune.tracing import Site

HOPELESS = 3.0
"""Times the fastest: whoever takes longer is not run again."""
REFUSALS = (ValueError, TypeError)
"""What formats, kernels and `SparseUseError` refuse with; anything else is a fault and is raised."""


class Program(NamedTuple):
    """A compiled function with its arguments: `call()` runs it.

    Attributes:
        call: without arguments.
        compile: milliseconds of lowering and compiling.
    """

    call: Callable[[], Any]
    compile: float


def compiled(fn: Callable[..., Any], *arguments: Any) -> Program:
    """`fn(*arguments)`, lowered and compiled for these arguments.

    Args:
        fn: any function that jit takes.
        arguments: what it will be called with, arrays in any pytrees.
    """
    start = time.perf_counter()
    program = jax.jit(fn).lower(*arguments).compile()
    return Program(lambda: program(*arguments), 1e3 * (time.perf_counter() - start))


def contest(
    site: Site, leaf: Any, rivals: Mapping[str, SparseWeight | str], *, repeats: int | None, seconds: float
) -> tuple[Timing, ...]:
    """Dense and its rivals at one site.

    Args:
        site: the operation.
        leaf: its dense weight.
        rivals: format -> the compressed weight, or why there is none.
        repeats: rounds; None for as many as fit `seconds`.
        seconds: aim for all of one contestant's runs, if there is no `repeats`.

    Returns:
        Dense first; it is not measured if nobody runs against it.
    """
    timings = {"dense": Timing("dense")}
    timings |= {format: Timing(format, refused=rival) for format, rival in rivals.items() if isinstance(rival, str)}
    weights = {format: rival for format, rival in rivals.items() if not isinstance(rival, str)}
    if weights:
        programs, refused = _entrants(site, leaf, weights)
        timings |= {format: Timing(format, refused=reason) for format, reason in refused.items()}
        timings |= race(programs, repeats=repeats, seconds=seconds) if len(programs) > 1 else {}
    return tuple(timings[format] for format in ("dense", *rivals))


def _entrants(site: Site, leaf: Any, weights: Mapping[str, SparseWeight]) -> tuple[dict[str, Program], dict[str, str]]:
    """The programs that give the dense answer, dense first, and why the others do not run."""
    x = activations(site.x_shape, site.x_dtype, leaf)
    programs, refused = {"dense": compiled(site.run, leaf, x)}, {}
    want = programs["dense"].call()
    for format, weight in weights.items():
        try:
            program = compiled(apply(site.run), weight, x)
        except REFUSALS as error:
            refused[format] = str(error)
            continue
        if difference := differs(program.call(), want, loose=weight.lossy):
            refused[format] = difference
        else:
            programs[format] = program
    return programs, refused


def race(
    programs: Mapping[str, Program], *, repeats: int | None, seconds: float, most: int = timing.MOST
) -> dict[str, Timing]:
    """Every program's timing, run in turns.

    Args:
        programs: name -> compiled program.
        repeats: rounds; None for as many as fit `seconds`.
        seconds: aim for all of one program's runs.
        most: upper bound of the rounds, without `repeats`.
    """
    runs = timing.interleaved(
        {name: program.call for name, program in programs.items()},
        repeats=repeats,
        seconds=seconds * len(programs),
        most=most,
        hopeless=HOPELESS,
        always=["dense"],
    )
    return {name: Timing(name, *timing.spread(taken), compile=programs[name].compile) for name, taken in runs.items()}


def activations(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    """Random activations, on the device of an array: normal, or small integers.

    Args:
        shape: of the activations.
        dtype: of the activations.
        like: the array.
    """
    rng, kind = np.random.default_rng(0), jnp.dtype(dtype)
    if jnp.issubdtype(kind, jnp.inexact):
        values = rng.standard_normal(shape, np.float32).astype(kind)
    else:
        values = rng.integers(0, 2, shape).astype(kind)
    return jax.device_put(values, like.sharding)


def differs(got: Any, want: Any, *, loose: bool = False) -> str:
    """Why these outputs are not the dense ones; "" if they are, but for rounding.

    Errors are measured against the largest dense value. Allowed is half of the dtype's digits, and for float32 no less
    than 2^-9, since GPUs multiply it with ten bits; integers are not compared, an index may flip on a tie.

    Args:
        got: outputs, any pytree.
        want: the dense ones.
        loose: allow a tenth, for formats that round the weights.
    """
    for one, dense in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if one.shape != dense.shape or one.dtype != dense.dtype:
            return f"It gives {one.dtype}{list(one.shape)}, dense gives {dense.dtype}{list(dense.shape)}."
        if not jnp.issubdtype(dense.dtype, jnp.inexact):
            continue
        allowed = 0.1 if loose else _allowed(dense.dtype)
        wide = np.complex128 if jnp.issubdtype(dense.dtype, jnp.complexfloating) else np.float64
        exact, other = np.asarray(dense).astype(wide), np.asarray(one).astype(wide)
        told = np.isfinite(exact)
        largest = np.abs(exact[told]).max(initial=0.0)
        error = np.abs(other[told] - exact[told]).max(initial=0.0)
        if not error <= allowed * largest:
            return (
                f"Its result is off by {error / (largest or 1.0):.1e} of the largest value, {allowed:.1e} is allowed."
            )
    return ""


def _allowed(dtype: Any) -> float:
    digits = float(jnp.finfo(dtype).eps) ** 0.5
    return max(digits, 2.0**-9) if dtype == jnp.float32 else digits
