"""The words of `jaxprune inspect`, `convert`, `predict`, `costs` and `data`. Nothing heavy is imported to show help."""

import argparse
from pathlib import Path
from typing import Any

INSPECT = """\
Show what a file holds: every tensor's shape, sparsity and encoding, its bits per weight beside their entropy, its bytes
against dense; the whole file, header included; and what it says of itself. Plain safetensors can be read, too.

  jaxprune inspect runs/quickstart-1a2b3c4d/seed_0/model.jaxprune
  jaxprune inspect model.jaxprune --json
"""
CONVERT = """\
Write a model as another file. IN is a file of jaxprune, plain safetensors, a checkpoint of a run, a PyTree checkpoint
of Orbax, or a folder with Keras's ResNet-50 (ResNet50/model.json and assets/labels.json of TensorFlow.js). OUT is, by
its suffix or --to, a file of jaxprune, dense safetensors, or an Orbax checkpoint. Masks and metadata go along. Of a
checkpoint of training, the model is taken: params, and statistics of batch norms beside them.

  jaxprune convert model.safetensors model.jaxprune
  jaxprune convert model.jaxprune smaller.jaxprune --quantize codebook4
  jaxprune convert model.jaxprune as_bits.jaxprune --encoding bitmask --no-deflate
  jaxprune convert runs/quickstart-1a2b3c4d/seed_0/finetune model.jaxprune
  jaxprune convert model.jaxprune checkpoint --to orbax
"""
PREDICT = """\
Say what a model makes of images: class and probability of each, and the time of one, dense and sparse, with the kernels
that really ran. FILE says which model it is (those of `jaxprune run` do). Images are PNG or JPEG of any size, in colour
or grey. For a model of digits, what differs from the background is scaled and centred as MNIST's digits are, be it dark
on light or light on dark. A sample that is no image is a .npy file, an array of the shape that the model takes.

  jaxprune predict runs/quickstart-1a2b3c4d/seed_0/model.jaxprune four.png photo.jpg
"""
COSTS = """\
Count the weights and multiply-adds of a model, per layer and in total, dense and with the non-zeros of a profile: one
column of a csv file, or all of them. The model is seen by its shapes; nothing is computed.

  jaxprune costs resnet50 --profile experiments/benchmarks/profiles/resnet50.csv
  jaxprune costs resnet50 --profile experiments/benchmarks/profiles/resnet50.csv:pruned_83 --out figures
  jaxprune costs lenet_5 --batch 64 --json
"""
FORMS = (*(f"codebook{bits}" for bits in range(1, 9)), "int8", "int4", "bfloat16", "float16", "none")


def add_parsers(commands: Any, style: dict[str, Any], do: dict[str, Any]) -> None:
    """Add the commands.

    Args:
        commands: what `add_subparsers` gave.
        style: keywords of every parser.
        do: "inspect", "convert" and "predict" -> function (arguments, overrides) -> exit code.
    """
    inspect = commands.add_parser("inspect", help="show what a file holds", description=INSPECT, **style)
    inspect.add_argument("file", metavar="FILE", type=Path, help="model.jaxprune, or any safetensors file")
    form = inspect.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print plain data instead")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table instead")
    inspect.set_defaults(do=do["inspect"])
    _add_convert(commands, style, do["convert"])
    predict = commands.add_parser("predict", help="classify images", description=PREDICT, **style)
    predict.add_argument("file", metavar="FILE", type=Path, help="model.jaxprune")
    predict.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="PNG or JPEG; or one sample as .npy")
    predict.add_argument("--model", metavar="MODULE:NAME", default="", help="allow a model of your own to be imported")
    predict.add_argument(
        "--formats", "--format", metavar="FORMAT", nargs="+", default=[], help="sparse formats to time (default: those "
        "made for one image on this device)",
    )  # fmt: skip
    predict.add_argument("--json", action="store_true", help="print plain data instead")
    predict.set_defaults(do=do["predict"])


def add_costs(commands: Any, style: dict[str, Any], do: Any) -> None:
    """Add the command `costs`; arguments as of `add_parsers`."""
    costs = commands.add_parser("costs", help="count a model's weights and multiply-adds", description=COSTS, **style)
    costs.add_argument("model", metavar="MODEL", help="a model's name, such as resnet50, vgg19 or lenet_5")
    costs.add_argument("--profile", metavar="FILE[:COLUMN]", default="", help="non-zeros per layer, from a csv")
    costs.add_argument("--image", metavar="N", type=int, help="height and width of the images (default: the model's)")
    costs.add_argument("--batch", metavar="N", type=int, default=1, help="inputs in one call (default: 1)")
    form = costs.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print plain data instead")
    form.add_argument("--markdown", action="store_true", help="print Markdown tables instead")
    costs.add_argument("--out", metavar="FOLDER", type=Path, help="draw the weights and multiply-adds of each layer")
    costs.set_defaults(do=do)


def _add_convert(commands: argparse._SubParsersAction, style: dict[str, Any], do: Any) -> None:
    convert = commands.add_parser("convert", help="write a model as another file", description=CONVERT, **style)
    convert.add_argument("source", metavar="IN", type=Path, help="a file, or the folder of a checkpoint")
    convert.add_argument("target", metavar="OUT", type=Path, help="NAME.jaxprune, NAME.safetensors, or see --to")
    convert.add_argument("--to", choices=["jaxprune", "safetensors", "orbax"], default="", help="what OUT is to be")
    convert.add_argument("--encoding", metavar="NAME", default="auto",
                         help="of matrices and kernels: dense, bitmask, csr16, csr32, gaps4, ... (default: auto, the "
                         "smallest of each)")  # fmt: skip
    convert.add_argument("--no-deflate", dest="deflate", action="store_false", help="leave all bytes as they are")
    convert.add_argument("--everything", action="store_true",
                         help="of a checkpoint of training all arrays (default: the model's alone)")  # fmt: skip
    convert.add_argument("--quantize", metavar="FORM", choices=FORMS, default="",
                         help="codebook1 to codebook8, int8, int4, bfloat16, float16; none: floats")  # fmt: skip
    convert.add_argument("--select", metavar="PATTERN", nargs="+", default=[],
                         help="leaves to quantize (default: every matrix and kernel)")  # fmt: skip
    convert.set_defaults(do=do)


def add_data(commands: Any, style: dict[str, Any], do: Any) -> None:
    """Add the command `data`; arguments as of `add_parsers`."""
    bring = commands.add_parser("data", help="bring data in").add_subparsers(required=True, metavar="COMMAND")
    load = bring.add_parser(
        "import", help="make a data set readable from its original files", **style,
        description="Write mnist, fashion_mnist (idx or idx.gz files) or cifar10 (PNG sheets) from FOLDER as a "
        "prepared TensorFlow Datasets data set, which that library itself then reads. TensorFlow is not needed.",
    )  # fmt: skip
    load.add_argument("name", metavar="NAME", help="mnist, fashion_mnist or cifar10")
    load.add_argument("folder", metavar="FOLDER", type=Path, help="where the original files lie")
    load.add_argument("--data-dir", metavar="DIR", type=Path, help="where to write (default: ~/tensorflow_datasets)")
    load.set_defaults(do=do)
