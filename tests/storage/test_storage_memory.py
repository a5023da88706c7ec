"""Memory: a file of a gigabyte is loaded tensor by tensor, one of them in memory twice at most."""

import json
import subprocess
import sys

import pytest

MIB = 2**20
SAVE = """
import sys
import numpy as np
import jaxprune as jp
path, encoding, tensors, weights, deflate = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
rng = np.random.default_rng(0)
leaf = rng.standard_normal((weights // 1024, 1024), np.float32)
if encoding != "dense":
    leaf[rng.random(leaf.shape, np.float32) < 0.5] = 0
jp.save(path, {f"w{i}": leaf for i in range(tensors)}, encoding=encoding, deflate=bool(deflate))
"""
LOAD = """
import json, resource, sys
import jax
import jax.numpy as jnp
import jaxprune as jp
jax.block_until_ready(jnp.zeros(8))
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
params = jax.block_until_ready(jp.load(sys.argv[1], to=sys.argv[2]))
print(json.dumps([before, peak(), sum(leaf.nbytes for leaf in params.values())]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "tensors", "deflate"),
    [
        ("dense", 16, 0),
        ("dense", 4, 0),
        ("bitmask", 16, 0),
        ("bitmask", 4, 0),
        ("bitmask", 256, 0),
        ("bitmask", 16, 1),
        ("csr16", 16, 0),
        ("gaps2", 16, 0),
    ],
)
def test_a_gigabyte(tmp_path, encoding, tensors, deflate):
    weights = 2**28 // tensors
    run = [sys.executable, "-c", SAVE, tmp_path / "file", encoding, str(tensors), str(weights), str(deflate)]
    subprocess.run(run, check=True)
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path / "file", "dense"], check=True, capture_output=True)
    before, peak, dense = json.loads(done.stdout)
    assert dense == 2**30
    taken = peak - before
    print(f"{encoding} x {tensors}: {taken / MIB:.0f} MiB for {dense / MIB:.0f}, one tensor {4 * weights / MIB:.0f}")
    assert taken <= dense + 4 * weights + 16 * MIB
