"""A million files found by a coverage-guided fuzzer: refused, or read exactly as the reader in NumPy reads them."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_million_inputs(tmp_path):
    """A quarter of an hour. Needs atheris, which has no wheels for every Python."""
    pytest.importorskip("atheris")
    command = [sys.executable, Path(__file__).parents[1] / "helpers/fuzz_artifact.py", "corpus", "-runs=1000000"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr[-5000:]
    counts = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{'")]
    last = max((one for one in counts if "inputs" in one), key=lambda one: one["inputs"])
    print(last)
    assert last["inputs"] >= 990_000
    assert last["accepted"] > 50_000
    assert last["measured"] > 60_000
