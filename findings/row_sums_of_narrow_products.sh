#!/usr/bin/env bash
# jaxlib 0.10.2 on a CPU computes the row sums of a jitted W x wrongly for rows 32,769 to about 43,500 of a batch, and
# for those batches only: with 50,000 rows all are right again.
#
#   jax.jit(jax.vmap(lambda x: jnp.sum((W @ x) ** 2)))        W (3, 3) or (2, 3), x (rows, 3), float32
#
# Known as jax-ml/jax#39103, whose title says "from 32,769 rows on". A good guess would be a rounding of the last digit,
# or rows lost from the limit on. What was seen, with jax and jaxlib 0.10.2 on x86-64, is neither:
#
#   rows      32,768   32,769   40,000   43,000   50,000   100,000
#   wrong          0        1    7,232   10,232        0         0
#
# Each wrong row holds the exact sum of another row, 128 earlier (32 on the issue's machine), so nothing looks broken: a
# mean over all rows is off by parts in ten thousand. It is wrong without the square, and with abs, relu or exp in its place; with one output, four or
# more, with two or four inputs, with x @ W.T, and with a sum over the rows all is right. In float64 it is the rows from
# 16,385 on. One core or many, and the options for fusion emitters, Eigen's threads and the optimisation level, make no
# difference: the product and the sum become one YNNPACK fusion, and
# XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce is what avoids it.
#
# 0.10.0 and 0.10.1 are right, and so is 0.12.0.1. Python 3.11 gets 0.10.2 from a plain `pip install jax`, since later
# versions need 3.12.
#
# Needs Python 3.11 to 3.13; PYTHON names another than python3. Exits with 1 if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/rows.py" <<'PROGRAM'
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def sums(W, x):
    return jax.vmap(lambda row: jnp.sum((W @ row) ** 2))(x)


def wrong(rows):
    """How many rows are wrong; whether each of those is right for some earlier row."""
    numbers = np.arange(rows, dtype=np.float64)
    x = np.stack([numbers, 0 * numbers, 0 * numbers], axis=1).astype(np.float32)
    found = np.sqrt(np.asarray(sums(np.eye(3, dtype=np.float32), x), np.float64))
    off = np.abs(found - numbers) > 0.5
    whole = np.abs(found[off] - np.round(found[off])) < 1e-2
    return int(off.sum()), bool(np.all(whole & (found[off] < numbers[off]))), int(off.argmax()) if off.any() else -1


seen = {rows: wrong(rows) for rows in (32_768, 32_769, 40_000, 50_000, 100_000)}
print("jaxlib", jax.lib.__version__, {rows: count for rows, (count, _, _) in seen.items()})
bad = {rows for rows, (count, _, _) in seen.items() if count}
if sys.argv[1] == "wrong":
    same = bad == {32_769, 40_000} and seen[40_000][0] == 7_232
    same = same and all(earlier and first == 32_768 for rows, (_, earlier, first) in seen.items() if rows in bad)
else:
    same = not bad
sys.exit(0 if same else 1)
PROGRAM

for case in "0.10.1 right" "0.10.2 wrong"; do
  read -r version verdict <<< "$case"
  "${PYTHON:-python3}" -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "jax==$version" "jaxlib==$version" numpy
  "$folder/$version/bin/python" "$folder/rows.py" "$verdict" || { echo "changed: $version is no longer $verdict"; exit 1; }
done
echo "as described"
