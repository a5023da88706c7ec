"""Sites of every kind: look-ups, scales, biases, parts of leaves, convolutions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from trace_helpers import kinds, like, normal

import jaxprune as jp
from jaxprune.layout import Axes

pytestmark = pytest.mark.usefixtures("quick")

N, IN, OUT, ROWS = 5, 6, 8, 11


INDICES = like(N, dtype=jnp.int32)
TABLE = Axes(inputs=(0,), outputs=(1,))
CHANNELS = Axes(outputs=(0,))
# function of a leaf and x, shapes of the leaf and of x (int32 for a look-up): kind, operation, axes
USES = {
    "rows": (lambda w, i: w[i], (ROWS, OUT), INDICES, "embedding", "gather", TABLE),
    "rows at known numbers": (
        lambda w, x: x + w[jnp.array([0, 1])].sum(),
        (ROWS, OUT),
        (N,),
        "embedding",
        "gather",
        TABLE,
    ),
    "take": (lambda w, i: jnp.take(w, i, axis=0, mode="clip"), (ROWS, OUT), INDICES, "embedding", "gather", TABLE),
    "take along the last axis": (
        lambda w, i: jnp.take(w, i, axis=1, mode="clip"),
        (OUT, ROWS),
        INDICES,
        "embedding",
        "gather",
        Axes(inputs=(1,), outputs=(0,)),
    ),
    "one row": (lambda w, i: w[i[0]], (ROWS, OUT), INDICES, "embedding", "dynamic_slice", TABLE),
    "rows, one by one": (lambda w, i: jax.vmap(lambda i: w[i])(i), (ROWS, OUT), INDICES, "embedding", "gather", TABLE),
    "rows of a table times a number": (lambda w, i: (3.0 * w)[i], (ROWS, OUT), INDICES, "embedding", "gather", TABLE),
    "x * w": (lambda w, x: x * w[None], (OUT,), (N, OUT), "scale", "mul", CHANNELS),
    "w * x": (lambda w, x: w[None] * x, (OUT,), (N, OUT), "scale", "mul", CHANNELS),
    "x / w": (lambda w, x: x / w[None], (OUT,), (N, OUT), "scale", "div", CHANNELS),
    "one sample": (lambda w, x: x * w, (OUT,), (OUT,), "scale", "mul", CHANNELS),
    "vmap of x * w": (lambda w, x: jax.vmap(lambda x: x * w)(x), (OUT,), (N, OUT), "scale", "mul", CHANNELS),
    "x * (1 + w)": (lambda w, x: x * (1 + w)[None], (OUT,), (N, OUT), "scale", "mul", CHANNELS),
    "x * exp(w)": (lambda w, x: x * jnp.exp(w)[None], (OUT,), (N, OUT), "scale", "mul", CHANNELS),
    "x / sqrt(w + eps)": (lambda w, x: x * lax.rsqrt(w + 1e-5)[None], (OUT,), (N, OUT), "scale", "mul", CHANNELS),
    "in bfloat16": (
        lambda w, x: x * w.astype(x.dtype)[None],
        (OUT,),
        like(N, OUT, dtype=jnp.bfloat16),
        "scale",
        "mul",
        CHANNELS,
    ),
    "einsum bc,c->bc": (lambda w, x: jnp.einsum("bc,c->bc", x, w), (OUT,), (N, OUT), "scale", "dot_general", CHANNELS),
    "where x is negative": (lambda w, x: jnp.where(x < 0, x * w[None], x), (OUT,), (N, OUT), "scale", "mul", CHANNELS),
    "broadcast first": (
        lambda w, x: x * jnp.broadcast_to(w, x.shape),
        (1, OUT),
        (N, OUT),
        "scale",
        "mul",
        Axes(outputs=(0, 1)),
    ),
    "a matrix for every sample": (
        lambda w, x: x * jnp.broadcast_to(w, x.shape),
        (IN, OUT),
        (N, IN, OUT),
        "scale",
        "mul",
        Axes(outputs=(0, 1)),
    ),
    "one number": (lambda w, x: x * w, (), (N, OUT), "scale", "mul", Axes()),
    "channels first": (lambda w, x: x * w, (OUT, 1, 1), (OUT, 3, 3), "scale", "mul", Axes(outputs=(0, 1, 2))),
    "x + w": (lambda w, x: x + w[None], (OUT,), (N, OUT), "bias", "add", CHANNELS),
    "x - w": (lambda w, x: x - w[None], (OUT,), (N, OUT), "bias", "sub", CHANNELS),
    "w - x": (lambda w, x: w[None] - x, (OUT,), (N, OUT), "bias", "sub", CHANNELS),
    "heads": (lambda w, x: x + w.reshape(1, 2, 4), (OUT,), (N, 2, 4), "bias", "add", CHANNELS),
    "positions": (lambda w, x: x + w[:N], (ROWS, OUT), (N, OUT), "bias", "add", Axes(outputs=(0, 1))),
    "added to what a loop makes": (
        lambda w, x: lax.scan(lambda h, x: (jnp.tanh(h + x) + w, None), jnp.zeros(OUT), x)[0],
        (OUT,),
        (N, OUT),
        "bias",
        "add",
        CHANNELS,
    ),
}


@pytest.mark.parametrize("case", USES)
def test_look_ups_scales_and_biases(case):
    fn, shape, x, kind, op, axes = USES[case]
    x = x if isinstance(x, jax.ShapeDtypeStruct) else like(*x)
    (site,) = jp.trace(lambda p, x: fn(p["w"], x), {"w": like(*shape)}, x, strict=True)
    if site.axes.spatial:  # an axis of size one that a broadcast put aside
        assert all(shape[axis] == 1 for axis in site.axes.spatial)
        axes = Axes(spatial=site.axes.spatial, outputs=tuple(a for a in axes.outputs if a not in site.axes.spatial))
    assert (site.name, site.kind, site.op, site.axes, site.macs) == ("w", kind, op, axes, 0)
    assert site.params == ()
    with pytest.raises(ValueError, match=f"'w' is used here as {kind}"):
        site.run(jnp.ones(shape), jnp.ones(site.x_shape))


def test_a_table_looked_up_by_another_leaf():
    params = {"places": like(N, dtype=jnp.int32), "table": like(ROWS, OUT)}
    sites = jp.trace(lambda p, x: x + p["table"][p["places"]], params, like(N, OUT))
    assert kinds(sites) == [("table", "embedding")]


def test_stacked_scales_and_biases():
    def fn(p, x):
        return lax.scan(lambda x, p: (x * p["scale"][None] + p["bias"][None], None), x, p)[0]

    sites = jp.trace(fn, {"scale": like(3, OUT), "bias": like(3, OUT)}, like(N, OUT), strict=True)
    assert kinds(sites) == [("scale", "scale"), ("bias", "bias")]
    for site in sites:
        assert (site.axes, site.count) == (Axes(layers=(0,), outputs=(1,)), 3)


class Linens(linen.Module):
    """Every layer of Flax that normalises, and two that have a bias."""

    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(ROWS, OUT, name="table")(tokens)
        x = linen.Dense(OUT, name="dense")(x)
        x = linen.LayerNorm(name="layer")(x)
        x = linen.RMSNorm(name="rms")(x)
        x = linen.GroupNorm(num_groups=2, name="group")(x)
        x = linen.BatchNorm(use_running_average=True, name="batch")(x)
        return linen.Conv(OUT, (3,), name="conv")(x)


LINEN_KINDS = {
    "batch_stats/batch/mean": "bias",
    "batch_stats/batch/var": "scale",
    "params/batch/bias": "bias",
    "params/batch/scale": "scale",
    "params/conv/bias": "bias",
    "params/conv/kernel": "convolution",
    "params/dense/bias": "bias",
    "params/dense/kernel": "product",
    "params/group/bias": "bias",
    "params/group/scale": "scale",
    "params/layer/bias": "bias",
    "params/layer/scale": "scale",
    "params/rms/scale": "scale",
    "params/table/embedding": "embedding",
}


@pytest.mark.usefixtures("relaxed")
def test_layers_of_linen():
    params = jax.eval_shape(Linens().init, jax.random.key(0), jnp.zeros((2, N), jnp.int32))
    sites = jp.trace(Linens().apply, params, like(2, N, dtype=jnp.int32), strict=True)
    assert dict(sorted(kinds(sites))) == LINEN_KINDS
    select = jp.weights_of(sites)
    assert select.names == {"params/dense/kernel", "params/conv/kernel"}
    assert jp.weights_of(sites, embeddings=True).names == {*select.names, "params/table/embedding"}


@pytest.mark.usefixtures("relaxed")
def test_layers_of_nnx_and_equinox():
    graph, params = nnx.split(
        nnx.Sequential(nnx.Linear(IN, OUT, rngs=nnx.Rngs(0)), nnx.LayerNorm(OUT, rngs=nnx.Rngs(0)))
    )
    sites = jp.trace(lambda p, x: nnx.merge(graph, p)(x), params, like(N, IN), strict=True)
    assert [site.kind for site in sites] == ["product", "bias", "scale", "bias"]

    model = eqx.nn.Sequential([eqx.nn.Conv2d(IN, OUT, 3, key=jax.random.key(0)), eqx.nn.GroupNorm(2, OUT)])
    arrays, rest = eqx.partition(model, eqx.is_array)
    sites = jp.trace(lambda p, x: jax.vmap(eqx.combine(p, rest))(x), arrays, like(N, IN, 9, 9), strict=True)
    assert [site.kind for site in sites] == ["convolution", "bias", "scale", "bias"]


X1, K1 = (N, 12, IN), (3, IN, OUT)
# options, shape of the kernel; numbers of a convolution along one axis, features last
CONVOLUTIONS = {
    "valid": ({"padding": "VALID"}, K1),
    "same": ({"padding": "SAME"}, K1),
    "strides": ({"padding": "VALID", "window_strides": (2,)}, K1),
    "dilated": ({"padding": "VALID", "rhs_dilation": (3,)}, K1),
    "grouped": ({"padding": "VALID", "feature_group_count": 2}, (3, IN // 2, OUT)),
    "depthwise": ({"padding": "VALID", "feature_group_count": IN}, (3, 1, 2 * IN)),
    "transposed": ({"padding": [(2, 1)], "lhs_dilation": (2,)}, K1),
    "transposed by three": ({"padding": [(0, 0)], "lhs_dilation": (3,)}, (4, IN, OUT)),
    "transposed by three, padded": ({"padding": [(2, 2)], "lhs_dilation": (3,)}, (4, IN, OUT)),
    "transposed, with strides and a dilated window": (
        {"padding": [(3, 2)], "lhs_dilation": (2,), "rhs_dilation": (3,), "window_strides": (3,)},
        K1,
    ),
}


def counted(x, kernel, y, options):
    """Multiply-adds along one axis, one after another: an output, an index of the window; holes are not read."""
    (low, _), (stride,) = options["padding"][0], options.get("window_strides", (1,))
    (hole,), (step,) = options.get("lhs_dilation", (1,)), options.get("rhs_dilation", (1,))
    taps = sum((place * stride + k * step - low) % hole == 0 for place in range(y[1]) for k in range(kernel[0]))
    return x[0] * taps * kernel[1] * y[2]


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_multiply_adds_of_convolutions(case):
    options, kernel = CONVOLUTIONS[case]
    strides = options.get("window_strides", (1,))

    def fn(w, x):
        return lax.conv_general_dilated(
            x, w, **{"window_strides": strides, **options}, dimension_numbers=("NWC", "WIO", "NWC")
        )

    (site,) = jp.trace(fn, like(*kernel), like(*X1), strict=True)
    assert (site.kind, site.axes) == ("convolution", Axes(spatial=(0,), inputs=(1,), outputs=(2,)))
    padding = {"SAME": [(1, 1)], "VALID": [(0, 0)]}.get(str(options["padding"]), options["padding"])
    assert site.macs == counted(X1, kernel, site.y_shape, {**options, "padding": padding})
    w, x = normal(*kernel), normal(*X1)
    np.testing.assert_allclose(site.run(w, x), fn(w, x), rtol=1e-5, atol=1e-5)
    if padding == [(0, 0)]:  # the compiler does not count padding
        cost = jax.jit(fn).lower(w, x).cost_analysis()
        assert cost["flops"] == 2 * site.macs


@pytest.mark.parametrize("flipped", [False, True])
def test_a_transposed_convolution_multiplies_every_input_with_every_weight(flipped):
    def fn(w, x):
        return lax.conv_transpose(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=flipped
        )

    kernel = (4, 4, OUT, IN) if flipped else (4, 4, IN, OUT)
    (site,) = jp.trace(fn, like(*kernel), like(N, 7, 7, IN), strict=True)
    assert site.macs == N * 7 * 7 * 16 * IN * OUT
    inputs, outputs = ((3,), (2,)) if flipped else ((2,), (3,))
    assert site.axes == Axes(spatial=(0, 1), inputs=inputs, outputs=outputs)
    w, x = normal(*kernel), normal(N, 7, 7, IN)
    np.testing.assert_allclose(site.run(w, x), fn(w, x), rtol=1e-5, atol=1e-5)


def halves(w):
    return [lax.slice(w, (0, 0), (2, OUT)), lax.dynamic_slice(w, (2, 0), (4, OUT))]


FORWARD, STACKED = Axes(inputs=(0,), outputs=(1,)), Axes(layers=(0,), inputs=(1,), outputs=(2,))
# leaf shape, its parts, axes of every site
PARTS = {
    "split in three": ((IN, 3 * OUT), lambda w: jnp.split(w, 3, axis=1), FORWARD),
    "split unevenly": ((IN, 3 * OUT), lambda w: jnp.split(w, [OUT, 2 * OUT - 3], axis=1), FORWARD),
    "sliced in three": ((IN, 3 * OUT), lambda w: [w[:, a : a + OUT] for a in (0, OUT, 2 * OUT)], FORWARD),
    "every third": ((IN, 3 * OUT), lambda w: [w[:, a::3] for a in range(3)], FORWARD),
    "indexed among three": ((IN, 3, OUT), lambda w: [w[:, a] for a in range(3)], Axes((1,), (), (0,), (2,))),
    "indexed after a reshape": ((IN, 3 * OUT), lambda w: [w.reshape(IN, 3, OUT)[:, a] for a in range(3)], FORWARD),
    "layers one by one": ((4, IN, OUT), lambda w: [w[a] for a in range(4)], STACKED),
    "layers unstacked": ((4, IN, OUT), lambda w: list(jnp.unstack(w)), STACKED),
    "layers at known numbers": (
        (4, IN, OUT),
        lambda w: [lax.dynamic_slice(w, (a, 0, 0), (1, IN, OUT))[0] for a in range(4)],
        STACKED,
    ),
    "inputs, in parts": ((IN, OUT), halves, FORWARD),
    "flipped": ((IN, OUT), lambda w: [w[:, ::-1], jnp.flip(w)], FORWARD),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_of_a_leaf_are_sites_of_their_own(case):
    shape, parts, axes = PARTS[case]
    leaf, x = normal(*shape), normal(N, IN, seed=1)
    made = parts(leaf)
    sites = jp.trace(lambda p, x: [x[:, : part.shape[0]] @ part for part in parts(p["w"])], {"w": leaf}, x, strict=True)
    assert [site.index for site in sites] == list(range(len(made)))
    for site, part in zip(sites, made, strict=True):
        assert (site.kind, site.weights, site.macs) == ("product", part.size, N * part.size)
        if case != "indexed after a reshape":  # axes merged in the leaf are apart again
            assert site.axes == axes
        given = x[:, : part.shape[0]]
        np.testing.assert_allclose(site.run(leaf, given), given @ part, rtol=1e-5, atol=1e-6)


COPIES = {
    "broadcast to a batch": (lambda w, x: jnp.einsum("bi,bio->bo", x, jnp.broadcast_to(w, (N, IN, OUT))), N * IN * OUT),
    "broadcast, and a part taken": (
        lambda w, x: jnp.einsum("bi,bio->bo", x[:2], jnp.broadcast_to(w, (N, IN, OUT))[:2]),
        2 * IN * OUT,
    ),
    "repeated heads": (lambda w, x: x @ jnp.repeat(w, 3, axis=1), 3 * N * IN * OUT),
    "tiled": (lambda w, x: x @ jnp.tile(w, (1, 2)), 2 * N * IN * OUT),
    "vmap of two products": (lambda w, x: jax.vmap(lambda s: s * x @ w)(jnp.ones(4)), 4 * N * IN * OUT),
}


@pytest.mark.parametrize("case", COPIES)
def test_a_leaf_that_is_copied_counts_every_multiply_add(case):
    fn, macs = COPIES[case]
    (site,) = jp.trace(fn, like(IN, OUT), like(N, IN), strict=True)
    assert (site.macs, site.weights, site.axes) == (macs, IN * OUT, FORWARD)
    w = normal(IN, OUT)
    x = normal(*site.x_shape, seed=1)
    assert site.run(w, x).shape == site.y_shape


def test_layers_that_a_loop_counts_through():
    stack, x = normal(3, IN, IN), normal(N, IN)
    (site,) = jp.trace(lambda w, x: lax.fori_loop(0, 3, lambda i, h: h @ w[i], x), stack, x, strict=True)
    assert (site.count, site.macs, site.weights, site.axes) == (3, 3 * N * IN * IN, stack.size, STACKED)
    np.testing.assert_allclose(site.run(stack, x), x @ stack[0], rtol=1e-5)


def test_branches_that_agree_pass_a_leaf_on():
    fn = lambda w, x: x @ lax.cond(x[0, 0] > 0, lambda w: w.T, lambda w: jnp.transpose(w), w)  # noqa: E731
    (site,) = jp.trace(fn, like(OUT, IN), like(N, IN), strict=True)
    assert site.axes == Axes(inputs=(1,), outputs=(0,))


@pytest.mark.parametrize("spec", [P("d"), P(None, "d"), P()])
def test_shards(spec):
    """Every device multiplies by its shard; where all have the whole leaf, all do the whole work."""
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=(AxisType.Auto,) * 2)
    shard = 4 if spec != P() else 1
    n_in, n_out = 8, 12
    x_spec = P(None, "d") if spec == P("d") else P()
    y = lambda w, x: lax.psum(x @ w, "d") if spec == P("d") else x @ w  # noqa: E731
    out = P(None, "d") if spec == P(None, "d") else P()
    fn = jax.shard_map(y, mesh=mesh, in_specs=(spec, x_spec), out_specs=out)
    (site,) = jp.trace(fn, like(n_in, n_out), like(N, n_in), strict=True)
    assert (site.axes, site.weights) == (FORWARD, n_in * n_out)
    assert (site.count, site.macs) == (8, 8 * N * n_in * n_out // shard)
    assert site.run(jnp.ones((n_in, n_out)), jnp.ones(site.x_shape)).shape == site.y_shape


def test_many_loops_and_leaves_that_change_places_come_to_an_end():
    def turned(n):
        def body(carry, _):
            inner, _ = lax.scan(body if n == 0 else turned(n - 1), carry, length=2) if n else (carry, None)
            return (*inner[1:-1], inner[0], inner[-1] @ inner[0]), None

        return body

    leaves = [like(IN, IN) for _ in range(6)]
    sites = jp.trace(lambda p, x: lax.scan(turned(3), (*p, x), length=2)[0], leaves, like(N, IN))
    assert sites == ()
    with pytest.raises(ValueError, match="runs into `scan`"):
        jp.trace(lambda p, x: lax.scan(turned(3), (*p, x), length=2)[0], leaves, like(N, IN), strict=True)
