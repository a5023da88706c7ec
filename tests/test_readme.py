"""What README.md shows is run as it stands there, and every name of the library in it is one."""

import ast
import functools
import operator
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import markdown_code
import numpy as np
import pytest

import jaxprune as jp

README = Path(__file__).parents[1] / "README.md"


def section(title):
    """The text under a heading of the second level."""
    return re.search(rf"^## {title}\n(.*?)^## ", README.read_text(), re.MULTILINE | re.DOTALL)[1]


@pytest.mark.usefixtures("relaxed")
def test_from_training_to_deployment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jp.sparse, "tune", functools.partial(jp.sparse.tune, cache=None, repeats=5))
    seen = {}
    for block in markdown_code.python(section("From training to deployment")):
        exec(compile(block, str(README), "exec"), seen)
    printed = capsys.readouterr().out
    assert "first/kernel   64x256" in printed
    alive = sum(int(jnp.sum(mask)) for mask in jax.tree.leaves(seen["masks"]) if mask.ndim > 1)
    assert alive == round(0.1 * (64 * 256 + 256 * 10))
    assert alive == sum(int(jnp.sum(leaf != 0)) for leaf in jax.tree.leaves(seen["params"]) if leaf.ndim > 1)
    kilobytes = re.search(r"(\d+) kB; dense it was (\d+)", README.read_text())
    dense = sum(leaf.nbytes for leaf in jax.tree.leaves((seen["params"], seen["rest"])) if leaf.dtype == jnp.float32)
    sizes = (tmp_path / "net.jaxprune").stat().st_size / 1000, dense / 1000
    assert np.allclose(sizes, [int(number) for number in kilobytes.groups()], atol=1)
    logits = seen["predict"](seen["sparse_params"], seen["x_test"])
    assert np.allclose(logits, seen["model"](seen["x_test"]), atol=1e-4)
    assert float(np.mean(logits.argmax(-1) == seen["y_test"])) > 0.9


@pytest.mark.parametrize("block", markdown_code.python(README.read_text()), ids=lambda block: block.split("\n")[0][:40])
def test_names_of_the_library(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and (name := re.fullmatch(r"jp\.([\w.]+)", ast.unparse(node))):
            operator.attrgetter(name[1])(jp)
