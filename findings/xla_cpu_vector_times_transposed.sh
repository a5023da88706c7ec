#!/usr/bin/env bash
# On a CPU a vector times a transposed matrix is 4 to 7 times slower with jaxlib 0.12 than with 0.10, by the same HLO.
#
# The last layer of a language model with tied embeddings, one token at a time: x (1, 288), E (32000, 288), float32,
# 37 MB. `x @ E.T` and `jnp.einsum("bi,oi->bo", x, E)` are the same product, and a good guess is the same program: a
# product with E as it lies, as fast as memory gives E.
#
# What was seen on two cores of Zen 4: in both jaxlib 0.10.2 and 0.12.0.1 only the einsum becomes a product by the
# library, 1.1 ms. Of `x @ E.T` XLA makes one loop over the 32000 outputs, a fusion copy_dot_fusion of transpose, copy
# and dot, and in that form 0.10.2 is faster, 0.6 ms, and 0.12.0.1 much slower, 4.4 to 4.7 ms, though the optimized HLO
# is equal but for what it says of source lines: it is the code made of the fusion that changed. Half of the time of a
# step of a small decoder is lost by how the product is written.
#
# Needs Python 3.12 or later (PYTHON names another than python3). Exits with 1 if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/products.py" <<'PROGRAM'
import pathlib
import re
import statistics
import sys
import time

import jax
import jax.numpy as jnp


def look(fn, *args):
    """Milliseconds, and the operations of the compiled program."""
    run, taken = jax.jit(fn).lower(*args).compile(), []
    for _ in range(120):
        start = time.perf_counter()
        run(*args).block_until_ready()
        taken.append(1e3 * (time.perf_counter() - start))
    lines = (re.sub(r", metadata=\{[^}]*\}", "", line) for line in run.as_text().splitlines() if " = " in line)
    return statistics.median(taken[20:]), "\n".join(lines)


x, E = jnp.ones((1, 288)), jnp.ones((32000, 288))
transposed, program = look(lambda x, E: x @ E.T, x, E)
summed, _ = look(lambda x, E: jnp.einsum("bi,oi->bo", x, E), x, E)
print(f"jaxlib {jax.lib.__version__}: x @ E.T {transposed:.2f} ms, einsum {summed:.2f} ms")
pathlib.Path(sys.argv[1]).write_text(program)
is_slow = transposed > 2.5 * summed
sys.exit(0 if "copy_dot_fusion" in program and is_slow == (sys.argv[2] == "slow") else 1)
PROGRAM
for version in "0.10.2 fast" "0.12.0.1 slow"; do
  set -- $version
  "${PYTHON:-python3}" -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet --disable-pip-version-check "jax==$1" "jaxlib==$1"
  JAX_PLATFORMS=cpu "$folder/$1/bin/python" "$folder/products.py" "$folder/$1.hlo" "$2" ||
    { echo "changed: jaxlib $1"; exit 1; }
done
cmp "$folder/0.10.2.hlo" "$folder/0.12.0.1.hlo" || { echo "changed: the programs differ"; exit 1; }
echo "as described"
