"""Compressed weights in functions written for dense ones, from every framework: equal results, or a refusal."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit
from sparse_helpers import FORMATS, compress_all, compress_one, each_format, make_leaf, make_x, sparse_leaves
from sparse_models import MODELS

from jaxprune import sparse

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick")]


USES = {
    "x @ w": lambda w, x: x @ w,
    "dot": lambda w, x: jnp.dot(x, w),
    "einsum": lambda w, x: jnp.einsum("bi,io->bo", x, w),
    "einsum, outputs first": lambda w, x: jnp.einsum("io,bi->ob", w, x),
    "tensordot of three axes": lambda w, x: jnp.tensordot(x.reshape(1, *x.shape), w, ((2,), (0,))),
    "w.T @ x": lambda w, x: jax.vmap(lambda row: w.T @ row)(x),
    "vmap in vmap": lambda w, x: jax.vmap(jax.vmap(lambda row: row @ w))(x.reshape(1, *x.shape)),
    "back through w.T": lambda w, x: (x @ w) @ w.T,
    "inner jit": lambda w, x: jax.jit(lambda w, x: jnp.maximum(x @ w, 0))(w, x),
    "relu": lambda w, x: jax.nn.relu(x @ w),
    "checkpoint": lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w, x),
    "scan over x": lambda w, x: jax.lax.scan(lambda carry, row: (carry + 1, row @ w), 0, x)[1],
    "cond": lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: 2 * x @ w, w),
    "fori_loop": lambda w, x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w @ w.T), x),
    "grad inside": lambda w, x: jax.grad(lambda x: jnp.sum((x @ w) ** 2))(x),
    "no-op reshape, copy, stop_gradient": lambda w, x: x @ jax.lax.stop_gradient(jnp.array(w).reshape(7, 4)),
    "reduce in float32": lambda w, x: jax.lax.dot(
        x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    ),
}


LEAF, X = make_leaf((7, 4), 0.4, "float32"), make_x((5, 7))
WEIGHTS = compress_all(LEAF)


def assert_equal(got, want, format):
    assert type(got) is type(want)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=format)


@pytest.mark.parametrize("use", USES)
def test_apply_equals_dense(use):
    """In one program, every format by itself and mapped over inputs."""

    fn = sparse.apply(USES[use])

    def both(w, x):
        return fn(w, x), jax.vmap(fn, (None, 0))(w, jnp.stack([x, x]))[1]

    @quick_jit
    def run(leaf, weights, x):
        return USES[use](leaf, x), {f: both(w, x) for f, w in weights.items()}

    want, found = run(LEAF, WEIGHTS, X)
    for format, both in found.items():
        for got in both:
            assert_equal(got, want, format)


# Every use with one format, every format with several uses: above are all pairs, and outside jit their steps are alike.
@pytest.mark.parametrize(("use", "format"), list(zip(USES, itertools.cycle(FORMATS))))
def test_apply_outside_jit_equals_dense(use, format):
    assert_equal(sparse.apply(USES[use])(WEIGHTS[format], X), USES[use](LEAF, X), format)


def makes_a_matrix(jaxpr, sizes):
    """Whether an equation, in whatever call, has a result as large as the weight: it is not run on its non-zeros."""
    inner = [param for eqn in jaxpr.eqns for param in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns"))]
    inner = [getattr(one, "jaxpr", one) for one in inner if hasattr(one, "eqns") or hasattr(one, "jaxpr")]
    here = any(sorted(var.aval.shape) == sorted(sizes) for eqn in jaxpr.eqns for var in eqn.outvars)
    return here or any(makes_a_matrix(one, sizes) for one in inner)


SIZES = (64, 32)
ANY = [
    name
    for name, one in sparse.FORMATS.items()
    if not (one.calibrated or (name.startswith("native") and sparse.native.why_missing()))
]
WAYS = {  # (leaf, x (5, in)) -> (5, out), for a leaf (in, out) and one (out, in)
    "in_out": {"x @ W": lambda w, x: x @ w, "W.T @ x": lambda w, x: (w.T @ x.T).T, "W.T @ v": lambda w, x: w.T @ x[0]},
    "out_in": {"x @ W.T": lambda w, x: x @ w.T, "W @ x": lambda w, x: (w @ x.T).T, "W @ v": lambda w, x: w @ x[0]},
}


@pytest.mark.parametrize("layout", WAYS)
@pytest.mark.parametrize("format", ANY)
def test_both_ways_round_run_on_the_non_zeros(format, layout):
    """Of the native formats, one call of the kernel; a product over the outputs has none but for bits, and is dense."""
    leaf = np.where(np.arange(64)[:, None] % 4 < 2, make_leaf(SIZES, 1.0, "float32"), 0)  # 2:4 along the inputs
    leaf = jnp.asarray(leaf if layout == "in_out" else leaf.T)
    weight, x, y = compress_one(leaf, format, layout), make_x((5, 64)), make_x((5, 32))
    for fn in WAYS[layout].values():
        jaxpr = jax.make_jaxpr(sparse.apply(fn))(weight, x).jaxpr
        assert not makes_a_matrix(jaxpr, SIZES)
        assert str(jaxpr).count("native_product[") == format.startswith("native")
        tolerance = 0.05 * np.abs(x).sum() if format.endswith("int8") else 1e-4
        np.testing.assert_allclose(quick_jit(sparse.apply(fn))(weight, x), fn(leaf, x), rtol=1e-4, atol=tolerance)
    for fn in WAYS["out_in" if layout == "in_out" else "in_out"].values():
        dense = format.startswith("native") and "bits" not in format
        assert makes_a_matrix(jax.make_jaxpr(sparse.apply(fn))(weight, y).jaxpr, SIZES) == dense


CASES = [(model, None) for model in MODELS] + [(model, jnp.bfloat16) for model in MODELS[:3]]


# One that works on columns and one that works on rows: what differs otherwise, no framework can see.
TWO = [name for name in FORMATS if name in ("bcsr", "native")]


@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_frameworks(model, dtype):
    with jax.numpy_rank_promotion("allow"):  # Flax and Haiku add their biases by rank promotion
        fn, params, layout, names = model(dtype)
        params = jax.tree.map(lambda leaf: jnp.asarray(np.where(np.abs(leaf) > 0.2, leaf, 0), leaf.dtype), params)
        compressed = {format: sparse.compress(params, format, layout=layout) for format in TWO}

        @quick_jit
        def run(params, compressed, x):
            found = {format: sparse.apply(fn)(tree, x) for format, tree in compressed.items()}
            return fn(params, x), found, sparse.decompress(compressed)

        with jax.numpy_dtype_promotion("strict" if dtype is None else "standard"):
            want, found, back = run(params, compressed, make_x((5, 6)))
    for format, got in found.items():
        assert [weight.name for weight in sparse_leaves(compressed[format])] == names
        assert got.dtype == want.dtype
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=1e-5, atol=1e-5, err_msg=format)
        assert jax.tree.structure(back[format]) == jax.tree.structure(params)
        assert all(map(np.array_equal, jax.tree.leaves(back[format]), jax.tree.leaves(params)))


@each_format
def test_scan_over_layers_of_activations_holds_weights_as_constants(format):
    leaf, xs = make_leaf((8, 8), 0.3, "float32"), make_x((6, 5, 8))

    def fn(params, xs):
        return jax.lax.scan(lambda h, x: (jnp.tanh(h @ params["w"] + x), None), jnp.zeros((5, 8)), xs)[0]

    got = quick_jit(sparse.apply(fn))(sparse.compress({"w": leaf}, format), xs)
    np.testing.assert_allclose(got, quick_jit(fn)({"w": leaf}, xs), rtol=1e-4, atol=1e-5)


@each_format
def test_no_retrace_for_other_values_or_patterns_of_equal_nse(format):
    traces = []

    def fn(params, x):
        traces.append(None)
        return x @ params["w"]

    predict, x = jax.jit(sparse.apply(fn)), make_x((5, 7))
    base = np.zeros((7, 4), np.float32)
    patterns = [0, 1, 2], [5, 9, 27], [4, 8, 12]
    if format == "block":  # where the longest run of blocks has another length, its program is another
        patterns = [0, 1, 2], [5, 8, 27], [4, 9, 14]
    for cells in patterns:
        leaf = base.copy()
        leaf.flat[cells] = [1.0, -2.0, 3.0]
        np.testing.assert_allclose(predict(sparse.compress({"w": jnp.asarray(leaf)}, format), x), x @ leaf, rtol=1e-5)
    assert len(traces) == 1


# Refusals, each read.

REFUSED = {
    "add": lambda w, x: x @ (w + 1),
    "mul": lambda w, x: x @ (2 * w),
    "slice": lambda w, x: w[0],
    "gather": lambda w, x: w[jnp.array([1, 1])],
    "reshape": lambda w, x: x[:, :4] @ w.reshape(4, 7),
    "reduce_sum": lambda w, x: jnp.sum(w),
    "conv_general_dilated": lambda w, x: jax.lax.conv(x[:, :4, None], w[:, :, None], (1,), "SAME"),
    "dot_general": lambda w, x: jnp.einsum("bi,io->bio", x, w),
    "dot_general, over both axes": lambda w, x: jnp.tensordot(x[:4].T, w, 2),
    "dot_general, over none": lambda w, x: jnp.tensordot(x, w, 0),
    "dot_general, twice": lambda w, x: w.T @ w,
    "convert_element_type": lambda w, x: w.astype(jnp.int32),
    "sort": lambda w, x: jnp.sort(w),
}
BEFORE = {"conv_general_dilated": "broadcast_in_dim|reshape", "sort": "sort"}


@pytest.mark.parametrize("primitive", REFUSED)
def test_other_uses_are_refused_or_decompressed(primitive):
    fn, name = REFUSED[primitive], BEFORE.get(primitive, primitive.split(",")[0])
    for format, weight in WEIGHTS.items():
        cls = sparse.FORMATS[format].__name__
        message = rf"'kernel' \((7, 4|4, 7)\).*{cls}.*`({name})`.*select=.*unsupported=\"dense\""
        with pytest.raises(sparse.SparseUseError, match=message):
            jax.jit(sparse.apply(fn))(weight, X)
    dense = sparse.apply(fn, unsupported="dense")
    want, found = quick_jit(lambda leaf, weights, x: (fn(leaf, x), {f: dense(w, x) for f, w in weights.items()}))(
        LEAF, WEIGHTS, X
    )
    for format, got in found.items():
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=format)


@each_format
def test_a_convolution_kernel_is_refused_at_its_convolution(format):
    weight = compress_one(make_leaf((3, 2), 0.9, "float32"), format)
    x = make_x((1, 3))

    def conv(weight, x):  # a window of no axes: the kernel goes into the convolution as it is
        return jax.lax.conv_general_dilated(x, weight, (), "SAME", dimension_numbers=("NC", "IO", "NC"))

    with pytest.raises(sparse.SparseUseError, match=r"'kernel'.*`conv_general_dilated`"):
        jax.jit(sparse.apply(conv))(weight, x)


def test_returned_leaf_keeps_its_structure_when_unsupported_is_dense():
    weight = compress_one(make_leaf((3, 2), 0.9, "float32"), "bcsr")
    back = sparse.apply(lambda weight: weight, unsupported="dense")(weight)
    assert jax.tree.structure(back) == jax.tree.structure(weight)


def test_custom_vjp_is_refused_with_a_way_out():
    double = jax.custom_vjp(lambda x: 2 * x)
    double.defvjp(lambda x: (2 * x, None), lambda _, ct: (2 * ct,))
    leaf, x = make_leaf((7, 4), 0.4, "float32"), make_x((5, 7))
    weight = compress_one(leaf, "bcoo")
    with pytest.raises(sparse.SparseUseError, match=r"custom_vjp.*jax\.jit"):
        jax.jit(sparse.apply(lambda w, x: double(x @ w)))(weight, x)
    got = jax.jit(sparse.apply(lambda w, x: jax.jit(double)(x @ w)))(weight, x)
    np.testing.assert_allclose(got, 2 * x @ leaf, rtol=1e-5, atol=1e-6)
