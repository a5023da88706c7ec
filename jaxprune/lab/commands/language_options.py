"""The words of `jaxprune generate` and `oneshot`. Nothing heavy is imported to show help."""

from pathlib import Path
from typing import Any

GENERATE = """\
Let a language model go on with a text, and time it: tokens a second, dense and, where weights are zero, sparse. FILE is
a GGUF file, a folder of Hugging Face's, a file of llama2.c with its tokenizer behind or beside it, or a file of
`jaxprune.save` whose metadata say which decoder it is; or a folder that `jaxprune oneshot` wrote.

  jaxprune generate stories15M.bin "Once upon a time" --tokens 100 --seed 1
  jaxprune generate pruned.jaxprune "Once upon a time" --tokenizer stories15M.bin
"""
ONESHOT = """\
Prune a language model in one shot, on a few texts: weights go, and those that stay make up for them. MODEL is what
`generate` reads. The folder OUT gets the model as what it was (GGUF, llama2.c, Hugging Face), as model.jaxprune with
its masks, and report.json: perplexity, divergence from the dense model, and the error of every product. Killed at any
moment, the same command goes on, and ends with the same weights.

  jaxprune oneshot stories15M.bin --sparsity 0.5 --out pruned
  jaxprune oneshot SmolLM2.gguf --method sparsegpt --pattern 2:4 --calibrate speeches --evaluate book.txt --out pruned
  jaxprune generate pruned "Once upon a time"
"""


def add_parsers(commands: Any, style: dict[str, Any], do: dict[str, Any]) -> None:
    """Add the commands.

    Args:
        commands: what `add_subparsers` gave.
        style: keywords of every parser.
        do: "generate" and "oneshot" -> function (arguments, overrides) -> exit code.
    """
    _add_generate(commands, style, do["generate"])
    _add_oneshot(commands, style, do["oneshot"])


def _add_generate(commands: Any, style: dict[str, Any], do: Any) -> None:
    generate = commands.add_parser("generate", help="let a language model write", description=GENERATE, **style)
    generate.add_argument("file", metavar="FILE", type=Path, help="a language model")
    generate.add_argument("prompt", metavar="TEXT", help="what it goes on with")
    generate.add_argument("--tokens", metavar="N", type=int, default=100, help="at most (default: 100)")
    generate.add_argument("--temperature", metavar="T", type=float, default=1.0, help="0: the likeliest (default: 1)")
    generate.add_argument("--seed", metavar="N", type=int, default=0, help="draws the tokens (default: 0)")
    generate.add_argument("--tokenizer", metavar="FILE", type=Path, help="a language model whose tokenizer it is")
    generate.add_argument("--formats", metavar="FORMAT", nargs="+", default=["native_bits"],
                          help="sparse formats to time (default: native_bits)")  # fmt: skip
    generate.add_argument("--json", action="store_true", help="print plain data instead")
    generate.set_defaults(do=do)


def _add_oneshot(commands: Any, style: dict[str, Any], do: Any) -> None:
    oneshot = commands.add_parser("oneshot", help="prune a language model in one shot", description=ONESHOT, **style)
    add: Any = oneshot.add_argument
    add("model", metavar="MODEL", type=Path, help="a language model")
    add("--out", metavar="FOLDER", type=Path, required=True, help="made, or of a run that stopped")
    add(
        "--method",
        choices=["alternating", "alternating-diagonal", "sparsegpt", "wanda", "magnitude"],
        default="alternating",
        help="alternating directions, errors weighed by the derivatives of the loss (default); the same with a weight "
        "for each output, faster by far for layers of a thousand outputs; or a published method",
    )
    add("--refit", action="store_true", help="least squares on the mask; alternating directions always do that")
    many: Any = oneshot.add_mutually_exclusive_group(required=True)
    many.add_argument("--sparsity", metavar="F", type=float, help="fraction of every matrix to remove")
    many.add_argument("--pattern", metavar="N:M", default="", help="N of every M inputs stay, such as 2:4")
    add("--allocate", action="store_true", help="matrices differ in sparsity, by their errors; all moments at once")
    add(
        "--order",
        choices=["products", "blocks", "layers"],
        default="",
        help="what is solved when; default: the method's",
    )
    add(
        "--fit",
        choices=["dense", "own"],
        default="",
        help="to whose outputs products are fitted; default: the order's",
    )
    add(
        "--calibrate",
        metavar="FILE|FOLDER|self",
        default="self",
        help="plain text, or texts that the model samples itself (default)",
    )
    add("--evaluate", metavar="FILE|FOLDER|self", default="self", help="likewise, other ones")
    add("--samples", metavar="N", type=int, default=128, help="texts of calibration (default: 128)")
    add("--length", metavar="N", type=int, default=256, help="tokens of each (default: 256)")
    add("--evaluate-samples", metavar="N", type=int, default=32, help="texts of evaluation (default: 32)")
    add("--evaluate-length", metavar="N", type=int, default=0, help="tokens of each (default: --length)")
    add("--batch", metavar="N", type=int, default=8, help="texts computed at once (default: 8)")
    add("--seed", metavar="N", type=int, default=0, help="draws the texts that the model samples (default: 0)")
    add(
        "--format",
        metavar="TYPE",
        default="",
        help="of the weights written: F32, F16, BF16, of GGUF Q8_0 and Q4_0 as "
        "well (default: F32, of GGUF F16); Q4_1 and Q5_1 lose zeros",
    )
    add("--tokenizer", metavar="FILE", type=Path, help="a language model whose tokenizer it is")
    add("--json", action="store_true", help="print plain data instead")
    oneshot.set_defaults(do=do)
