#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 (jax 0.10.2, flax not needed), Python 3.11 or newer, CPU.
#
# Guess: a pytree with a key "a.b" beside a nested {"a": {"b": ...}} is saved as two arrays, or refused; names of leaves
#   with dots come from flat dicts, as PyTorch's `state_dict` has them, merged into a nested tree.
# Seen: both leaves are written under the one name "a.b". `save` and `restore` of `StandardCheckpointer` succeed, and
#   both leaves come back with the values of one of them; the other's are gone without a word.
# What it means: a tree that mixes the two ways of naming loses weights in a checkpoint that "worked". jaxprune refuses
#   such trees by both names before it writes an Orbax folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.11 "$HOME"/.pyenv/versions/3.11*/bin/python python3; do
  "$python" -c "import venv" >/dev/null 2>&1 && break
done
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder/saved" <<'PY'
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp

tree = {"a.b": jnp.zeros(2), "a": {"b": jnp.ones(2)}}
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[1], tree)
with ocp.StandardCheckpointer() as checkpointer:
    back = checkpointer.restore(sys.argv[1], tree)
print("saved:   ", tree)
print("restored:", back)
assert back["a.b"].tolist() == back["a"]["b"].tolist(), "the leaves are told apart now"
PY
