"""README.md: its links lead to files, every name of the library in it is one. Its code is run by test_examples.py."""

import ast
import operator
import re
from pathlib import Path

import markdown_code
import pytest

import jaxprune as jp

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("block", markdown_code.python(README.read_text()), ids=lambda block: block.split("\n")[0][:40])
def test_names_of_the_library(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and (name := re.fullmatch(r"jp\.([\w.]+)", ast.unparse(node))):
            operator.attrgetter(name[1])(jp)


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text())
    assert len(links) > 15
    assert [link for link in links if not (README.parent / link).exists()] == []
