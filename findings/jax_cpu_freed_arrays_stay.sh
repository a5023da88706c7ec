#!/usr/bin/env bash
# On Linux, weights that are replaced one after the other leave most of the freed arrays in the process's memory.
#
# 240 matrices of a language model's sizes (0.4 to 3.5 MB, 531 MB in all) are replaced one by one, as layer-wise pruning
# or quantization does: a product and a new matrix are computed, a mask is kept (133 MB in the end), and the old matrix
# is deleted with `Array.delete()`. So 664 MB are alive at the end. A good guess is a process that grows by the masks.
#
# What was seen with jaxlib 0.12.0.1 and glibc 2.36: it grows by four times that, from 793 to 1,357 MB. XLA's CPU
# allocator is the C library's. glibc maps an array by itself, and unmaps it when it is freed, only above a threshold
# which rises to the size of the largest array that was ever freed, up to 32 MB. After the first large one all smaller
# arrays lie on the heap, between what stays, and the heap shrinks only at its end. With the threshold held at 256 KiB by
# `mallopt` before the first array the same program goes from 755 to 886 MB.
#
# Needs Python 3.12 or later and glibc (PYTHON names another than python3). Exits with 1 if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/replaced.py" <<'PROGRAM'
import ctypes
import sys

if sys.argv[1] == "held":
    ctypes.CDLL(None).mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD

import jax
import jax.numpy as jnp
import numpy as np


def resident():
    """Megabytes of this process that are in memory now."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmRSS"))


moments = jax.jit(lambda weight: weight @ weight.T)
new = jax.jit(lambda weight, sums: sums @ weight)
shapes = [(576, 576), (576, 192), (576, 1536), (1536, 576)]
weights = [jnp.array(np.ones(shape, np.float32)) for _ in range(60) for shape in shapes]
before, masks = resident(), []
for i, old in enumerate(weights):
    weights[i] = new(old, moments(old))
    masks.append(np.asarray(weights[i]) != 0)
    old.delete()
    del old
alive = sum(mask.nbytes for mask in masks) // 10**6
print(f"{sys.argv[1]}: {before} MB before, {resident()} after, of which {alive} are masks")
sys.exit(0 if (resident() - before > 2.5 * alive) == (sys.argv[1] == "own") else 1)
PROGRAM
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1
for threshold in own held; do
  JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/replaced.py" "$threshold" ||
    { echo "changed: with a threshold of its $threshold"; exit 1; }
done
echo "as described"
