"""The command `jaxprune`: run experiments, look at them, bring data in, measure, and handle model files.

Everything printed by this project is printed here. Problems are one line on standard error, without a traceback;
`--debug` shows it.
"""

import argparse
import importlib.metadata
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxprune.lab.bench import options
from jaxprune.lab.commands import file_options, language_options

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

OF_THE_LAB = {
    *("absl", "array_record", "flax", "matplotlib", "orbax", "PIL", "pydantic", "pydantic_core", "rich", "sklearn"),
    *("jinja2", "tensorflow_datasets", "tomli_w"),
}
"""Packages that experiments need and the library does not, as they are imported."""

EPILOG = """\
exit codes: 0 done; 1 the run failed (loss not finite, disk full, damaged files); 2 the command, the config or the data
is not usable as given; 130 interrupted (the same command goes on from the last checkpoint).
"""

RUN_HELP = """\
Train, prune, fine-tune, compress and evaluate what CONFIG describes.

Everything goes into one folder, named after the config and the hash of what it computes. Run the same command again
and it goes on where it stopped, killed at whatever moment, to the same result bit for bit; a finished run is shown.
A file with a [sweep] is a run for every combination of its values, and a table; several files are done in turn.

Every value of the config can be given on the command line; `jaxprune keys` says which there are:

  jaxprune run experiments/quickstart.toml --prune.sparsity 0.95 --seeds "[0, 1, 2]" --finetune.duration "5 epochs"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments, overrides = _parse(list(sys.argv[1:] if argv is None else argv))
    if "" not in sys.path:
        sys.path.append("")  # a user's own criteria, models and data, MODULE:NAME in a config
    try:
        code = arguments.do(arguments, overrides)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has enough, as in `jaxprune ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("jaxprune: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if arguments.debug:
            raise
        usage = isinstance(error, ValueError | TypeError | FileNotFoundError | IsADirectoryError)
        for line in _words(error).splitlines():
            print(f"jaxprune: {line}", file=sys.stderr)
        return EXIT_USAGE if usage else EXIT_FAILED


def _words(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] in OF_THE_LAB:
        return f"{error.name.partition('.')[0]!r} is not installed. It comes with: pip install 'jaxprune[lab]'"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, LookupError | AssertionError | AttributeError | NameError):  # whose words are for programmers
        return f"{type(error).__name__}: {error}. This was not foreseen; --debug shows where it happened."
    return str(error) or type(error).__name__


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _parser()
    own, overrides = _split(argv) if argv[:1] == ["run"] else (argv, [])
    return parser.parse_args(own, argparse.Namespace(command=["jaxprune", *argv])), overrides


def _version() -> str:
    try:
        return f"jaxprune {importlib.metadata.version('jaxprune')}"
    except importlib.metadata.PackageNotFoundError:
        return "jaxprune, not installed"


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words of `run` that are its own, and those that override the config, values kept with their flags."""
    own: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        flag = word.partition("=")[0]
        if not word.startswith("--") or flag in ("--out", "--runs", "--quiet", "--debug", "--help"):
            own.append(word)
        elif "=" in word:
            overrides.append(word)
        else:
            overrides += [word, *([value] if (value := next(words, None)) is not None else [])]
    return own, overrides


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    style: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "parents": [common], "allow_abbrev": False}
    parser = argparse.ArgumentParser(
        prog="jaxprune", description="Functional pruning for JAX.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run an experiment", description=RUN_HELP, epilog=EPILOG, **style)
    run.add_argument("config", metavar="CONFIG", nargs="+", help="a TOML file, such as experiments/quickstart.toml")
    run.add_argument("--runs", metavar="DIR", default="runs", help="where run folders are made (default: runs)")
    run.add_argument("--out", metavar="DIR", help="the run's folder itself, instead of one named after the config")
    run.add_argument("--quiet", action="store_true", help="no progress bar, only the result")
    run.set_defaults(do=_run)

    keys = commands.add_parser(
        "keys", help="list every key of a config", **style,
        description="Print every key that a config may have, its type, its default and what it means, as Markdown.",
    )  # fmt: skip
    keys.set_defaults(do=_keys)

    report = commands.add_parser(
        "report", help="show a finished run, or compare several", **style,
        description="Print what finished runs came to. One run: its summary, and its page written anew. The folder of "
        "a sweep, NAME-sweep: its table of test errors, and its page. Several: a Markdown table with a row for each "
        "run and each point of a sweep, and with --out a page that compares them. --table writes the tables of results "
        "in a Markdown file anew, where it marks them: <!-- table: overview results/NAME.json --> ... <!-- end -->.",
    )  # fmt: skip
    report.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="the folder of a run or of a sweep")
    report.add_argument("--table", metavar="FILE", type=Path, help="a Markdown file, such as experiments/README.md")
    report.add_argument("--out", metavar="FILE", type=Path, help="write the comparison as an HTML page")
    report.add_argument("--json", action="store_true", help="print the results as JSON instead")
    report.set_defaults(do=_report, refuse=report.error)

    file_options.add_data(commands, style, _import)
    options.add_doctor(commands, style, _doctor)
    file_options.add_costs(commands, style, _costs)
    options.add_parser(commands, style, {"measure": _bench, "plot": _bench_plot})
    file_options.add_parsers(commands, style, {"inspect": _inspect, "convert": _convert, "predict": _predict})
    language_options.add_parsers(commands, style, {"generate": _generate, "oneshot": _oneshot})
    return parser


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from jaxprune.lab.commands import terminal
    from jaxprune.lab.recipe import config as cfg
    from jaxprune.lab.report import html
    from jaxprune.lab.report import sweeps as of_sweeps
    from jaxprune.lab.runs import run as lab_run
    from jaxprune.lab.runs import sweep as lab_sweep

    sweeps = [(path, cfg.load_sweep(path, overrides)) for path in arguments.config]
    runs = Path(arguments.runs)
    if arguments.out and (len(sweeps) > 1 or sweeps[0][1].axes):
        raise cfg.ConfigError("--out names the folder of one run; of several choose their place with --runs.")
    tables = []
    with terminal.watcher(quiet=arguments.quiet) as watcher:
        for path, sweep in sweeps:
            command = shlex.join(["jaxprune", "run", path, *overrides])
            if sweep.axes:
                tables.append(lab_sweep.run(sweep, runs, command, watcher))
                continue
            config = sweep.points[0].config
            folder = Path(arguments.out) if arguments.out else lab_run.folder_of(config, runs)
            results = lab_run.run(config, folder, command, watcher)
            print(html.summary_text(results))
            print(f"report: {folder / 'report.html'}")
    if tables:
        print(f"{of_sweeps.text(tables)}\n")
    for one in tables:
        print(f"report: {lab_sweep.folder_of(one['name'], runs) / 'report.html'}")
    return 0


def _keys(arguments: argparse.Namespace, _: list[str]) -> int:
    from jaxprune.lab.recipe import reference

    print(reference.markdown())
    return 0


def _report(arguments: argparse.Namespace, _: list[str]) -> int:
    from jaxprune import files
    from jaxprune.lab.report import comparison, figures, html, publish, sweeps
    from jaxprune.lab.report.results import read_results

    if arguments.table:
        print(f"{arguments.table}: {comparison.fill(arguments.table)} tables written")
    if not arguments.runs:
        return 0 if arguments.table else arguments.refuse("the following arguments are required: RUN, or --table FILE")
    results = [read_results(folder) for folder in arguments.runs]
    rows = sweeps.side_by_side(results)
    if arguments.out:
        page = html.comparison_page(rows, {"comparison": figures.png(figures.comparison(rows))})
        files.write(arguments.out, page)
    if arguments.json:
        print(json.dumps(results, indent=1))
    elif all("points" in one for one in results):
        print(f"{sweeps.text(results)}\n")
        for folder, one in zip(arguments.runs, results, strict=True):
            print(f"report: {sweeps.write_page(folder, one)}")
    elif len(results) == 1:
        print(html.summary_text(results[0]))
        print(f"report: {publish.rewrite_page(arguments.runs[0])}")
    else:
        print(html.summary_markdown(rows))
    return 0


def _import(arguments: argparse.Namespace, _: list[str]) -> int:
    from jaxprune.lab.commands import terminal
    from jaxprune.lab.data.importing import import_folder

    with terminal.progress(f"importing {arguments.name}") as advance:
        folder = import_folder(arguments.name, arguments.folder, arguments.data_dir, advance)
    print(f"{arguments.name} is ready in {folder}")
    return 0


def _doctor(arguments: argparse.Namespace, _: list[str]) -> int:
    from jaxprune.lab.bench import doctor

    found = doctor.findings()
    print(doctor.text(found))
    return EXIT_FAILED if any(one.state == "broken" for one in found) else 0


def _costs(arguments: argparse.Namespace, _: list[str]) -> int:
    from jaxprune.lab.commands import costs

    found = costs.of_model(arguments.model, arguments.profile, arguments.image, arguments.batch)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        print(costs.text(found, markdown=arguments.markdown))
    if arguments.out:
        for path in costs.draw(found, arguments.out):
            print(f"figure: {path}", file=sys.stderr)
    return 0


def _bench(arguments: argparse.Namespace, _: list[str]) -> int:
    from jaxprune.lab.bench import session

    plan = options.plan_of(arguments)
    measure = session.prepare(plan)
    try:
        with session.bar(quiet=arguments.quiet) as progress:
            text = session.run(plan, measure, arguments.out, shlex.join(arguments.command), progress)
    except KeyboardInterrupt:
        print(f"jaxprune: interrupted; what was measured is in {arguments.out / session.FILE}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(text)
    return 0


def _bench_plot(arguments: argparse.Namespace, _: list[str]) -> int:
    from jaxprune.lab.bench import session

    for path in session.draw(arguments.file, arguments.out or arguments.file.parent):
        print(f"figure: {path}")
    return 0


def _inspect(arguments: argparse.Namespace, _: list[str]) -> int:
    from jaxprune.storage import Artifact
    from jaxprune.storage.contents import contents

    with Artifact(arguments.file) as file:
        table = contents(file)
    if arguments.json:
        print(json.dumps(table.to_dict(), indent=1))
        return 0
    print(f"{arguments.file}: {'plain safetensors' if table.version is None else f'version {table.version}'}\n")
    print(table.to_markdown() if arguments.markdown else table)
    if table.metadata:
        print("\n" + "\n".join(f"{key}: {_short(value)}" for key, value in table.metadata.items()))
    return 0


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _convert(arguments: argparse.Namespace, _: list[str]) -> int:
    from jaxprune.lab.commands import convert

    kind = convert.kind_of(arguments.target, arguments.to)
    model = convert.read(arguments.source, everything=arguments.everything)
    if arguments.quantize:
        model = convert.quantized(model, arguments.quantize, tuple(arguments.select))
    convert.write(arguments.target, model, kind, encoding=arguments.encoding, deflate=arguments.deflate)
    print(f"{arguments.target} is written: {convert.size_text(arguments.target, model)}.")
    return 0


def _predict(arguments: argparse.Namespace, _: list[str]) -> int:
    from jaxprune.lab.commands import predict

    model = predict.load(arguments.file, arguments.model)
    found = predict.predict(model, arguments.images, arguments.formats)
    print(json.dumps(found.to_dict(), indent=1) if arguments.json else found)
    return 0


def _generate(arguments: argparse.Namespace, _: list[str]) -> int:
    from jaxprune.lab.commands import generate

    print(generate.of_arguments(arguments))
    return 0


def _oneshot(arguments: argparse.Namespace, _: list[str]) -> int:
    from jaxprune.lab.commands import oneshot, terminal
    from jaxprune.lab.runs.machine import hand_back_freed_arrays

    hand_back_freed_arrays()
    with terminal.steps("solved") as progress:
        text = oneshot.of_arguments(arguments, terminal.note, progress)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
