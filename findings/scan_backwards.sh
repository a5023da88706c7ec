#!/usr/bin/env bash
# jax 0.12.0.1 has a flag for the loops to come, jax_scan3 (JAX_SCAN3=1). With it `lax.scan(..., reverse=True)` runs
# forwards, and says nothing.
#
# A good guess: what the new loops cannot do yet raises, as reverse-mode derivatives of them do (NotImplementedError that
# names Scan3). What was seen: `reverse` is taken, kept and not looked at, so the carry is the one of a forward scan.
#
#   scan(lambda c, x: (2 c + x, c), 0, [1, 2, 3, 4], reverse=True)     49, [24, 11, 4, 0]     without the flag
#                                                                      26, [0, 1, 4, 11]      with it, the forward result
#
# `reverse` is what recurrent models run backwards with, and what generalised advantage estimation is written with. It
# also means that code which walks jaxprs sees no `scan` there, but a while loop over references.
#
# Needs Python 3.12 or later; PYTHON names another than python3. Exits with 1 if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.12.0.1" "jaxlib==0.12.0.1"

cat > "$folder/scan.py" <<'PROGRAM'
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp


def last(reverse):
    carry, _ = jax.lax.scan(lambda c, x: (2 * c + x, c), 0.0, jnp.array([1.0, 2.0, 3.0, 4.0]), reverse=reverse)
    return float(carry)


before = last(False), last(True)
jax.config.update("jax_scan3", True)
after = last(False), last(True)
print("jax", jax.__version__, "forwards and backwards:", before, "with jax_scan3:", after)
sys.exit(0 if before == (26.0, 49.0) and after == (26.0, 26.0) else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/scan.py" || { echo "changed: jax_scan3 runs otherwise"; exit 1; }
echo "as described"
