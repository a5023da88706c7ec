"""Leaves, inputs and compressed weights; shared by the tests of sparse weights."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import sparse
from jaxprune.layout import FLAX, TORCH

# Formats that hold any matrix exactly; test_native_formats.py has the others, and "native_row", which is "native" with
# another tile. Where the native kernels were not built,
# test_native.py says so, and the rest is tested without them.
FORMATS = [
    name
    for name, format in sorted(sparse.FORMATS.items())
    if not (format.lossy or name == "native_row" or format.why_not(np.ones((5, 7))))
    and not (name.startswith("native") and sparse.native.why_missing())
]
LAYOUTS = {"in_out": FLAX, "out_in": TORCH}

# Living blocks (in, out), by how many each output block has.
RUNS = {
    "equal": np.eye(3)[:, [1, 2, 0]],
    "alike": np.array([[1, 0, 1], [0, 1, 1], [0, 1, 0]]),
    "very different": np.array([[0, 0, 0, 0, 1], [1, 0, 0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]),
}

needs_kernels = pytest.mark.skipif(bool(sparse.native.why_missing()), reason=sparse.native.why_missing() or "there")
each_format = pytest.mark.parametrize("format", FORMATS)


def put(array, dtype="float32"):
    """`jnp.asarray`, which would compile a program for every shape."""
    return jax.device_put(np.asarray(array, jnp.dtype(dtype)))


def make_leaf(shape, density, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return put(np.where(rng.random(shape) < density, rng.normal(size=shape), 0), dtype)


def make_x(shape, dtype="float32", seed=1):
    return put(np.random.default_rng(seed).normal(size=shape), dtype)


def compress_one(leaf, format, layout="in_out"):
    name = "conv" if leaf.ndim == 3 else "kernel"  # else it might be stacked layers
    return sparse.compress({name: leaf}, format, layout=LAYOUTS[layout])[name]


def compress_all(leaf, layout="in_out"):
    """Format -> the leaf in it, to be looked at in one program."""
    return {format: compress_one(leaf, format, layout) for format in FORMATS}


def least(dtype):
    """Error that no result of this dtype is free of: its smallest step, or what is flushed to zero."""
    return max(1e-30, float(jnp.finfo(dtype).smallest_subnormal))


def sparse_leaves(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, sparse.SparseWeight))
    return [leaf for leaf in leaves if isinstance(leaf, sparse.SparseWeight)]


INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_vnni")
TESTS = Path(__file__).parents[1]
PATHS = os.pathsep.join(str(TESTS / folder) for folder in ("helpers", "native", "sparse"))


def check_under(isa, program, folder):
    """Runs a program, whose last line says which instruction set ran, with the kernels of one of them."""
    environment = {**os.environ, "JAXPRUNE_ISA": isa, "PYTHONPATH": PATHS}
    # Elsewhere, so that the installed package is imported and not the sources beside these tests.
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if done.stdout.strip() != isa:
        pytest.skip(f"this processor has no {isa}: {done.stdout.strip()} ran")
