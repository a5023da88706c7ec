"""What is taken where nothing is said: the format of this platform, and the layout that the model's function has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit
from sparse_helpers import make_leaf, make_x, needs_kernels, sparse_leaves
from tune_helpers import install_clock, tune

from jaxprune import native, sparse
from jaxprune.layout import FLAX, TORCH
from jaxprune.sparse import compression

CONV = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
PARAMS = {
    "conv": {"kernel": make_leaf((3, 3, 4, 8), 0.2, "float32")},
    "first": {"kernel": make_leaf((8, 32), 0.2, "float32", 1), "bias": jnp.ones((1, 32))},
    "last": {"kernel": make_leaf((32, 16), 1.0, "float32", 2)},  # not pruned
}
BATCHES = [make_x((batch, 6, 6, 4)) for batch in (1, 5)]


def model(params, x):
    x = jax.nn.relu(jax.lax.conv_general_dilated(x, params["conv"]["kernel"], (1, 1), "SAME", **CONV))
    x = jax.nn.relu(jnp.mean(x, (1, 2)) @ params["first"]["kernel"] + params["first"]["bias"])
    return x @ params["last"]["kernel"]


def kinds(params):
    return {weight.name: type(weight) for weight in sparse_leaves(params)}


def assert_as_dense(compressed):
    for x in BATCHES:
        y = quick_jit(sparse.apply(model))(compressed, x)
        np.testing.assert_allclose(y, quick_jit(model)(PARAMS, x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- formats


@needs_kernels
def test_on_a_cpu_the_native_kernels_are_taken_convolutions_included():
    compressed = sparse.compress(PARAMS)
    assert kinds(compressed) == {"conv/kernel": sparse.NativeWeight, "first/kernel": sparse.NativeWeight}
    assert compressed["last"]["kernel"] is PARAMS["last"]["kernel"]
    assert sparse.nbytes(compressed) < sparse.nbytes(PARAMS)
    assert_as_dense(compressed)


def test_on_a_cpu_without_kernels_bcsr_is_taken_and_convolutions_stay_dense(monkeypatch):
    monkeypatch.setattr(native, "why_missing", lambda: "There is no compiler here.")
    compressed = sparse.compress(PARAMS)
    assert kinds(compressed) == {"first/kernel": sparse.BCSRWeight}
    assert compressed["conv"]["kernel"] is PARAMS["conv"]["kernel"]
    assert_as_dense(compressed)


def test_elsewhere_bcoo_is_taken_unless_the_leaf_is_committed_to_a_cpu(monkeypatch):
    here = jax.device_put(PARAMS["first"]["kernel"], jax.devices("cpu")[0])
    monkeypatch.setattr(native, "why_missing", lambda: "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kinds(sparse.compress(PARAMS)) == {"first/kernel": sparse.BCOOWeight}
    assert compression.default_format(here) == "native"
    assert compression.default_format(np.asarray(here)) == "bcoo"


def test_float64_is_for_bcsr():
    with jax.enable_x64(True):
        leaf, x = make_leaf((40, 30), 0.1, "float64"), make_x((3, 40), "float64")
        (weight,) = sparse_leaves(sparse.compress({"w": leaf}))
        assert type(weight) is sparse.BCSRWeight
        np.testing.assert_allclose(sparse.matmul(x, weight), np.asarray(x) @ np.asarray(leaf), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("density", "is_sparse"), [(0.75, True), (0.85, False)])
def test_what_takes_no_fewer_bytes_stays_dense(monkeypatch, density, is_sparse):
    monkeypatch.setattr(native, "why_missing", lambda: "")
    leaf = make_leaf((512, 64), density, "float32")  # five bytes a non-zero instead of four a weight
    assert bool(kinds(sparse.compress({"w": leaf}))) is is_sparse
    assert kinds(sparse.compress({"w": leaf}, "native"))  # as it was told


def test_leaves_that_no_format_has_stay_dense():
    stacked = {"layers": {"kernel": make_leaf((3, 6, 6), 0.1, "float32")}, "v": jnp.ones(3)}
    assert sparse_leaves(sparse.compress(stacked, select="*")) == []
    with pytest.raises(ValueError, match=r"'w' holds a NaN"):
        sparse.compress({"w": jnp.full((3, 3), jnp.nan)})


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("format", [None, "bcsr", "native"])
def test_a_name_that_does_not_tell_the_layout_is_refused(format):
    params = {"a": {"A": make_leaf((9, 5), 0.3, "float32")}}
    assert sparse_leaves(sparse.compress(params, format, unsupported="dense")) == []
    with pytest.raises(ValueError, match=r"'a/A' \(9, 5\).*layout=jp\.FLAX.*layout_of.*A plan knows it too: .*tune"):
        sparse.compress(params, format)
    for layout, sizes in ((FLAX, (5, 9)), (TORCH, (9, 5))):
        (weight,) = sparse_leaves(sparse.compress(params, format, layout=layout))
        assert weight.sizes == sizes


FOUND = {
    "torch names": ({"a_up": {"weight": (48, 32)}, "b_down": {"weight": (16, 48)}}, lambda w, x: x @ w.T),
    "names that say nothing": ({"A": (48, 32), "B": (16, 48)}, lambda w, x: (w @ x.T).T),
    "names that lie": ({"kernel": (48, 32), "w": (16, 48)}, lambda w, x: x @ w.T),
    "in, out": ({"weight": (32, 48), "z": (48, 16)}, lambda w, x: x @ w),
}


@pytest.mark.parametrize("case", FOUND)
def test_tune_finds_the_layout_in_the_function(monkeypatch, case):
    shapes, product = FOUND[case]
    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    params = jax.tree.map(lambda shape: make_leaf(shape, 0.2, "float32"), shapes, is_leaf=is_shape)
    params["table"] = {"kernel": make_leaf((32, 32), 0.2, "float32")}  # of no product

    def fn(params, x):
        for leaf in jax.tree.leaves(params | {"table": None}):
            x = jnp.tanh(product(leaf, x))
        return x + params["table"]["kernel"][:1, :1]

    x = make_x((3, 32))
    install_clock(monkeypatch, bcsr=0.1, planned=0.5)
    chosen = tune(fn, params, x)
    weights = sparse_leaves(compressed := sparse.compress(params, chosen))
    assert sorted(weight.sizes for weight in weights) == [(16, 48), (48, 32)]
    np.testing.assert_allclose(quick_jit(sparse.apply(fn))(compressed, x), fn(params, x), rtol=1e-4, atol=1e-5)
    told = tune(fn, params, x, layout=FLAX, select="*/kernel")
    assert list(told.formats) == ["table/kernel"]  # what is said is respected


def test_axes_that_nobody_can_tell_leave_a_leaf_dense(monkeypatch):
    """One axis, split between what is summed over and what is kept."""
    install_clock(monkeypatch, bcsr=0.1, planned=0.5)
    fn = lambda p, x: jnp.einsum("bi,oik->bok", x, p["w"].reshape(4, 8, 3))  # noqa: E731
    chosen = tune(fn, {"w": make_leaf((32, 3), 0.3, "float32")}, make_x((5, 8)))
    assert chosen.is_dense
    assert "No format runs here" in chosen.leaves[0].why
