"""Training on compressed params: the gradients of the masked dense model, by products with the non-zeros alone."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from quick import quick_jit
from sparse_helpers import INSTRUCTION_SETS, LAYOUTS, check_under, make_leaf, make_x, needs_kernels, put

import jaxprune as jp
from jaxprune import native, sparse

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick"), needs_kernels]
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.6e-2}


def take_apart(leaf, layout="in_out"):
    return sparse.trainable(sparse.compress({"kernel": leaf}, "native", layout=LAYOUTS[layout]))


def forward(params, x):
    return jax.nn.relu(x @ params["a"] + params["bias"][None]) @ params["b"]


def make_model(dtype="float32", density=0.3):
    """Params of two layers, some inputs and outputs dead, and what `trainable` makes of them."""
    a, b = (np.array(make_leaf(shape, density, "float32", seed)) for seed, shape in enumerate([(37, 50), (50, 21)]))
    a[3], a[:, 7], b[:, 20] = 0, 0, 0
    params = {"a": put(a, dtype), "bias": put(np.full(50, 0.1), dtype), "b": put(b, dtype)}
    compressed = sparse.compress(params, "native", select=lambda _, leaf: leaf.ndim == 2, layout=jp.layout.FLAX)
    return params, *sparse.trainable(compressed)


def loss_of(params, x):
    return jnp.sum(sparse.apply(forward)(params, x) ** 2)


def near(got, want, tolerance=2e-5):
    got, want = (np.asarray(array, np.float64) for array in (got, want))
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0) <= tolerance * max(np.abs(want).max(initial=0), 1e-30)


def masked(grads, params):
    return {
        name: np.where(params[name] != 0, grads[name], 0) if params[name].ndim == 2 else grads[name] for name in grads
    }


@quick_jit
def pull(values, rest, x, ct):
    """y, and the derivatives of it for `ct` in the values, as a leaf, and in x."""
    y, back = jax.vjp(lambda v, x: sparse.matmul(x, sparse.join(v, rest)["kernel"]), values, x)
    of_values, of_x = back(ct)
    return y, sparse.join(of_values, rest)["kernel"].decompress(), of_x


@settings(max_examples=20)
@example(n=600, n_in=17, n_out=33, density=0.3, dtype="bfloat16", layout="out_in", seed=1)
@example(n=65, n_in=300, n_out=270, density=0.01, dtype="float32", layout="in_out", seed=2)
@given(
    n=st.sampled_from([1, 2, 15, 16, 17, 64, 65, 130]),
    n_in=st.sampled_from([1, 5, 16, 33, 300]),
    n_out=st.sampled_from([1, 4, 17, 64, 270]),
    density=st.sampled_from([0.0, 0.02, 0.2, 1.0]),
    dtype=st.sampled_from(sorted(TOLERANCE)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 2**16),
)
def test_derivatives_equal_those_in_float64(n, n_in, n_out, density, dtype, layout, seed):
    leaf = np.array(make_leaf((n_in, n_out), density, dtype, seed).astype(jnp.float32))
    leaf[n_in // 2], leaf[:, n_out // 3] = 0, 0  # an input and an output without weights
    x, ct = make_x((n, n_in), dtype, seed), make_x((n, n_out), dtype, seed + 1)
    values, rest = take_apart(put(leaf if layout == "in_out" else leaf.T, dtype), layout)
    y, of_leaf, of_x = pull(values, rest, x, ct)
    assert (y.dtype, of_leaf.dtype, of_x.dtype) == (dtype,) * 3
    w, x, ct = (np.asarray(array, np.float64) for array in (leaf, x, ct))
    of_leaf = np.asarray(of_leaf, np.float64) if layout == "in_out" else np.asarray(of_leaf, np.float64).T
    there = w != 0
    for got, want, scale in (
        (np.asarray(y, np.float64), x @ w, np.abs(x) @ np.abs(w)),
        (of_leaf, np.where(there, x.T @ ct, 0), np.abs(x).T @ np.abs(ct)),
        (np.asarray(of_x, np.float64), ct @ w.T, np.abs(ct) @ np.abs(w).T),
    ):
        assert np.all(np.abs(got - want) <= TOLERANCE[dtype] * scale + 1e-30)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa, tmp_path):
    program = """
import jax, jax.numpy as jnp, numpy as np
from jaxprune import native, sparse
from sparse_helpers import make_leaf, make_x
for n, n_in, n_out, density in ((70, 300, 90, 0.1), (3, 40, 35, 1.0), (1, 600, 20, 0.01)):
    w, x, ct = make_leaf((n_in, n_out), density, "float32"), make_x((n, n_in)), make_x((n, n_out), seed=2)
    values, rest = sparse.trainable(sparse.compress({"kernel": w}, "native"))
    product = lambda v, x: sparse.matmul(x, sparse.join(v, rest)["kernel"])
    of_values, of_x = jax.jit(lambda v, x: jax.vjp(product, v, x)[1](ct))(values, x)
    w, x, ct = (np.asarray(array, np.float64) for array in (w, x, ct))
    of_leaf = sparse.decompress(sparse.join(of_values, rest))["kernel"]
    np.testing.assert_allclose(of_leaf, (x.T @ ct) * (w != 0), atol=1e-4)
    np.testing.assert_allclose(of_x, ct @ w.T, atol=1e-4)
print(native.instruction_set())
"""
    check_under(isa, program, tmp_path)


def test_a_gradient_is_two_sparse_products_a_layer_and_nothing_of_the_leafs_size():
    _, values, rest = make_model()
    x = make_x((9, 37))
    program = (
        jax.jit(jax.grad(lambda v, r, x: loss_of(sparse.join(v, r), x))).lower(values, rest, x).compile().as_text()
    )
    assert program.count('custom_call_target="jaxprune_sampled"') == 2
    assert program.count('custom_call_target="jaxprune_product"') == 3  # of x none is asked for
    for shape in ("37,50", "50,37", "50,21", "21,50"):
        assert f"[{shape}]" not in program


@pytest.mark.usefixtures("relaxed")
@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
def test_adam_trains_the_values_alone_as_it_trains_the_masked_model(dtype):
    params, values, rest = make_model(dtype)
    masks = jp.nonzero_masks(params) | {"bias": jnp.ones(50, bool)}
    masked_tx, tx = optax.chain(optax.adam(1e-2), jp.keep_params_sparse(masks)), optax.adam(1e-2)

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=(0, 1))
    def step(values, state, rest, tx):
        loss, grads = jax.value_and_grad(lambda v: loss_of(sparse.join(v, rest), x))(values)
        updates, state = tx.update(grads, state, values)
        return optax.apply_updates(values, updates), state, loss

    x = make_x((11, 37), dtype)
    state, dense_state = tx.init(values), masked_tx.init(params)
    n_values = sum(int(np.count_nonzero(leaf)) for leaf in params.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * n_values + 1
    dense, nothing = params | {}, dict.fromkeys(params)
    dense = jax.tree.map(jnp.copy, dense)
    for _ in range(3):
        values, state, loss = step(values, state, rest, tx)
        dense, dense_state, dense_loss = step(dense, dense_state, nothing, masked_tx)
        near(loss, dense_loss, TOLERANCE[dtype])
    back = sparse.decompress(sparse.join(values, rest))
    for name, leaf in dense.items():
        assert np.all((back[name] != 0) <= np.asarray(masks[name]))
        near(back[name], leaf, 5e-3 if dtype == "float32" else 5e-2)  # Adam's first steps are signs of gradients


@pytest.mark.usefixtures("relaxed")
def test_what_optax_does_to_a_whole_tree():
    _, values, rest = make_model()
    x = make_x((8, 37))
    grad = jax.grad(lambda v, x: loss_of(sparse.join(v, rest), x))
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9))
    tx = optax.MultiSteps(clipped, 2)
    state, whole_state = tx.init(values), clipped.init(values)
    half = jax.tree.map(lambda g: g / 2, grad(values, x))
    want = optax.apply_updates(values, clipped.update(half, whole_state, values)[0])
    got = values
    for part in (x[:4], x[4:]):
        updates, state = quick_jit(tx.update)(grad(got, part), state, got)
        got = optax.apply_updates(got, updates)
    jax.tree.map(near, got, want)


def test_gradients_add_up_in_a_scan_and_one_by_one_under_vmap():
    params, values, rest = make_model()
    x = make_x((6, 4, 37))
    grad = jax.grad(lambda v, x: loss_of(sparse.join(v, rest), x))

    @quick_jit
    def in_all(values, x):
        zeros = jax.tree.map(jnp.zeros_like, values)
        return jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, grad(values, x)), None), zeros, x)[0]

    each = quick_jit(jax.vmap(grad, (None, 0)))(values, x)
    want = masked(jax.grad(lambda p: loss_of(p, x.reshape(24, 37)))(params), params)
    jax.tree.map(near, sparse.decompress(sparse.join(in_all(values, x), rest)), want)
    summed = jax.tree.map(lambda leaf: leaf.sum(0), each)
    jax.tree.map(near, sparse.decompress(sparse.join(summed, rest)), want)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), values)  # two models of one pattern
    both = quick_jit(jax.vmap(grad, (0, None)))(several, x[0])
    jax.tree.map(lambda two, one: near(two[0], one), both, grad(values, x[0]))


def test_a_checkpoint_and_the_way_of_equinox():
    _, values, rest = make_model()
    x = make_x((5, 37))
    want = quick_jit(jax.grad(lambda v: loss_of(sparse.join(v, rest), x)))(values)
    again = quick_jit(jax.grad(lambda v: jax.checkpoint(lambda v: loss_of(sparse.join(v, rest), x))(v)))(values)
    filtered = eqx.filter_jit(eqx.filter_grad(loss_of))(sparse.join(values, rest), x)
    jax.tree.map(near, again, want)
    jax.tree.map(near, filtered, want)


def test_derivatives_of_any_order_and_forward():
    leaf, x = make_leaf((19, 23), 0.2, "float32"), make_x((7, 19))
    values, rest = take_apart(leaf)
    there = leaf != 0
    along, dense_along = jax.tree.map(lambda v: jnp.cos(7 * v), values), jnp.where(there, jnp.cos(7 * leaf), 0)
    direction = make_x((7, 19), seed=3)

    def of(product):
        """A function of (weight, x) -> its derivatives of several kinds."""

        def f(w, x):
            return jnp.sum(jnp.sin(product(w, x)) ** 2)

        def derivatives(w, x, dw):
            both = jax.grad(f, (0, 1))
            forward = jax.jvp(f, (w, x), (dw, direction))[1]
            _, of_second = jax.jvp(both, (w, x), (dw, direction))
            back = jax.grad(lambda w, x: sum(jnp.sum(g**2) for g in jax.tree.leaves(both(w, x))), (0, 1))(w, x)
            return forward, of_second, back

        return quick_jit(derivatives)

    got = of(lambda v, x: sparse.matmul(x, sparse.join(v, rest)["kernel"]))(values, x, along)
    want = of(lambda w, x: x @ jnp.where(there, w, 0))(leaf, x, dense_along)
    near(got[0], want[0])
    for (of_values, of_x), (of_leaf, of_same) in zip(got[1:], want[1:], strict=True):
        near(sparse.join(of_values, rest)["kernel"].decompress(), np.where(there, of_leaf, 0), 1e-4)
        near(of_x, of_same, 1e-4)


def test_a_tied_weight_is_sparse_both_ways_round():
    leaf, x = make_leaf((19, 23), 0.2, "float32"), make_x((7, 19))
    values, rest = take_apart(leaf)

    def loss(params, x):
        return jnp.sum((x @ params["kernel"] @ params["kernel"].T) ** 2)

    got = jax.jit(jax.grad(lambda v, x: sparse.apply(loss)(sparse.join(v, rest), x), (0, 1)))
    of_values, of_x = got(values, x)
    of_leaf, of_same = jax.grad(loss, (0, 1))({"kernel": leaf}, x)
    near(sparse.decompress(sparse.join(of_values, rest))["kernel"], np.where(leaf != 0, of_leaf["kernel"], 0))
    near(of_x, of_same)
    assert "[19,23]" not in got.lower(values, x).compile().as_text()


def test_devices_share_a_batch():
    params, values, rest = make_model()
    n = min(4, len(jax.devices()))
    mesh, x = Mesh(jax.devices()[:n], ("batch",)), make_x((3 * n, 37))

    def loss(values, rest, x):
        y = jax.shard_map(
            sparse.apply(forward),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("batch")),
            out_specs=PartitionSpec("batch"),
        )(sparse.join(values, rest), x)
        return jnp.sum(y**2)

    grads = jax.jit(jax.grad(loss))(values, rest, x)
    want = masked(jax.grad(lambda p: loss_of(p, x))(params), params)
    jax.tree.map(near, sparse.decompress(sparse.join(grads, rest)), want)


def test_it_comes_back_is_saved_and_exported(tmp_path):
    params, values, rest = make_model()
    joined = sparse.join(values, rest)
    jax.tree.map(np.testing.assert_array_equal, sparse.decompress(joined), params)
    jp.save(tmp_path / "trained.jaxprune", sparse.decompress(joined))
    jax.tree.map(np.testing.assert_array_equal, jp.load(tmp_path / "trained.jaxprune"), params)
    again, _ = sparse.trainable(joined)  # what is trainable stays so
    jax.tree.map(np.testing.assert_array_equal, again, values)
    x = make_x((5, 37))
    exported = jax.export.deserialize(
        jax.export.export(
            jax.jit(sparse.apply(forward)),
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("jaxprune_product")],
        )(joined, x).serialize()
    )
    near(exported.call(joined, x), forward(params, x))


def test_other_formats_stay_what_they_are():
    params = {"a": make_leaf((20, 30), 0.2, "float32"), "b": make_leaf((3, 3, 8, 8), 0.2, "float32"), "c": jnp.ones(3)}
    packed = {
        "a": sparse.compress({"kernel": params["a"]}, "bcoo")["kernel"],
        "b": sparse.compress({"kernel": params["b"]}, "native")["kernel"],
        "d": sparse.compress({"kernel": params["a"]}, "native")["kernel"],
        "key": jnp.arange(3),
    }
    values, rest = sparse.trainable(packed)
    assert [type(values[name]) for name in "abd"] == [sparse.BCOOWeight, sparse.NativeWeight, sparse.TrainableWeight]
    assert values["key"] is None
    assert rest["key"].shape == (3,)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(values))


def test_refusals():
    with pytest.raises(ValueError, match=r"`params` has no matrix in the format \"native\".*compress"):
        sparse.trainable({"kernel": jnp.ones((3, 3))})
    weight = sparse.join(*take_apart(make_leaf((19, 23), 0.2, "float32")))["kernel"]
    fields = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    order = np.asarray(weight.order)
    for wrong in (order[::-1].copy(), np.zeros_like(order), order[:-1]):
        with pytest.raises(ValueError, match="'kernel' has a transposed pattern that is not that of its values"):
            sparse.TrainableWeight(**fields | {"order": wrong})
    with pytest.raises(ValueError, match="bounds"):
        sparse.TrainableWeight(**fields | {"bounds_across": np.asarray(weight.bounds_across)[:-1]})


def test_calls_that_do_not_fit_name_what():
    weight = sparse.join(*take_apart(make_leaf((19, 23), 0.2, "float32")))["kernel"]
    x, y = make_x((7, 19)), make_x((7, 23))
    for parts, word in (
        ((weight.index, weight.bounds[:-1], x, y), "`bounds`"),
        ((weight.index, weight.bounds.at[3].set(10**6), x, y), "`bounds`"),
        ((weight.index.at[3].set(255), weight.bounds, x, y), "`index`"),
        ((weight.index, weight.bounds, x.astype(jnp.float16), y), "`x`"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=word):
            jax.block_until_ready(native.sampled(*parts, tile=weight.tile))
    for order in (weight.order.at[2].set(-1), weight.order.at[2].set(weight.nse)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="`order` leads outside"):
            jax.block_until_ready(native.permuted(weight.values, order))
