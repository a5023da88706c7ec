"""How the site is built: `sphinx-build -W --keep-going docs docs/_build`."""

import argparse
import re
import sys
from pathlib import Path

import jaxprune
from jaxprune.lab.commands import main

sys.path.append(str(Path(__file__).parent))

project = "jaxprune"
author = "The jaxprune authors"
project_copyright = "The jaxprune authors, Apache-2.0"
version = release = jaxprune.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "formulas",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_generated", "Thumbs.db"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
default_role = (
    "py:obj"  # `name` in a docstring is a link where there is such a name, else code
)

# References that pages make (`{py:func}`, links, anchors) must resolve. Names in docstrings may be those of arguments
# or of other libraries, and types in signatures are shown as they are written.
nitpicky = True
nitpick_ignore_regex = [("py:(obj|class|exc)", ".*")]
suppress_warnings = [
    "ref.python"
]  # a name in a docstring that two modules have, as `ByRule`, links to one of them

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"jaxprune {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"


def commands() -> str:
    """The help of every command, as Markdown."""
    parts = []

    def describe(parser: argparse.ArgumentParser, depth: int) -> None:
        if depth:
            parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, width=88
            )
            heading = "#" * (depth + 1)
            parts.append(
                f"{heading} `{parser.prog}`\n\n```text\n{parser.format_help().rstrip()}\n```\n"
            )
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    describe(command, depth + 1)

    describe(main._parser(), 0)
    return "\n".join(parts)


def write_generated(app) -> None:
    """What pages include and nobody writes by hand."""
    folder = Path(app.srcdir) / "_generated"
    folder.mkdir(exist_ok=True)
    path = folder / "commands.md"
    text = re.sub(r"\n{3,}", "\n\n", commands())
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def setup(app) -> None:
    """Write the pages that are generated before any is read."""
    app.connect("builder-inited", write_generated)
