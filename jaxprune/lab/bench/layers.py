"""`bench layers`: three equal layers with ReLU in one jitted function, over sizes, sparsities, batches and formats.

    x -> relu(x W1) -> relu(. W2) -> relu(. W3),   W (in, out) square; a layer that is not square stands alone

Three layers, not one, since what a format costs between layers (transposes, layouts) is part of its price.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.checks import check_sparsity
from jaxprune.lab.bench import contest, rivals, sparsify
from jaxprune.lab.bench.rows import Peak, Work, measured, rates, work_of
from jaxprune.lab.models.parts import random_params
from jaxprune.lab.report import wording
from jaxprune.lab.report.results import Row
from jaxprune.types import Params

Progress = Callable[[int, int, str], None]
SETTLE = 0.3  # seconds; threads of other libraries spin that long after their last product, on the cores we measure


@dataclasses.dataclass(frozen=True)
class Layers:
    """What is measured.

    Attributes:
        sizes: (in, out) of the layers.
        batches: samples at once.
        sparsities: fractions removed, at random positions.
        formats: names in `sparse.FORMATS`.
        layers: how many, for square ones.
        repeats: rounds of `timing.interleaved`; None: as many as take two seconds a case.
        rivals: whether SciPy and PyTorch run too.
        seed: draws weights, zeros and activations.

    Raises:
        ValueError: a name, a fraction or a number that cannot be meant; nothing to measure.
    """

    sizes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    sparsities: tuple[float, ...]
    formats: tuple[str, ...]
    layers: int = 3
    repeats: int | None = None
    rivals: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        contest.check_formats(self.formats)
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        numbers = (*sum(self.sizes, ()), *self.batches, self.layers, 1 if self.repeats is None else self.repeats)
        if min(numbers) < 1:
            raise ValueError(f"Sizes, batches, layers and repeats are 1 or more; {min(numbers)} arrived.")


def parse_size(text: str) -> tuple[int, int]:
    """(in, out) of "4096" or "768x3072".

    Raises:
        ValueError: neither.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and int(side) for side in sides):
        raise ValueError(f"A size is a number, or INxOUT such as 768x3072; {text!r} arrived.")
    return int(sides[0]), int(sides[-1])


def chain(params: Params, x: Float[Array, "batch n_in"]) -> Float[Array, "batch n_out"]:
    """The layers one after the other, in the order of the dict."""
    for weight in params.values():
        x = jax.nn.relu(x @ weight)
    return x


def measure(plan: Layers, peak: Peak, progress: Progress) -> Iterator[list[Row]]:
    """The rows of one case after the other: dense, the formats, the rivals.

    Args:
        plan: what is measured.
        peak: of the machine.
        progress: told (cases done, cases in all, which one comes).
    """
    total = len(plan.sizes) * len(plan.sparsities) * len(plan.batches)
    done = 0
    for size in plan.sizes:
        for sparsity in plan.sparsities:
            params = weights(size, sparsity, plan)
            entries = contest.enter(params, plan.formats)
            for batch in plan.batches:
                progress(done, total, f"{size[0]}x{size[1]} {wording.zeros(sparsity)} batch {batch}")
                yield _case(plan, size, sparsity, batch, entries, peak)
                done += 1
    progress(done, total, "done")


def weights(size: tuple[int, int], sparsity: float, plan: Layers) -> Params:
    """Kernels "000/kernel", "001/kernel", ... (in, out), scaled so that activations keep their size."""
    n_layers = plan.layers if size[0] == size[1] else 1
    values, places = jax.random.split(jax.random.key(plan.seed))
    dense = random_params({f"{i:03d}/kernel": jax.ShapeDtypeStruct(size, jnp.float32) for i in range(n_layers)}, values)
    return sparsify.prune_to(dense, sparsify.uniform_counts(dense, sparsity), places)


def _case(
    plan: Layers, size: tuple[int, int], sparsity: float, batch: int, entries: dict[str, contest.Entry], peak: Peak
) -> list[Row]:
    dense = entries["dense"].params
    x = jax.random.normal(jax.random.key(plan.seed + 1), (batch, size[0]))
    n_layers = len(jax.tree.leaves(dense))
    results = contest.run(chain, entries, x, repeats=plan.repeats)
    work, base = work_of(chain, dense, x), float(np.median(results["dense"].runs))
    case = {"kind": "layers", "model": f"{size[0]}x{size[1]}", "layers": n_layers, "batch": batch, "sparsity": sparsity}
    rows = [measured(case, name, entries[name], result, work, base, peak) for name, result in results.items()]
    if not plan.rivals:
        return rows
    return rows + _rival_rows(plan, case, dense, x, work, base, peak)


def _rival_rows(plan: Layers, case: Row, dense: Any, x: Array, work: Work, base: float, peak: Peak) -> list[Row]:
    """A loop of their own: threads that still spin after a run would slow whoever comes next."""
    expected = np.asarray(chain(dense, jnp.asarray(x)), np.float64)
    entries = rivals.rivals([np.asarray(leaf) for leaf in jax.tree.leaves(dense)], np.asarray(x))
    errors = {entry.name: contest.difference(entry.name, entry.call().T, expected) for entry in entries}
    calls = {entry.name: entry.call for entry in entries}
    runs = contest.timing.interleaved(calls, repeats=plan.repeats, seconds=2.0, turn=contest.TURN)
    if entries:
        time.sleep(SETTLE)
    unknown = {"refused": "", "lower_s": None, "compile_s": None, "custom_calls": {}, "dense_leaves": {}}
    return [
        {
            **case,
            "contestant": entry.name,
            **unknown,
            "compressed_leaves": 0 if entry.name == "torch_dense" else case["layers"],
            **rates(runs[entry.name], entry.bytes, entry.nse, work, base, peak),
            "error": errors[entry.name],
        }
        for entry in entries
    ]
