#!/usr/bin/env bash
# What keeps XLA on a CPU from rounding a product and a sum only once: neither reduce_precision, nor a barrier in 0.10.
#
# a * b + c in float32, of 4,096 numbers each. With two roundings, as NumPy computes it, 985 of the results are others
# than with one, as a fused multiply-add computes it. Who wants the first, to be equal to a kernel or to another machine
# to the bit, has two operations that say so: `lax.reduce_precision(a * b, 8, 23)`, which rounds to float32, and
# `lax.optimization_barrier(a * b)`. A good guess is that both hold.
#
# What was seen: jitted code fuses a * b + c on jaxlib 0.10.2 and 0.12.0.1. reduce_precision to the precision that the
# number has is taken out on both, and the result has one rounding. The barrier holds on 0.12.0.1; on 0.10.2 it is gone
# before code is made, and the result has one rounding too. What holds on both is a maximum with the smallest float32,
# which changes no number but comes between. And of two factors that are constants, (x * 0.1) * 0.7, 0.10.2 makes one,
# which changes 949 results; 0.12.0.1 does not.
#
# Needs Python 3.12 or later and a processor with fused multiply-add (PYTHON names another than python3). Exits with 1
# if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/rounded.py" <<'PROGRAM'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

a, b, c = np.random.default_rng(0).normal(size=(3, 4096)).astype(np.float32)
twice, once = a * b + c, np.float32(np.float64(a) * np.float64(b) + np.float64(c))
assert 900 < np.sum(twice != once) < 1100
ways = {
    "plain": lambda product: product,
    "reduce_precision": lambda product: lax.reduce_precision(product, 8, 23),
    "barrier": lax.optimization_barrier,
    "maximum": lambda product: jnp.maximum(product, jnp.finfo(jnp.float32).min),
}
found = {}
for name, way in ways.items():
    result = np.asarray(jax.jit(lambda a, b, c, way=way: way(a * b) + c)(a, b, c))
    assert (result == once).all() or (result == twice).all()
    found[name] = 1 if (result == once).all() else 2
scaled = np.asarray(jax.jit(lambda x: x * np.float32(0.1) * np.float32(0.7))(a))
changed = int(np.sum(scaled != a * np.float32(0.1) * np.float32(0.7)))
print(f"jaxlib {jax.lib.__version__}: roundings {found}; two constant factors change {changed} results")
held = 2 if sys.argv[1] == "holds" else 1
same = found == {"plain": 1, "reduce_precision": 1, "barrier": held, "maximum": 2}
sys.exit(0 if same and (changed == 0) == (held == 2) else 1)
PROGRAM
for version in "0.10.2 gone" "0.12.0.1 holds"; do
  set -- $version
  "${PYTHON:-python3}" -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet --disable-pip-version-check "jax==$1" "jaxlib==$1"
  JAX_PLATFORMS=cpu "$folder/$1/bin/python" "$folder/rounded.py" "$2" || { echo "changed: jaxlib $1"; exit 1; }
done
echo "as described"
