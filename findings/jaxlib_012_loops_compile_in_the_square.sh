#!/usr/bin/env bash
# jaxlib 0.12.0.1, CPU: a `while` loop whose body counts in n arrays compiles in the square of n; jaxlib 0.11 and later
# need Python 3.12 or newer.
#
# Guess: compile time grows with the size of the program, as everywhere else in a program without branches.
# Seen (seconds of processor time on one machine, 2 cores): with 40 and 80 arrays of 64 x 64 in the loop's body the
# compiler takes about four times as long for twice the arrays. One `jnp.sort` of three numbers in the body, whose result
# is what went in, makes the same loop compile in proportion to n, and many times faster.
# Why: XLA:CPU turns a loop that it takes for small into a call of one function, of whatever size (the compiled text has
# `xla_cpu_small_call`); a loop with a sort in it is none of those.
# What it means: bisections, line searches and counters over a model's leaves compile slowly on the newest jaxlib; a test
# that compiles for few leaves does not show it. The reductions alone, without a loop, compile in proportion.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.13 "$HOME"/.pyenv/versions/3.13*/bin/python python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python; do
  "$python" -c "import venv" >/dev/null 2>&1 && break
done
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import time

import jax
import jax.numpy as jnp
from jax import lax


def threshold(arrays, sort):
    """The largest multiple of 1/16 that half of all numbers reach, four steps of bisection."""
    half = sum(a.size for a in arrays) // 2

    def narrow(i, found):
        steps = jnp.array([1.0, 2.0, 3.0]) / 4.0 ** (i + 1)
        steps = jnp.sort(steps) if sort else steps
        for step in (steps[0], steps[1], steps[2]):
            count = sum(jnp.sum(a >= found + step, dtype=jnp.int32) for a in arrays)
            found = jnp.where(count >= half, found + step, found)
        return found

    return lax.fori_loop(0, 4, narrow, jnp.float32(0))


def seconds(n, sort):
    arrays = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * n
    lowered = jax.jit(lambda arrays: threshold(arrays, sort)).lower(arrays)
    before = time.process_time()
    text = lowered.compile().as_text()
    return time.process_time() - before, "xla_cpu_small_call" in text


seconds(2, False)
found = {(n, sort): seconds(n, sort) for sort in (False, True) for n in (40, 80)}
for (n, sort), (took, small) in found.items():
    print(f"{n} arrays, {'with' if sort else 'without'} the sort: {took:.2f} s, one function: {small}")
assert found[80, False][1] and not found[80, True][1]
assert found[80, False][0] > 2.8 * found[40, False][0]
assert found[80, True][0] < 2.6 * found[40, True][0]
PY
