"""The work of `jaxprune costs`: a model of the list by its shapes alone, dense and with the non-zeros of a profile.

    found = of_model("resnet50", "experiments/benchmarks/profiles/resnet50.csv")
    print(text(found))

A profile without masks says how many weights of a layer are not zero, and that fraction of its multiply-adds is left.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from jaxprune import tables
from jaxprune.lab.bench import sparsify
from jaxprune.lab.models import zoo
from jaxprune.lab.report import cost_figures, figures
from jaxprune.tracing.activations import peak_activations
from jaxprune.tracing.cost_model import Costs, costs
from jaxprune.tracing.finder import trace
from jaxprune.tracing.sites import PRODUCTS

HEADER = ("in all", "weights", "reduction", "GMACs", "reduction")


@dataclasses.dataclass(frozen=True)
class ModelCosts:
    """One model, its costs dense and under each column of a profile.

    Attributes:
        model: its name.
        sample: shape of one input, (h, w, c) for an image.
        batch: inputs in one call, which multiply-adds and activations are of.
        parameters: numbers in its params, biases, norms and their statistics included.
        parameter_bytes: what they take.
        activation_bytes: the most activations alive at once.
        dense: costs of the leaves that products and convolutions use.
        profiles: column of the profile -> the same with its non-zeros.
    """

    model: str
    sample: tuple[int, ...]
    batch: int
    parameters: int
    parameter_bytes: int
    activation_bytes: int
    dense: Costs
    profiles: dict[str, Costs]

    @property
    def tables(self) -> dict[str, Costs]:
        """What is worth a table of layers: the profiles, or the dense model where there is none."""
        return self.profiles or {"dense": self.dense}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the attributes, `Costs.to_dict` of the dense model and of each profile."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        profiles = {column: found.to_dict() for column, found in self.profiles.items()}
        return {**plain, "sample": list(self.sample), "dense": self.dense.to_dict(), "profiles": profiles}


def of_model(name: str, profile: str = "", side: int | None = None, batch: int = 1) -> ModelCosts:
    """Costs of a model of the list, without weights in memory.

    Args:
        name: one of `jaxprune.lab.models.zoo.NAMES`.
        profile: "FILE", all columns, or "FILE:COLUMN"; "" for none. As `sparsify.read_profile` has it.
        side: height and width of the images; without it the model's own.
        batch: inputs in one call.

    Raises:
        ValueError: an unknown model, images too small, a batch below 1, a profile that is not this model's.
    """
    if batch < 1:
        raise ValueError(f"A batch has one input or more, {batch} arrived.")
    network = zoo.shapes(name, side)
    inputs = jax.ShapeDtypeStruct((batch, *network.sample.shape), network.sample.dtype)
    sites = trace(network.apply, network.params, inputs)
    dense = costs([site for site in sites if site.kind in PRODUCTS])
    leaves = jax.tree.leaves(network.params)
    return ModelCosts(
        model=name,
        sample=network.sample.shape,
        batch=batch,
        parameters=sum(math.prod(leaf.shape) for leaf in leaves),
        parameter_bytes=sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves),
        activation_bytes=peak_activations(network.apply, network.params, inputs),
        dense=dense,
        profiles={
            place.rpartition(":")[2].removeprefix("nonzero_"): dense.with_nonzeros(
                sparsify.profile_counts(network.params, sparsify.read_profile(place))
            )
            for place in _places(profile)
        },
    )


def _places(profile: str) -> list[str]:
    """Every column that is meant, as "FILE:COLUMN"."""
    if not profile:
        return []
    if not Path(profile).is_file():
        if ":" not in profile:
            raise ValueError(
                f"There is no profile {profile!r}: give a csv file, or FILE:COLUMN for one of its columns."
            )
        return [profile]
    reader, columns = sparsify.open_profile(profile)
    if not columns:
        header = ",".join(reader.fieldnames or ())
        raise ValueError(f"{profile} is no profile: its header names no column nonzero_.... It reads {header[:80]!r}.")
    return [f"{profile}:{column}" for column in columns]


def text(found: ModelCosts, *, markdown: bool = False) -> str:
    """A table of layers for each profile, one of totals, and what the model takes in all.

    Args:
        found: of `of_model`.
        markdown: GitHub's tables, under headings.
    """
    size = " x ".join(map(str, found.sample))
    parts = [f"{'# ' * markdown}{found.model}, batch {found.batch}, inputs {size}"]
    for column, one in found.tables.items():
        parts += [f"## {column}", one.to_markdown()] if markdown else [f"{column}\n\n{one}"]
    rows = [total(column, one) for column, one in {"dense": found.dense, **found.profiles}.items()]
    parts.append((tables.markdown if markdown else tables.columns)(HEADER, rows, words=1))
    parts.append(
        f"{found.parameters:,} parameters with biases, norms and their statistics: "
        f"{found.parameter_bytes / 1e6:,.1f} MB; activations at their peak: {found.activation_bytes / 1e6:,.1f} MB."
    )
    return "\n\n".join(parts)


def total(column: str, found: Costs) -> tuple[str, ...]:
    """Cells of `HEADER`: weights that are not zero, multiply-adds that are left in GMACs, and times fewer of both."""
    all_of_it = found.total
    macs = f"{all_of_it.macs_left / 1e9:.4f}"
    return (column, f"{all_of_it.nnz:,}", f"{all_of_it.reduction:.2f}x", macs, f"{all_of_it.macs_reduction:.2f}x")


def draw(found: ModelCosts, folder: Path) -> list[Path]:
    """Write a figure of each table of layers; returns where they are.

    Args:
        found: of `of_model`.
        folder: is made if it is not there.
    """
    paths = []
    for column, one in found.tables.items():
        paths.append(folder / f"costs_{found.model}_{column}.png")
        figures.save(cost_figures.layer_costs(one, f"{found.model}, {column}, batch {found.batch}"), paths[-1])
    return paths
