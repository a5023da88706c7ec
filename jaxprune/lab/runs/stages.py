"""The stages of one seed: train, prune, fine-tune, quantize, each from its last checkpoint if it was begun before."""

from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxprune as jp
from jaxprune.lab import models
from jaxprune.lab.data import own_data, sets, streams
from jaxprune.lab.data.samples import samples_of
from jaxprune.lab.recipe import build
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.runs import evidence, found, metrics, store, train
from jaxprune.quantize.codes import dequantize
from jaxprune.quantize.sharing import reshare, share_weights
from jaxprune.types import Masks, Params

STAGES = ("train", "prune", "finetune", "quantize")


class Watcher:
    """What a run tells while it goes; this one listens to nothing."""

    def stage(self, seed: int, name: str, steps: int) -> None:
        """A stage of `steps` steps begins, or is taken up again."""

    def step(self, step: int) -> None:
        """The stage has come to this step."""

    def note(self, text: str) -> None:
        """Something the user should know."""


class Shared:
    """What runs of a sweep have in common: a data set read once, dense trainings done once.

    Attributes:
        folder: where those trainings lie; None, of a run alone: in its own folder.
    """

    def __init__(self, folder: Path | None = None):
        self.folder, self._datasets = folder, {}

    def dataset(self, section: cfg.Data) -> sets.Dataset:
        """The data set of a [data] section."""
        key = (section.name, section.data_dir, repr(section.options))
        if key not in self._datasets:
            self._datasets[key] = sets.of_config(section)
        return self._datasets[key]

    def training(self, config: cfg.Config, own: Path) -> Path:
        """Where the checkpoints of a seed's dense training are, `own` being the seed's folder."""
        if self.folder is None:
            return own / "train"
        folder = self.folder / cfg.training_hash(config)
        own_data.remember(self.dataset(config.data), config.data.name, folder)
        return folder / own.name


class SeedRun(NamedTuple):
    """The models a seed comes to, params and masks as arrays; the network's function.

    `stored` is what its file holds, as [store] says. `sparsity` is of the selected leaves together. `rounds` has a
    record for every round of an iterative config.
    """

    network: models.Network
    dense: Params
    pruned: Params
    finetuned: Params
    stored: store.Stored
    masks: Masks
    sparsity: float
    records: list[dict[str, Any]]
    rounds: list[dict[str, Any]]


def run_seed(
    config: cfg.Config,
    seed: int,
    dataset: sets.Dataset,
    folder: Path,
    watcher: Watcher,
    before: list[dict[str, Any]],
    shared: Shared,
) -> SeedRun:
    """Train, prune, fine-tune and quantize with one seed.

    Args:
        config: the experiment.
        seed: decides the initial weights, the orders of samples, shifts, dropout, and what is held out for validation.
        dataset: with all training data.
        folder: the run's; checkpoints go below it, metrics into it.
        watcher: told what happens.
        before: metrics of earlier seeds, which metrics.jsonl begins with.
        shared: what runs of a sweep have in common.

    Raises:
        ConfigError: a method that does not fit, or a stop rule without held-out samples.
    """
    held_in, validation = sets.split_validation(dataset, config.data.validation, seed)
    network, keys = _network(config, seed, dataset)
    known = found.of_model(config.prune, network, dataset.train_images.shape[1:])
    build.check(config.prune, network.params, known)
    found.check_activations(config.prune, network, dataset.train_images.shape[1:], known)
    found.check(config.prune, len(validation[0]))
    if config.prune.tolerance is not None and not len(validation[0]):
        raise cfg.ConfigError("prune.tolerance: needs held-out samples, data.validation above 0")
    log = metrics.MetricsLog(folder / "metrics.jsonl", before, seed)
    own = folder / f"seed_{seed}"
    training = shared.training(config, own)
    stages = _SeedStages(config, seed, network, dataset, held_in, validation, own, training, keys, watcher, log, known)
    dense = stages.trained()
    pruned, masks = stages.pruned(dense)
    finetuned = stages.finetuned(pruned, masks)
    stored = stages.stored(finetuned, masks)
    sparsity = train.sparsity(masks, stages.selected)
    return SeedRun(network, dense, pruned, finetuned, stored, masks, sparsity, log.records, stages.rounds)


def _network(config: cfg.Config, seed: int, dataset: sets.Dataset) -> tuple[models.Network, dict[str, Any]]:
    init, *rest = jax.random.split(jax.random.key(seed), 1 + len(STAGES))
    shape = tuple(int(side) for side in dataset.train_images.shape[1:])
    return models.build(config.model, init, shape, dataset.classes), dict(zip(STAGES, rest, strict=True))


class _SeedStages:
    """The stages of one seed, what they have in common, and what the rounds of an iterative config came to."""

    def __init__(
        self, config: cfg.Config, seed: int, network: models.Network, dataset: sets.Dataset, held_in: sets.Dataset,
        validation: tuple[Any, Any], folder: Path, training: Path, keys: dict[str, Any],
        watcher: Watcher, log: metrics.MetricsLog, found: dict[str, Any],
    ):  # fmt: skip
        self.config, self.seed, self.network, self.folder, self.training = config, seed, network, folder, training
        self.keys, self.watcher, self.log, self.classes, self.found = keys, watcher, log, dataset.classes, found
        self.samples = samples_of(held_in.train_images, held_in.train_labels, held_in.scale)
        self.validation = samples_of(*validation, held_in.scale)
        self.test = samples_of(dataset.test_images, dataset.test_labels, dataset.scale)
        self.apply, self.selected = jax.jit(network.apply), build.selected(config.prune, network.params)
        self.prune_steps = build.prune_steps(config.prune, self._per_epoch(config.train))
        self.rounds: list[dict[str, Any]] = []
        self.teacher: train.Teacher | None = None

    def trained(self) -> Params:
        """Dense training; the params it ends with."""
        phase = self.config.train
        steps = phase.duration.steps(self._per_epoch(phase))
        tx = build.optimizer(phase, steps)
        dense = self._run("train", phase, tx, steps, self.network.params, self.training).params
        if (distill := self.config.distill).share:
            self.teacher = train.Teacher(self.network.apply, dense, distill.share, distill.temperature)
        return dense

    def pruned(self, dense: Params) -> tuple[Params, Masks]:
        """Pruned params, and the masks that did it."""
        phase, prune = build.pruning_phase(self.config), self.config.prune
        known = found.of_dense(prune, self.found, dense, self._validate, self._evidence)
        steps, method = self.prune_steps, build.method(prune, known)
        if build.in_rounds(prune, method):
            return self._in_rounds(dense, method)
        if prune.how == "one-shot":
            masks = self._one_shot(dense, method)
            dense, tx = jp.apply_masks(dense, masks), jp.keep_params_sparse(masks)
        else:
            if text := build.too_few_updates(prune, self._per_epoch(phase)):
                self.watcher.note(text)
            inner = build.optimizer(phase, steps)
            tx = build.pruning_optimizer(inner, prune, self._per_epoch(phase), self.keys["prune"], known)
        state = self._run("prune", phase, tx, steps, dense)
        return state.params, train.masks_of(state)

    def _one_shot(self, dense: Params, method: jp.Method) -> Masks:
        prune, evidence_of = self.config.prune, partial(self._evidence, method)
        if prune.iterations == 1:
            return jp.compute_masks(method, dense, prune.sparsity, **jax.jit(evidence_of)(dense))
        if prune.sparsity is None:
            raise cfg.ConfigError("prune.iterations: needs prune.sparsity, to come to it step by step")
        return jp.iterative_masks(method, dense, prune.sparsity, count=prune.iterations, evidence=evidence_of)

    def _in_rounds(self, dense: Params, method: jp.Method) -> tuple[Params, Masks]:
        """Rounds that are trainings of their own, of groups one after the other or in turn; left in `rounds`."""
        prune, levels = self.config.prune, build.levels(self.config.prune)
        groups, early, reference = prune.groups or (None,), self._early(), self._validate(dense)
        state = jp.training.IterativeResult(
            dense, jax.tree.map(lambda param: jnp.ones_like(param, dtype=bool), dense), ()
        )
        if not prune.in_turn:
            for number, patterns in enumerate(groups, 1):
                part = number / len(groups)  # else the first would take all that may be lost
                state = self._rounds_of(patterns, method, levels, state, early, reference, part)
            return state.params, state.masks
        turns = deque((patterns, 0, 0) for patterns in groups)  # rounds done, failed one after the other
        while turns:
            patterns, done, failed = turns.popleft()
            state = self._rounds_of(patterns, method, [levels[done]], state, early, reference, first=done + 1)
            done, failed = (done, failed + 1) if state.failed else (done + 1, 0)
            if failed < prune.patience and done < len(levels):
                turns.append((patterns, done, failed))
        return state.params, state.masks

    def _rounds_of(
        self, patterns: Sequence[str] | None, method: jp.Method, levels: list[Any], state: jp.training.IterativeResult,
        early: Params | None, reference: float | None, part: float = 1.0, first: int = 1,
    ) -> jp.training.IterativeResult:  # fmt: skip
        phase, prune, before = build.pruning_phase(self.config), self.config.prune, len(self.rounds)
        tolerance = None if prune.tolerance is None else part * prune.tolerance
        length = prune.duration.steps(self._per_epoch(phase))
        if patterns is not None:
            method = build.of_group(method, patterns, state.params)

        def trained(params: Params, masks: Masks, number: int) -> Params:
            tx = build.optimizer(phase, length)
            tx = build.alone(tx, patterns, params) if patterns and prune.freeze else tx
            tx = optax.chain(tx, jp.keep_params_sparse(masks))
            folder = self.folder / f"prune/round_{before + number}"
            key = jax.random.fold_in(self.keys["prune"], before + number)  # else all would see the same beginning
            params = self._run("prune", phase, tx, length, params, folder, self._apply(masks), key).params
            self.rounds.append(self._round(params, masks, before + number))
            return params

        done = jp.iterative_pruning(
            method, state.params, levels, trained, early_params=early, masks=state.masks,
            evaluate=None if reference is None else self._validate, tolerance=tolerance, reference=reference,
            evidence=partial(self._evidence, method),
        )  # fmt: skip
        for record, one in zip(self.rounds[before:], done.rounds, strict=True):
            record |= {"group": list(patterns or ()), **one._asdict(), "number": first + one.number - 1}
        return done

    def _round(self, params: Params, masks: Masks, number: int) -> dict[str, Any]:
        """What the model of a round is worth on the test data, which decide nothing, and its file."""
        path = self.folder / "rounds" / f"{number}.jaxprune"
        path.parent.mkdir(exist_ok=True)
        image = self.test.images.shape[1:]
        jp.save(path, params, masks=masks, metadata=store.identity(self.config, self.seed, image, self.classes))
        _, bytes_of = store.leaf_bytes(params, self.config.sparse.format, self.network, image)
        return {
            "accuracy": train.accuracy(train.predict(self.apply, params, self.test), self.test),
            "removed": train.sparsity(masks, self.selected),
            "bytes": path.stat().st_size,
            "sparse_bytes": sum(bytes_of.values()),
        }

    def _early(self) -> Params | None:
        """Weights that rounds begin with: of the initialisation, or so far into the training that dense params had."""
        phase, rewind = self.config.train, self.config.prune.rewind
        if rewind in ("none", "rate"):
            return None
        if rewind == "initialisation":
            return self.network.params
        per_epoch = self._per_epoch(phase)
        whole = phase.duration.steps(per_epoch)
        steps = min(cfg.Duration.parse(rewind).steps(per_epoch), whole)
        return self._run(
            "train", phase, build.optimizer(phase, whole), steps, self.network.params, self.folder / "early"
        ).params

    def finetuned(self, pruned: Params, masks: Masks) -> Params:
        """Params after training with the dead weights held at zero."""
        phase = self.config.finetune
        steps = phase.duration.steps(self._per_epoch(phase))
        tx = optax.chain(build.optimizer(phase, steps), jp.keep_params_sparse(masks))
        return self._run("finetune", phase, tx, steps, pruned, apply=self._apply(masks)).params

    def stored(self, finetuned: Params, masks: Masks) -> store.Stored:
        """The model as its file holds it; the values that weights share are trained first."""
        phase = self.config.store
        plain = store.prepared(phase, self.network, finetuned, masks, self.samples.images)
        quantized = store.quantize(phase, plain.params, plain.masks)
        if phase.quantize != "codebook":
            return plain._replace(params=quantized)
        steps = phase.duration.steps(self._per_epoch(phase))
        tx = optax.chain(share_weights(quantized), build.optimizer(phase, steps), jp.keep_params_sparse(plain.masks))
        apply = plain.apply if phase.compact else self._apply(masks)
        trained = self._run("quantize", phase, tx, steps, dequantize(quantized), apply=apply)
        return plain._replace(params=reshare(quantized, trained.params))

    def _apply(self, masks: Masks | None = None) -> Any:
        """The network's function for training: batch norms look at the batch; where less is left, less is dropped."""
        model, observe = self.config.model, self.network.observe
        if observe is not None:
            return lambda params, images, key=None: observe(params, images, key)
        if masks is None or not model.adjust_dropout:
            return self.network.apply
        rates = {name: float(rate) for name, rate in jp.training.adjusted_dropout(model.dropout, masks).items()}
        return partial(self.network.apply, rates=rates)

    def _evidence(self, method: jp.Method, params: Params) -> dict[str, Any]:
        samples = streams.held(self.samples, evidence.SAMPLES)
        return evidence.of(method, self.network.apply, params, samples, self.keys["prune"])

    def _per_epoch(self, phase: cfg.Phase) -> int:
        return max(self.samples.labels.shape[0] // self._batch(phase), 1)

    def _batch(self, phase: cfg.Phase) -> int:
        return min(phase.batch_size, self.samples.labels.shape[0])

    def _run(
        self, name: str, phase: cfg.Phase, tx: Any, steps: int, params: Params, folder: Path | None = None,
        apply: Any = None, key: Any = None,
    ) -> train.TrainState:  # fmt: skip
        per_epoch, folder = self._per_epoch(phase), folder or self.folder / name
        stage = train.Stage(
            name=name,
            tx=tx,
            steps=steps,
            batch_size=self._batch(phase),
            steps_per_epoch=per_epoch,
            save_every=max(self.config.checkpoint.every.steps(per_epoch), 1),
            keep=self.config.checkpoint.keep,
            key=self.keys[name] if key is None else key,
            shift=self.config.data.shift,
            flip=self.config.data.flip,
            teacher=None if name == "train" else self.teacher,
            selected=self.selected,
        )
        self.watcher.stage(self.seed, name, steps)
        outcome = train.run_stage(
            stage, apply or self._apply(), train.start(params, tx), self.samples, folder,
            validate=self._validate, on_step=self.watcher.step, on_record=self.log.add,
        )  # fmt: skip
        for text in outcome.damaged:
            self.watcher.note(f"Damaged checkpoint in {folder} passed over: {text}")
        self.log.close_stage()
        return outcome.state

    def _validate(self, params: Params) -> float | None:
        if not self.validation.labels.shape[0]:
            return None
        return train.accuracy(train.predict(self.apply, params, self.validation), self.validation)
