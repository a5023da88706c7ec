"""Rows as text for a terminal: the numbers, where sparsity starts to pay, and what did not run and why."""

from collections.abc import Sequence

from jaxprune.lab.bench.rows import Row, break_evens

HEADER = ("model", "batch", "zeros", "contestant", "median ms", "(quartiles)", "x dense", "GFLOP/s", "of peak", "GB/s",
          "of peak", "MB", "lower s", "compile s", "custom calls")  # fmt: skip
LEFT = (0, 2, 3, 14)  # columns of words


def text(rows: Sequence[Row]) -> str:
    """The table, break-even sparsities, and what was left out with the reason."""
    parts = [_columns([HEADER, *(_cells(row) for row in rows if not row["refused"])])]
    parts += [lines for lines in (_break_even_lines(rows), _stayed_lines(rows), _refused_lines(rows)) if lines]
    return "\n\n".join("\n".join(lines) for lines in parts)


def zeros(row: Row) -> str:
    """How sparse the case is, in words: "90 %", or the name of the profile."""
    return f"{100 * row['sparsity']:.4g} %" if isinstance(row["sparsity"], float) else str(row["sparsity"])


def _cells(row: Row) -> tuple[str, ...]:
    calls = ", ".join(f"{target} x{n}" if n > 1 else target for target, n in sorted(row["custom_calls"].items()))
    return (
        row["model"],
        str(row["batch"]),
        zeros(row),
        row["contestant"],
        f"{row['median_ms']:.3f}",
        f"({row['low_ms']:.3f}-{row['high_ms']:.3f})",
        f"{row['ratio']:.2f}",
        f"{row['gflops']:.1f}",
        f"{row['of_peak_gflops']:.0%}",
        f"{row['gbytes']:.1f}",
        f"{row['of_peak_gbytes']:.0%}",
        f"{row['bytes'] / 1e6:.2f}",
        "" if row["lower_s"] is None else f"{row['lower_s']:.2f}",
        "" if row["compile_s"] is None else f"{row['compile_s']:.2f}",
        calls,
    )


def _columns(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in LEFT else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def _break_even_lines(rows: Sequence[Row]) -> list[str]:
    """A line per model and contestant: the sparsity from which on it beats dense, at each batch."""
    found: dict[tuple[str, str], list[str]] = {}
    for (model, batch, contestant), (word, sparsity) in break_evens(rows).items():
        answer = word if sparsity is None else f"{'below ' if word == 'below' else ''}{100 * sparsity:.3g} %"
        found.setdefault((model, contestant), []).append(f"batch {batch}: {answer}")
    if not found:
        return []
    table = [(model, contestant, ", ".join(answers)) for (model, contestant), answers in found.items()]
    wide, long = (max(len(line[i]) for line in table) for i in (0, 1))
    head = "Break-even: the sparsity from which on it is faster than dense (none: not at any measured)"
    return [head, *(f"  {model:<{wide}}  {contestant:<{long}}  {answer}" for model, contestant, answer in table)]


def _stayed_lines(rows: Sequence[Row]) -> list[str]:
    lines: dict[str, None] = {}
    for row in rows:
        for why, names in row.get("dense_leaves", {}).items():
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            total = row["compressed_leaves"] + sum(map(len, row["dense_leaves"].values()))
            lines[f"{row['model']} {row['contestant']}: {len(names)} of {total} leaves dense ({some}): {why}"] = None
    return list(lines)


def _refused_lines(rows: Sequence[Row]) -> list[str]:
    """One line per contestant and model, however many cases it was refused in."""
    first = {(row["model"], row["contestant"]): row["refused"] for row in reversed(rows) if row["refused"]}
    return [f"{model} {contestant} did not run: {reason}" for (model, contestant), reason in first.items()]
