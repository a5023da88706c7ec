"""`bench model`: a whole network end to end, dense against the same network with its leaves compressed.

Sparsities come from one number for all layers, from a profile (a csv file), or from a run that pruned for real. What a
format cannot store stays dense inside the contestant, and is counted and named with the reason; `tune` is the network
as `jaxprune.sparse.tuning.tune` would have it run here.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from jaxprune import sparse
from jaxprune.lab.bench import contest, sparsify
from jaxprune.lab.bench.layers import Progress
from jaxprune.lab.bench.rows import Peak, measured, work_of
from jaxprune.lab.checkpoints import checkpoint
from jaxprune.lab.data import sets
from jaxprune.lab.models import zoo
from jaxprune.lab.models.parts import Network
from jaxprune.lab.recipe import build
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.report import wording
from jaxprune.lab.report.results import Row, read_run
from jaxprune.lab.runs import train
from jaxprune.types import Params

UNIFORM = 0.9
"""Sparsity of all layers where nothing else is asked for."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """What is measured.

    Attributes:
        name: in `zoo.MEASURED`, or "" for the model of `run`.
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
            raise ValueError(f"Give a model's name ({', '.join(zoo.MEASURED)}), or a finished run with --run FOLDER.")
        if self.run is not None and self.side:
            raise ValueError("The images of a run have the size it was trained with: leave --image out.")


def prepare(plan: Whole) -> Callable[[Peak, Progress], Iterator[list[Row]]]:
    """Read and build what is measured, so that bad input is refused before anything runs.

    Args:
        plan: what is measured.

    Returns:
        (peak of the machine, progress) -> the rows of one case after the other: dense, the formats, the plan.

    Raises:
        ValueError: a model, a profile or a run that cannot be used.
    """
    network, cases = _cases(plan)
    name = plan.name if plan.run is None else read_run(plan.run)["name"]
    image = network.sample.shape
    model = name if image[0] in (224, 28) or plan.run else f"{name} {image[0]}x{image[0]}"

    def measure(peak: Peak, progress: Progress) -> Iterator[list[Row]]:
        total, done = len(cases) * len(plan.batches), 0
        for sparsity, make in cases.items():
            params = make()
            entries = contest.enter(params, plan.formats)
            for batch in plan.batches:
                progress(done, total, f"{name} {wording.zeros(sparsity)} batch {batch}")
                tell = functools.partial(progress, done, total)
                case = {"kind": "model", "model": model, "image": list(image), "batch": batch, "sparsity": sparsity}
                yield _rows(plan, network, params, case, entries, peak, tell)
                done += 1
        progress(done, total, "done")

    return measure


def _cases(plan: Whole) -> tuple[Network, dict[str | float, Callable[[], Params]]]:
    """The network, and its zeros in words or as a sparsity -> what makes the params that have them."""
    if plan.run is not None:
        network, name = of_run(plan.run), f"run {plan.run.name}"
        return network, {**rounds_of(plan.run, network.params)} or {name: lambda: network.params}
    profiles = {place: sparsify.read_profile(place) for place in plan.profiles}
    init, drawn = jax.random.split(jax.random.key(plan.seed))
    network = zoo.deployed(plan.name, init, plan.side)
    counts: dict[str | float, dict[str, int]] = {
        place.rpartition(":")[2].removeprefix("nonzero_"): sparsify.profile_counts(network.params, profile)
        for place, profile in profiles.items()
    }
    if not profiles:
        counts = {s: sparsify.uniform_counts(network.params, s) for s in plan.sparsities or (UNIFORM,)}
    return network, {
        label: functools.partial(sparsify.prune_to, network.params, kept, drawn) for label, kept in counts.items()
    }


def _rows(
    plan: Whole, network: Network, params: Params, case: Row, entries: dict[str, contest.Entry], peak: Peak,
    tell: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    x = jax.random.uniform(jax.random.key(plan.seed + 1), (case["batch"], *network.sample.shape))
    if plan.tune:
        entries = {**entries, "tune": _tuned(plan, network, params, x, lambda what: tell(f"{case['model']} {what}"))}
    results = contest.run(network.apply, entries, x, repeats=plan.repeats, seconds=10.0)
    work, base = work_of(network.apply, params, x), float(np.median(results["dense"].runs))
    return [measured(case, name, entries[name], result, work, base, peak) for name, result in results.items()]


def _tuned(plan: Whole, network: Network, params: Params, x: Any, tell: Callable[[str], None]) -> contest.Entry:
    """The network as `tune` would have it; one that measured this before, here, measures nothing."""
    options: dict[str, Any] = {} if plan.cache is None else {"cache": plan.cache}
    try:
        chosen = sparse.tune(
            network.apply, params, x, formats=plan.formats,
            progress=lambda done, total, leaf: tell(f"tune {leaf} {done}/{total}"), **options
        )  # fmt: skip
        stored = sparse.compress(params, chosen)
    except contest.REFUSALS as error:
        return contest.Entry(None, refused=str(error))
    return contest.Entry(stored, contest.stayed_dense(params, stored, planned=chosen.reason))


# ---------------------------------------------------------------- finished runs


def of_run(folder: Path) -> Network:
    """The fine-tuned model of a finished run's first seed, with its zeros.

    Args:
        folder: of `jaxprune run`, finished.

    Raises:
        ValueError: it is no run folder, or not finished.
        CheckpointError: its last checkpoint is damaged.
    """
    read_run(folder)
    config = cfg.load(folder / "config.toml")
    network = zoo.build(config.model, jax.random.key(config.seeds[0]), *sets.facts(config.data))
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), network.params)
    # What the last stage saves, as far as shapes go; the number of steps decides no shape.
    tx = optax.chain(build.optimizer(config.finetune, 1), jp.keep_params_sparse(masks))
    stage = folder / f"seed_{config.seeds[0]}" / "finetune"
    found, _ = checkpoint.restore_latest(stage, train.start(network.params, tx))
    if found is None:
        raise ValueError(f"{folder} has no checkpoint of its fine-tuning any more. Run its command again.")
    return network._replace(params=jax.tree.map(jnp.asarray, found.state.params))


def rounds_of(folder: Path, like: Any) -> dict[float, Callable[[], Any]]:
    """Of a run in rounds: sparsity of the pruned leaves -> what reads the params that the first seed had there.

    Rounds that a stop rule took back are among them; a run without rounds has none.

    Args:
        folder: of `jaxprune run`, finished.
        like: params of the network, for their structure.
    """
    results = read_run(folder)
    rounds = folder / f"seed_{results['seeds'][0]}" / "rounds"
    return {
        round(one["removed"], 6): lambda number=number: jp.load(rounds / f"{number}.jaxprune", like=like)
        for number, one in enumerate(results.get("rounds", [[]])[0], 1)
    }
