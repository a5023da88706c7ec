"""Code of Markdown pages: found, run in order, and what it prints held against what the page shows.

A line `% not run: REASON` right above a block of Python says that it is not run, and why. A block of text below
`% printed` is what the block of Python before it printed, where `...` stands for anything, as in doctests.
"""

import contextlib
import doctest
import io
import re
from typing import NamedTuple

BLOCK = re.compile(
    r"^(?:% (?P<mark>[^\n]*)\n)?```(?P<language>python|text)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """A block of a page.

    Attributes:
        language: "python" or "text".
        code: what is in it.
        mark: the comment right above it, "" if there is none.
        line: of the page, where its code begins, from 0.
    """

    language: str
    code: str
    mark: str
    line: int


def blocks(text):
    """Blocks of Python and of text, in order."""
    return [
        Block(found["language"], found["code"], found["mark"] or "", text.count("\n", 0, found.start("code")))
        for found in BLOCK.finditer(text)
    ]


def python(text):
    """The Python of the blocks that are run."""
    return [block.code for block in blocks(text) if block.language == "python" and not is_left_out(block)]


def is_left_out(block):
    return block.mark.startswith("not run: ")


def run(path, names):
    """Run a page's blocks one after the other in one namespace; what is printed must be what is shown."""
    printed, checker = "", doctest.OutputChecker()
    for block in blocks(path.read_text("utf-8")):
        if block.language == "text" and block.mark == "printed":
            assert checker.check_output(block.code, printed, SAME), f"{path}:{block.line + 1}: printed\n{printed}"
        elif block.language == "python" and not is_left_out(block):
            with contextlib.redirect_stdout(io.StringIO()) as caught:
                exec(compile("\n" * block.line + block.code, str(path), "exec"), names)
            printed = caught.getvalue()
