"""The native kernels under the sanitizers: operands that fit, and operands with whatever may be wrong with them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "jaxprune" / "native"
ISAS = ("portable", "avx2", "avx512", "avx512_vnni")
# What every run is expected to reach, each of it named in a refusal.
NAMES = ("values", "index", "bounds", "scale", "bias", "residual", "x", "tile", "group", "window", "totals", "grid")
NAMES += ("y", "order")


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    """The built program; skips where the tools for it are missing."""
    cmake, compiler = shutil.which("cmake"), os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not cmake or not compiler:
        pytest.skip("needs cmake and a C++ compiler")
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "probe.cc").write_text("int main() { return 0; }\n")
    flags = ["-fsanitize=address,undefined", "probe.cc", "-o", "probe"]
    probe = subprocess.run([compiler, *flags], cwd=folder, capture_output=True)
    if probe.returncode or subprocess.run([folder / "probe"], env=environment("portable")).returncode:
        pytest.skip(f"{compiler} has no sanitizers here")
    make = [cmake, "-S", SOURCES, "-B", folder / "build", "-DJAXPRUNE_SANITIZE=ON"]
    make += [f"-DCMAKE_CXX_COMPILER={compiler}"]
    for command in (make, [cmake, "--build", folder / "build"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "build" / "fuzz"


def environment(isa):
    # Leaks cannot be looked for in containers that forbid it; bytes out of bounds can.
    return {**os.environ, "JAXPRUNE_ISA": isa, "ASAN_OPTIONS": "detect_leaks=0"}


def available(fuzz):
    """The instruction sets of this processor; another than was wished for runs where it has none."""
    ran = {isa: subprocess.run([fuzz, "0", "0"], env=environment(isa), capture_output=True).stdout for isa in ISAS}
    return [isa for isa in ISAS if ran[isa].startswith(f"isa {isa},".encode())]


def run(fuzz, isa, calls, seed):
    """Its summary, checked for having done what was asked."""
    done = subprocess.run([fuzz, str(calls), str(seed)], env=environment(isa), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = {name: int(count) for name, count in re.findall(r"(calls|fitting|accepted|refused) (\d+)", done.stdout)}
    assert counts["calls"] == calls == counts["accepted"] + counts["refused"]
    assert counts["fitting"] > calls / 5
    assert counts["refused"] > calls / 3
    for name in NAMES:
        assert re.search(rf"; \d+ jaxprune_product: [^;]*`{name}`", done.stdout), name
    return done.stdout


# One test for all sets, since building takes longer than running, and two workers would build twice.
def test_twenty_thousand_calls(fuzz):
    for isa in available(fuzz):
        run(fuzz, isa, 20_000, 1)


@pytest.mark.slow
def test_a_million_calls_in_all(fuzz):
    for isa in available(fuzz):
        summary = run(fuzz, isa, 400_000, 1_000_000)
        assert "no memory for the inputs" in summary
        assert "must make fewer than 2^31 inputs" in summary
