"""A run: one config, one folder, from the data to the report.

    runs/quickstart-1a2b3c4d/        named after the config and the hash of all that changes results
        config.toml                  the resolved config
        machine.json                 versions and machine
        metrics.jsonl                one line per seed, stage and epoch
        seed_0/{train,prune,finetune,quantize}/   checkpoints; the last of a stage is the stage's result
        seed_0/model.jaxprune        the fine-tuned model, stored as [store] says
        seed_0/result.json           what one seed came to
        figures/*.png  results.json  report.html

The same config comes to the same folder and goes on where the last call was stopped.
"""

import contextlib
import datetime
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab import build, data, files, machine, models, store, train
from jaxprune.lab import config as cfg
from jaxprune.storage.quantize import dequantize
from jaxprune.storage.sharing import reshare, share_weights
from jaxprune.types import Masks, Params

TAYLOR_SAMPLES = 2048  # of the training data, for one-shot criteria that look at gradients
STAGES = ("train", "prune", "finetune", "quantize")


class RunError(ValueError):
    """A run folder that cannot be used; says why, and the way out."""


class Watcher:
    """What a run tells while it goes; this one listens to nothing."""

    def stage(self, seed: int, name: str, steps: int) -> None:
        """A stage of `steps` steps begins, or is taken up again."""

    def step(self, step: int) -> None:
        """The stage has come to this step."""

    def note(self, text: str) -> None:
        """Something the user should know."""


class SeedRun(NamedTuple):
    """The models a seed comes to, params and masks as arrays, `quantized` as [store] says; the network's function."""

    network: models.Network
    dense: Params
    pruned: Params
    finetuned: Params
    quantized: Any
    masks: Masks
    records: list[dict[str, Any]]


def folder_of(config: cfg.Config, root: str | Path = "runs") -> Path:
    """Where a config's run lies: root/name-hash."""
    return Path(root) / f"{config.name}-{cfg.config_hash(config)}"


def run(config: cfg.Config, folder: Path, command: str, watcher: Watcher | None = None) -> dict[str, Any]:
    """Do all that is not done yet, and return what stands in results.json.

    Args:
        config: the experiment.
        folder: the run's folder, made if it is not there.
        command: how to do it again, for the report.
        watcher: told what happens.

    Raises:
        RunError: the folder belongs to another config, or another process is running in it.
        DataError, ConfigError, TrainingError, CheckpointError: from the parts.
    """
    watcher = watcher or Watcher()
    _claim(folder, config)
    with _only_process(folder):
        if (folder / "results.json").exists():
            watcher.note(f"{folder} is finished; delete the folder to run it again.")
            return json.loads((folder / "results.json").read_text())
        files.write_text(folder / "config.toml", cfg.dump(config))
        machine.record(folder / "machine.json", watcher.note)
        return _run_seeds(config, folder, command, watcher)


def _run_seeds(config: cfg.Config, folder: Path, command: str, watcher: Watcher) -> dict[str, Any]:
    from jaxprune.lab import publish  # brings matplotlib

    started = _now()
    dataset = data.load(config.data.name, config.data.data_dir or None)
    results, records, first = [], [], None
    for seed in config.seeds:
        done = run_seed(config, seed, dataset, folder, watcher, records)
        records += done.records
        results.append(_seed_result(config, seed, dataset, done, folder))
        first = first or done
    assert first is not None
    summary = publish.results(config, dataset, results, command, (started, _now()))
    models = {"dense": first.dense, "pruned": first.pruned, "fine-tuned": first.finetuned}
    weights = publish.histogram_weights(models, first.masks)
    publish.write(folder, summary, publish.make_figures(summary, records, weights, config.prune.distribution.t))
    return summary


def run_seed(
    config: cfg.Config, seed: int, dataset: data.Dataset, folder: Path, watcher: Watcher, before: list[dict[str, Any]]
) -> SeedRun:
    """Train, prune, fine-tune and quantize with one seed.

    Args:
        config: the experiment.
        seed: decides the initial weights, the orders of samples, shifts, dropout, and what is held out for validation.
        dataset: with all training data.
        folder: the run's; checkpoints go below it, metrics into it.
        watcher: told what happens.
        before: metrics of earlier seeds, which metrics.jsonl begins with.
    """
    held_in, validation = data.split_validation(dataset, config.data.validation, seed)
    network, keys = _network(config, seed, dataset)
    build.check(config.prune, network.params)
    log = _MetricsLog(folder / "metrics.jsonl", before, seed)
    stages = _SeedStages(config, seed, network, held_in, validation, folder / f"seed_{seed}", keys, watcher, log)
    dense = stages.trained()
    pruned, masks = stages.pruned(dense)
    finetuned = stages.finetuned(pruned, masks)
    quantized = stages.quantized(finetuned, masks)
    return SeedRun(network, dense, pruned, finetuned, quantized, masks, log.records)


def _network(config: cfg.Config, seed: int, dataset: data.Dataset) -> tuple[models.Network, dict[str, Any]]:
    init, *rest = jax.random.split(jax.random.key(seed), 1 + len(STAGES))
    shape = tuple(int(side) for side in dataset.train_images.shape[1:])
    return models.build(config.model, shape, dataset.classes, init), dict(zip(STAGES, rest, strict=True))  # pyright: ignore[reportArgumentType]


class _SeedStages:
    """The stages of one seed; what they have in common, and nothing that changes."""

    def __init__(
        self, config: cfg.Config, seed: int, network: models.Network, held_in: data.Dataset,
        validation: tuple[np.ndarray, np.ndarray], folder: Path, keys: dict[str, Any], watcher: Watcher, log: Any,
    ):  # fmt: skip
        self.config, self.seed, self.network, self.folder = config, seed, network, folder
        self.keys, self.watcher, self.log = keys, watcher, log
        self.samples = samples_of(held_in.train_images, held_in.train_labels, held_in.scale)
        self.validation = samples_of(*validation, held_in.scale)
        self.apply = jax.jit(network.apply)
        self.prune_steps = build.prune_steps(config.prune, self._per_epoch(config.train))

    def trained(self) -> Params:
        """Dense training; the params it ends with."""
        phase = self.config.train
        steps = phase.duration.steps(self._per_epoch(phase))
        return self._run("train", phase, build.optimizer(phase, steps), steps, self.network.params).params

    def pruned(self, dense: Params) -> tuple[Params, Masks]:
        """Pruned params, and the masks that did it."""
        phase, prune = self.config.train, self.config.prune
        steps = self.prune_steps
        if prune.how == "one-shot":
            masks = self._one_shot(dense)
            dense, tx = jp.apply_masks(dense, masks), jp.keep_params_sparse(masks)
        else:
            inner = build.optimizer(phase, steps)
            tx = build.pruning_optimizer(inner, prune, self._per_epoch(phase), self.keys["prune"])
        state = self._run("prune", phase, tx, steps, dense)
        return state.params, train.masks_of(state)

    def finetuned(self, pruned: Params, masks: Masks) -> Params:
        """Params after training with the dead weights held at zero."""
        phase = self.config.finetune
        steps = phase.duration.steps(self._per_epoch(phase))
        tx = optax.chain(build.optimizer(phase, steps), jp.keep_params_sparse(masks))
        return self._run("finetune", phase, tx, steps, pruned).params

    def quantized(self, finetuned: Params, masks: Masks) -> Any:
        """Params as they are stored; the values that weights share are trained first."""
        phase = self.config.store
        quantized = store.quantize(phase, finetuned, masks)
        if phase.quantize != "codebook":
            return quantized
        steps = phase.duration.steps(self._per_epoch(phase))
        tx = optax.chain(share_weights(quantized), build.optimizer(phase, steps), jp.keep_params_sparse(masks))
        return reshare(quantized, self._run("quantize", phase, tx, steps, dequantize(quantized)).params)

    def _one_shot(self, dense: Params) -> Masks:
        prune, rows = self.config.prune, jnp.arange(min(TAYLOR_SAMPLES, self.samples.labels.shape[0]))
        evidence: dict[str, Any] = {}
        if prune.criterion == "taylor":
            loss = jax.jit(lambda p, samples: train.mean_loss(self.network.apply, p, samples, rows, None)[0])
            evidence["grads"] = jax.grad(loss)(dense, self.samples)
        if prune.criterion == "random":
            evidence["key"] = self.keys["prune"]
        return jp.compute_masks(build.method(prune), dense, prune.sparsity, **evidence)

    def _per_epoch(self, phase: cfg.Phase) -> int:
        return max(self.samples.labels.shape[0] // self._batch(phase), 1)

    def _batch(self, phase: cfg.Phase) -> int:
        return min(phase.batch_size, self.samples.labels.shape[0])

    def _run(self, name: str, phase: cfg.Phase, tx: Any, steps: int, params: Params) -> train.TrainState:
        per_epoch = self._per_epoch(phase)
        stage = train.Stage(
            name=name,
            tx=tx,
            steps=steps,
            batch_size=self._batch(phase),
            steps_per_epoch=per_epoch,
            save_every=max(self.config.checkpoint.every.steps(per_epoch), 1),
            keep=self.config.checkpoint.keep,
            key=self.keys[name],
            shift=self.config.data.shift,
        )
        self.watcher.stage(self.seed, name, steps)
        outcome = train.run_stage(
            stage, self.network.apply, train.start(params, tx), self.samples, self.folder / name,
            validate=self._validate, on_step=self.watcher.step, on_record=self.log.add,
        )  # fmt: skip
        for text in outcome.damaged:
            self.watcher.note(f"Damaged checkpoint in {self.folder / name} passed over: {text}")
        self.log.close_stage()
        return outcome.state

    def _validate(self, params: Params) -> float | None:
        if not self.validation.labels.shape[0]:
            return None
        return train.accuracy(train.predict(self.apply, params, self.validation), self.validation)


def samples_of(images: np.ndarray, labels: np.ndarray, scale: float) -> train.Samples:
    """Arrays of a data set on the device."""
    return train.Samples(jnp.asarray(images), jnp.asarray(labels), jnp.float32(scale))


class _MetricsLog:
    """metrics.jsonl: begun anew by every call, then a line for every record.

    A killed run may leave lines of epochs that its checkpoint does not hold. The records that travel in the checkpoints
    are the truth, and a stage that is taken up again hands them all over once more.
    """

    def __init__(self, path: Path, before: list[dict[str, Any]], seed: int):
        self.path, self.seed, self.earlier_steps = path, seed, 0
        self.records: list[dict[str, Any]] = []
        files.write_text(path, "".join(json.dumps(record) + "\n" for record in before))

    def add(self, record: dict[str, Any]) -> None:
        """A record of this stage, with the step counted through all stages."""
        self.records.append({"seed": self.seed, **record, "step": record["step"] + self.earlier_steps})
        with self.path.open("a") as file:
            file.write(json.dumps(self.records[-1]) + "\n")

    def close_stage(self) -> None:
        """What comes now is of the next stage."""
        self.earlier_steps = self.records[-1]["step"] if self.records else 0


def _seed_result(config: cfg.Config, seed: int, dataset: data.Dataset, done: SeedRun, folder: Path) -> dict[str, Any]:
    """Accuracies on the test data, dense, pruned, fine-tuned, sparse and stored; written to seed_N/result.json too."""
    test = samples_of(dataset.test_images, dataset.test_labels, dataset.scale)
    apply = jax.jit(done.network.apply)
    classes = {
        name: train.predict(apply, params, test)
        for name, params in (("dense", done.dense), ("pruned", done.pruned), ("finetuned", done.finetuned))
    }
    stored = jp.sparse.compress(done.finetuned, format=config.sparse.format, unsupported="dense")
    classes["sparse"] = train.predict(jax.jit(jp.sparse.apply(done.network.apply)), stored, test)
    path, sparsity = folder / f"seed_{seed}" / "model.jaxprune", train.sparsity(done.masks)
    accuracy = train.accuracy(train.predict(apply, dequantize(done.quantized), test), test)
    about = store.identity(config, seed) | {"sparsity": round(sparsity, 6), "accuracy": round(accuracy, 6)}
    store.write(path, config.store, done.quantized, done.masks, about)
    table = jp.summarize(done.finetuned, done.masks).to_dict()
    stored_leaves = jax.tree_util.tree_leaves_with_path(stored, is_leaf=lambda x: isinstance(x, jp.sparse.SparseWeight))
    bytes_of = {tree.leaf_name(path): jp.sparse.nbytes(leaf) for path, leaf in stored_leaves}
    result = {
        "seed": seed,
        "accuracy": {name: train.accuracy(predicted, test) for name, predicted in classes.items()},
        "agreement": int(np.sum(classes["sparse"] == classes["finetuned"])) / len(classes["sparse"]),
        "sparsity": sparsity,
        "seconds": sum(_last_of_stages(done.records)),
        "overall_sparsity": table["total"]["sparsity"],
        "leaves": [{**leaf, "sparse_bytes": bytes_of[leaf["name"]]} for leaf in table["leaves"]],
        "bytes": sum(bytes_of.values()),
        "dense_bytes": table["total"]["bytes"],
        "artifact": store.measure(path, apply, done.finetuned, test),
    }
    files.write_text(folder / f"seed_{seed}" / "result.json", json.dumps(result, indent=1))
    return result


def _last_of_stages(records: list[dict[str, Any]]) -> list[float]:
    """Seconds of each stage: its records count on."""
    return list({record["stage"]: record["seconds"] for record in records}.values())


def _claim(folder: Path, config: cfg.Config) -> None:
    """Refuse a folder that holds something else."""
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "config.toml"
    if not written.exists():
        if any(p.name not in (".lock", "metrics.jsonl") and not p.name.startswith(".tmp") for p in folder.iterdir()):
            raise RunError(f"{folder} is there and is no run folder. Choose another with --out.")
        return
    theirs, ours = cfg.config_hash(cfg.load(written)), cfg.config_hash(config)
    if theirs != ours:
        raise RunError(
            f"{folder} was written by another config (its hash is {theirs}, this one's {ours}). "
            "Choose another folder with --out, or delete it."
        )


@contextlib.contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"Another process is running in {folder}. Wait for it, or stop it.") from None
        yield


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
