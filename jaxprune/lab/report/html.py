"""Pages and tables: what came out of a run, said once in plain words and then in every number.

One page is one file, `page.html.j2` filled in, which escapes all text. Images, style and text are inline, and its own
security policy forbids it to load anything, so it opens from a mail or an archive as it did on the day. The page,
`summary_text` for a terminal and `summary_markdown` for a README say the same things through the same few functions,
and they never round a share up to all or down to none: 100 % is written only where it is exact.
"""

import functools
from collections.abc import Sequence
from datetime import datetime
from html import escape
from typing import Any

import jinja2

from jaxprune import tables
from jaxprune.lab.report import curves
from jaxprune.lab.report.figures import data_uri
from jaxprune.lab.report.wording import factor, percent, points, size_text, with_deviation

Record = dict[str, Any]  # one JSON object
_STAGES = {"dense": "Dense", "pruned": "Pruned", "finetuned": "Fine-tuned", "sparse": "Sparse"}
_CAPTIONS = {
    "weight_histograms": "Weights of the pruned leaves, all on the same axes; after pruning, zeros are left out.",
    "training_curve": "Accuracy over the steps of all stages, and beside it the sparsity of the pruned leaves.",
    "leaf_sparsity": "Share of every pruned leaf that was removed, with the weights left and the weights there.",
    "storage": "Bytes of the model over the sparsity of its pruned leaves, zeros at random; dots: break-even.",
    "accuracy_over_kept": "Test accuracy over the weights kept, ours and what others published. Bars are one standard "
    "deviation over seeds.",
    "size_over_kept": "Bytes over the weights kept: of the model's file, and of its sparse weights in memory.",
    "comparison": "Test accuracy of every run. Bars are one standard deviation over seeds.",
}


def report_page(
    results: Record, config_text: str, machine: dict[str, str], metrics: list[Record], figures: dict[str, bytes]
) -> str:
    """Return the report of one run as one HTML page.

    Args:
        results, machine, metrics: the content of `results.json`, `machine.json` and `metrics.jsonl`.
        config_text: the resolved config, TOML.
        figures: caption key -> PNG; a function's name in `jaxprune.lab.report.figures` brings its caption, any other
            key is its own caption. Shown in the given order.
    """
    parts = [
        {"cards": _cards(results)},
        _verdict(results),
        {"pairs": _facts(results)},
        _figures(figures),
        _rounds(results),
        _leaves(results["leaves"]),
        _stages(metrics),
        {"heading": "Run it again", "code": results["command"]},
        {"heading": "Resolved config", "code": config_text},
        {"heading": "Versions and machine", "pairs": machine.items()},
    ]
    about = {"name": results["name"], "hash": results["hash"], "about": _circumstances(results)}
    return _page(f"{results['name']}: report", headline(results), parts, **about)


def comparison_page(results: list[Record], figures: dict[str, bytes]) -> str:
    """Return a comparison of several runs as one HTML page.

    Args:
        results: the content of `results.json` of each run.
        figures: caption key -> PNG, as for `report_page`.
    """
    parts = [
        {"columns": _RUN_COLUMNS, "rows": _run_rows(results)},
        _figures(figures),
        {"heading": "Run them again", "code": "\n".join(result["command"] for result in results)},
    ]
    about = "Accuracy on test data: mean ± standard deviation over seeds. Sparsity: of pruned leaves."
    return _page("Comparison of runs", comparison_headline(results), parts, name="Comparison of runs", about=about)


def sweep_page(results: Record, figures: dict[str, bytes]) -> str:
    """Return what the points of a sweep came to as one HTML page.

    Args:
        results: of `jaxprune.lab.runs.sweep`.
        figures: caption key -> PNG, as for `report_page`.
    """
    rows = [
        (name, percent(point["sparsity"]["mean"], 2),
         *(with_deviation(point["accuracy"][stage]) for stage in ("dense", "finetuned")),
         f"{point['artifact']['ratio']:.1f}" if "artifact" in point else "-", point["hash"])
        for name, point in zip(curves.point_names(results["points"]), results["points"], strict=True)
    ]  # fmt: skip
    columns = ("Experiment", "Removed", "Dense", "Fine-tuned", "File, times smaller", "Config")
    parts = [
        {"columns": columns, "rows": rows},
        _figures(figures),
        {"heading": "Run it again", "code": results["command"]},
    ]
    about = "Accuracy on test data: mean ± standard deviation over seeds. Removed: of pruned leaves."
    lead = results["title"] or f"{len(rows)} experiments"
    return _page(f"{results['name']}: sweep", lead, parts, name=results["name"], about=about)


def _page(title: str, lead: str, parts: Sequence[Record], **top: str) -> str:
    """The template filled in; a part has some of the keys that it asks for."""
    return _template().render(title=title, lead=lead.replace(" %", "\N{NO-BREAK SPACE}%"), parts=parts, **top)


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("jaxprune.lab.report")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("page.html.j2")


def summary_text(results: Record) -> str:
    """Return the outcome of one run as an aligned plain-text table for a terminal."""
    rows = [(_STAGES[stage], with_deviation(accuracy)) for stage, accuracy in _accuracies(results)]
    rows += [*_facts(results), ("Sparse = masked", agreement_text(results)[1])]
    lines = [f"{name:<15}  {value}" for name, value in rows]
    return "\n".join([f"{results['name']} {results['hash']}: {headline(results)}", "", *lines])


def summary_markdown(results: list[Record]) -> str:
    """Return several runs as a Markdown table, one row each, ready for a README."""
    rows = [[_markdown_cell(cell) for cell in row] for row in _run_rows(results)]
    return tables.markdown(_RUN_COLUMNS, rows, words=1) + "\n"


def headline(results: Record) -> str:
    """Say in one sentence what came out: what was removed, and what it cost."""
    removed = percent(results["sparsity"]["mean"])
    accuracy = dict(_accuracies(results))
    last = next((stage for stage in ("sparse", "finetuned", "pruned") if stage in accuracy), None)
    known = [f"{percent(accuracy[s]['mean'])} {_STAGES[s].lower()}" for s in ("dense", last) if s in accuracy]
    text = f"{removed} of the weights in the pruned leaves removed; accuracy {', '.join(known) or 'not measured'}"
    stored = results.get("artifact")
    return f"{text}; the file is {factor(stored['dense_bytes'], stored['bytes']['mean'])}." if stored else f"{text}."


def comparison_headline(results: list[Record]) -> str:
    """Say in one sentence what the runs span. Runs on different data are counted, never ranked."""
    if not results:
        return "No runs to compare."
    names = list(dict.fromkeys(map(_data_name, results)))
    count = f"{len(results)} run{'s' if len(results) > 1 else ''}"
    if len(names) > 1:
        return f"{count} on {len(names)} data sets ({', '.join(names)}): compare within a data set only."
    text = f"{count} on {names[0]}: {_span([r['sparsity']['mean'] for r in results])} of the weights removed"
    sparse = [accuracy["mean"] for r in results if (accuracy := r["accuracy"].get("sparse"))]
    return f"{text}, accuracy with sparse weights {_span(sparse)}." if sparse else f"{text}."


def _span(shares: list[float]) -> str:
    low, high = percent(min(shares)), percent(max(shares))
    return low if low == high else f"{low} to {high}"


def agreement_text(results: Record) -> tuple[bool, str]:
    """Return whether the sparse model gives the masked model's class for every test sample, and a sentence of it."""
    values, test = results["sparse"]["agreement"]["values"], results["dataset"]["test"]
    if not values:
        return False, "not compared."
    if all(value == 1.0 for value in values):
        seeds = f", for all {len(values)} seeds" if len(values) > 1 else ""
        return True, f"yes, the same class on all {test:,} test samples{seeds}."
    seeds = results["seeds"] if len(results["seeds"]) == len(values) else range(len(values))
    differing = [
        f"seed {seed} on {max(1, round((1 - value) * test)):,} of {test:,} test samples ({percent(value, 2)} agree)"
        for seed, value in zip(seeds, values, strict=True)
        if value != 1.0
    ]
    return False, f"no, the class differs for {'; '.join(differing)}."


def _accuracies(results: Record) -> list[tuple[str, Record]]:
    # a run without fine-tuning has no such entry
    return [(stage, found) for stage in _STAGES if (found := results["accuracy"].get(stage))]


def _circumstances(results: Record) -> str:
    data, seeds, finished = results["dataset"], results["seeds"], datetime.fromisoformat(results["finished"])
    counts = f"{data['train']:,} training, {data['validation']:,} validation and {data['test']:,} test samples"
    which = f"{len(seeds)} seeds ({', '.join(map(str, seeds))})" if len(seeds) > 1 else f"Seed {seeds[0]}"
    return f"{data['name']}: {counts}. {which}. Finished {finished:%Y-%m-%d %H:%M %Z}."


def _facts(results: Record) -> list[tuple[str, str]]:
    sparse, seconds = results["sparse"], results["seconds"]["mean"]
    each = " for each seed" if len(results["seeds"]) > 1 else ""
    stored = [("On disk", _file_text(results["artifact"]))] if "artifact" in results else []  # older runs have none
    macs = [("Multiply-adds", _macs_text(results["macs"]))] if "macs" in results else []
    return [
        ("Sparsity", f"{with_deviation(results['sparsity'])} of the pruned leaves"),
        ("Overall", f"{with_deviation(results['overall_sparsity'])} of all parameters"),
        *macs,
        ("In memory", f"as {sparse['format']}, ready to run: {size_text(sparse['dense_bytes'], sparse['bytes'])}"),
        *stored,
        ("Time", f"{seconds:,.1f} s{each}"),
    ]


def _macs_text(macs: Record) -> str:
    dense, left = macs["dense"], macs["left"]["mean"]
    return f"{dense:,} for one image, {left:,.0f} with the weights left: {dense / max(left, 1):.2f} times fewer"


def _file_text(stored: Record) -> str:
    how = "weights as they are" if stored["quantize"] == "none" else stored["quantize"]
    size = f"{stored['bytes']['mean']:,.0f} bytes, {factor(stored['dense_bytes'], stored['bytes']['mean'])} than dense"
    return f"model.jaxprune, packed: {how}, {size}; accuracy {with_deviation(stored['accuracy'])}"


def _change(results: Record, accuracy: Record | None) -> str:
    """Write the distance of an accuracy from that of the dense model in percentage points, with its sign."""
    dense = results["accuracy"].get("dense")
    if not (dense and accuracy) or accuracy is dense:
        return ""
    return f"{100 * (accuracy['mean'] - dense['mean']):+.2f}".replace("-", "\N{MINUS SIGN}")


_RUN_COLUMNS = ("Run", "Data", "Sparsity", "Dense, %", "Pruned, %", "Fine-tuned, %", "Sparse, %",
                "Sparse minus dense, points", "Sparse = masked", "In memory, of dense", "From file, %",
                "File, times smaller", "Seeds", "Config")  # fmt: skip


def _run_rows(results: list[Record]) -> list[tuple[str, ...]]:
    rows = []
    for result in results:
        accuracy, sparse, seeds = result["accuracy"], result.get("sparse"), str(len(result["seeds"]))
        cells = [points(accuracy[stage]) if accuracy.get(stage) else "-" for stage in _STAGES]
        agrees = _agrees(sparse["agreement"]["values"] if sparse else ())
        share = percent(sparse["bytes"] / sparse["dense_bytes"]) if sparse and sparse["dense_bytes"] else "-"
        start = (result["name"], _data_name(result), percent(result["sparsity"]["mean"]))
        change, stored = _change(result, accuracy.get("sparse")) or "-", _file_cells(result.get("artifact"))
        rows.append((*start, *cells, change, agrees, share, *stored, seeds, result["hash"]))
    return rows


def _agrees(values: Sequence[float]) -> str:
    return "not compared" if not values else "yes" if set(values) == {1.0} else "NO"


def _data_name(result: Record) -> str:
    return result.get("dataset", {}).get("name", "-")  # points of older sweeps do not say it


def _file_cells(stored: Record | None) -> tuple[str, str]:
    return (points(stored["accuracy"]), f"{stored['ratio']:.1f}") if stored else ("-", "-")


def _markdown_cell(text: str) -> str:
    """Keep a name from ending its cell, its row, or being read as markup."""
    for mark in "\\|`*_[]":
        text = text.replace(mark, "\\" + mark)
    return escape(" ".join(text.split()), quote=False)


def _cards(results: Record) -> list[Record]:
    cards = [
        _card(stage, _STAGES[stage], accuracy, _change(results, accuracy)) for stage, accuracy in _accuracies(results)
    ]
    if stored := results.get("artifact"):
        title = f"File, {factor(stored['dense_bytes'], stored['bytes']['mean'])}"
        cards.append(_card("artifact", title, stored["accuracy"], _change(results, stored["accuracy"])))
    return cards


def _card(tone: str, title: str, accuracy: Record, change: str) -> Record:
    many = len(accuracy["values"]) > 1
    return {
        "tone": tone,
        "title": title,
        "accuracy": percent(accuracy["mean"], 2),
        "spread": f"± {100 * accuracy['std']:.2f} over {len(accuracy['values'])} seeds" if many else "one seed",
        "note": f"{change} points from dense" if change else "accuracy on test data",
    }


def _verdict(results: Record) -> Record:
    agrees, text = agreement_text(results)
    first, comma, rest = text.partition(",")
    return {"tone": "good" if agrees else "bad", "verdict": (first.capitalize(), comma + rest)}


def _leaves(leaves: list[Record]) -> Record:
    rows = [
        (leaf["name"], " x ".join(map(str, leaf["shape"])), f"{leaf['weights']:,}", f"{leaf['nnz']:,}",
         percent(leaf["sparsity"]), f"{leaf['bytes']:,}", f"{leaf['sparse_bytes']:,}")
        for leaf in leaves
    ]  # fmt: skip
    weights, nnz, dense, sparse = (sum(leaf[k] for leaf in leaves) for k in ("weights", "nnz", "bytes", "sparse_bytes"))
    gone = percent(1 - nnz / weights) if weights else "-"
    total = (f"{len(leaves)} leaves", "", f"{weights:,}", f"{nnz:,}", gone, f"{dense:,}", f"{sparse:,}")
    columns = ("Leaf", "Shape", "Weights", "Non-zero", "Sparsity", "Bytes dense", "Bytes sparse")
    return {"heading": "Leaves", "columns": columns, "rows": rows, "total": total}


def _rounds(results: Record) -> Record:
    """Show every round of every seed, of those that the stop rule took back by how much they failed."""
    columns = ("Round", "Seed", "Group", "Removed of it", "Removed", "Validation", "Test", "File, bytes", "")
    rows = [
        (str(one["number"]), str(seed), " ".join(one["group"]) or "all", percent(one["sparsity"], 2),
         percent(one["removed"], 2), "-" if one["score"] is None else percent(one["score"], 2),
         percent(one["accuracy"], 2), f"{one['bytes']:,}",
         _taken_back(one))
        for seed, rounds in zip(results["seeds"], results.get("rounds", []), strict=False) for one in rounds
    ]  # fmt: skip
    return {"heading": "Rounds", "columns": columns, "rows": rows} if rows else {}


def _taken_back(one: Record) -> str:
    needed, score = one["needed"], one["score"]
    if needed is None or score >= needed:
        return ""
    return f"taken back: {percent(needed, 2)} needed, failed by {100 * (needed - score):.2f} points"


def _stages(metrics: list[Record]) -> Record:
    """Show the last record of every stage of every seed: the numbers at the stage's end."""
    last = {(record["seed"], record["stage"]): record for record in metrics}
    columns = ("Stage", "Seed", "Step", "Loss", "Training accuracy", "Validation accuracy", "Sparsity")
    shares = ("train_accuracy", "validation_accuracy", "sparsity")
    rows = []
    for (seed, stage), record in last.items():
        cells = ["-" if record.get(key) is None else percent(record[key], 2) for key in shares]
        name = stage.replace("finetune", "fine-tune")
        rows.append((name, str(seed), f"{record['step']:,}", f"{record['loss']:.4g}", *cells))
    return {"heading": "At the end of each stage", "columns": columns, "rows": rows} if rows else {}


def _figures(figures: dict[str, bytes]) -> Record:
    return {"figures": [(_CAPTIONS.get(key, key), data_uri(picture)) for key, picture in figures.items()]}
