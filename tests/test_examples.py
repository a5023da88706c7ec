"""Every example that is shown is run: the blocks of README.md, and every `>>>` of a docstring."""

import contextlib
import doctest
import importlib
import io
import pkgutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import markdown_code
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune.quantize.codes import to_codebooks

README = Path(__file__).parents[1] / "README.md"


def examples():
    """Docstrings with an example, of every module."""
    found = []
    for module in pkgutil.walk_packages(jp.__path__, "jaxprune."):
        source = importlib.util.find_spec(module.name).origin
        if source.endswith(".py") and ">>> " in Path(source).read_text():
            tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module.name))
            found += [one for one in tests if one.examples]
    return found


def apply_fn(params, x):
    for name in ("conv1", "conv2"):
        x = jax.lax.conv_general_dilated(
            x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
    x = jax.nn.relu(x.mean((1, 2)) @ params["dense"]["kernel"])
    return x @ params["out"]["kernel"]


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """What examples speak of without making it: a small network, its data and what was computed before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rng = np.random.default_rng(0)
    shapes = {"conv1": (3, 3, 4, 8), "conv2": (3, 3, 8, 16), "dense": (16, 32), "out": (32, 8)}
    params = {name: {"kernel": jnp.float32(rng.standard_normal(shape) * 0.2)} for name, shape in shapes.items()}
    x = jnp.float32(rng.standard_normal((4, 8, 8, 4)))
    labels = jnp.argmax(apply_fn(params, x), -1)
    method = jp.Method(layout=jp.FLAX)
    masks = jp.compute_masks(method, params, 0.5)
    return {
        "jp": jp, "jax": jax, "jnp": jnp, "optax": optax, "apply_fn": apply_fn, "params": params, "x": x,
        "model": SimpleNamespace(apply=apply_fn), "batches": [x, x + 1], "method": method, "masks": masks,
        "key": jax.random.key(0),
        "grads": jax.grad(lambda params: apply_fn(params, x).mean())(params),
        "accuracy": lambda params: float(jnp.mean(jnp.argmax(apply_fn(params, x), -1) == labels)),
        "couplings": jp.couplings(apply_fn, params, x), "train": lambda params, masks, number: params,
        "logits": apply_fn(jp.apply_masks(params, masks), x), "to_codebooks": to_codebooks,
    }  # fmt: skip


def a_module():
    """The same where the model is a module, pruned by channels."""
    model, x, call = Net(nnx.Rngs(0)), jnp.ones((4, 16)), lambda model, x: model(x)
    method = jp.Method(granularity=jp.Channels(jp.couplings(call, model, x)))
    masks = jp.compute_masks(method, model, 0.5)
    return {"model": model, "x": x, "masks": masks, "small": jp.compact(call, model, masks, x)}


@pytest.mark.usefixtures("relaxed")
@pytest.mark.parametrize("block", markdown_code.python(README.read_text()), ids=lambda block: block.split("\n")[0][:50])
def test_blocks_of_the_readme_run(block, world):
    exec(compile(block, str(README), "exec"), world)


@pytest.mark.usefixtures("relaxed")
@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_examples_of_docstrings_run(example, world):
    names, checker = example.globs | world, doctest.OutputChecker()
    names |= a_module() if example.name.endswith("resized") else {}
    for one in example.examples:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(one.source, example.name, "single"), names)
        if one.want:  # what a line gives is not always shown
            assert checker.check_output(one.want, printed.getvalue(), doctest.ELLIPSIS), printed.getvalue()
