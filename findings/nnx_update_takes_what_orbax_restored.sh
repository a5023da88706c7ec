#!/usr/bin/env bash
# flax 0.12.8 with orbax-checkpoint 0.12.8 (jax 0.10.2), Python 3.11 or newer, CPU.
#
# Guess: an NNX state saved by Orbax and restored without a target, a dict of dicts, either sets the model's variables by
#   `nnx.update`, or is refused because it is no state.
# Seen: Orbax gives every variable as {"value": array}. `nnx.update(model, restored)` says nothing and puts that dict
#   into the variable, in the place of its array. Only the next call of the model fails, with `KeyError: Ellipsis`, in a
#   line of flax's own that says nothing of checkpoints.
# What it means: the error is far from its cause, and a script that restores and saves again without a forward pass
#   writes the wrong tree. Restore with a target, or drop the level "value". Files of jaxprune hold the arrays themselves.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.11 "$HOME"/.pyenv/versions/3.11*/bin/python python3; do
  "$python" -c "import venv" >/dev/null 2>&1 && break
done
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  flax==0.12.8 orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - "$folder/saved" <<'PY'
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[1], nnx.state(model))
with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(sys.argv[1])
print("restored:", {name: type(leaf).__name__ for name, leaf in restored.items()})
nnx.update(model, restored)
print("the kernel's value is now a", type(model.kernel.get_value()).__name__)
try:
    model(jnp.ones((1, 2)))
except KeyError as error:
    print("calling the model:", repr(error))
    assert error.args == (Ellipsis,)
else:
    raise AssertionError("the model runs: what was restored is taken, or refused earlier")
PY
