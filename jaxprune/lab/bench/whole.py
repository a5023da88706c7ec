"""`bench model`: a whole network end to end, dense against the same network with its leaves compressed.

Sparsities come from one number for all layers, from a profile (a csv file), or from a run that pruned for real. What a
format cannot store stays dense inside the contestant, and is counted and named with the reason; `tune` is the network
as `jaxprune.sparse.tuning.tune` would have it run here.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import sparse
from jaxprune.lab.bench import contest, networks, sparsify
from jaxprune.lab.bench.layers import Progress
from jaxprune.lab.bench.peak import Peak
from jaxprune.lab.bench.rows import Row, measured, work_of
from jaxprune.lab.models.zoo import Network
from jaxprune.types import Params

UNIFORM = 0.9
"""Sparsity of all layers where nothing else is asked for."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """What is measured.

    Attributes:
        name: in `networks.NAMES`, or "" for the model of `run`.
        batches: images at once.
        formats: names in `sparse.FORMATS`.
        sparsities: of all layers, one case each.
        profiles: "FILE:COLUMN", one case each.
        run: folder of a finished run.
        tune: whether the plan of `sparse.tune` runs too.
        cache: folder where `tune` keeps its timings; None: its own default.
        side: height and width of the images; None: the model's own.
        repeats: rounds of `timing.interleaved`; None: as many as take ten seconds a case.
        seed: draws weights, zeros and images.

    Raises:
        ValueError: a name, a fraction or a number that cannot be meant; zeros asked for in more than one way.
    """

    name: str
    batches: tuple[int, ...]
    formats: tuple[str, ...]
    sparsities: tuple[float, ...] = ()
    profiles: tuple[str, ...] = ()
    run: Path | None = None
    tune: bool = False
    cache: Path | None = None
    side: int | None = None
    repeats: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        contest.check_formats(self.formats)
        for sparsity in self.sparsities:
            sparsify.check_sparsity(sparsity)
        least = min((*self.batches, self.side or 1, 1 if self.repeats is None else self.repeats))
        if least < 1:
            raise ValueError(f"Batches, repeats and the side of images are 1 or more; {least} arrived.")
        if bool(self.sparsities) + bool(self.profiles) + (self.run is not None) > 1:
            raise ValueError("Zeros come from --sparsity, from --profile or from --run: give one of them.")
        if bool(self.name) == (self.run is not None):
            raise ValueError(f"Give a model's name ({', '.join(networks.NAMES)}), or a finished run with --run FOLDER.")
        if self.run is not None and self.side:
            raise ValueError("The images of a run have the size it was trained with: leave --image out.")


class _Case(NamedTuple):
    label: str | float
    params: Params


def prepare(plan: Whole) -> Callable[[Peak, Progress], Iterator[list[Row]]]:
    """Read and build what is measured, so that bad input is refused before anything runs.

    Args:
        plan: what is measured.

    Returns:
        (peak of the machine, progress) -> the rows of one case after the other: dense, the formats, the plan.

    Raises:
        ValueError: a model, a profile or a run that cannot be used.
    """
    network, make_cases, n_cases = _cases(plan)

    def measure(peak: Peak, progress: Progress) -> Iterator[list[Row]]:
        total, done = n_cases * len(plan.batches), 0
        for case in make_cases():
            entries = contest.enter(case.params, plan.formats)
            for batch in plan.batches:
                label = case.label if isinstance(case.label, str) else f"{case.label:.0%}"
                progress(done, total, f"{network.name} {label} batch {batch}")
                tell = functools.partial(progress, done, total)
                yield _rows(plan, network, case, batch, entries, peak, tell)
                done += 1
        progress(done, total, "done")

    return measure


def _cases(plan: Whole) -> tuple[Network, Callable[[], Iterator[_Case]], int]:
    """The network, its sparse versions one at a time, and how many."""
    if plan.run is not None:
        from jaxprune.lab.bench.of_run import of_run, rounds_of  # brings flax's and Orbax's readers

        network, name = of_run(plan.run), f"run {plan.run.name}"
        made = rounds_of(plan.run, network.params) or {name: lambda: network.params}
        return network, lambda: (_Case(label, read()) for label, read in made.items()), len(made)
    profiles = {place: sparsify.read_profile(place) for place in plan.profiles}
    init, zeros = jax.random.split(jax.random.key(plan.seed))
    network = networks.build(plan.name, init, plan.side)
    counts: dict[str | float, dict[str, int]] = {
        place.rpartition(":")[2].removeprefix("nonzero_"): sparsify.profile_counts(network.params, profile)
        for place, profile in profiles.items()
    }
    if not profiles:
        counts = {s: sparsify.uniform_counts(network.params, s) for s in plan.sparsities or (UNIFORM,)}
    return (
        network,
        lambda: (_Case(label, sparsify.prune_to(network.params, kept, zeros)) for label, kept in counts.items()),
        len(counts),
    )


def _rows(
    plan: Whole,
    network: Network,
    case: _Case,
    batch: int,
    entries: dict[str, contest.Entry],
    peak: Peak,
    tell: Callable[[str], None],
) -> list[Row]:
    x = jax.random.uniform(jax.random.key(plan.seed + 1), (batch, *network.sample.shape))
    if plan.tune:
        entries = {**entries, "tune": _tuned(plan, network, case.params, x, tell)}
    results = contest.run(network.apply, entries, x, repeats=plan.repeats, seconds=10.0)
    work, base = work_of(network.apply, case.params, x), float(np.median(results["dense"].runs))
    side = network.sample.shape[0]
    model = network.name if side in (224, 28) or plan.run else f"{network.name} {side}x{side}"
    row = {"kind": "model", "model": model, "image": list(network.sample.shape), "batch": batch, "sparsity": case.label}
    return [measured(row, name, entries[name], result, work, base, peak) for name, result in results.items()]


def _tuned(plan: Whole, network: Network, params: Params, x: Any, tell: Callable[[str], None]) -> contest.Entry:
    """The network as `tune` would have it; one that measured this before, here, measures nothing."""
    options: dict[str, Any] = {"progress": lambda done, total, leaf: tell(f"tune {network.name} {leaf} {done}/{total}")}
    if plan.cache is not None:
        options["cache"] = plan.cache
    try:
        chosen = sparse.tune(network.apply, params, x, formats=plan.formats, **options)
        stored = sparse.compress(params, chosen)
    except contest.REFUSALS as error:
        return contest.Entry(None, refused=str(error))
    return contest.Entry(stored, contest.stayed_dense(params, stored, planned=chosen.reason))
