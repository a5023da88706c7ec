"""From a finished run to what is read: results.json, figures, the page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune import files, tree
from jaxprune.lab.data import sets
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.report import curves, figures, html, wording
from jaxprune.lab.report.results import read_json, read_run
from jaxprune.lab.report.storage_figure import storage
from jaxprune.types import Masks, Params

MODELS = ("dense", "pruned", "finetuned", "sparse")
FIGURES = ("weight_histograms", "training_curve", "leaf_sparsity", "storage", "accuracy_over_kept", "size_over_kept")


def results(
    config: cfg.Config, dataset: sets.Dataset, seeds: Sequence[dict[str, Any]], command: str, times: tuple[str, str],
    machine: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """What stands in results.json: mean and standard deviation over seeds of all that was measured.

    Args:
        config: the experiment.
        dataset: for its name and sizes.
        seeds: one result a seed, as in seed_N/result.json.
        command: how to do it again.
        times: when this call began and ended, ISO with time zone.
        machine: of `jaxprune.lab.runs.machine`.
    """
    held_out = round(len(dataset.train_labels) * config.data.validation)
    return {
        "name": config.name,
        "title": config.title,
        "hash": cfg.config_hash(config),
        "command": command,
        "started": times[0],
        "finished": times[1],
        "seeds": list(config.seeds),
        "dataset": {
            "name": dataset.name,
            "train": len(dataset.train_labels) - held_out,
            "validation": held_out,
            "test": len(dataset.test_labels),
        },
        "accuracy": {model: wording.spread([seed["accuracy"][model] for seed in seeds]) for model in MODELS},
        "sparsity": wording.spread([seed["sparsity"] for seed in seeds]),
        "overall_sparsity": wording.spread([seed["overall_sparsity"] for seed in seeds]),
        "sparse": {
            "format": config.sparse.format,
            "agreement": {"values": [seed["agreement"] for seed in seeds]},
            "bytes": seeds[0]["bytes"],
            "dense_bytes": seeds[0]["dense_bytes"],
        },
        "artifact": _artifact(config, [seed["artifact"] for seed in seeds]),
        "macs": {"dense": seeds[0]["macs"]["dense"], "left": wording.spread([seed["macs"]["left"] for seed in seeds])},
        "leaves": seeds[0]["leaves"],
        "seconds": wording.spread([seed["seconds"] for seed in seeds]),
        "machine": {key: machine[key] for key in ("processor", "cores", "jax")},
        **({"rounds": [seed["rounds"] for seed in seeds]} if seeds[0]["rounds"] else {}),
        **({"published": config.model_dump(mode="json")["published"]} if config.published else {}),
    }


def _artifact(config: cfg.Config, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the files of the seeds came to; `ratio` is that of dense bytes to the mean of a whole file."""
    stored = wording.spread([seed["bytes"] for seed in seeds])
    return {
        "quantize": config.store.quantize,
        "bytes": stored,
        "dense_bytes": seeds[0]["dense_bytes"],
        "ratio": seeds[0]["dense_bytes"] / stored["mean"],
        "accuracy": wording.spread([seed["accuracy"] for seed in seeds]),
        "nnz": wording.spread([seed["nnz"] for seed in seeds]),
        "shapes": seeds[0]["shapes"],
    }


def histogram_weights(models: dict[str, Params], masks: Masks) -> dict[str, np.ndarray]:
    """The weights of the leaves that have dead ones, or of all, one flat array a model."""
    pruned = [name for name, mask in tree.named_leaves(masks).items() if not bool(mask.all())]

    def flat(params: Params) -> np.ndarray:
        leaves = tree.named_leaves(params)
        return np.concatenate([np.asarray(leaves[name]).ravel() for name in pruned or leaves])

    return {title: flat(params) for title, params in models.items()}


def make_figures(
    summary: dict[str, Any], metrics: list[dict[str, Any]], weights: dict[str, np.ndarray], threshold: float | None
) -> dict[str, bytes]:
    """Name -> PNG of the figures of a run."""
    drawn = {
        "weight_histograms": figures.weight_histograms(weights, threshold),
        "training_curve": figures.training_curve(metrics),
        "leaf_sparsity": figures.leaf_sparsity(summary["leaves"]),
        "storage": storage(summary["leaves"], summary["artifact"], summary["sparsity"]["mean"]),
    }
    drawn |= curves.of_runs([summary])
    return {name: figures.png(figure) for name, figure in drawn.items()}


def write(folder: Path, summary: dict[str, Any], pictures: dict[str, bytes]) -> None:
    """Figures, report.html and, last, results.json, whose presence says that the run is finished."""
    for name, picture in pictures.items():
        files.write(folder / "figures" / f"{name}.png", picture)
    files.write(folder / "report.html", page(folder, summary, pictures))
    files.write(folder / "results.json", json.dumps(summary, indent=1))


def page(folder: Path, summary: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The run's page, from what lies in its folder."""
    metrics = _metrics(folder / "metrics.jsonl")
    machine = read_json(folder / "machine.json", "Delete it, and results.json, and run again.")
    return html.report_page(summary, (folder / "config.toml").read_text(), machine, metrics, pictures)


def _metrics(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Delete results.json beside it and run again.") from None


def rewrite_page(folder: Path) -> Path:
    """The page of a finished run, written anew from what lies in its folder; returns where it is."""
    pictures = {
        path.stem: path.read_bytes() for name in FIGURES if (path := folder / "figures" / f"{name}.png").exists()
    }
    path = folder / "report.html"
    files.write(path, page(folder, read_run(folder), pictures))
    return path
