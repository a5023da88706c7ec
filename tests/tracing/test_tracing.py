"""The site finder: every use of every leaf, through whatever renames it, and the operation rebuilt from the site."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn, drawn_nnx
from flax import linen, nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from sparse_models import MODELS
from trace_helpers import normal

import jaxprune as jp
from jaxprune.layout import Axes
from jaxprune.tracing import paths
from jaxprune.tracing import sites as kinds

pytestmark = pytest.mark.usefixtures("quick")

N, IN, OUT = 5, 7, 4


def products(fn, params, *args, **kwargs):
    """Sites of products and convolutions alone."""
    return tuple(site for site in jp.trace(fn, params, *args, **kwargs) if site.kind in kinds.PRODUCTS)


def with_custom_jvp(w, x):
    product = jax.custom_jvp(lambda w, x: x @ w)
    product.defjvp(lambda primals, tangents: (product(*primals), product(*tangents)))
    return product(w, x)


def with_custom_vjp(w, x):
    product = jax.custom_vjp(lambda w, x: x @ w)
    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, ct: (kept[1].T @ ct, ct @ kept[0].T))
    return product(w, x)


FORWARD, BACK = Axes(inputs=(0,), outputs=(1,)), Axes(inputs=(1,), outputs=(0,))
# Each computes x @ w as its only product: (function, times it runs).
PRODUCTS = {
    "x @ w": (lambda w, x: x @ w, 1),
    "einsum": (lambda w, x: jnp.einsum("bi,io->bo", x, w), 1),
    "through w.T.T": (lambda w, x: x @ w.T.T, 1),
    "through a reshape and back": (lambda w, x: x @ w.reshape(OUT * IN).reshape(IN, OUT), 1),
    "through axes of size one": (lambda w, x: x @ jnp.squeeze(jnp.expand_dims(w, (0, 2)), (0, 2)), 1),
    "through casts": (lambda w, x: x @ w.astype(jnp.float16).astype(jnp.float32), 1),
    "copy and stop_gradient": (lambda w, x: x @ lax.stop_gradient(jnp.array(w)), 1),
    "jit": (jax.jit(lambda w, x: x @ w), 1),
    "jit that returns the weight transposed": (lambda w, x: x @ jax.jit(jnp.transpose)(w).T, 1),
    "jit in jit": (jax.jit(lambda w, x: jax.jit(lambda w: x @ w)(w)), 1),
    "named for a checkpoint": (lambda w, x: x @ checkpoint_name(w, "w"), 1),
    "checkpoint": (jax.checkpoint(lambda w, x: x @ w), 1),
    "custom_jvp": (with_custom_jvp, 1),
    "custom_vjp": (with_custom_vjp, 1),
    "vmap": (lambda w, x: jax.vmap(lambda row: row @ w)(x), 1),
    "vmap of w.T @ row": (lambda w, x: jax.vmap(lambda row: w.T @ row)(x), 1),
    "scan, a constant": (lambda w, x: lax.scan(lambda c, _: (x @ w, None), jnp.zeros((N, OUT)), length=3)[0], 3),
    "scan, carried": (lambda w, x: lax.scan(lambda c, _: ((c[0], x @ c[0]), None), (w, x @ w), length=3)[0][1], None),
    "scan in scan": (
        lambda w, x: lax.scan(
            lambda c, _: (lax.scan(lambda d, _: (x @ w, None), c, length=2)[0], None), jnp.zeros((N, OUT)), length=3
        )[0],
        6,
    ),
    "while": (lambda w, x: lax.while_loop(lambda c: c[0, 0] == 0, lambda c: x @ w, jnp.zeros((N, OUT))), 1),
    "while, carried": (
        lambda w, x: lax.while_loop(lambda c: c[1] < 1, lambda c: (c[0], c[1] + 1, x @ c[0]), (w, 0, x[:, :OUT]))[2],
        1,
    ),
    "one branch": (lambda w, x: lax.cond(True, lambda w: x @ w, lambda w: x[:, :OUT], w), 1),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_is_found_whatever_lies_between(case):
    fn, count = PRODUCTS[case]
    w, x = normal(IN, OUT), normal(N, IN, seed=1)
    sites = jp.trace(lambda params, x: fn(params["w"], x), {"w": w, "b": normal(OUT)}, x)
    if count is None:
        assert [site.count for site in sites] == [1, 3]
    else:
        assert [(site.name, site.index, site.op, site.count) for site in sites] == [("w", 0, "dot_general", count)]
    for site in sites:
        assert site.macs == site.count * N * IN * OUT
        if "reshape" not in case:  # axes merged by one reshape are not told apart after the next
            assert site.axes == FORWARD
            assert (site.inputs, site.outputs) == ((0,), (1,))
        given = x.T if site.x_shape == (IN, N) else x
        got = site.run(w, given)
        assert (got.shape, got.dtype.name) == (site.y_shape, site.y_dtype)
        rounded = w.astype(jnp.float16).astype(jnp.float32) if "casts" in case else w
        np.testing.assert_allclose(got if got.shape == (N, OUT) else got.T, x @ rounded, rtol=1e-5, atol=1e-6)


UNFOLLOWED = {
    "added": lambda w, x: x @ (w + 1),
    "scaled": lambda w, x: x @ (2 * w),
    "summed": lambda w, x: jnp.sum(w),
    "masked": lambda w, x: x @ jnp.where(jnp.eye(IN, OUT) > 0, w, 0),
    "concatenated": lambda w, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([w, w]),
    "padded": lambda w, x: x @ jnp.pad(w, ((0, 0), (0, 1))),
    "changed in a loop": lambda w, x: x @ lax.fori_loop(0, 3, lambda _, w: w + 1, w),
    "swapped in a loop": lambda w, x: lax.fori_loop(0, 3, lambda _, c: (c[1], c[0]), (w, w + 1))[0],
    "carried into a loop": lambda w, x: lax.fori_loop(0, 3, lambda _, c: w, jnp.zeros_like(w)),
    "handed out of a loop": lambda w, x: lax.scan(lambda c, _: (c, w), 0.0, length=3),
    "one of two": lambda w, x: lax.cond(x[0, 0] > 0, lambda w: w, lambda w: -w, w),
    "squared": lambda w, x: jnp.sum(w * w),
    "squared, as a vector": lambda w, x: jnp.sum(w.reshape(-1) * w.reshape(-1)),
}


@pytest.mark.parametrize("case", UNFOLLOWED)
def test_other_uses_are_in_no_site(case):
    fn = UNFOLLOWED[case]
    traced = lambda **how: jp.trace(lambda p, x: fn(p["w"], x), {"w": normal(IN, OUT)}, normal(N, IN), **how)  # noqa: E731
    assert traced() == ()
    with pytest.raises(ValueError, match=r"'w'.* runs into `\w+` at .*test_tracing.py:\d+"):
        traced(strict=True)


def test_a_leaf_that_is_handed_back_is_consumed():
    assert jp.trace(lambda w, x: w, normal(IN, OUT), normal(N, IN), strict=True) == ()


def test_both_branches_of_a_cond_are_listed():
    fn = lambda w, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: 2 * (x @ w), w)  # noqa: E731
    assert [site.index for site in jp.trace(fn, normal(IN, OUT), normal(N, IN))] == [0, 1]


def test_tied_weights_have_a_site_for_every_use():
    sites = jp.trace(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, {"w": normal(IN, OUT)}, normal(N, IN))
    assert [(site.name, site.index, site.axes) for site in sites] == [("w", 0, FORWARD), ("w", 1, BACK)]


def test_a_product_of_two_leaves_is_a_site_of_each():
    sites = jp.trace(lambda p: p["a"] @ p["b"], {"a": normal(N, IN), "b": normal(IN, OUT)})
    assert [(site.name, site.weight_first, site.x_shape) for site in sites] == [
        ("a", True, (IN, OUT)),
        ("b", False, (N, IN)),
    ]


def test_stacked_layers_run_once_a_layer():
    stack, x = normal(3, IN, IN), normal(N, IN)
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w.T), None), x, p["layers"])[0]  # noqa: E731
    (site,) = jp.trace(fn, {"layers": stack}, x)
    assert (site.count, site.macs, site.leaf_shape) == (3, 3 * N * IN * IN, (3, IN, IN))
    assert site.axes == Axes(layers=(0,), inputs=(2,), outputs=(1,))
    np.testing.assert_allclose(site.run(stack, x), x @ stack[0].T, rtol=1e-5)


def test_layers_of_a_linen_scan():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return linen.tanh(linen.Dense(IN)(x)), None

    model = linen.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    with jax.numpy_rank_promotion("allow"):
        params = drawn(jax.eval_shape(model.init, jax.random.key(0), normal(N, IN), None))
        (site,) = products(model.apply, params, normal(N, IN), None)
    assert (site.name, site.count) == ("params/Dense_0/kernel", 3)
    assert site.axes == Axes(layers=(0,), inputs=(1,), outputs=(2,))


CONVOLUTIONS = {
    "plain": ({}, (3, 3, 6, 8), 2 * 10 * 10 * 8 * 9 * 6),
    "strides": ({"strides": 2}, (3, 3, 6, 8), 2 * 5 * 5 * 8 * 9 * 6),
    "valid": ({"padding": "VALID"}, (3, 3, 6, 8), 2 * 8 * 8 * 8 * 9 * 6),
    "dilation": ({"kernel_dilation": 2}, (3, 3, 6, 8), 2 * 10 * 10 * 8 * 9 * 6),
    "groups": ({"feature_group_count": 2}, (3, 3, 3, 8), 2 * 10 * 10 * 8 * 9 * 3),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case):
    options, shape, macs = CONVOLUTIONS[case]
    model = linen.Conv(8, (3, 3), use_bias=False, **options)
    x = normal(2, 10, 10, 6)
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    (site,) = jp.trace(model.apply, params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert (site.name, site.op, site.macs, site.leaf_shape) == ("params/kernel", "conv_general_dilated", macs, shape)
    assert site.axes == Axes(spatial=(0, 1), inputs=(2,), outputs=(3,))
    np.testing.assert_allclose(site.run(params["params"]["kernel"], x), model.apply(params, x), rtol=1e-5, atol=1e-5)


def test_a_convolution_of_equinox_has_its_outputs_first():
    model = drawn(eqx.filter_eval_shape(eqx.nn.Conv2d, 6, 8, 3, key=jax.random.key(0)))
    arrays, rest = eqx.partition(model, eqx.is_array)
    (site,) = products(lambda p, x: jax.vmap(eqx.combine(p, rest))(x), arrays, normal(2, 6, 10, 10))
    assert site.axes == Axes(spatial=(2, 3), inputs=(1,), outputs=(0,))


def test_heads_merged_or_split_are_still_outputs_and_inputs():
    def attention(p, x):
        heads = jnp.einsum("bi,ihd->bhd", x, p["split"].reshape(IN, 2, 3))
        return jnp.einsum("bhd,hdo->bo", heads, p["merged"].reshape(2, 3, OUT))

    first, second = jp.trace(attention, {"split": normal(IN, 6), "merged": normal(6, OUT)}, normal(N, IN))
    assert (first.name, first.axes) == ("split", FORWARD)
    assert (second.name, second.axes) == ("merged", FORWARD)


def test_axes_that_cannot_be_told_are_none():
    (site,) = jp.trace(lambda w, x: jnp.einsum("bi,io->bo", x, w.reshape(IN, OUT)), normal(IN * OUT), normal(N, IN))
    assert site.axes is site.inputs is site.outputs is None


def test_a_window_of_one_pixel_squeezed_away():
    (site,) = jp.trace(lambda w, x: x @ w.reshape(IN, OUT), normal(1, 1, IN, OUT), normal(N, IN))
    assert site.axes == Axes(spatial=(0, 1), inputs=(2,), outputs=(3,))


@pytest.mark.parametrize("model", MODELS)
def test_frameworks(model):
    with jax.numpy_rank_promotion("allow"):
        fn, params, layout, names = model(None)
        sites = products(fn, params, normal(N, 6))
    assert [site.name for site in sites] == names
    for site in sites:
        assert site.axes == layout.axes(site.name, site.leaf_shape)


def test_nnx_scan_over_layers():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return nnx.Linear(IN, IN, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def apply(layer, x):
        return nnx.tanh(layer(x))

    graph, params = nnx.split(drawn_nnx(lambda: make(nnx.Rngs(0).split(3))))
    with jax.numpy_rank_promotion("allow"):
        (site,) = products(lambda p, x: apply(nnx.merge(graph, p), x), params, normal(N, IN))
    assert (site.name, site.count) == ("kernel", 3)
    assert site.axes == Axes(layers=(0,), inputs=(1,), outputs=(2,))


def test_what_is_no_array_is_handed_over_as_it_is():
    def fn(params, x, scale, train, name=None):
        assert train is True
        assert name == "here"
        return scale * (x @ params["w"])

    assert len(jp.trace(fn, {"w": normal(IN, OUT)}, normal(N, IN), 2.0, True, name="here")) == 1


def test_sites_are_plain_and_run_under_jit_and_grad():
    w, x = normal(IN, OUT), normal(N, IN)
    fn = lambda w, x: lax.dot(x, w, precision="highest", preferred_element_type=jnp.float32)  # noqa: E731
    (site,) = jp.trace(fn, w, x)
    assert hash(site) == hash(dataclasses.replace(site))
    assert dict(site.params)["precision"] == ("highest", "highest")
    np.testing.assert_array_equal(jax.jit(site.run)(w, x), fn(w, x))
    assert jax.grad(lambda w: site.run(w, x).sum())(w).shape == w.shape
    (preset,) = jp.trace(lambda w, x: lax.dot(x, w, precision="F32_F32_F32"), w, x)
    np.testing.assert_allclose(preset.run(w, x), x @ w, rtol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "axes"),
    [
        ((6, 4), (24,), [{0, 1}]),
        ((6, 4), (2, 3, 4), [{0}, {0}, {1}]),
        ((6, 4), (6, 1, 4), [{0}, set(), {1}]),
        ((6, 4), (3, 8), [{0, 1}, {0, 1}]),
        ((1, 6), (6,), [{1}]),
        ((1, 1), (1,), [set()]),
        ((0, 4), (0,), [{0, 1}]),
        ((2, 3, 5, 7), (6, 35), [{0, 1}, {2, 3}]),
    ],
)
def test_axes_through_a_reshape(old, new, axes):
    path = paths.start("w", old, "float32").followed("reshape", {"dimensions": None}, new)
    assert path is not None
    assert [set(one) for one in path.axes] == axes
