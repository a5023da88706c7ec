"""`jaxprune doctor`: each thing that can be wrong with an installation is told apart, with the way out."""

import importlib.metadata
import os
import subprocess
import sys

import jax
import pytest

from jaxprune import native
from jaxprune.lab.bench import doctor
from jaxprune.lab.bench.rows import Peak
from jaxprune.lab.commands import main

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch):
    monkeypatch.setattr(doctor.rows, "measure_peak", lambda: Peak(180.0, 31.0, ""))


@pytest.fixture
def kernels(monkeypatch):
    """(reason or "", name of loops) stand for the kernels that are here."""

    def use(missing, isa=""):
        monkeypatch.setattr(native, "why_missing", lambda: missing)
        monkeypatch.setattr(native, "instruction_set", lambda: isa)

    return use


def found(name):
    return next(one for one in doctor.findings() if one.name == name)


def test_it_says_what_is_here(kernels, capsys):
    kernels("", "avx512_vnni")
    assert main.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in (f"jax {jax.__version__}", "180 GFLOP/s in products, 31 GB/s", "avx512_vnni loops", "extra lab"):
        assert word in out


def test_broken_kernels_are_an_error(kernels, capsys):
    kernels("The native kernels fail when they are called, as those built for another jaxlib do: reinstall jaxprune.")
    assert main.main(["doctor"]) == main.EXIT_FAILED
    assert "broken  native kernels  The native kernels fail" in capsys.readouterr().out


def test_a_compiler_that_has_come_since_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    native._library.cache_clear()
    try:
        monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
        assert found("native kernels").state == "broken"
        assert "want of a C++ compiler" in found("native kernels").text
        assert "is here now" not in found("native kernels").text
        monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
        assert found("native kernels").text.endswith("A compiler is here now: g++.")
    finally:
        native._library.cache_clear()


def test_slower_loops_have_a_reason(kernels, monkeypatch):
    kernels("", "avx2")
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("JAXPRUNE_ISA", raising=False)
    assert found("native kernels") == doctor.Finding(
        "slow", "native kernels", "avx2 loops: this processor has not all that the fastest ones, avx512_vnni, need"
    )
    monkeypatch.setenv("JAXPRUNE_ISA", "avx2")
    assert found("native kernels").text == "avx2 loops, since JAXPRUNE_ISA=avx2"
    kernels("", "portable")
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    assert found("native kernels").state == "fine"


def test_a_missing_extra_is_no_fault(kernels, monkeypatch, capsys):
    kernels("", "avx512_vnni")
    asked = importlib.metadata.version

    def without_flax(name):
        if name == "flax":
            raise importlib.metadata.PackageNotFoundError(name)
        return asked(name)

    monkeypatch.setattr(importlib.metadata, "version", without_flax)
    one = found("extra lab")
    assert one.state == "missing"
    assert one.text.startswith("without flax>=")
    assert one.text.endswith("pip install 'jaxprune[lab]'")
    assert main.main(["doctor"]) == 0


def test_what_is_not_installed_is_told(kernels, monkeypatch):
    kernels("", "portable")

    def refuse(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", refuse)
    assert doctor.python() == doctor.Finding("broken", "jaxprune", "not installed. In its folder: pip install .")


def test_a_platform_that_is_not_here(tmp_path):
    """In a process of its own, since a backend is chosen once."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxprune.lab.commands.main", "doctor"],
        env={**os.environ, "JAX_PLATFORMS": "nothing"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == main.EXIT_FAILED
    assert "broken  jax" in done.stdout
    assert "JAX_PLATFORMS" in done.stdout
