"""`bench train`: a whole step of training, dense with masks against compressed, over sparsities.

    dense        optax.adam and `keep_params_sparse`, as one trains with fixed masks
    compressed   optax.adam on `sparse.trainable(sparse.compress(params, "native"))`

Cross entropy of random labels, zeros at random, params and state donated. Useful work counts a step as three passes
forward. Bytes are the most that a compiled step holds at once, state and temporaries included, as XLA counts them.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from jaxprune import sparse
from jaxprune.lab.bench import contest, layers, sparsify
from jaxprune.lab.bench.layers import Progress
from jaxprune.lab.bench.rows import Peak, Work, rates, work_of
from jaxprune.lab.models import zoo
from jaxprune.lab.models.parts import random_params
from jaxprune.lab.report import wording
from jaxprune.lab.report.results import Row
from jaxprune.sparse.tuning import timing
from jaxprune.types import Params

LAYERS = 3
"""Of a model that is named by a size."""


@dataclasses.dataclass(frozen=True)
class Training:
    """What is measured.

    Attributes:
        name: in `zoo.MEASURED`; or a size, "4096" or "768x3072", of layers with ReLU.
        batches: samples of a step.
        sparsities: of all matrices and kernels.
        formats: of the compressed one; only "native" has sparse derivatives.
        repeats: rounds of `timing.interleaved`; None: as many as take ten seconds a case.
        seed: draws weights, zeros, samples and labels.

    Raises:
        ValueError: a name, a fraction or a number that cannot be meant.
    """

    name: str
    batches: tuple[int, ...]
    sparsities: tuple[float, ...]
    formats: tuple[str, ...] = ("native",)
    repeats: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            sparsify.check_sparsity(sparsity)
        least = min((*self.batches, 1 if self.repeats is None else self.repeats))
        if least < 1:
            raise ValueError(f"Batches and repeats are 1 or more; {least} arrived.")
        if missing := sparse.native.why_missing():
            raise ValueError(f"Only the native kernels train on non-zeros. {missing}")


class _Trainer:
    """One way to train: its state, donated from step to step, and its compiled step."""

    def __init__(self, apply: Callable[..., Any], values: Params, rest: Params, tx: Any, *batch: Any) -> None:
        def step(values: Params, state: Any, rest: Params, *batch: Any) -> tuple[Params, Any]:
            def loss(values: Params) -> Any:
                logits = apply(sparse.join(values, rest), batch[0])
                return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

            updates, state = tx.update(jax.grad(loss)(values), state, values)
            return optax.apply_updates(values, updates), state

        self.values = jax.tree.map(jnp.copy, values)
        self.state = tx.init(self.values)
        begun = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(self.values, self.state, rest, *batch)
        between = time.perf_counter()
        compiled = lowered.compile()
        self.seconds_of = {"lower_s": between - begun, "compile_s": time.perf_counter() - between}
        self.calls = contest.custom_calls(compiled)
        found: Any = compiled.memory_analysis()
        kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        self.bytes = kept + found.temp_size_in_bytes
        self._step, self._rest = compiled, (rest, *batch)

    def advance(self) -> Any:
        self.values, self.state = self._step(self.values, self.state, *self._rest)
        return self.values, self.state


def prepare(plan: Training) -> Callable[[Peak, Progress], Iterator[list[Row]]]:
    """Build what is measured; what it returns measures.

    Raises:
        ValueError: a name that is neither a model nor a size.
    """
    apply, params, shape, model = _model(plan)
    drawn = jax.random.key(plan.seed + 1)

    def measure(peak: Peak, progress: Progress) -> Iterator[list[Row]]:
        total, done = len(plan.sparsities) * len(plan.batches), 0
        for sparsity in plan.sparsities:
            pruned = sparsify.prune_to(params, sparsify.uniform_counts(params, sparsity), drawn)
            for batch in plan.batches:
                progress(done, total, f"{model} {wording.zeros(sparsity)} batch {batch}")
                case = {"kind": "train", "model": model, "batch": batch, "sparsity": sparsity}
                yield _case(plan, case, apply, pruned, shape, peak)
                done += 1
        progress(done, total, "done")

    return measure


def _model(plan: Training) -> tuple[Callable[..., Any], Params, tuple[int, ...], str]:
    """Apply function, dense params, shape of a sample, and the name in rows."""
    key = jax.random.key(plan.seed)
    if plan.name in zoo.MEASURED:
        network = zoo.deployed(plan.name, key)
        return network.apply, network.params, network.sample.shape, plan.name
    try:
        size = layers.parse_size(plan.name)
    except ValueError:
        raise ValueError(f"{plan.name!r} is no model ({', '.join(zoo.MEASURED)}), and no size such as 4096.") from None
    count = LAYERS if size[0] == size[1] else 1
    kernels = {f"{i:03d}/kernel": jax.ShapeDtypeStruct(size, jnp.float32) for i in range(count)}
    return layers.chain, random_params(kernels, key), size[:1], "x".join(map(str, size))


def _case(
    plan: Training, case: Row, apply: Callable[..., Any], params: Params, shape: tuple[int, ...], peak: Peak
) -> list[Row]:
    rng = np.random.default_rng(plan.seed + 2)
    x = jnp.asarray(rng.random((case["batch"], *shape), np.float32))
    classes = jax.eval_shape(apply, params, x).shape[-1]
    labels = jnp.asarray(rng.integers(0, classes, case["batch"]))
    trainers, stored = {}, {}
    alive = jax.tree.map(lambda leaf, mask: mask | (leaf.ndim < 2), params, jp.nonzero_masks(params))
    fixed = optax.chain(optax.adam(1e-4), jp.keep_params_sparse(alive))
    trainers["dense"] = _Trainer(apply, params, jax.tree.map(lambda _: None, params), fixed, x, labels)
    stored["dense"] = params
    for name in plan.formats:
        stored[name] = sparse.compress(params, name, unsupported="dense")
        parts = sparse.trainable(stored[name])
        trainers[name] = _Trainer(sparse.apply(apply), *parts, optax.adam(1e-4), x, labels)
    calls = {name: trainer.advance for name, trainer in trainers.items()}
    runs = timing.interleaved(calls, repeats=plan.repeats, seconds=10.0, always=("dense",))
    work, base = _of_a_step(work_of(apply, params, x)), float(np.median(runs["dense"]))
    return [_row(case, name, trainer, params, stored[name], runs[name], work, base, peak)
            for name, trainer in trainers.items()]  # fmt: skip


def _of_a_step(work: Work) -> Work:
    """Forward, the derivatives of activations, those of weights."""
    return work._replace(macs=3 * work.macs, dense_macs=3 * work.dense_macs)


def _row(
    case: Row, name: str, trainer: _Trainer, params: Params, stored: Params, runs: Any, work: Work, base: float,
    peak: Peak,
) -> Row:  # fmt: skip
    slots, compressed = contest.stored_slots(stored)
    stayed = {} if name == "dense" else contest.stayed_dense(params, stored, format=name)
    return {
        **case,
        "contestant": name,
        "refused": "",
        **trainer.seconds_of,
        "custom_calls": dict(trainer.calls),
        "compressed_leaves": compressed,
        "dense_leaves": {why: list(names) for why, names in stayed.items()},
        **rates(runs, trainer.bytes, slots, work, base, peak),
    }
