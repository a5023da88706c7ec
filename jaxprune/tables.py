"""Tables of text cells, as columns for a terminal and as GitHub's Markdown.

The first `words` columns hold words and stand to the left, the others hold numbers and stand to the right.
"""

import abc
from collections.abc import Iterable, Sequence


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """The table for a terminal, under its header and a rule.

    Args:
        header: a name for each column.
        rows: cells, as many a row as the header has.
        words: how many of the first columns hold words.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row: Iterable[str]) -> str:
        cells = (c.ljust(w) if i < words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line("-" * width for width in widths), *map(line, rows)])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """The table in Markdown.

    Args:
        header: a name for each column.
        rows: cells, as many a row as the header has.
        words: how many of the first columns hold words.
    """
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


class Table(abc.ABC):
    """What can be written as a table; `str(table)` is the one for a terminal."""

    @property
    @abc.abstractmethod
    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]], int]:
        """Header, rows, and how many of the first columns hold words."""

    def to_markdown(self) -> str:
        """A GitHub table."""
        return markdown(*self.cells)

    def __str__(self) -> str:
        return columns(*self.cells)
