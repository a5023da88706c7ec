"""Pruning a language model in one shot: calibrated on texts, compared with dense, written as what it was.

print(run(Options(Path("stories15M.bin"), Path("pruned"), sparsity=0.5)))

The folder holds what was asked for (`oneshot.json`), the texts that the model sampled itself, every matrix that is
solved until all are, the model, and `report.json`, the last to be written. The same options go on where a run stopped.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune import files, tree
from jaxprune.checks import check_sparsity
from jaxprune.lab.commands import generate, language_files, oneshot_report
from jaxprune.lab.commands.oneshot_report import Report
from jaxprune.lab.models.language import decoder, evaluation, texts
from jaxprune.lab.models.language.files import Language
from jaxprune.lab.runs.solved import SolvedFiles
from jaxprune.oneshot.order import Progress
from jaxprune.storage import Artifact
from jaxprune.storage.container import parsed

SELECT = "*layers*kernel"
ASKED, REPORT, SOLVED = "oneshot.json", "report.json", "solved"
SELF = "self"


class Method(NamedTuple):
    """How a method is meant: its solver and order, whether a loss weighs the outputs, who competes, the fit."""

    solver: Any
    order: str
    weighed: bool = False
    pattern: Any = None
    fit: str = ""


METHODS = {
    "alternating": Method(jp.oneshot.AlternatingDirections(every=5, iterations=500), "products", weighed=True),
    "alternating-diagonal": Method(
        jp.oneshot.AlternatingDirections(every=3, iterations=100, diagonal=True), "products", weighed=True
    ),
    "sparsegpt": Method(jp.oneshot.SparseGPT(), "blocks"),
    "wanda": Method(jp.oneshot.Wanda(), "blocks", pattern=jp.distributions.PerOutput()),
    "magnitude": Method(jp.oneshot.Magnitude(), "blocks"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        model: a file or folder that `generate` reads.
        out: folder, made, or of a run that stopped.
        method: one of `METHODS`.
        refit: whether least squares follow on the mask; alternating directions always do that.
        sparsity: fraction removed of every matrix; None: the pattern says it.
        allocate: whether matrices differ in sparsity, by their errors; `sparsity` is then that of all together.
        pattern: "2:4": so many of so many inputs stay; "": any weights.
        order: see `jp.oneshot.prune`; "": the method's.
        fit: likewise; "": the order's.
        calibrate: a text file, a folder of them, or "self".
        evaluate: likewise.
        samples: texts of calibration.
        length: tokens of each.
        evaluate_samples: texts of evaluation.
        evaluate_length: tokens of each; 0: `length`.
        batch: texts computed at once.
        seed: draws the texts of evaluation; those of calibration are drawn by the next one.
        format: type of the weights in the file that is written; "": the most exact of the kind, of GGUF F16.
        tokenizer: a file of a model whose tokenizer it is; None: the model's own.

    Raises:
        ValueError: numbers of texts or tokens that are none; not one of sparsity and pattern.
    """

    model: Path
    out: Path
    method: str = "alternating"
    refit: bool = False
    sparsity: float | None = None
    allocate: bool = False
    pattern: str = ""
    order: str = ""
    fit: str = ""
    calibrate: str = SELF
    evaluate: str = SELF
    samples: int = 128
    length: int = 256
    evaluate_samples: int = 32
    evaluate_length: int = 0
    batch: int = 8
    seed: int = 0
    format: str = ""
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        for name, least in {"samples": 1, "length": 2, "evaluate_samples": 1, "evaluate_length": 0, "batch": 1}.items():
            if (number := getattr(self, name)) < least:
                raise ValueError(f"--{name.replace('_', '-')} is {number}, {least} or more was expected.")
        if bool(self.pattern) == (self.sparsity is not None):
            raise ValueError("Either --sparsity or --pattern says how many weights go: 0.5, or 2:4.")
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        elif self.allocate:
            raise ValueError("--allocate goes with --sparsity: a pattern has one sparsity for all matrices.")


def _quiet(*_: Any) -> None:
    pass


def run(options: Options, note: Callable[[str], None] = _quiet, progress: Progress | None = None) -> Report:
    """Prune, compare and write; goes on where a run of the same options stopped.

    Args:
        options: see there.
        note: told what is done, a line each.
        progress: of `jp.oneshot.prune`.

    Raises:
        ValueError: options that do not go together, or not with the model; a folder that holds something else.
        FileError: a damaged model.
        OSError: files that cannot be read or written.
    """
    method = _method(options)
    pattern = _pattern(options) or method.pattern
    model = generate.read(options.model, options.tokenizer)
    writer = language_files.Writer(options.model, model, options.format)
    given = {word: _windows(options, model, word) for word in ("calibrate", "evaluate")}
    asked = _asked(options, method, model, given)
    _claim(options.out, asked)
    if (options.out / REPORT).exists():
        shutil.rmtree(options.out / SOLVED, ignore_errors=True)
        return oneshot_report.read(options.out / REPORT)
    sets = {word: _kept_texts(options, asked, model, word, note) if tokens is None else tokens
            for word, tokens in given.items()}  # fmt: skip
    batches = _batches(sets["calibrate"], options.batch)
    forward = partial(decoder.forward, config=model.config)
    note(_memory(forward, model, batches[0], method))
    loss = partial(evaluation.loss, partial(forward, remat=True)) if method.weighed else None
    sparsity: Any = options.sparsity
    if options.allocate:
        note("Errors of every matrix at five sparsities are compared.")
        sparsity = jp.oneshot.allocation(
            forward, model.params, batches, sparsity, select=SELECT, loss=loss, diagonal=_diagonal(method)
        )
    errors: dict[str, float] = {}

    def told(done: int, total: int, place: tuple[str, int], error: float) -> None:
        errors[place[0]] = error
        if progress is not None:
            progress(done, total, place, error)

    params, masks = jp.oneshot.prune(
        forward, model.params, batches, method.solver, sparsity, pattern=pattern, select=SELECT,
        order=method.order, fit=method.fit, progress=told,  # pyright: ignore[reportArgumentType]
        loss=loss, kept=SolvedFiles(options.out / SOLVED, _digest(asked), note),
    )  # fmt: skip
    found = evaluation.compare(forward, params, model.params, sets["evaluate"], batch=options.batch)
    pruned = [np.asarray(mask) for name, mask in tree.named_leaves(masks).items() if name in errors]
    found_sparsity = 1 - sum(map(np.count_nonzero, pruned)) / sum(mask.size for mask in pruned)
    digests = {word: texts.digest(tokens) for word, tokens in sets.items()}
    report = Report(asked, float(found_sparsity), found, errors, digests)
    for path in writer.write(options.out, params, masks):
        note(f"{path} is written.")
    files.write(options.out / REPORT, json.dumps(report.to_dict(), indent=1))
    shutil.rmtree(options.out / SOLVED)
    return report


def of_arguments(
    arguments: argparse.Namespace, note: Callable[[str], None], progress: Callable[[int, int, str], None]
) -> str:
    """What the command prints."""
    options = Options(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)})

    def told(done: int, total: int, place: tuple[str, int], error: float) -> None:
        progress(done, total, f"{place[0]}, relative error {error:.3f}")

    report = run(options, note, told)
    return json.dumps(report.to_dict(), indent=1) if arguments.json else str(report)


# ---------------------------------------------------------------- options


def _method(options: Options) -> Method:
    method = METHODS[options.method]
    if options.refit and not isinstance(method.solver, jp.oneshot.AlternatingDirections):
        method = method._replace(solver=dataclasses.replace(method.solver, refit=True))
    order = options.order or method.order
    return method._replace(order=order, fit=options.fit or ("dense" if order == "products" else "own"))


def _pattern(options: Options) -> Any:
    if not options.pattern:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", options.pattern)
    if found is None:
        raise ValueError(f"--pattern is N:M, such as 2:4, {options.pattern!r} arrived.")
    return jp.NM(int(found[1]), int(found[2]))


def _asked(options: Options, method: Method, model: Language, given: Mapping[str, np.ndarray | None]) -> dict[str, Any]:
    """The options, with what decides the result in the place of names of files."""
    plain = dataclasses.asdict(options) | {"order": method.order, "fit": method.fit}
    for name in ("out", "tokenizer"):
        del plain[name]
    shown = {word: SELF if tokens is None else f"tokens {texts.digest(tokens)}" for word, tokens in given.items()}
    return plain | {"model": _digest_of(model)} | shown


def _digest_of(model: Language) -> str:
    found = hashlib.sha256(repr(model.config).encode())
    for name, leaf in tree.named_leaves(model.params).items():
        found.update(name.encode())
        found.update(np.ascontiguousarray(leaf).data)
    return found.hexdigest()[:16]


def _digest(asked: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _claim(out: Path, asked: dict[str, Any]) -> None:
    """Begin a run in a folder, or refuse it."""
    path = out / ASKED
    if path.exists():
        try:
            before = parsed(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}. Take another --out, or empty it.") from None
        if before != asked:
            words = [
                f"{key} was {before.get(key)!r}, is {asked[key]!r}" for key in asked if before.get(key) != asked[key]
            ]
            raise ValueError(f"{out} holds another run: {'; '.join(words)}. Take another --out, or empty it.")
    elif out.exists() and any(not found.name.endswith(".tmp") for found in out.iterdir()):
        raise ValueError(f"{out} is not empty, and holds no run of this command. Take another --out.")
    else:
        files.write(path, json.dumps(asked, indent=1))


# ---------------------------------------------------------------- texts


def _sizes(options: Options, word: str) -> tuple[int, int]:
    if word == "calibrate":
        return options.samples, options.length
    return options.evaluate_samples, options.evaluate_length or options.length


def _windows(options: Options, model: Language, word: str) -> np.ndarray | None:
    """Windows of text files: of calibration from all over the text, of evaluation the first; None: the model's own."""
    where = getattr(options, word)
    if where == SELF:
        return None
    if model.tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer for the texts of --{word}. Name one: --tokenizer FILE.")
    count, length = _sizes(options, word)
    found = texts.windows(model.tokenizer, texts.files_of(Path(where)), length)
    if len(found) < count:
        raise ValueError(f"--{word} {where} has {len(found)} windows of {length} tokens, {count} were asked for.")
    return found[np.arange(count) * len(found) // count] if word == "calibrate" else found[:count]


def _kept_texts(
    options: Options, asked: Mapping[str, Any], model: Language, word: str, note: Callable[[str], None]
) -> np.ndarray:
    """Texts of the model, from the folder or sampled into it."""
    path, (count, length) = options.out / f"{word}.jaxprune", _sizes(options, word)
    seed = options.seed + (word == "calibrate")
    about = {"model": asked["model"], "seed": seed}
    if path.exists():
        try:
            with Artifact(path) as file:
                tokens = np.asarray(jp.load(path)["tokens"])
                if file.metadata == about and tokens.shape == (count, length):
                    return tokens
        except (ValueError, KeyError):
            pass
        note(f"{path} is damaged, or of another model; the texts are sampled again.")
    note(f"The model samples {count} texts of {length} tokens for --{word} (seed {seed}).")
    known = model.tokenizer
    ends = [] if known is None else [token for token in (known.first, known.last) if token is not None]
    tokens = texts.sampled(model.params, model.config, count, length, seed, first=ends[0] if ends else 1)
    jp.save(path, {"tokens": tokens}, metadata=about)
    return tokens


def _batches(tokens: np.ndarray, most: int) -> list[Any]:
    """Batches of one size, as large as allowed and as divides the texts."""
    size = max(size for size in range(1, most + 1) if len(tokens) % size == 0)
    return [jnp.asarray(tokens[start : start + size]) for start in range(0, len(tokens), size)]


def _diagonal(method: Method) -> bool:
    return getattr(method.solver, "diagonal", False)


def _memory(forward: Callable[..., Any], model: Language, batch: Any, method: Method) -> str:
    """What second moments take, in words."""
    sizes = jp.evidence.bytes_of_moments(forward, model.params, batch, select=SELECT)
    blocks: dict[str, int] = {}
    for name, size in sizes.items():
        key = "" if method.order == "layers" else name.rpartition("/")[0].rpartition("/")[0]
        blocks[key] = blocks.get(key, 0) + size * (1 + (method.fit == "dense"))
    leaves = tree.named_leaves(model.params)
    power = 1 if _diagonal(method) else 2
    outputs = sum(4 * leaves[name].shape[-1] ** power for name in sizes) if method.weighed else 0
    most, weights = max(blocks.values()) + outputs, sum(leaf.nbytes for leaf in leaves.values())
    return (
        f"Second moments take {most / 1e6:,.1f} MB at most, beside {weights / 1e6:,.1f} MB of weights, as many of "
        "pruned ones, and the activations of the texts."
    )
