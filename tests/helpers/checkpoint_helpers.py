"""States that show which step they are of, saved and compared bit for bit; shared by the tests of checkpoints."""

import jax
import numpy as np

from jaxprune.lab.checkpoints import flat
from jaxprune.lab.checkpoints.checkpoint import save


def state_of(step):
    """A state that shows which step it is of, in every leaf."""
    return {"w": np.full((50, 30), step, np.float32), "mask": np.arange(9) % 2 == step % 2, "step": step}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert flat.leaves(a) == flat.leaves(b)
    assert [type(x) for x in jax.tree.leaves(a)] == [type(x) for x in jax.tree.leaves(b)]
    first, second = flat.to_arrays(a), flat.to_arrays(b)
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in second.items()}


def assert_is_step(found, step):
    assert found.step == step
    assert found.meta == {"step": step}
    assert_same(found.state, state_of(step))


def save_steps(folder, *steps, keep=9):
    for step in steps:
        save(folder, step, state_of(step), {"step": step}, keep=keep)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())
