"""The native kernels outlive their build: made from their sources alone, called under this jaxlib and under another."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sparse_helpers import make_leaf, make_x, needs_kernels

from jaxprune import native, sparse

REPOSITORY = Path(__file__).parents[2]
SOURCES = REPOSITORY / "jaxprune" / "native"
CALLS = ("TARGET", "TRANSPOSED", "CODES", "SAMPLED", "PERMUTED")
# Optimized as little as can be, and for no processor in particular: it compiles in a tenth of the time.
FLAGS = ["-O0", "-std=c++17", "-shared", "-fPIC", f"-I{SOURCES}", "-isystem", SOURCES / "third_party"]
PORTABLE = ["-DKERNELS=kPortable", '-DISA_NAME="portable"', "-DVECTOR_BYTES=16", "-Wno-psabi"]

# A handler with a fault: of a version that is not yet, or one that refuses every call, or one that cannot multiply.
FAULTY = r"""
#include "xla/ffi/api/c_api.h"
extern "C" int jaxprune_interface() { return INTERFACE; }
extern "C" XLA_FFI_Error* jaxprune_product(XLA_FFI_CallFrame* frame) {
  const bool asked = frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata;
  if (asked) {
    XLA_FFI_Metadata* about = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
    about->api_version.major_version = XLA_FFI_API_MAJOR;
    about->api_version.minor_version = FAULT == 0 ? 99 : XLA_FFI_API_MINOR;
    about->traits = 0;
    return nullptr;
  }
  if (FAULT == 1) {
    XLA_FFI_Error_Create_Args error = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, "Unexpected size",
                                       XLA_FFI_Error_Code_INVALID_ARGUMENT};
    return frame->api->XLA_FFI_Error_Create(&error);
  }
  *static_cast<float*>(static_cast<XLA_FFI_Buffer*>(frame->rets.rets[0])->data) = 5;
  return nullptr;
}
extern "C" XLA_FFI_Error* jaxprune_transposed(XLA_FFI_CallFrame* frame) { return jaxprune_product(frame); }
extern "C" XLA_FFI_Error* jaxprune_codes(XLA_FFI_CallFrame* frame) { return jaxprune_product(frame); }
extern "C" XLA_FFI_Error* jaxprune_sampled(XLA_FFI_CallFrame* frame) { return jaxprune_product(frame); }
extern "C" XLA_FFI_Error* jaxprune_permuted(XLA_FFI_CallFrame* frame) { return jaxprune_product(frame); }
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """(name, *arguments) -> a library; skips where there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("native")

    def run(name, *arguments):
        done = subprocess.run([compiler, *FLAGS, *arguments, "-o", folder / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder / name

    return run


@pytest.fixture
def loaded(monkeypatch):
    """Another library in place of the one found, its call under a name of its own; both are put back."""

    def use(library):
        monkeypatch.setattr(native, "LIBRARY", library)
        for name in CALLS:
            monkeypatch.setattr(native, name, f"jaxprune_{name}_of_{library.stem}")
        forget()

    def forget():
        native._library.cache_clear()
        native._why_not_called.cache_clear()

    yield use
    monkeypatch.undo()
    forget()


def test_a_library_built_from_its_sources_runs_here(build, loaded):
    loops = build("loops.o", "-c", *PORTABLE, SOURCES / "kernels.cc")
    loaded(build("here.so", SOURCES / "product.cc", SOURCES / "codecs.cc", loops))
    assert (native.why_missing(), native.instruction_set()) == ("", "portable")
    leaf, x = make_leaf((300, 40), 0.2, "float32"), make_x((70, 300))
    weight = sparse.compress({"kernel": leaf}, "native")["kernel"]
    program = jax.jit(sparse.matmul).lower(x, weight).compile()
    assert native.TARGET in program.as_text()
    for rows in (x, x[:1]):  # threads of the pool, and a single position
        np.testing.assert_allclose(sparse.matmul(rows, weight), rows @ leaf, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fault", "says"),
    [(0, r"another jaxlib.*reinstall"), (1, "another jaxlib.*Unexpected size"), (2, r"2 x 3 is 5\.0")],
)
def test_a_library_that_fails_in_its_first_call_is_named(build, loaded, tmp_path, fault, says):
    (tmp_path / "faulty.cc").write_text(FAULTY)
    macros = f"-DFAULT={fault}", f"-DINTERFACE={native.INTERFACE}"
    loaded(build(f"fault_{fault}.so", *macros, tmp_path / "faulty.cc"))
    assert native.why_not_loaded() == ""
    assert native.instruction_set() == ""
    weight = sparse.compress({"kernel": make_leaf((9, 4), 0.5, "float32")}, "native")["kernel"]
    with pytest.raises(TypeError, match=f"'kernel' is stored for the native kernels.*{says}"):
        jax.jit(sparse.matmul)(jnp.ones((2, 9)), weight)


@pytest.fixture
def first():
    """As if no call had been made yet."""
    native._why_not_called.cache_clear()
    yield
    native._why_not_called.cache_clear()


def seen_by(transform):
    """What `why_missing` says while a transformation traces."""
    said = []

    def function(x):
        said.append(native.why_missing())
        return x * 2.0

    jax.block_until_ready(transform(function)(jnp.ones(8)))
    return said


def mesh(kind):
    return jax.make_mesh((4,), ("i",), axis_types=(kind,))


def over_devices(function):
    shard = jax.shard_map(function, mesh=mesh(jax.sharding.AxisType.Auto), in_specs=P("i"), out_specs=P("i"))
    return jax.jit(shard)


TRANSFORMS = {
    "jit": jax.jit,
    "vmap": jax.vmap,
    "grad of a loop": lambda f: jax.grad(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: f(x), x).sum()),
    "shard_map": over_devices,
    "checkpoint": jax.checkpoint,
    "compile time": lambda f: jax.jit(jax.ensure_compile_time_eval()(f)),
}
SETTINGS = {
    "jax_transfer_guard": "disallow_explicit",
    "jax_enable_x64": True,
    "jax_disable_jit": True,
    "jax_debug_nans": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_check_tracer_leaks": True,
}
CONTEXTS = {
    "transfer guard": lambda: jax.transfer_guard("disallow_explicit"),
    "x64": lambda: jax.enable_x64(True),
    "another device": lambda: jax.default_device(jax.devices()[3]),
    "mesh": lambda: jax.set_mesh(mesh(jax.sharding.AxisType.Explicit)),
    "no jit": jax.disable_jit,
}


@needs_kernels
@pytest.mark.usefixtures("first")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_first_call_is_made_inside_of_any_transformation(transform):
    assert set(seen_by(TRANSFORMS[transform])) == {""}


@needs_kernels
@pytest.mark.usefixtures("first")
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_first_call_is_made_under_any_context(context):
    with CONTEXTS[context]():
        assert native.why_missing() == ""


@needs_kernels
@pytest.mark.usefixtures("first")
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_first_call_is_made_under_any_setting(setting):
    before = getattr(jax.config, setting)
    jax.config.update(setting, SETTINGS[setting])
    try:
        assert native.why_missing() == ""
    finally:
        jax.config.update(setting, before)


@pytest.mark.usefixtures("first")
def test_where_jax_has_no_cpu_it_is_said(monkeypatch):
    def none(**_):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", none)
    assert "`jax_platforms`" in native._called()


CHECK = """
import sys, jax, jax.numpy as jnp, numpy as np
from jaxprune import sparse
from jaxprune.sparse import native
from pathlib import Path
native.LIBRARY = Path(sys.argv[1])
for name in sys.argv[2:]:
    setattr(native, name, "another " + name)  # the one beside the package is registered
native._library.cache_clear()
assert not native._why_not_called.cache_info().currsize  # the import calls nothing
assert native.why_missing() == "", native.why_missing()
w = np.where(np.random.default_rng(0).random((300, 40)) < 0.2, 1.5, 0).astype(np.float32)
weight = sparse.compress({"w": w}, "native")["w"]
for n in (1, 70, 3000):
    x = np.random.default_rng(n).normal(size=(n, 300)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(sparse.matmul)(x, weight), x @ w, rtol=1e-3, atol=1e-3)
print(jax.__version__, native.instruction_set())
"""


@pytest.mark.slow
@pytest.mark.parametrize("build_here", [True, False])
def test_a_library_built_beside_one_jaxlib_runs_beside_another(tmp_path, build_here):
    """A wheel of either Python, and its kernels in the other: JAXPRUNE_OTHER_PYTHON, one with another jaxlib."""
    if not (other := os.environ.get("JAXPRUNE_OTHER_PYTHON")):
        pytest.skip("set JAXPRUNE_OTHER_PYTHON to a python whose jaxlib is another one")
    builder, runner = (sys.executable, other) if build_here else (other, sys.executable)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    wheel = [builder, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, REPOSITORY]
    subprocess.run(wheel, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as files:
        library = files.extract("jaxprune/native/_kernels.so", tmp_path)
    done = subprocess.run([runner, "-c", CHECK, library, *CALLS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
