#!/usr/bin/env bash
# jax 0.12.0.1 with the flag `jax_scan3` ("embrace the future of loops"), Python 3.12 or newer, CPU.
#
# Guess: the flag changes how `lax.scan` is represented; results stay, or something is refused.
# Seen: results change without a word.
#   - Under `jit` a scan that stacks no outputs is left out: `lax.scan(lambda c, x: (c + x, None), 0, arange(5))` carries
#     out 0 where it should be 10, and `lax.fori_loop(0, 5, ...)`, which is such a scan, gives its initial value.
#     Outside of `jit` both are right. With stacked outputs the carry is right too.
#   - `reverse=True` is ignored: running sums of 0 1 2 3 4 from the end come out as 0 0 1 3 6, not 10 9 7 4 0.
# What it means: loops that only carry are the usual form of optimizers, power iterations and counters; a test of values
# sees it, a test of shapes does not. jaxprune traces its own loops, and users' functions, in the form of today.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.13 "$HOME"/.pyenv/versions/3.13*/bin/python python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python; do
  "$python" -c "import venv" >/dev/null 2>&1 && break
done
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
from jax import lax

x = jnp.arange(5, dtype=jnp.int32)
zero = jnp.int32(0)


def results():
    carried = lambda x: lax.scan(lambda c, v: (c + v, None), zero, x)[0]
    stacked = lambda x: lax.scan(lambda c, v: (c + v, c), zero, x)
    backwards = lambda x: lax.scan(lambda c, v: (c + v, c), zero, x, reverse=True)[1]
    counted = lambda: lax.fori_loop(0, 5, lambda i, c: c + i, zero)
    return {
        "carry alone, jit": int(jax.jit(carried)(x)),
        "carry alone, eager": int(carried(x)),
        "carry beside outputs, jit": int(jax.jit(stacked)(x)[0]),
        "fori_loop, jit": int(jax.jit(counted)()),
        "reverse, jit": jax.jit(backwards)(x).tolist(),
    }


today = results()
jax.config.update("jax_scan3", True)
coming = results()
for name, value in today.items():
    print(f"{name}: {value}; with jax_scan3 {coming[name]}")
assert today == {
    "carry alone, jit": 10, "carry alone, eager": 10, "carry beside outputs, jit": 10, "fori_loop, jit": 10,
    "reverse, jit": [10, 9, 7, 4, 0],
}
assert coming == {
    "carry alone, jit": 0, "carry alone, eager": 10, "carry beside outputs, jit": 10, "fori_loop, jit": 0,
    "reverse, jit": [0, 0, 1, 3, 6],
}
PY
