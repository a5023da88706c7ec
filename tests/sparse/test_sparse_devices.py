"""Compressed weights over several devices, and in programs that another process runs."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from quick import quick_jit
from sparse_helpers import FORMATS, each_format, make_leaf, make_x, needs_kernels

from jaxprune import sparse
from jaxprune.layout import FLAX
from jaxprune.sparse import exports

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick")]

LEAF, X = make_leaf((8, 4), 0.4, "float32"), make_x((4, 8))
WHOLE, CUT = PartitionSpec(), PartitionSpec("d")
LAID = {
    "not at all": lambda leaf, mesh: leaf,
    "whole": lambda leaf, mesh: jax.device_put(leaf, NamedSharding(mesh, WHOLE)),
    "cut": lambda leaf, mesh: jax.device_put(leaf, NamedSharding(mesh, CUT)),
}


def model(params, x):
    return jax.nn.relu(x @ params["w"] + jnp.ones((1, 4))) @ params["w"].T + x


def both(fn):
    """Results and derivatives, in one program."""
    return lambda params, x: (fn(params, x), jax.grad(lambda x: jnp.sum(fn(params, x) ** 2))(x))


def mesh_of(kind):
    return jax.make_mesh((2,), ("d",), axis_types=(kind,))


@each_format
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_over_devices(format, kind):
    """However the dense leaf was laid out, results are those of one device; on explicit axes they lie as dense ones."""
    mesh = mesh_of(kind)
    x = jax.device_put(X, NamedSharding(mesh, CUT))
    want = both(model)({"w": LEAF}, X)
    run = quick_jit(both(sparse.apply(model)))
    for name, lay in LAID.items():
        params = sparse.compress({"w": lay(LEAF, mesh)}, format)
        found = run(params, x)
        for got, wanted in zip(found, want, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4, err_msg=name)
            assert kind is AxisType.Auto or got.sharding.is_equivalent_to(x.sharding, 2)


@each_format
def test_apply_inside_shard_map(format):
    """Which checks what varies over devices: weights are the same on all, activations are not."""
    mesh = mesh_of(AxisType.Auto)
    inside = jax.shard_map(both(sparse.apply(model)), mesh=mesh, in_specs=(WHOLE, CUT), out_specs=CUT)
    found = quick_jit(inside)(sparse.compress({"w": LEAF}, format), X)
    for got, wanted in zip(found, both(model)({"w": LEAF}, X), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_compressed_weights_are_where_their_leaf_is():
    """A leaf that jax may move may be moved; one on a device is compressed there, one on a mesh on all of it."""
    mesh, second = mesh_of(AxisType.Auto), jax.devices()[1]
    places = {"free": LEAF, "second": jax.device_put(LEAF, second), "cut": LAID["cut"](LEAF, mesh)}
    weights = sparse.compress(places, "bcsr", layout=FLAX)
    parts = {name: jax.tree.leaves(weight) for name, weight in weights.items()}
    assert not any(part.committed for part in parts["free"])
    assert all(part.committed and part.devices() == {second} for part in parts["second"])
    assert all(part.sharding == NamedSharding(mesh, WHOLE) for part in parts["cut"])


def test_shard_map_inside_apply_is_refused_with_the_way():
    mesh = mesh_of(AxisType.Auto)
    inside = jax.shard_map(model, mesh=mesh, in_specs=(WHOLE, CUT), out_specs=CUT)
    with pytest.raises(sparse.SparseUseError, match=r"`jax\.shard_map`.*Put `apply` inside"):
        jax.jit(sparse.apply(inside))(sparse.compress({"w": LEAF}, "bcsr"), X)


RENAMED = {
    "optimization_barrier": lambda w, x: x @ jax.lax.optimization_barrier((w, x))[0],
    "checkpoint_name": lambda w, x: x @ checkpoint_name(w, "w"),
    "sharding_constraint": lambda w, x: (
        x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh_of(AxisType.Auto), CUT))
    ),
}


@pytest.mark.parametrize("use", RENAMED)
def test_what_only_renames_a_weight_goes_through(use):
    weight = sparse.compress({"w": LEAF}, "bcsr")["w"]
    np.testing.assert_allclose(quick_jit(sparse.apply(RENAMED[use]))(weight, X), X @ LEAF, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- programs for another process

REGISTERED = """
import jax, numpy as np
import jaxprune
none = np.zeros(0, np.float32)
parts = (np.full(1, 2, np.float32), np.zeros(1, np.uint8), np.array([0, 1], np.int32), none, none, none)
call = jax.ffi.ffi_call("jaxprune_product", jax.ShapeDtypeStruct((1, 1), np.float32))
window = np.zeros(0, np.int64)
y = call(*parts, np.full((1, 1), 3, np.float32), tile=np.int64(1), group=np.int64(1), window=window, relu=False)
assert y.tolist() == [[6]]
"""
READ = """
import pickle, sys
import jax, jax.export, jaxprune
import numpy as np
with open(sys.argv[1], "rb") as file:
    blobs, parts, x, want = pickle.load(file)
for format, blob in blobs.items():
    exported = jax.export.deserialize(blob)
    args, _ = jax.tree.unflatten(exported.in_tree, [*parts[format], x])
    np.testing.assert_allclose(exported.call(*args), want, rtol=1e-4, atol=1e-4, err_msg=format)
"""


def elsewhere(program, *arguments):
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]


@needs_kernels
def test_kernels_are_there_with_the_import_alone():
    elsewhere(REGISTERED)


@pytest.mark.parametrize("format", [*FORMATS, "native_int8"])
def test_types_of_weights_are_written_and_read(format):
    weight = sparse.FORMATS[format].from_leaf(np.asarray(LEAF).T, outputs_last=False, name="a/\u00e9")
    parts, static = jax.tree_util.default_registry.flatten_one_level(weight)
    back = exports._read(type(weight), json.loads(exports._written(static)), parts)
    assert jax.tree.structure(back) == jax.tree.structure(weight)


@needs_kernels
def test_an_exported_program_runs_elsewhere(tmp_path):
    """In every format, in another process."""
    pytest.importorskip("flatbuffers", reason="jax writes programs with flatbuffers, which it does not bring along")
    calls = (sparse.native.TARGET, sparse.native.TRANSPOSED, "cpu_csr_sparse_dense_ffi")
    checks = [jax.export.DisabledSafetyCheck.custom_call(call) for call in calls]
    blobs, parts, want = {}, {}, np.asarray(model({"w": LEAF}, X))
    for format in FORMATS:
        params = sparse.compress({"w": LEAF, "b": X[0]}, format)
        exported = jax.export.export(quick_jit(sparse.apply(model)), disabled_checks=checks)(params, X)
        blobs[format] = exported.serialize()
        parts[format] = [np.asarray(part) for part in jax.tree.leaves(params)]
    file = tmp_path / "programs"
    file.write_bytes(pickle.dumps((blobs, parts, np.asarray(X), want)))
    elsewhere(READ, file)
