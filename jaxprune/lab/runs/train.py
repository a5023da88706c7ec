"""Training, in stages that can be killed: train -> prune -> fine-tune, each a pure function of the one before.

A stage is a number of optimizer steps. Everything that a step reads travels in `TrainState`, and everything random in
it is folded out of the stage's key and the step, so that a stage taken up again from a checkpoint ends bit-identical
to one never stopped. A finished stage is its last checkpoint.

Within an epoch nothing is fetched from the device: losses are summed there, and a loss that is not finite leaves its
step behind, to be found at the end of the epoch.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab.checkpoints import checkpoint
from jaxprune.lab.data import streams
from jaxprune.lab.data.samples import Samples, mirrored, scaled, shifted
from jaxprune.lab.models.parts import followed
from jaxprune.types import Masks, Params

CHUNK, PIXELS = 1000, 2**24  # images evaluated at once, and numbers in them
_SHIFTS, _FLIPS = 2**31, 2**31 + 1  # folded into a step's key; networks fold in the numbers of their layers


class TrainingError(RuntimeError):
    """Training cannot go on; says at which step, and what can be done."""


class Teacher(NamedTuple):
    """A dense model whose answers count for a share of the loss, see `jaxprune.distillation_loss`.

    Attributes:
        apply: (params, images) -> logits.
        params: its weights.
        share: of the loss, in [0, 1).
        temperature: above 0.
    """

    apply: Callable[..., Array]
    params: Params
    share: float
    temperature: float


class Tally(NamedTuple):
    """Sums since the last report; `bad_step` is the first step whose loss was not finite, or -1."""

    loss: Float[Array, ""]
    correct: Int[Array, ""]
    seen: Int[Array, ""]
    bad_step: Int[Array, ""]


class TrainState(NamedTuple):
    """All that changes from step to step, and all that a checkpoint holds."""

    params: Params
    opt_state: Any
    tally: Tally
    step: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        name: "train", "prune", "finetune" or "quantize".
        tx: the optimizer.
        steps: how many steps.
        batch_size: samples a step.
        steps_per_epoch: steps that pass once over the samples; what is left over waits for the next epoch's order.
        save_every: steps between checkpoints.
        keep: checkpoints kept.
        key: what the stage draws from: orders of samples, shifts of images, dropout.
        shift: by how many pixels images are moved at most.
        flip: whether half of the images are mirrored.
        teacher: whom the model learns from besides the labels.
        selected: names of the leaves that sparsity is told of.
    """

    name: str
    tx: optax.GradientTransformation
    steps: int
    batch_size: int
    steps_per_epoch: int
    save_every: int
    keep: int
    key: Key[Array, ""]
    shift: int = 0
    flip: bool = False
    teacher: Teacher | None = None
    selected: Collection[str] = ()


class Outcome(NamedTuple):
    """What a stage leaves: its last state, one record of metrics an epoch, and damaged checkpoints met on the way."""

    state: TrainState
    records: list[dict[str, Any]]
    damaged: list[str]


def start(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """State before the first step of a stage."""
    return TrainState(params, tx.init(params), _no_tally(), jnp.zeros((), jnp.int32))


def _no_tally() -> Tally:
    # Every field a buffer of its own: the state is donated, and a buffer can be given away only once.
    return Tally(
        *(jnp.full((), value, dtype) for value, dtype in ((0, "float32"), (0, "int32"), (0, "int32"), (-1, "int32")))
    )


def _look(apply: Callable[..., Array], state: TrainState, samples: Samples) -> Tally:
    """The tally of a stage that takes no step: what the model makes of the first samples."""
    rows = jnp.arange(min(chunk_size(samples), samples.labels.shape[0]))
    loss, (correct, _) = mean_loss(jax.jit(apply), state.params, samples, rows, None)
    return state.tally._replace(loss=loss * rows.size, correct=correct, seen=jnp.int32(rows.size))


def mean_loss(
    apply: Callable[..., Array],
    params: Params,
    samples: Samples,
    rows: Int[Array, "b"],
    key: Key[Array, ""] | None,
    shift: int = 0,
    flip: bool = False,
    teacher: Teacher | None = None,
) -> tuple[Float[Array, ""], tuple[Int[Array, ""], dict[str, Any]]]:
    """Mean loss over some rows of the samples; how many of them are classified right, and statistics of the batch.

    The loss is the cross-entropy in nats, with a teacher mixed with the distance from its answers. `apply` gives
    logits, or logits and statistics.
    """
    images, labels = samples.images[rows], samples.labels[rows]
    if shift:
        assert key is not None
        images = shifted(images, jax.random.fold_in(key, _SHIFTS), shift)
    if flip:
        assert key is not None
        images = mirrored(images, jax.random.fold_in(key, _FLIPS))
    inputs = scaled(samples, images)
    given: Any = apply(params, inputs, key)
    logits, seen = given if isinstance(given, tuple) else (given, {})
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    if teacher is not None:
        soft = jp.distillation_loss(logits, teacher.apply(teacher.params, inputs), temperature=teacher.temperature)
        loss = (1 - teacher.share) * loss + teacher.share * soft
    return loss, (jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.int32), seen)


def make_step(apply: Callable[..., Array], stage: Stage) -> Callable[..., TrainState]:
    """The jitted step (state, samples, order, teacher's params or None) -> state; `state` is donated.

    `order` is the epoch's permutation.
    """

    def step(state: TrainState, samples: Samples, order: Int[Array, "n"], teaching: Params = None) -> TrainState:
        first = state.step % stage.steps_per_epoch * stage.batch_size
        rows = jax.lax.dynamic_slice_in_dim(order, first, stage.batch_size)
        key = jax.random.fold_in(jax.random.fold_in(stage.key, 1), state.step)

        teacher = stage.teacher and stage.teacher._replace(params=teaching)

        def loss_of(params: Params) -> tuple[Array, Any]:
            return mean_loss(apply, params, samples, rows, key, stage.shift, stage.flip, teacher)

        (loss, (correct, seen)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = stage.tx.update(grads, state.opt_state, state.params)
        params = followed(optax.apply_updates(state.params, updates), seen)
        bad = (state.tally.bad_step < 0) & ~jnp.isfinite(loss)
        tally = Tally(
            state.tally.loss + loss * stage.batch_size,
            state.tally.correct + correct,
            state.tally.seen + stage.batch_size,
            jnp.where(bad, state.step, state.tally.bad_step),
        )
        return TrainState(params, opt_state, tally, state.step + 1)

    return jax.jit(step, donate_argnums=0)


@jax.jit(static_argnums=1)
def epoch_order(key: Key[Array, ""], n: int, epoch: Int[Array, ""]) -> Int[Array, "n"]:
    """The order in which an epoch sees its samples; a function of key and epoch alone."""
    return jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, 0), epoch), n)


def predict(apply: Callable[..., Array], params: Params, samples: Samples) -> np.ndarray:
    """Classes, int32 (n,), evaluated in chunks; `apply` is jitted already."""
    n, size = samples.labels.shape[0], chunk_size(samples)
    chunks = [
        jnp.argmax(apply(params, scaled(samples, samples.images[i : i + size])), axis=-1) for i in range(0, n, size)
    ]
    return np.concatenate([np.asarray(chunk, np.int32) for chunk in chunks]) if chunks else np.zeros(0, np.int32)


def chunk_size(samples: Samples) -> int:
    """How many samples are looked at at once, where no batch size says it."""
    return min(CHUNK, max(PIXELS // math.prod(samples.images.shape[1:]), 1))


def accuracy(predicted: np.ndarray, samples: Samples) -> float:
    """Share of samples classified right, in [0, 1]."""
    return float(np.mean(predicted == np.asarray(samples.labels)))


def run_stage(
    stage: Stage,
    apply: Callable[..., Array],
    before: TrainState,
    samples: Samples,
    folder: Path,
    *,
    validate: Callable[[Params], float | None],
    on_step: Callable[[int], None] = lambda step: None,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Outcome:
    """Run a stage to its end, from its last good checkpoint if there is one.

    Args:
        stage: what to do.
        apply: the network's function.
        before: the state at step 0; only its structure is used when a checkpoint is taken up.
        samples: training samples.
        folder: where the stage's checkpoints lie.
        validate: params -> accuracy on held-out samples, or None; called once an epoch.
        on_step: told the step after each one was handed to the device.
        on_record: told every record of metrics, those of a checkpoint taken up included.

    Raises:
        TrainingError: a loss was not finite.
        CheckpointError: nothing could be read or written; see `jaxprune.lab.checkpoints.checkpoint`.
    """
    with _interrupts_wait():
        found, damaged = checkpoint.restore_latest(folder, before)
    # A copy, since the first step gives its state away and `before` belongs to the caller.
    state, records = (found.state, list(found.meta["records"])) if found else (jax.tree.map(jnp.copy, before), [])
    step_fn, began, teaching = make_step(apply, stage), time.perf_counter(), stage.teacher and stage.teacher.params
    spent = records[-1]["seconds"] if records else 0.0
    now = int(state.step)
    for record in records:
        on_record(record)
    if stage.steps == 0 and not records:
        state = state._replace(tally=_look(apply, state, samples))
        records.append(_record(stage, state, validate(state.params), 0.0))
        on_record(records[0])
        with _interrupts_wait():
            checkpoint.save(folder, 0, state, {"records": records}, keep=stage.keep)
    for stop in _stops(now, stage):
        order = epoch_order(stage.key, samples.labels.shape[0], jnp.int32(now // stage.steps_per_epoch))
        for given, places in streams.batches(samples, stage.key, order, range(now, stop), stage.batch_size):
            state = step_fn(state, given, places, teaching)
            now += 1
            on_step(now)
        if now % stage.steps_per_epoch == 0 or now == stage.steps:
            record = _record(stage, state, validate(state.params), spent + time.perf_counter() - began)
            records.append(record)
            on_record(record)
            state = state._replace(tally=_no_tally())
        if now % stage.save_every == 0 or now == stage.steps:
            _refuse_bad_step(stage, state.tally)
            with _interrupts_wait():
                checkpoint.save(folder, now, state, {"records": records}, keep=stage.keep)
    return Outcome(state, records, damaged)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Control-C waits for the end of a save: Orbax, cut short, prints tracebacks from threads of its own."""
    if threading.current_thread() is not threading.main_thread():  # signals come to that one alone
        yield
        return
    arrived: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signum, frame: arrived.append(signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if arrived:
            signal.raise_signal(signal.SIGINT)


def _stops(now: int, stage: Stage) -> Iterator[int]:
    """Steps at which the loop looks up: ends of epochs, checkpoints, the end."""
    while now < stage.steps:
        now = min((now // every + 1) * every for every in (stage.steps_per_epoch, stage.save_every))
        now = min(now, stage.steps)
        yield now


def _refuse_bad_step(stage: Stage, tally: Tally) -> None:
    if (bad := int(tally.bad_step)) >= 0:
        section = {"prune": "train", "quantize": "store"}.get(stage.name, stage.name)
        raise TrainingError(
            f"The loss is not finite at step {bad + 1} of stage {stage.name!r}. Lower {section}.learning_rate; "
            "the checkpoint before it is kept."
        )


def _record(stage: Stage, state: TrainState, validation: float | None, seconds: float) -> dict[str, Any]:
    _refuse_bad_step(stage, state.tally)
    seen = max(int(state.tally.seen), 1)
    return {
        "stage": stage.name,
        "step": int(state.step),
        "epoch": int(state.step) / stage.steps_per_epoch,
        "loss": float(state.tally.loss) / seen,
        "train_accuracy": int(state.tally.correct) / seen,
        "validation_accuracy": validation,
        "sparsity": sparsity(masks_of(state), stage.selected),
        "seconds": round(seconds, 3),
    }


def masks_of(state: TrainState) -> Any:
    """Masks in the optimizer's state, or None where it has none."""
    return optax.tree.get(state.opt_state, "masks", None)


def sparsity(masks: Masks | None, selected: Collection[str]) -> float:
    """Fraction removed of the leaves of these names; 0 without masks."""
    named = {} if masks is None else tree.named_leaves(masks)
    chosen = {name: mask for name, mask in named.items() if name in selected}
    return float(jp.sparsity_of(chosen)) if chosen else 0.0
