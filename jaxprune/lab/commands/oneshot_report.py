"""What one-shot pruning of a language model came to: beside dense, and the error of every product."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxprune import tables
from jaxprune.lab.models.language.evaluation import Comparison
from jaxprune.storage.container import FileError, parsed


@dataclasses.dataclass(frozen=True)
class Report:
    """What came of it.

    Attributes:
        asked: the options, digests of model and texts among them.
        sparsity: of the pruned matrices together.
        found: beside the dense model, on the texts of evaluation.
        errors: "layers/0/query/kernel" -> of its outputs, relative to those wanted, see `jp.oneshot.Solution`.
        texts: digests of the tokens of calibration and evaluation.
    """

    asked: dict[str, Any]
    sparsity: float
    found: Comparison
    errors: dict[str, float]
    texts: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        one = self.found
        rows = [
            ("perplexity", f"{one.perplexity:.3f}", f"{one.dense:.3f}"),
            ("KL to dense, nats a token", f"{one.divergence:.4f}", "0"),
            ("same likeliest token", f"{one.agreement:.1%}", "100.0%"),
            ("sparsity of the pruned matrices", f"{self.sparsity:.2%}", ""),
        ]
        return (
            f"{tables.columns(('', 'pruned', 'dense'), rows, 1)}\n\nRelative error of every product:\n\n{self._errors}"
        )

    @property
    def _errors(self) -> str:
        blocks: dict[str, dict[str, float]] = {}
        for name, error in self.errors.items():
            block, _, product = name.removesuffix("/kernel").rpartition("/")
            blocks.setdefault(block, {})[product] = error
        header = list(dict.fromkeys(product for block in blocks.values() for product in block))
        rows = [
            (name, *(f"{block[one]:.3f}" if one in block else "" for one in header)) for name, block in blocks.items()
        ]
        return tables.columns(("", *header), rows, 1)


def read(path: Path) -> Report:
    """The report of a finished run.

    Raises:
        FileError: it is damaged.
        OSError: it cannot be read.
    """
    try:
        plain = parsed(path.read_text("utf-8"))
        return Report(**plain | {"found": Comparison(**plain["found"])})
    except (ValueError, TypeError, KeyError) as error:
        raise FileError(f"{path} is damaged: {error}. Delete it, and the same command makes it again.") from None
