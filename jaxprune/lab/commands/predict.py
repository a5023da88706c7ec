"""Predicting: the model that a file describes, its answers to images, and how long one image takes, dense and sparse.

model = load("model.jaxprune")
print(predict(model, paths))
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab import models
from jaxprune.lab.bench import contest, session
from jaxprune.lab.commands import convert
from jaxprune.lab.data import images, sets
from jaxprune.lab.recipe import config as cfg
from jaxprune.sparse.tuning import timing
from jaxprune.storage import Artifact
from jaxprune.tables import columns


class Loaded(NamedTuple):
    """A model out of a file, ready for images.

    Attributes:
        apply: (params, images (batch, h, w, c)) -> logits (batch, classes).
        params: dense.
        shape: (h, w, c) of its images, or what else it takes.
        prepare: path of an image, or of a sample as a .npy -> what the model expects.
        labels: names of the classes.
    """

    apply: Callable[..., Any]
    params: Any
    shape: tuple[int, ...]
    prepare: Callable[[Path], np.ndarray]
    labels: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model makes of one image.

    Attributes:
        image: its path.
        label: of the most probable class.
        probability: of that class.
    """

    image: str
    label: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Latency:
    """Time of one image in one form of the model.

    Attributes:
        form: "dense", or the sparse format.
        milliseconds: median of the runs; None if it did not run.
        speedup: of dense over this; None if it did not run.
        kernels: native kernel that really ran -> how often in one call.
        dense_leaves: matrices and kernels that had to stay dense.
        refused: why it did not run; "" if it did.
    """

    form: str
    milliseconds: float | None
    speedup: float | None
    kernels: dict[str, int]
    dense_leaves: tuple[str, ...]
    refused: str


def load(path: Path, own: str = "") -> Loaded:
    """The model that a file's metadata name.

    Args:
        path: of the file.
        own: MODULE:NAME of a model of the user's own, which a file alone may not have imported.

    Raises:
        FileError: a damaged file.
        ValueError: its metadata name no model known here, or code that `own` does not; or its tensors are not that
            model's.
        OSError: it cannot be read.
    """
    with Artifact(path) as file:
        about = convert.metadata_of(file)
        sizes = {name: record.shape for name, record in file.records.items()}
    match about:
        case {"model": {"name": "keras_resnet50"}, "labels": list(labels)}:
            return _keras_resnet50(path, labels)
        case {"model": {"name": str(name)} as model, "image": [int(), *_] as shape, "classes": int(classes)}:
            _refuse_unasked(path, name, own)
            given, image = cfg.Model.model_validate(model), tuple(shape)
        case _:
            raise ValueError(
                f"{path} does not say which model it is: its metadata have no model, image and classes. Files of "
                "`jaxprune run`, and of `jaxprune convert` from a run's checkpoint, do."
            )
    network = models.shapes(given, image, classes)
    kind = str(about.get("data"))
    labels = sets.LABELS.get(kind) or [str(label) for label in range(classes)]
    params = jp.load(path, like=_as_small(network.params, sizes))
    try:
        jax.eval_shape(network.apply, params, jax.ShapeDtypeStruct((1, *image), jnp.float32))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its tensors do not fit together in a {given.name}: {error}") from None
    return Loaded(network.apply, params, image, lambda file: _prepared(file, kind, image), labels)


def _refuse_unasked(path: Path, name: str, own: str) -> None:
    """A file may come from anywhere: code that it names is imported only where the user names it too."""
    if own and name != own:
        raise ValueError(f"{path} is of the model {name}, not of {own}.")
    if ":" in name and not own:
        raise ValueError(
            f"{path} is of a model of your own, {name}, and a file alone imports no code: say --model {name} as well."
        )


def _prepared(file: Path, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """An image as those that the model was trained on, or a sample that an array file holds as it is."""
    if file.suffix == ".npy":
        return _sample(file, kind, shape)
    if len(shape) != 3:
        raise ValueError(f"{file}: expected a sample of shape {shape} as a .npy file: the model takes no images.")
    return images.PREPARE.get(kind, images.photograph)(images.read(file), (shape[0], shape[1], shape[2]))


def _sample(file: Path, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        found = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is no array file: {error}") from None
    pixels = found.dtype == np.uint8
    if (found.shape != shape and (*found.shape, 1) != shape) or not (pixels or found.dtype.kind == "f"):
        raise ValueError(
            f"{file}: expected one sample {shape}, floats or uint8 pixels, arrived {found.dtype} {found.shape}."
        )
    scale = sets.DIGITS_SCALE if kind == "digits" else 255.0
    return found.astype(np.float32).reshape(shape) / np.float32(scale if pixels else 1)


def _as_small(params: Any, sizes: Mapping[str, Sequence[int]]) -> Any:
    """Shapes of a model from which units may be removed: those of the file, where they are no larger."""

    def fitting(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        found = tuple(sizes.get(name, ()))
        smaller = len(found) == len(leaf.shape) and all(
            ours <= most for ours, most in zip(found, leaf.shape, strict=True)
        )
        return jax.ShapeDtypeStruct(found, leaf.dtype) if smaller else leaf

    return tree.map_named(fitting, params)


def _keras_resnet50(path: Path, labels: list[str]) -> Loaded:
    from jaxprune.lab.models import pretrained

    model = pretrained.KERAS_RESNET50
    params = jp.load(path, like=model.shapes())

    def prepare(file: Path) -> np.ndarray:
        images.read(file)  # refuses what is no image
        return np.asarray(pretrained.preprocess(pretrained.load_image(file)[None])[0])

    return Loaded(model.apply, params, model.image, prepare, labels)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """All answers, and the time of one image in each form; `str` is what a terminal shows."""

    answers: tuple[Answer, ...]
    latencies: tuple[Latency, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [(answer.image, answer.label, f"{answer.probability:.2%}") for answer in self.answers]
        times = [_words(latency) for latency in self.latencies]
        header = ("form", "ran", "one image", "faster")
        return f"{columns(('image', 'class', 'probability'), rows, 2)}\n\n{columns(header, times, 2)}"


def _words(latency: Latency) -> tuple[str, ...]:
    if latency.milliseconds is None or latency.speedup is None:
        return (latency.form, f"did not run: {latency.refused}", "-", "-")
    ran = [f"{name} x {count}" for name, count in latency.kernels.items()]
    ran += [f"{len(latency.dense_leaves)} leaves dense"] if latency.dense_leaves else []
    return (latency.form, ", ".join(ran) or "XLA", f"{latency.milliseconds:.3f} ms", f"{latency.speedup:.2f}x")


def predict(model: Loaded, paths: Sequence[Path], formats: Sequence[str] = ()) -> Prediction:
    """Answers to all images, and times of the first.

    Args:
        model: of `load`.
        paths: of the images.
        formats: see `latencies`.

    Raises:
        ValueError: a file is no image, or an unknown format.
        OSError: a file cannot be read.
    """
    return Prediction(tuple(answers(model, paths)), tuple(latencies(model, paths[0], formats)))


def answers(model: Loaded, paths: Sequence[Path]) -> list[Answer]:
    """Class and probability of every image, one after the other.

    Raises:
        ValueError: a file is no image, or shows nothing; it is named.
        OSError: it cannot be read.
    """
    probabilities_of = jax.jit(lambda params, batch: jax.nn.softmax(model.apply(params, batch)[0]))
    found = []
    for path in paths:
        probabilities = np.asarray(probabilities_of(model.params, _batch(model, path)))
        best = int(probabilities.argmax())
        found.append(Answer(str(path), model.labels[best], float(probabilities[best])))
    return found


def _batch(model: Loaded, path: Path) -> jax.Array:
    try:
        return jnp.asarray(model.prepare(path))[None]
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def latencies(model: Loaded, path: Path, formats: Sequence[str] = (), seconds: float = 1.0) -> list[Latency]:
    """Time of one image, dense and in sparse formats, in turns; what differs from dense is refused.

    Args:
        model: of `load`.
        path: the image.
        formats: names in `jaxprune.sparse.FORMATS`; none: those made for one image on this device.
        seconds: aim for all runs together.

    Raises:
        ValueError: an unknown format.
        WrongAnswer: a format computes something else.
    """
    chosen = tuple(formats) or _formats_here()
    contest.check_formats(chosen)
    entries = contest.enter(model.params, chosen)
    results = contest.run(model.apply, entries, _batch(model, path), seconds=seconds)
    base = timing.spread(results["dense"].runs).median
    return [_latency(form, entries[form], result, base) for form, result in results.items()]


def _formats_here() -> tuple[str, ...]:
    platform = jax.default_backend()
    return ("native", "native_row", "native_bits") if platform == "cpu" else session.default_formats(platform)[:1]


def _latency(form: str, entry: contest.Entry, result: contest.Result, base: float) -> Latency:
    ran = None if result.refused else timing.spread(result.runs).median
    return Latency(
        form=form,
        milliseconds=ran,
        speedup=base / ran if ran else None,
        kernels={name: count for name, count in result.custom_calls.items() if name.startswith("jaxprune")},
        dense_leaves=tuple(name for names in entry.stayed.values() for name in names),
        refused=result.refused,
    )
