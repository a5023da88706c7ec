"""The measured choice on every kind of model: layouts, frameworks, shapes, dtypes, devices. Times are faked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_helpers import make_leaf, make_x, sparse_leaves
from sparse_models import MODELS
from tune_helpers import PARAMS, X, install_clock, mlp, timings_of, tune

import jaxprune as jp
from jaxprune import sparse


@pytest.fixture
def clock(monkeypatch):
    return functools.partial(install_clock, monkeypatch)


def test_torch_layout_travels_with_the_plan(clock):
    clock(bcsr=0.1, planned=0.5)
    params = {"first/weight[0]": make_leaf((48, 32), 0.2, "float32")}
    chosen = tune(lambda p, x: x @ p["first/weight[0]"].T, params, layout=jp.TORCH)
    (weight,) = sparse_leaves(sparse.compress(params, sparse.Plan.from_json(chosen.to_json())))
    assert not weight.outputs_last
    assert weight.sizes == (48, 32)


def test_shapes_alone_and_other_arguments(clock):
    clock(bcsr=0.1, planned=0.5)

    def fn(params, x, shift, train):
        assert train is True
        return mlp(params, x["image"]) + shift

    x = {"image": jax.ShapeDtypeStruct(X.shape, X.dtype)}
    chosen = sparse.tune(fn, PARAMS, x, jnp.float32(1), True, formats=["bcsr"], cache=None)
    assert set(chosen.formats.values()) == {"bcsr"}


def test_numpy_leaves_and_bfloat16(clock, unchecked):
    clock(bcsr=0.1, planned=0.5)
    params = {"w": np.asarray(make_leaf((16, 8), 0.3, "float32"))}
    assert tune(lambda p, x: x @ p["w"], params, make_x((3, 16))).formats == {"w": "bcsr"}
    params = {"w": make_leaf((16, 8), 0.3, "bfloat16")}
    assert tune(lambda p, x: x @ p["w"], params, make_x((3, 16), "bfloat16")).formats == {"w": "bcsr"}


@pytest.mark.parametrize("model", MODELS)
def test_frameworks(clock, model):
    clock(bcsr=0.1, planned=0.5)
    with jax.numpy_rank_promotion("allow"):
        fn, params, layout, names = model(None)
        chosen = tune(fn, params, make_x((5, 6)), layout=layout)
        assert chosen.formats == dict.fromkeys(names, "bcsr")
        assert [weight.name for weight in sparse_leaves(sparse.compress(params, chosen))] == names


def test_a_leaf_on_many_devices_stays_dense(clock):
    clock(bcsr=0.1)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    leaf = jax.device_put(make_leaf((32, 8), 0.2, "float32"), sharding)
    chosen = tune(lambda w, x: x @ w, leaf, make_x((3, 32)))
    assert chosen.is_dense
    assert "lies on 8 devices" in chosen.leaves[0].why


def test_convolutions_are_measured_or_refused(clock):
    clock(planned=0.5)
    kernel = make_leaf((3, 3, 4, 8), 0.2, "float32")

    def conv(kernel, x):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    (leaf,) = tune(conv, kernel, make_x((1, 6, 6, 4)), formats=None).leaves
    assert (leaf.spatial, leaf.inputs, leaf.outputs) == ((0, 1), (2,), (3,))
    assert leaf.sites[0].op == "conv_general_dilated"
    assert set(timings_of(leaf)) == {"dense"} | {n for n, f in sparse.FORMATS.items() if not getattr(f, "lossy", 0)}
