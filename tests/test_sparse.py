"""Compressed weights: the same numbers as dense, from every framework, or a refusal that says why."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import sparse
from jaxprune.layout import FLAX, TORCH, Axes

FORMATS = sorted(sparse.FORMATS)
LAYOUTS = {"in_out": FLAX, "out_in": TORCH}
# Half a unit in the last place for the rounding of inputs and result, the rest for the order of sums.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.6e-2, "float16": 2e-3}
DOT = jax.lax.dot_general

pytestmark = pytest.mark.filterwarnings("error")
each_format = pytest.mark.parametrize("format", FORMATS)


def make_leaf(shape, density, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.where(rng.random(shape) < density, rng.normal(size=shape), 0), dtype)


def make_x(shape, dtype="float32", seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def compress_one(leaf, format, layout="in_out"):
    return sparse.compress({"kernel": leaf}, format, layout=LAYOUTS[layout])["kernel"]


def in_out(leaf, layout):
    """The leaf as float64 (in, out)."""
    matrix = np.asarray(leaf).astype(np.float64)
    return matrix if layout == "in_out" else matrix.T


def assert_near(got, want, scale, dtype):
    """Error relative to the sum of absolute products, as every summation is bounded."""
    assert got.shape == want.shape
    assert np.all(np.abs(np.asarray(got).astype(np.float64) - want) <= TOLERANCE[dtype] * scale + 1e-30)


sizes = st.sampled_from([0, 1, 2, 5, 16, 17])
problems = {
    "n_in": sizes,
    "n_out": sizes,
    "batch": st.lists(st.sampled_from([0, 1, 2, 3, 7]), max_size=3),
    "density": st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    "dtype": st.sampled_from(sorted(TOLERANCE)),
    "layout": st.sampled_from(sorted(LAYOUTS)),
    "seed": st.integers(0, 2**16),
}


@each_format
@given(**problems)
def test_matmul_equals_numpy(format, n_in, n_out, batch, density, dtype, layout, seed):
    shape = (n_in, n_out) if layout == "in_out" else (n_out, n_in)
    leaf, x = make_leaf(shape, density, dtype, seed), make_x((*batch, n_in), dtype, seed)
    weight = compress_one(leaf, format, layout)
    w, x64 = in_out(leaf, layout), np.asarray(x).astype(np.float64)
    for y in jax.jit(lambda x, weight: (sparse.matmul(x, weight), sparse.reference.matmul(x, weight)))(x, weight):
        assert y.dtype == x.dtype
        assert_near(y, x64 @ w, np.abs(x64) @ np.abs(w), dtype)


@each_format
@given(**problems)
def test_round_trip_is_bit_exact(format, n_in, n_out, batch, density, dtype, layout, seed):
    del batch
    leaf = make_leaf((n_in, n_out), density, dtype, seed)
    weight = compress_one(leaf, format, layout)
    back, stored = jax.jit(lambda weight: (weight.decompress(), weight.stored.todense()))(weight)
    assert back.dtype == leaf.dtype
    assert np.asarray(back).tobytes() == np.asarray(leaf).tobytes()
    assert weight.nse == np.count_nonzero(np.asarray(leaf))
    assert (weight.shape, weight.dtype, weight.name) == (leaf.shape, leaf.dtype, "kernel")
    assert np.array_equal(in_out(stored, "out_in"), in_out(leaf, layout))


@each_format
def test_round_trip_of_odd_values(format):
    leaf = np.array([[1e-45, -0.0, np.inf], [0.0, -np.inf, -1e-40]], np.float32)  # subnormals stay, -0.0 does not
    weight = compress_one(jnp.asarray(leaf), format)
    assert weight.nse == 4
    assert np.asarray(jax.jit(sparse.decompress)(weight)).tobytes() == (np.where(leaf == 0, 0, leaf)).tobytes()


@each_format
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("density", [0.0, 0.3])
@pytest.mark.parametrize("batch", [(), (0,), (3, 5)])
def test_gradients_equal_dense(format, layout, density, batch):
    leaf, x = make_leaf((6, 9), density, "float32"), make_x((*batch, 6 if layout == "in_out" else 9))
    weight = compress_one(leaf, format, layout)

    def loss(values, x):
        return jnp.sum(jnp.sin(sparse.matmul(x, weight.with_values(values))))

    def dense_loss(leaf, x):
        return jnp.sum(jnp.sin(x @ (leaf if layout == "in_out" else leaf.T)))

    d_values, d_x = jax.jit(jax.grad(loss, (0, 1)))(weight.values, x)
    dense_d_leaf, dense_d_x = jax.grad(dense_loss, (0, 1))(leaf, x)
    stored = dense_d_leaf.T if layout == "in_out" else dense_d_leaf
    np.testing.assert_allclose(d_x, dense_d_x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_values, stored[weight.coordinates()], rtol=1e-5, atol=1e-5)
    forward = jax.jvp(loss, (weight.values, x), (weight.values, x))[1]
    np.testing.assert_allclose(forward, jax.jvp(dense_loss, (leaf, x), (leaf, x))[1], rtol=1e-4, atol=1e-5)


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


@each_format
@pytest.mark.parametrize("use", USES)
def test_apply_equals_dense(format, use):
    leaf, x = make_leaf((7, 4), 0.4, "float32"), make_x((5, 7))
    weight, fn = compress_one(leaf, format), sparse.apply(USES[use])
    want = USES[use](leaf, x)
    for got in (jax.jit(fn)(weight, x), fn(weight, x), jax.vmap(fn, (None, 0))(weight, jnp.stack([x, x]))[1]):
        assert type(got) is type(want)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@each_format
def test_vmap_over_stored_values(format):
    leaf, x = make_leaf((7, 4), 0.4, "float32"), make_x((5, 7))
    weight = compress_one(leaf, format)
    many = jnp.stack([weight.values, 2 * weight.values])
    for axis, batch in ((None, x), (0, jnp.stack([x, x]))):
        got = jax.vmap(lambda values, x: sparse.matmul(x, weight.with_values(values)), (0, axis))(many, batch)
        np.testing.assert_allclose(got, jnp.stack([x @ leaf, 2 * x @ leaf]), rtol=1e-5, atol=1e-5)


@each_format
def test_bfloat16_weights_float32_inputs(format):
    leaf, x = make_leaf((64, 8), 0.5, "bfloat16"), make_x((3, 64))
    weight = compress_one(leaf, format)
    with pytest.raises(Exception, match="promotion"):
        sparse.matmul(x, weight)
    with jax.numpy_dtype_promotion("standard"):
        got, want = sparse.matmul(x, weight), jnp.matmul(x, leaf)
        from_apply = jax.jit(sparse.apply(jnp.matmul))(x, weight)
    assert got.dtype == want.dtype == from_apply.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(from_apply, want, rtol=1e-5, atol=1e-5)
    mixed = functools.partial(DOT, dimension_numbers=(((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    x = x.astype(jnp.bfloat16)
    got = jax.jit(sparse.apply(mixed))(x, weight)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.asarray(x).astype(float) @ np.asarray(leaf).astype(float), atol=1e-4)


def test_16_bit_sums_are_rounded_once():
    leaf = jnp.ones((4096, 1), jnp.bfloat16)  # added one by one, bfloat16 ones stop at 256
    for format in FORMATS:
        y = sparse.matmul(jnp.ones((1, 4096), jnp.bfloat16), compress_one(leaf, format))
        assert float(y[0, 0]) == 4096


def test_float64():
    with jax.enable_x64(True):
        leaf, x = make_leaf((20, 9), 0.3, "float64"), make_x((4, 20), "float64")
        for format in FORMATS:
            y = jax.jit(sparse.matmul)(x, compress_one(leaf, format))
            np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(leaf), rtol=1e-13, atol=1e-13)


# Every framework, its apply function unchanged: (apply_fn, params, layout, names of the compressed leaves).


def nnx_model(dtype):
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(6, 8, rngs=rngs, dtype=dtype), nnx.Linear(8, 3, rngs=rngs, dtype=dtype)])

        def __call__(self, x):
            return self.layers[1](nnx.relu(self.layers[0](x)))

    graph, params = nnx.split(Mlp(nnx.Rngs(0)))
    return lambda params, x: nnx.merge(graph, params)(x), params, FLAX, ["layers/0/kernel", "layers/1/kernel"]


def nnx_module(dtype):
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 3, rngs=rngs, dtype=dtype)

        def __call__(self, x):
            return jnp.tanh(self.first(x))

    return lambda model, x: model(x), Mlp(nnx.Rngs(0)), FLAX, ["first/kernel"]


def linen_model(dtype):
    model = linen.Sequential([linen.Dense(8, dtype=dtype), linen.relu, linen.Dense(3, dtype=dtype)])
    params = model.init(jax.random.key(0), jnp.zeros((1, 6)))
    return model.apply, params, FLAX, ["params/layers_0/kernel", "params/layers_2/kernel"]


def haiku_model(_):
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 3], name="mlp")(x)))
    names = ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]
    return model.apply, model.init(jax.random.key(0), jnp.zeros((1, 6))), FLAX, names


def equinox_model(_):
    arrays, rest = eqx.partition(eqx.nn.MLP(6, 3, 8, 1, key=jax.random.key(0)), eqx.is_array)
    names = ["layers/0/weight", "layers/1/weight"]
    return lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x), arrays, TORCH, names


def plain_model(_):
    params = [(make_x((6, 8), seed=1), make_x((8,), seed=2)), (make_x((8, 3), seed=3), make_x((3,), seed=4))]

    def fn(params, x):
        (w0, b0), (w1, b1) = params
        return jnp.maximum(x @ w0 + b0[None], 0) @ w1 + b1[None]

    return fn, params, FLAX, ["0/0", "1/0"]


MODELS = [nnx_model, nnx_module, linen_model, haiku_model, equinox_model, plain_model]
CASES = [(model, None) for model in MODELS] + [(model, jnp.bfloat16) for model in MODELS[:3]]


def sparse_leaves(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, sparse.SparseWeight))
    return [leaf for leaf in leaves if isinstance(leaf, sparse.SparseWeight)]


@each_format
@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_frameworks(model, dtype, format):
    with jax.numpy_rank_promotion("allow"):  # Flax and Haiku add their biases by rank promotion
        fn, params, layout, names = model(dtype)
        params = jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) > 0.2, leaf, 0), params)
        compressed = sparse.compress(params, format, layout=layout)
        assert [weight.name for weight in sparse_leaves(compressed)] == names
        x = make_x((5, 6))
        with jax.numpy_dtype_promotion("strict" if dtype is None else "standard"):
            want, got = jax.jit(fn)(params, x), jax.jit(sparse.apply(fn))(compressed, x)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=1e-5, atol=1e-5)
    back = sparse.decompress(compressed)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(params)))


@each_format
def test_scan_over_layers_of_activations_holds_weights_as_constants(format):
    leaf, xs = make_leaf((8, 8), 0.3, "float32"), make_x((6, 5, 8))

    def fn(params, xs):
        return jax.lax.scan(lambda h, x: (jnp.tanh(h @ params["w"] + x), None), jnp.zeros((5, 8)), xs)[0]

    got = jax.jit(sparse.apply(fn))(sparse.compress({"w": leaf}, format), xs)
    np.testing.assert_allclose(got, fn({"w": leaf}, xs), rtol=1e-4, atol=1e-5)


@each_format
def test_no_retrace_for_other_values_or_patterns_of_equal_nse(format):
    traces = []

    def fn(params, x):
        traces.append(None)
        return x @ params["w"]

    predict, x = jax.jit(sparse.apply(fn)), make_x((5, 7))
    base = np.zeros((7, 4), np.float32)
    for cells in ([0, 1, 2], [5, 9, 27], [4, 8, 12]):
        leaf = base.copy()
        leaf.flat[cells] = [1.0, -2.0, 3.0]
        np.testing.assert_allclose(predict(sparse.compress({"w": jnp.asarray(leaf)}, format), x), x @ leaf, rtol=1e-5)
    assert len(traces) == 1


@each_format
def test_is_a_pytree(format):
    weight = compress_one(make_leaf((7, 4), 0.4, "float32"), format)
    leaves, treedef = jax.tree.flatten(weight)
    assert jax.tree.structure(jax.tree.unflatten(treedef, leaves)) == treedef
    assert jax.tree.structure(compress_one(2 * weight.decompress(), format)) == treedef
    assert weight.nbytes == sum(leaf.nbytes for leaf in leaves) == sparse.nbytes({"a": weight})
    doubled = jax.tree.map(lambda leaf: leaf * 2 if leaf.dtype == jnp.float32 else leaf, weight)
    assert np.array_equal(doubled.decompress(), 2 * weight.decompress())
    shapes = jax.eval_shape(lambda weight: weight, weight)
    assert (shapes.shape, shapes.dtype, shapes.nse) == (weight.shape, weight.dtype, weight.nse)


def test_nbytes():
    params = sparse.compress({"w": make_leaf((50, 40), 1.0, "float32"), "bias": jnp.zeros(40)}, "bcoo")
    assert sparse.nbytes(params) == 50 * 40 * (4 + 8) + 40 * 4
    params = sparse.compress({"w": make_leaf((50, 40), 1.0, "bfloat16"), "bias": jnp.zeros(40)}, "bcsr")
    assert sparse.nbytes(params) == 50 * 40 * (2 + 4) + 41 * 4 + 40 * 4


def test_dense_format_and_leaves_without_weights_stay():
    params = {"w": make_leaf((5, 4), 0.5, "float32"), "bias": jnp.ones(4), "step": jnp.array(3)}
    assert sparse.compress(params, "dense")["w"] is params["w"]
    compressed = sparse.compress(params, "bcsr")
    assert compressed["bias"] is params["bias"]
    assert compressed["step"] is params["step"]
    assert sparse.apply(lambda p: p["w"])(compressed).nse == compressed["w"].nse  # a returned leaf stays compressed


def test_select_by_name():
    params = {"a": {"w": make_leaf((5, 4), 0.5, "float32")}, "b": {"w": make_leaf((5, 4), 0.5, "float32")}}
    assert [weight.name for weight in sparse_leaves(sparse.compress(params, select="b/*"))] == ["b/w"]
    with pytest.raises(ValueError, match=r"'c/\*'"):
        sparse.compress(params, select="c/*")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="Eigen's kernel is CPU's")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bcsr_runs_eigen_under_jit_and_vmap(dtype):
    weight, x = compress_one(make_leaf((64, 32), 0.1, dtype), "bcsr"), make_x((4, 6, 64), dtype)

    def kernels(fn, *args):
        return jax.jit(fn).lower(*args).compile().as_text().count('custom_call_target="cpu_csr_sparse_dense_ffi"')

    assert kernels(sparse.matmul, x, weight) == 1
    assert kernels(jax.vmap(sparse.matmul, (0, None)), x, weight) == 1
    assert kernels(jax.vmap(sparse.apply(jnp.matmul), (1, None)), x, weight) == 1
    assert kernels(sparse.apply(jax.vmap(lambda x, w: w.T @ x, (0, None))), x[:, 0], weight) == 1


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


@each_format
@pytest.mark.parametrize("primitive", REFUSED)
def test_other_uses_are_refused_or_decompressed(format, primitive):
    leaf, x, fn = make_leaf((7, 4), 0.4, "float32"), make_x((5, 7)), REFUSED[primitive]
    compressed = sparse.compress({"layer": leaf}, format)

    def on_params(params, x):
        return fn(params["layer"], x)

    name = BEFORE.get(primitive, primitive.split(",")[0])
    message = rf"'layer' \((7, 4|4, 7)\).*{sparse.FORMATS[format].__name__}.*`({name})`.*select=.*unsupported=\"dense\""
    with pytest.raises(sparse.SparseUseError, match=message):
        jax.jit(sparse.apply(on_params))(compressed, x)
    got = jax.jit(sparse.apply(on_params, unsupported="dense"))(compressed, x)
    np.testing.assert_allclose(got, fn(leaf, x), rtol=1e-5, atol=1e-5)


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


def refuse_compress(error, message, params, *args, **options):
    with pytest.raises(error, match=message):
        sparse.compress(params, *args, **options)


def test_compress_refusals(unchecked):
    leaf = make_leaf((5, 4), 0.5, "float32")
    conv, stacked = (
        {"conv": {"kernel": jnp.ones((3, 3, 1, 2))}, "d": leaf},
        FLAX.with_rules({"s": Axes((0,), (), (1,), (2,))}),
    )
    refuse_compress(ValueError, r"'csc'.*'bcoo', 'bcsr', 'dense'", {"w": leaf}, "csc")
    refuse_compress(ValueError, r"`unsupported`.*'maybe'", {"w": leaf}, unsupported="maybe")
    refuse_compress(ValueError, r"'conv/kernel' \(3, 3, 1, 2\) is a convolution kernel.*select.*unsupported", conv)
    refuse_compress(ValueError, r"'s' \(2, 3, 4\) is stacked layers", {"s": jnp.ones((2, 3, 4))}, layout=stacked)
    refuse_compress(ValueError, r"'v' \(3,\) is no matrix", {"v": jnp.ones(3)}, select=lambda name, leaf: True)
    refuse_compress(ValueError, r"'b' holds a NaN", {"a": leaf, "b": leaf.at[1, 1].set(jnp.nan)})
    refuse_compress(
        TypeError, r"'w' is compressed already.*decompress", {"w": compress_one(leaf, "bcoo").replace(name="w")}
    )
    refuse_compress(TypeError, r"'i' is int32", {"i": jnp.ones((3, 3), jnp.int32)}, select="i")
    kept = sparse.compress(conv, unsupported="dense")
    assert kept["conv"]["kernel"] is conv["conv"]["kernel"]
    assert isinstance(kept["d"], sparse.BCOOWeight)
    with pytest.raises(TypeError, match=r"'w' is traced.*outside"):
        jax.jit(lambda leaf: sparse.compress({"w": leaf}))(leaf)
    with pytest.raises(ValueError, match=r"`unsupported`.*'maybe'"):  # asked of `apply`
        sparse.apply(jnp.matmul, unsupported="maybe")


def test_matmul_refuses_other_inputs():
    weight = compress_one(make_leaf((5, 4), 0.5, "float32"), "bcsr")
    for shape in ((4,), (5, 4)):
        with pytest.raises(ValueError, match=r"'kernel' needs x of shape \(\*batch, 5\)"):
            sparse.matmul(jnp.ones(shape), weight)
    with pytest.raises(sparse.SparseUseError, match="'kernel'"):
        weight.materialise()
    assert weight.replace(unsupported="dense").materialise().shape == (5, 4)


ONE, TWO = np.ones(1, np.float32), np.ones(2, np.float32)
BAD_PARTS = {
    "unsorted outputs": (sparse.BCOOWeight, (TWO, [[1, 0], [0, 0]]), "sorted"),
    "unsorted inputs": (sparse.BCOOWeight, (TWO, [[1, 1], [1, 0]]), "sorted"),
    "twice": (sparse.BCOOWeight, (TWO, [[1, 1], [1, 1]]), "each once"),
    "output too large": (sparse.BCOOWeight, (ONE, [[3, 0]]), "outside its 3 outputs and 2 inputs"),
    "input too large": (sparse.BCOOWeight, (ONE, [[0, 2]]), "outside"),
    "negative": (sparse.BCOOWeight, (ONE, [[-1, 0]]), "outside"),
    "too few": (sparse.BCOOWeight, (TWO, [[0, 0]]), r"indices \(2, 2\), \(1, 2\) arrived"),
    "csr unsorted": (sparse.BCSRWeight, (TWO, [1, 0], [0, 2, 2, 2]), "sorted"),
    "csr input too large": (sparse.BCSRWeight, (TWO, [0, 2], [0, 2, 2, 2]), "outside"),
    "csr bounds too few": (sparse.BCSRWeight, (TWO, [0, 1], [0, 2, 2]), "4 run bounds"),
    "csr bounds fall": (sparse.BCSRWeight, (TWO, [0, 1], [0, 2, 1, 2]), "climb"),
    "csr bounds end early": (sparse.BCSRWeight, (TWO, [0, 1], [0, 1, 1, 1]), "its 2 values"),
    "csr too few": (sparse.BCSRWeight, (TWO, [0], [0, 2, 2, 2]), "2 values, but 1 input"),
    "float index": (sparse.BCOOWeight, (ONE, [[0.0, 0.0]]), "integers"),
    "integer values": (sparse.BCOOWeight, (np.ones(1, np.int32), [[0, 0]]), "floating values"),
    "matrix of values": (sparse.BCOOWeight, (np.ones((1, 1), np.float32), [[0, 0]]), "floating values"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_are_checked(case):
    cls, (values, *indices), message = BAD_PARTS[case]
    with pytest.raises((ValueError, TypeError), match=rf"(?s){message}"):
        cls(values, *(np.asarray(part) for part in indices), leaf_shape=(2, 3), name="w")


def test_traced_parts_are_refused_and_good_ones_taken():
    good = sparse.BCSRWeight(TWO, np.array([0, 1]), np.array([0, 1, 1, 2]), leaf_shape=(2, 3), name="w")
    assert np.array_equal(good.decompress(), [[1, 0, 0], [0, 0, 1]])
    with pytest.raises(TypeError, match=r"'w'.*traced"):
        jax.jit(lambda i: sparse.BCSRWeight(good.values, i, good.indptr, leaf_shape=(2, 3), name="w"))(good.indices)
