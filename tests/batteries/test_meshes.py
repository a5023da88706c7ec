"""Explicit meshes, what `jax.make_mesh` gives, and `jax.shard_map`: the masks of one device, where the params lie."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_battery import EVIDENCE, LAYOUT, METHODS, drawn, shares

import jaxprune as jp
from jaxprune.exact.ranking import kth_largest, top_k_mask

SPECS = (PartitionSpec("x", "y"), PartitionSpec(None, "x"), PartitionSpec("x", None), PartitionSpec(("x", "y"), None))
OTHERS = {
    "uneven_block": jp.Method(granularity=jp.Block(4, 3), layout=LAYOUT),
    "along": jp.Method(granularity=jp.Kernel(), distribution=jp.NM(1, 2, along="outputs"), layout=LAYOUT),
    "normalized": jp.Method(distribution=jp.Global(normalized=True, floor=0.05), layout=LAYOUT),
}
ALL = METHODS | OTHERS
WITH_SPECS = list(zip(ALL, itertools.cycle(SPECS)))


@pytest.fixture(scope="module")
def mesh():
    made = jax.make_mesh((4, 2), ("x", "y"))
    assert set(made.axis_types) == {AxisType.Explicit}
    return made


def spread(tree, mesh, spec):
    """Matrices by the spec, where it divides them; all else whole on every device."""

    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        full = PartitionSpec(*[None] * (leaf.ndim - 2), *spec) if leaf.ndim > 1 else PartitionSpec()
        with contextlib.suppress(ValueError):
            return jax.device_put(leaf, NamedSharding(mesh, full))
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(one, tree)


def lie(tree):
    """Of each leaf the spec; one of no mesh, as a new jax has of a leaf of ones, is whole on every device."""
    whole = lambda leaf: PartitionSpec(*[None] * leaf.ndim)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.sharding.spec if leaf.sharding else whole(leaf), tree)


@pytest.mark.parametrize(("name", "spec"), WITH_SPECS)
def test_every_method_on_an_explicit_mesh(mesh, name, spec):
    """Masks, and what `prune` holds and gives, are of the types of the params: those of a step fit the next."""
    method, sparsity = ALL[name], shares(ALL[name])[-1]
    params, evidence = spread(drawn(0), mesh, spec), spread(EVIDENCE, mesh, spec)
    grads = evidence.pop("grads")
    other = {key: one for key, one in evidence.items() if key not in ("key", "statistics")}
    where = lie(jax.eval_shape(lambda params: params, params))
    masks = jax.eval_shape(lambda p, e: jp.compute_masks(method, p, sparsity, grads=grads, **e), params, evidence)
    assert lie(masks) == where
    for packed in (False, True):
        tx = jp.prune(optax.sgd(0.1), method, sparsity=sparsity, key=evidence["key"], packed=packed)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(lambda *given, tx=tx: tx.update(*given, **other), grads, state, params)
        assert lie(updates) == where
        assert lie(after.masks) == lie(state.masks)
        assert lie(after.statistics) == lie(state.statistics)


@pytest.mark.parametrize(("name", "spec"), [("block", SPECS[0]), ("lamp", SPECS[3])])
def test_explicit_masks_are_those_of_one_device(mesh, name, spec):
    """To the bit, and where the params lie: within jit and at once, with a mesh set and without."""
    method, sparsity = ALL[name], shares(ALL[name])[-1]
    params = {"dense": drawn(0)["dense"]}
    want = jp.compute_masks(method, params, sparsity)
    sharded = spread(params, mesh, spec)
    jitted = jax.jit(lambda params: jp.compute_masks(method, params, sparsity))(sharded)
    with jax.set_mesh(mesh):
        eager = jp.compute_masks(method, sharded, sparsity)
    packed = jp.unpack_masks(jp.pack_masks(jitted), sharded)
    for found in (jitted, eager, packed):
        for leaf, mask in found.items():
            np.testing.assert_array_equal(mask, want[leaf])
            assert mask.sharding.is_equivalent_to(sharded[leaf].sharding, mask.ndim)


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3]])
def test_what_else_reads_weights_on_an_explicit_mesh(mesh, spec):
    params = drawn(0)
    sharded = spread(params, mesh, spec)
    method = jp.Method(layout=LAYOUT)
    grads, key = spread(drawn(1), mesh, spec), jax.random.key(0)
    for tx in (
        jp.regrow(optax.sgd(0.1), jp.Method(granularity=jp.Output(), layout=LAYOUT), sparsity=0.5, key=key),
        jp.splice(optax.sgd(0.1), method, sparsity=0.5),
        jp.training.group_lasso(0.1, layout=LAYOUT),
        jp.training.growing_penalty(method, 0.5, rise=1e-4, every=5, ceiling=1.0),
    ):
        updates, _ = jax.eval_shape(lambda g, p, tx=tx: tx.update(g, tx.init(p), p), grads, sharded)
        assert lie(updates) == lie(jax.eval_shape(lambda params: params, sharded))
    scores = jnp.abs(sharded["dense"])
    assert kth_largest(scores, 5) == kth_largest(jnp.abs(params["dense"]), 5)
    mask = top_k_mask(scores, 5)
    assert mask.sharding == scores.sharding
    np.testing.assert_array_equal(mask, top_k_mask(jnp.abs(params["dense"]), 5))


def test_an_explicit_mesh_gathers_nothing_of_a_leafs_size(mesh):
    one = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x", "y")))
    run = jax.jit(lambda params: jp.compute_masks(jp.Method(), params, 0.9))
    text = run.lower({"kernel": one}).compile().as_text()
    assert not [op for op in ("all-gather(", "all-to-all(", "collective-permute(") if op in text]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["owl", "budget"])
def test_each_device_prunes_weights_of_its_own(name):
    """Inside `jax.shard_map`, which checks what varies: each device has the masks of its weights alone."""
    method, sparsity = ALL[name], shares(ALL[name])[-1]
    norms = {"input_norms": EVIDENCE["input_norms"]}
    models = [{"dense": drawn(seed)["dense"]} for seed in (0, 31)]
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("d")

    def own(stacked):
        params = jax.tree.map(lambda leaf: leaf[0], stacked)
        return jax.tree.map(lambda mask: mask[None], jp.compute_masks(method, params, sparsity, **norms))

    run = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=spec, out_specs=spec))
    masks = run(jax.tree.map(lambda *leaves: jnp.stack(leaves), *models))
    for i, params in enumerate(models):
        for leaf, want in jp.compute_masks(method, params, sparsity, **norms).items():
            np.testing.assert_array_equal(masks[leaf][i], want)
