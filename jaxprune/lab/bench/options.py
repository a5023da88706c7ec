"""The words of `jaxprune bench` and `doctor`: parsers, and what words mean. Nothing heavy is imported to show help."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxprune.lab.bench.layers import Layers
    from jaxprune.lab.bench.training import Training
    from jaxprune.lab.bench.whole import Whole

ABOUT = """\
Measure where sparsity pays on this machine: dense against the sparse formats, in turns, in one process.

  jaxprune bench layers                            products: sizes x sparsities x batches x formats
  jaxprune bench model resnet50 --batch 1 16       whole networks, end to end
  jaxprune bench train 4096 --batch 256            steps of training, masked against compressed
  jaxprune bench plot bench/bench.jsonl            draw the figures again
"""
LAYERS = """\
Time three equal layers with ReLU in one jitted function, dense and in each sparse format; zeros at random positions.
SciPy and PyTorch run beside them where they are installed. Nothing else should run on the machine meanwhile.

  jaxprune bench layers --sizes 1024 4096 --batches 1 16 64 256 --formats native native_row
  jaxprune bench layers --sizes 768x3072 --batches 64 --sparsities 0.5 0.9 --no-rivals --out results
"""
MODEL = """\
Time a network end to end, dense and with its leaves in each sparse format. Weights are random; zeros are at random
positions, as many as --sparsity or --profile say, or those of a finished run of `jaxprune run`, after each of its
rounds if it has any.

  jaxprune bench model resnet50 --batch 1 16 --profile experiments/benchmarks/profiles/resnet50.csv:pruned_83
  jaxprune bench model tf_tutorial_cnn --batch 64 --sparsity 0.95 --tune
  jaxprune bench model --run runs/quickstart-1a2b3c4d

Models: resnet50, vgg19 (images 224 x 224), tf_tutorial_cnn, lenet_300_100, lenet_5, mlp (28 x 28).
"""
TRAIN = """\
Time a step of training with fixed masks and Adam: on dense params that are masked, and on compressed ones; and say how
much memory each takes at once. NAME is a model, or a size of layers with ReLU (three of them, if they are square).

  jaxprune bench train 4096 --batches 64 256 --sparsities 0.5 0.75 0.9 0.95 0.99
  jaxprune bench train lenet_300_100 --batch 128
"""
PLOT = """\
Draw the figures of FILE, lines that `jaxprune bench` wrote, again: speed-up over sparsity, whole models, roofline.

  jaxprune bench plot bench/bench.jsonl --out figures
"""

SPARSITIES = ["0.5", "0.7", "0.9", "0.95", "0.99"]


def add_parser(commands: Any, style: dict[str, Any], do: dict[str, Any]) -> None:
    """Add `bench` and its subcommands.

    Args:
        commands: what `add_subparsers` gave.
        style: keywords of every parser.
        do: "measure" and "plot" -> function (arguments, overrides) -> exit code.
    """
    bench = commands.add_parser("bench", help="measure where sparsity pays on this machine", description=ABOUT, **style)
    kinds = bench.add_subparsers(required=True, metavar="COMMAND")

    about = "layers: sizes x sparsities x batches x formats"
    layers = kinds.add_parser("layers", help=about, description=LAYERS, **style)
    _several(layers, "--sizes", metavar="SIZE", default=["1024", "4096"], help="4096, or INxOUT: 768x3072")
    _several(layers, "--batches", "--batch", metavar="N", default=["1", "16", "64", "256"])
    _several(layers, "--sparsities", "--sparsity", metavar="S", default=SPARSITIES, help="fractions removed, in [0, 1)")
    layers.add_argument("--layers", metavar="N", type=int, default=3, help="how many square layers (default: 3)")
    layers.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True, help="SciPy and PyTorch too")
    _common(layers)
    layers.set_defaults(do=do["measure"], plan=_layers)

    model = kinds.add_parser("model", help="whole networks, end to end", description=MODEL, **style)
    model.add_argument("name", metavar="NAME", nargs="?", default="", help="a model's name; none with --run")
    _several(model, "--batches", "--batch", metavar="N", default=["1", "16"])
    _several(model, "--sparsities", "--sparsity", metavar="S", default=[], help="of all layers (default: 0.9)")
    _several(model, "--profile", metavar="FILE:COLUMN", default=[], help="non-zeros per layer, from a csv")
    model.add_argument("--run", metavar="FOLDER", type=Path, help="the model of a finished run, or of its rounds")
    model.add_argument("--tune", action="store_true", help="also the plan that jaxprune.sparse.tuning.tune finds here")
    model.add_argument("--cache", metavar="FOLDER", type=Path, help="where tune keeps its timings")
    model.add_argument("--image", metavar="N", type=int, help="height and width of the images (default: the model's)")
    _common(model)
    model.set_defaults(do=do["measure"], plan=_whole)

    train = kinds.add_parser("train", help="steps of training, masked against compressed", description=TRAIN, **style)
    train.add_argument("name", metavar="NAME", help="a model's name, or a size: 4096, 768x3072")
    _several(train, "--batches", "--batch", metavar="N", default=["64", "256"])
    _several(train, "--sparsities", "--sparsity", metavar="S", default=SPARSITIES, help="fractions removed, in [0, 1)")
    _common(train, formats=False)
    train.set_defaults(do=do["measure"], plan=_train, formats=["native"])

    plot = kinds.add_parser("plot", help="draw the figures again", description=PLOT, **style)
    plot.add_argument("file", metavar="FILE", type=Path, help="bench.jsonl")
    plot.add_argument("--out", metavar="FOLDER", type=Path, help="where to draw (default: beside FILE)")
    plot.set_defaults(do=do["plot"])


def add_doctor(commands: Any, style: dict[str, Any], do: Any) -> None:
    """Add `doctor`; arguments as of `add_parser`."""
    doctor = commands.add_parser(
        "doctor", help="say what works here, and what is missing", **style,
        description="Look at versions, devices, native kernels, the machine's peak and extras, and say how to get what "
        "is missing. Exit code 1 where something is broken.",
    )  # fmt: skip
    doctor.set_defaults(do=do)


def _several(parser: argparse.ArgumentParser, *flags: str, **about: Any) -> None:
    parser.add_argument(*flags, nargs="+", **about)


def _common(parser: argparse.ArgumentParser, *, formats: bool = True) -> None:
    rounds = "rounds of 4 to 40 runs of each (default: as many as take a few seconds)"
    folder = "where rows are added and figures drawn (default: bench)"
    if formats:
        _several(
            parser, "--formats", "--format", metavar="FORMAT", default=[], help="default: all that suit the device"
        )
    parser.add_argument("--repeats", metavar="N", type=int, help=rounds)
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of weights, zeros and inputs (default: 0)")
    parser.add_argument("--platform", metavar="NAME", choices=["cpu", "gpu", "tpu"], help="cpu, gpu or tpu")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("bench"), help=folder)
    parser.add_argument("--quiet", action="store_true", help="no progress bar, only the result")


def plan_of(arguments: argparse.Namespace) -> "Layers | Whole | Training":
    """What the words ask for; from here on JAX runs on the chosen platform.

    Raises:
        ValueError: words that cannot be meant.
    """
    from jaxprune.lab.bench import session

    platform = session.use_platform(arguments.platform)
    formats = _words(arguments.formats) or session.default_formats(platform)
    common = {
        "batches": _numbers(arguments.batches, "--batches", int),
        "formats": tuple(dict.fromkeys(name for name in formats if name != "dense")),
        "sparsities": _numbers(arguments.sparsities, "--sparsities", float),
        "repeats": arguments.repeats,
        "seed": arguments.seed,
    }
    return arguments.plan(arguments, common)


def _layers(arguments: argparse.Namespace, common: dict[str, Any]) -> "Layers":
    from jaxprune.lab.bench.layers import Layers, parse_size

    sizes = tuple(map(parse_size, _words(arguments.sizes)))
    return Layers(sizes=sizes, layers=arguments.layers, rivals=arguments.rivals, **common)


def _whole(arguments: argparse.Namespace, common: dict[str, Any]) -> "Whole":
    from jaxprune.lab.bench.whole import Whole

    given = {key: getattr(arguments, key) for key in ("name", "run", "tune", "cache")}
    return Whole(profiles=tuple(arguments.profile), side=arguments.image, **given, **common)


def _train(arguments: argparse.Namespace, common: dict[str, Any]) -> "Training":
    from jaxprune.lab.bench.training import Training

    return Training(name=arguments.name, **common)


def _words(given: Sequence[str]) -> list[str]:
    """Words separated by spaces, by commas, or both."""
    return [word for part in given for word in part.split(",") if word]


def _numbers(given: Sequence[str], flag: str, kind: type[Any]) -> tuple[Any, ...]:
    words = _words(given)
    try:
        return tuple(map(kind, words))
    except ValueError:
        expected = "whole numbers" if kind is int else "fractions in [0, 1)"
        raise ValueError(f"{flag} takes {expected}, separated by spaces; {' '.join(words)!r} arrived.") from None
