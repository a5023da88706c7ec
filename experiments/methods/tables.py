"""The tables of methods, from the committed results of the sweeps here, as Markdown.

python experiments/methods/tables.py                 # errors by sparsity, for experiments/README.md
python experiments/methods/tables.py --presets       # preset, paper, composition, one measured row, for README.md
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jaxprune as jp
from jaxprune.lab import sweep, words

RESULTS = Path(__file__).parents[1] / "results"
GRID = ("gradual", "iterative", "one_shot", "initial", "moving")


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"methods_{name}.json").read_text())


def composition(preset: jp.Preset) -> str:
    """The answers that are not the usual ones, in words of the configs."""
    table = words.words_of(preset)
    parts = [table["criterion"]]
    parts += [table["granularity"]["name"]] if table["granularity"]["name"] != "element" else []
    share = table["distribution"]
    parts.append(f"nm({share['n']}, {share['m']})" if share["name"] == "nm" else share["name"])
    when = {
        "one-shot": "one-shot" if preset.iterations == 1 else f"one-shot in {preset.iterations} steps",
        "gradual": table["schedule"],
        "iterative": f"rounds, rewind {table['rewind']}",
        "regrow": f"regrow by {table.get('grow')}",
    }
    return ", ".join([*parts, when.get(preset.how, preset.how)])


def measured() -> dict[str, str]:
    """Preset -> sparsity and test error of one row: 95 % where there is one."""
    found = {}
    for name in (*GRID, "patterns"):
        for point in read(name)["points"]:
            values = point["values"].get("prune", {key[6:]: value for key, value in point["values"].items()})
            if values.get("sparsity", 0.95) in (0.95, 0.5):
                error = 100 * (1 - point["accuracy"]["finetuned"]["mean"])
                found[values["preset"]] = f"{100 * point['sparsity']['mean']:.3g} %: {error:.2f} %"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of methods.")
    parser.add_argument("--presets", action="store_true")
    if not parser.parse_args().presets:
        print(sweep.table([read(name) for name in GRID]), sweep.table([read("extreme")]), sep="\n\n")
        return
    rows = measured()
    print("| preset | paper | composition | MNIST, removed: error |\n| --- | --- | --- | --- |")
    for name, preset in jp.presets().items():
        print(f"| `{name}` | {preset.paper} | {composition(preset)} | {rows.get(name, 'not measured')} |")


if __name__ == "__main__":
    main()
