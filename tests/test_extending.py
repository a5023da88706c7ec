"""One file and one line: what is added to a room is a word of configs, a key of their reference, a case of the battery.

The package is copied, a criterion, a granularity, a distribution and a schedule are added to the copy as a user would,
each a file and its line in the room, and everything else is asked of the copy in processes of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CRITERION = '''
"""The cube of a weight."""

import jax.numpy as jnp


def cube(params, /, **_):
    """Cube of the absolute value."""
    return {name: jnp.abs(param.astype(jnp.float32)) ** 3 for name, param in params.items()}
'''
GRANULARITY = '''
"""Neighbours."""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class InARow:
    """Weights of neighbouring outputs.

    Attributes:
        size: how many are in a group, and the
            outputs must divide by it.
    """

    size: int = 2

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"`InARow(size)` needs size >= 1, got {self.size}.")

    def pool(self, scores):
        return scores.reshape(*scores.shape[:-1], -1, self.size).mean(-1)

    def expand(self, kept, shape):
        return jnp.repeat(kept, self.size, axis=-1)
'''
DISTRIBUTION = '''
"""A bound on what a leaf loses."""

import dataclasses

import jax.numpy as jnp

from jaxprune.distributions.contest import contest, required


@dataclasses.dataclass(frozen=True)
class Capped:
    """Every leaf loses the same, up to a bound.

    Attributes:
        most: the largest sparsity of a leaf.
    """

    most: float = 0.5

    def __call__(self, groups, sparsity, *, dims):
        share = jnp.minimum(jnp.float32(required(sparsity, self)), jnp.float32(self.most))
        return {name: contest(scores, share) for name, scores in groups.items()}
'''
SCHEDULE = '''
"""Half way between linear and cubic."""

import jax.numpy as jnp


def quadratic(final, *, begin, end, initial=0.0):
    """Faster at first."""

    def schedule(step):
        done = jnp.clip((jnp.asarray(step, jnp.float32) - begin) / max(end - begin, 1), 0.0, 1.0)
        return jnp.where(done == 1, jnp.float32(final), final + (initial - final) * (1.0 - done) ** 2)

    return schedule
'''
ADDED = {  # file -> its text, the room's own file, what its line there imports
    "criteria/cubes.py": (CRITERION, "criteria/__init__.py", "cube"),
    "neighbours.py": (GRANULARITY, "granularity.py", "InARow"),
    "distributions/caps.py": (DISTRIBUTION, "distributions/__init__.py", "Capped"),
    "quadratics.py": (SCHEDULE, "schedules.py", "quadratic"),
}

FROM_PYTHON = """
import jax, jax.numpy as jnp, jaxprune as jp
from jaxprune.criteria import cube
from jaxprune.distributions import Capped
from jaxprune.granularity import InARow
from jaxprune.schedules import quadratic
params = {"kernel": jax.random.normal(jax.random.key(0), (4, 8))}
masks = jp.compute_masks(jp.Method(cube, InARow(4), Capped(0.25)), params, 0.9)
assert int(masks["kernel"].sum()) == 24, masks
assert float(quadratic(0.8, begin=0, end=4)(4)) == jnp.float32(0.8)
"""
CONFIG = """
name = "added"
data.name = "digits"
model.widths = [8]
train.duration = "4 steps"
finetune.duration = "1 step"
[prune]
how = "gradual"
criterion = "cube"
granularity = {name = "in_a_row", size = 2}
distribution = {name = "capped", most = 0.25}
schedule = "quadratic"
sparsity = 0.5
duration = "4 steps"
update_every = "1 step"
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository, with a file and a line more for each answer."""
    root = tmp_path_factory.mktemp("copy")
    left_out = shutil.ignore_patterns("__pycache__", "test_*.py")
    shutil.copytree(ROOT / "jaxprune", root / "jaxprune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", root / "tests", ignore=left_out)
    shutil.copy(ROOT / "tests/batteries/test_battery.py", root / "tests/batteries")
    shutil.copy(ROOT / "pyproject.toml", root)
    for file, (text, room, name) in ADDED.items():
        (root / "jaxprune" / file).write_text(text.lstrip())
        module = file.removesuffix(".py").replace("/", ".")
        with (root / "jaxprune" / room).open("a") as end:
            end.write(f"from jaxprune.{module} import {name} as {name}\n")
    return root


def asked(copy, *words):
    """Exit code and what a program says that has the copy for its package."""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    return subprocess.run([sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True)


def test_python_has_them(copy):
    said = asked(copy, "-c", FROM_PYTHON)
    assert said.returncode == 0, said.stderr


def test_a_config_can_name_them_and_a_run_prunes_with_them(copy):
    (copy / "added.toml").write_text(CONFIG)
    command = ["-m", "jaxprune.lab.commands.main", "run", "added.toml", "--quiet", "--out", "out"]
    said = asked(copy, *command)
    assert said.returncode == 0, said.stderr
    # 64 x 8 and 8 x 10 weights in pairs: a quarter of each, though half was asked for.
    assert json.loads((copy / "out/results.json").read_text())["sparsity"]["values"] == [0.25]
    bad = asked(copy, *command, "--prune.granularity.size", "0")
    assert "granularity: `InARow(size)` needs size >= 1, got 0." in bad.stderr
    bad = asked(copy, *command, "--prune.distribution.mots", "0.5")
    assert bad.stderr == "jaxprune: --prune.distribution.mots: unknown key, did you mean most?\n"


def test_the_reference_describes_them(copy):
    text = asked(copy, "-m", "jaxprune.lab.commands.main", "keys").stdout
    said = "how many are in a group, and the outputs must divide by it."
    assert '- `"in_a_row"`: Weights of neighbouring outputs.' in text
    assert f'| `size` | an integer | `2` | `name` = `"in_a_row"` | {said} |' in text
    assert '| `most` | a number | `0.5` | `name` = `"capped"` | the largest sparsity of a leaf. |' in text
    assert '`"cube"`, ' in text
    assert '`"quadratic"`, ' in text


def test_the_battery_takes_them_up(copy):
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/batteries/test_battery.py"]
    said = asked(copy, *command, "-k", "exact_counts and (cube or in_a_row or capped)")
    assert said.returncode == 0, said.stdout
    assert "3 passed" in said.stdout
