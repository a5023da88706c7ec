"""What every test runs under: strict JAX, eight fake devices, annotations checked, one hypothesis profile.

This file is imported before any test module, and must come before jax: devices are counted once, at its import.
"""

import atexit
import contextlib
import gc
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What one worker of a run has compiled the others read, and it itself after `jax.clear_caches()`. The first process
# to come here makes the folder, workers and programs that tests start inherit its name. A folder of yours is kept.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    PROGRAMS = tempfile.mkdtemp(prefix="jaxprune-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS
    atexit.register(shutil.rmtree, PROGRAMS, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every annotation of the package, shapes included, is checked at every call. Not those of the tables of a config:
# pydantic reads them, some name protocols of its own that cannot be checked.
PACKAGE = Path(__file__).parents[1] / "jaxprune"
MODULES = [path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py")]
PACKAGES = {"jaxprune", "jaxprune.lab", "jaxprune.lab.recipe"}  # of which not all modules are
NAMES = {".".join(path.parts).removesuffix(".__init__") for path in MODULES} - PACKAGES
SECTIONS = ("answers", "config", "data_section", "fields", "prune_section")
PYDANTIC = {f"jaxprune.lab.recipe.{name}" for name in SECTIONS}
jaxtyping.install_import_hook(sorted(NAMES - PYDANTIC), "checker.checked")

hypothesis.settings.register_profile(
    "jaxprune",
    deadline=None,  # the first example of a shape compiles
    max_examples=25,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jaxprune")


# Their tests take longest: they go first, so that no worker is left with one at the end.
LONGEST = ("native_fuzz", "cli", "streams", "sweep", "transforms_nesting", "bench_cli", "targets")


def pytest_configure(config):
    # A program that another worker is just writing is compiled here as well; one that cannot be written is lost.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache entry")


def pytest_collection_modifyitems(items):
    first = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))


def pytest_runtest_teardown(item, nextitem):
    """Programs that are kept take mappings of memory, of which Linux grants 65,530: from time to time they go."""
    maps = Path("/proc/self/maps")
    if (nextitem is None or nextitem.path != item.path) and maps.exists():
        with maps.open("rb") as lines:
            if sum(1 for _ in lines) > 10_000:
                jax.clear_caches()


# What is imported and collected is never garbage; Python would look through it again and again.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def quick():
    """Programs compile faster and run slower: for modules that test what is computed, not how it is rounded."""
    from quick import quickly

    with quickly():
        yield


@pytest.fixture
def relaxed():
    """JAX as users have it, for libraries that promote dtypes or ranks themselves."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def unchecked():
    """Annotations are not checked: a caller's wrong type arrives where the package itself refuses it."""
    with _unchecked():
        yield


@contextlib.contextmanager
def _unchecked():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
