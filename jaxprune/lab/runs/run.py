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
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxprune as jp
from jaxprune import files
from jaxprune.lab.data import own_data, sets
from jaxprune.lab.data.samples import samples_of
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.report.results import read_results
from jaxprune.lab.runs import machine, store, train
from jaxprune.lab.runs.stages import SeedRun, Shared, Watcher, run_seed
from jaxprune.quantize.codes import dequantize

_BEFORE_THE_CONFIG = r"\.lock|metrics\.jsonl|\..*\.tmp|\.tmp-.*"
"""What a run that was killed before it wrote its config may have left."""


class RunError(ValueError):
    """A run folder that cannot be used; says why, and the way out."""


def folder_of(config: cfg.Config, root: str | Path = "runs") -> Path:
    """Where a config's run lies: root/name-hash."""
    return Path(root) / f"{config.name}-{cfg.config_hash(config)}"


def run(
    config: cfg.Config, folder: Path, command: str, watcher: Watcher | None = None, *, shared: Shared | None = None
) -> dict[str, Any]:
    """Do all that is not done yet, and return what stands in results.json.

    Args:
        config: the experiment.
        folder: the run's folder, made if it is not there.
        command: how to do it again, for the report.
        watcher: told what happens.
        shared: what runs of a sweep have in common.

    Raises:
        RunError: the folder belongs to another config, or another process is running in it.
        DataError, ConfigError, TrainingError, CheckpointError: from the parts.
    """
    watcher = watcher or Watcher()
    _claim(folder, config)
    with _only_process(folder):
        if (folder / "results.json").exists():
            watcher.note(f"{folder} is finished; delete the folder to run it again.")
            return read_results(folder)
        files.write(folder / "config.toml", cfg.dump(config))
        machine.record(folder / "machine.json", watcher.note)
        return _run_seeds(config, folder, command, watcher, shared or Shared())


def _run_seeds(config: cfg.Config, folder: Path, command: str, watcher: Watcher, shared: Shared) -> dict[str, Any]:
    from jaxprune.lab.report import publish

    started = _now()
    dataset = shared.dataset(config.data)
    own_data.remember(dataset, config.data.name, folder)
    results, records, first = [], [], None
    for seed in config.seeds:
        done = run_seed(config, seed, dataset, folder, watcher, records, shared)
        records += done.records
        results.append(_seed_result(config, seed, dataset, done, folder))
        first = first or done
    assert first is not None
    made_on = json.loads((folder / "machine.json").read_text())
    summary = publish.results(config, dataset, results, command, (started, _now()), made_on)
    models = {"dense": first.dense, "pruned": first.pruned, "fine-tuned": first.finetuned}
    weights = publish.histogram_weights(models, first.masks)
    threshold = config.prune.distribution.options.get("t")
    publish.write(folder, summary, publish.make_figures(summary, records, weights, threshold))
    return summary


def _seed_result(config: cfg.Config, seed: int, dataset: sets.Dataset, done: SeedRun, folder: Path) -> dict[str, Any]:
    """Accuracies on the test data, dense, pruned, fine-tuned, sparse and stored; written to seed_N/result.json too."""
    test = samples_of(dataset.test_images, dataset.test_labels, dataset.scale)
    apply = jax.jit(done.network.apply)
    classes = {
        name: train.predict(apply, params, test)
        for name, params in (("dense", done.dense), ("pruned", done.pruned), ("finetuned", done.finetuned))
    }
    compressed, bytes_of = store.leaf_bytes(done.finetuned, config.sparse.format, done.network, test.images.shape[1:])
    odd = "dense" if ":" in config.model.name else "refuse"  # what a model of the user's own does is not known
    classes["sparse"] = train.predict(jax.jit(jp.sparse.apply(done.network.apply, unsupported=odd)), compressed, test)
    path = folder / f"seed_{seed}" / "model.jaxprune"
    apply_stored, values = jax.jit(done.stored.apply), dequantize(done.stored.params)
    accuracy = train.accuracy(train.predict(apply_stored, values, test), test)
    about = store.identity(config, seed, test.images.shape[1:], dataset.classes)
    about |= {"sparsity": round(done.sparsity, 6), "accuracy": round(accuracy, 6)}
    how = {"encoding": config.store.encoding, "deflate": config.store.deflate}
    jp.save(path, done.stored.params, masks=done.stored.masks, **how, metadata=about)
    table = jp.summarize(done.finetuned, done.masks).to_dict()
    image = jax.ShapeDtypeStruct((1, *test.images.shape[1:]), "float32")
    costs = jp.costs(jp.trace(done.network.apply, done.finetuned, image), done.masks).total
    result = {
        "seed": seed,
        "accuracy": {name: train.accuracy(predicted, test) for name, predicted in classes.items()},
        "agreement": int(np.sum(classes["sparse"] == classes["finetuned"])) / len(classes["sparse"]),
        "sparsity": done.sparsity,
        "seconds": sum(_seconds(done.records)),
        "rounds": done.rounds,
        "macs": {"dense": costs.macs, "left": costs.macs_left},
        "overall_sparsity": table["total"]["sparsity"],
        "leaves": [{**leaf, "sparse_bytes": bytes_of[leaf["name"]]} for leaf in table["leaves"]],
        "bytes": sum(bytes_of.values()),
        "dense_bytes": table["total"]["bytes"],
        "artifact": store.measure(path, apply_stored, values, done.finetuned, test),
    }
    files.write(folder / f"seed_{seed}" / "result.json", json.dumps(result, indent=1))
    return result


def _seconds(records: list[dict[str, Any]]) -> list[float]:
    """Of each stage, and each round that is a training of its own: its records count on, the last has all."""
    following = [*records[1:], {"stage": None}]
    return [
        one["seconds"]
        for one, after in zip(records, following, strict=True)
        if after["stage"] != one["stage"] or after["epoch"] <= one["epoch"]
    ]


def _claim(folder: Path, config: cfg.Config) -> None:
    """Refuse a folder that holds something else."""
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "config.toml"
    if not written.exists():
        if not all(re.fullmatch(_BEFORE_THE_CONFIG, path.name) for path in folder.iterdir()):
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
