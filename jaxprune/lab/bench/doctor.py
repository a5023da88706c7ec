"""`jaxprune doctor`: what is installed, what runs here, what is missing and how to get it."""

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax

from jaxprune import native
from jaxprune.lab.bench import rows
from jaxprune.sparse.tuning.machine import cores, processor

DISTRIBUTION = "jaxprune"
COMPILERS = ("c++", "g++", "clang++")
FASTEST = {"x86_64": "avx512_vnni", "AMD64": "avx512_vnni"}
"""Machine -> the best loops that there are for it; "portable" for all others."""


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        state: "fine"; "slow", it works, but could be faster; "missing", an extra that nothing else needs; "broken".
        name: of what was looked at.
        text: what was found, and the way out.
    """

    state: Literal["fine", "slow", "missing", "broken"]
    name: str
    text: str


def findings() -> list[Finding]:
    """Everything that was looked at, in order."""
    jax_here = _jax()
    return [python(), _machine(measure=jax_here.state == "fine"), jax_here, _kernels(), *_extras()]


def text(found: list[Finding]) -> str:
    """A line each."""
    wide = max(len(one.name) for one in found)
    return "\n".join(f"{one.state:8}{one.name:{wide + 2}}{one.text}" for one in found)


def python() -> Finding:
    """The package itself and what runs it."""
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return Finding("broken", DISTRIBUTION, "not installed. In its folder: pip install .")
    return Finding("fine", DISTRIBUTION, f"{version}, Python {platform.python_version()}, {platform.platform()}")


def _machine(*, measure: bool) -> Finding:
    found = f"{processor()}, {cores()} cores"
    if measure:
        peak = rows.measure_peak()
        found += f": {peak.gflops:.0f} GFLOP/s in products, {peak.gbytes:.0f} GB/s of memory"
    return Finding("fine", "machine", found)


def _jax() -> Finding:
    versions = f"jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}"
    try:
        devices = ", ".join(dict.fromkeys(f"{one.platform} ({one.device_kind})" for one in jax.devices()))
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        return Finding("broken", "jax", f"{versions}; no device: {first} Look at `jax_platforms`, or JAX_PLATFORMS.")
    return Finding("fine", "jax", f"{versions}; {devices}")


def _kernels() -> Finding:
    name = "native kernels"
    if missing := native.why_missing():
        there = next((one for one in COMPILERS if shutil.which(one)), None)
        now = f" A compiler is here now: {there}." if there and not native.LIBRARY.exists() else ""
        return Finding("broken", name, missing + now)
    isa, best = native.instruction_set(), FASTEST.get(platform.machine(), "portable")
    if isa == best:
        return Finding("fine", name, f"{isa} loops")
    if wish := os.environ.get("JAXPRUNE_ISA"):
        return Finding("slow", name, f"{isa} loops, since JAXPRUNE_ISA={wish}")
    return Finding("slow", name, f"{isa} loops: this processor has not all that the fastest ones, {best}, need")


def _extras() -> Iterator[Finding]:
    wanted: dict[str, list[str]] = {}
    for line in _requirements():
        requirement, _, marker = line.partition(";")
        if (extra := re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)) and DISTRIBUTION not in requirement:
            wanted.setdefault(extra[1], []).append(requirement.strip())
    for extra, requirements in sorted(wanted.items()):
        lacking = [one for one in requirements if not _is_installed(one)]
        get = f"pip install '{DISTRIBUTION}[{extra}]'"
        if lacking:
            yield Finding("missing", f"extra {extra}", f"without {', '.join(lacking)}. To get it: {get}")
        else:
            yield Finding("fine", f"extra {extra}", f"{len(requirements)} packages")


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _is_installed(requirement: str) -> bool:
    """Whether a package is there at all; pip has seen to its version."""
    try:
        importlib.metadata.version(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
