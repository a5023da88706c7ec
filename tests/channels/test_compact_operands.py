"""Compaction whatever the operands are: numbers of any kind, written in the function or not, keys, symbolic sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compact_helpers import all_alive, all_equal_the_masked_model, beside_the_masked_model, halved
from compact_models import MODELS, make_input
from flax import nnx
from jax import export, lax
from jax._src.config import use_simplified_jaxpr_constants as simplified_constants
from trace_helpers import normal

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick")


def draw(dtype, *shape, seed=0):
    """Numbers of any kind, whole ones so large that they wrap around in products."""
    rng = np.random.default_rng([seed, *shape])
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(rng.integers(jnp.iinfo(dtype).min, jnp.iinfo(dtype).max, shape, endpoint=True), dtype)
    noise = rng.normal(size=shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        noise = noise + 1j * rng.normal(size=shape)
    return jnp.asarray(noise, dtype)


def wide(vector, like):
    return jnp.expand_dims(vector, tuple(range(like.ndim - 1)))


def three_layers(p, x):
    """Products or convolutions of any dtype, two of them behind numbers that may be constants."""
    for i in range(3):
        if x.ndim == 2:
            x = x @ p[f"w{i}"]
        else:
            x = lax.conv_general_dilated(x, p[f"w{i}"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = x + wide(p[f"b{i}"].astype(x.dtype), x)
        x = x * x if i < 2 else x
    return x


def with_constants(dtype, window=(), bias=None):
    """Three layers: two outputs of the first are constants, and one of the second is a sum of these alone."""
    sizes = {"w0": (*window, 5, 6), "w1": (*window, 6, 4), "w2": (*window, 4, 3)}
    params = {name: draw(dtype, *shape) for name, shape in sizes.items()}
    params |= {f"b{i}": draw(bias or dtype, sizes[f"w{i}"][-1], seed=i) for i in range(3)}
    masks = all_alive(params)
    masks["w0"] = masks["w0"].at[..., :2].set(False)
    masks["w1"] = masks["w1"].at[..., 2:, 0].set(False)
    return params, masks, draw(dtype, 4, *([3] * len(window)), 5, seed=9)


DTYPES = ("complex64", "bfloat16", "int8", "uint32")


@pytest.mark.parametrize(("dtype", "window"), [*((dtype, ()) for dtype in DTYPES), ("complex64", (1, 1))])
def test_constants_of_every_kind_of_numbers_go_into_the_next_bias(dtype, window):
    params, masks, x = with_constants(dtype, window)
    small = jp.compact(three_layers, params, masks, x)
    assert [small.params[f"w{i}"].shape[-1] for i in range(3)] == [4, 3, 3]
    want, (got,) = beside_the_masked_model(three_layers, params, masks, x, (small.apply, small.params))
    assert got.dtype == want.dtype == dtype
    if jnp.issubdtype(want.dtype, jnp.integer):
        np.testing.assert_array_equal(got, want)
    else:
        error = np.abs(np.asarray(got - want, np.complex128)).max() / np.abs(np.asarray(want, np.complex128)).max()
        assert error < (0.05 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("part", ["imaginary", "real"])
def test_a_matrix_of_one_part_is_not_empty(part):
    params, masks, x = with_constants("complex64")
    params["w2"] = jnp.asarray(np.asarray(params["w2"].real) * (1j if part == "imaginary" else 1), "complex64")
    small = jp.compact(three_layers, params, masks, x)
    assert [small.params[f"w{i}"].shape[-1] for i in range(3)] == [4, 3, 3]
    want, (got,) = beside_the_masked_model(three_layers, params, masks, x, (small.apply, small.params))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(("bias", "dtype", "folds"), [
    ("int32", "float32", False), ("float32", "complex64", False), ("bfloat16", "float32", True),
])  # fmt: skip
def test_constants_go_into_no_bias_that_cannot_hold_them(bias, dtype, folds):
    params, masks, x = with_constants(dtype, bias=bias)
    if "int32" in (bias, dtype):
        params |= {name: jnp.clip(30 * leaf, -9, 9) for name, leaf in params.items()}
        x = jnp.clip(x, -9, 9)
    small = jp.compact(three_layers, params, masks, x)
    assert [small.params[f"w{i}"].shape[-1] for i in range(2)] == ([4, 3] if folds else [6, 4])
    want, (got,) = beside_the_masked_model(three_layers, params, masks, x, (small.apply, small.params))
    np.testing.assert_allclose(got, want, rtol=0, atol=(0.02 if folds else 1e-5) * float(jnp.abs(want).max()))


def test_numbers_beside_unknown_ones_keep_their_kind():
    """Padding with a complex number, and concatenation with one, around activations that nobody knows."""
    params = {"a": draw("complex64", 5, 4), "b": draw("complex64", 12, 3), "bias": draw("complex64", 3)}

    def fn(p, x):
        x = jnp.concatenate([x @ p["a"], jnp.full((4, 4), 2 - 3j, "complex64")], 1)
        x = lax.pad(x, jnp.asarray(1 + 2j, x.dtype), ((0, 0, 0), (2, 2, 0)))
        return x @ p["b"] + wide(p["bias"], x)

    x = draw("complex64", 4, 5)
    small = jp.compact(fn, params, all_alive(params), x)
    assert small.params["b"].shape == (4, 3)
    want, (got,) = beside_the_masked_model(fn, params, all_alive(params), x, (small.apply, small.params))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_complex_weights_of_a_function_s_own_are_refused():
    own = draw("complex64", 5, 5)
    with pytest.raises(ValueError, match="holds arrays of its own"):
        jp.trace(lambda _, x: x @ own, {"w": draw("complex64", 5, 5)}, draw("complex64", 4, 5))


# Numbers that are written in the function stand in its jaxpr as literals.

LITERALS = {
    "added": lambda p, x: jax.nn.relu(x @ p["a"] + 1.0) @ p["b"],
    "added first": lambda p, x: jax.nn.relu(1.0 + x @ p["a"]) @ p["b"],
    "taken from": lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"] - 1,
    "taken from one": lambda p, x: 1 - jax.nn.relu(x @ p["a"]) @ p["b"],
    "of NumPy": lambda p, x: jax.nn.relu(x @ p["a"] + np.float32(2)) @ p["b"],
    "made wider": lambda p, x: x @ p["a"] + jnp.full((4, 6), 2.0) @ p["c"] @ p["a"] + lax.broadcast(1.0, (4, 6)),
    "multiplied by": lambda p, x: lax.dot_general(
        jax.nn.relu(lax.dot_general(x, 2.0, (((), ()), ((), ()))) @ p["a"]) @ p["b"], 0.5, (((), ()), ((), ()))
    ),
    "a branch": lambda p, x: lax.cond(True, lambda x: x @ p["a"] + 1.0, lambda x: x @ p["a"], x) @ p["b"],
    "a loop": lambda p, x: lax.fori_loop(0, 3, lambda i, h: h @ p["c"] @ p["a"] + 1.0, x @ p["a"]) @ p["b"],
    "a result": lambda p, x: (jax.nn.relu(x @ p["a"] + 0.5) @ p["b"], 1.0, jnp.float32(2)),
    "chosen": lambda p, x: jnp.where(x @ p["a"] > 0.5, 1.0, x @ p["a"]) @ p["b"],
}


def test_numbers_written_in_the_function():
    params, x = {"a": normal(5, 6), "b": normal(6, 3, seed=1), "c": normal(6, 5, seed=2)}, normal(4, 5, seed=3)
    masks = all_alive(params)
    masks["b"] = masks["b"].at[:2].set(False)
    smalls = {case: jp.compact(fn, params, masks, x) for case, fn in LITERALS.items()}
    assert smalls["taken from one"].params["a"].shape == (5, 4)
    assert smalls["added"].params["a"].shape == (5, 4)
    all_equal_the_masked_model(
        lambda p, x: {case: fn(p, x) for case, fn in LITERALS.items()},
        params,
        masks,
        x,
        (
            lambda p, x: {case: small.apply(p[case], x) for case, small in smalls.items()},
            {c: s.params for c, s in smalls.items()},
        ),
    )
    for fn in LITERALS.values():
        assert jp.tracing.peak_activations(fn, params, x)
        assert jp.costs(jp.trace(fn, params, x), masks).total.macs


def test_arrays_written_in_the_function():
    """Which JAX keeps as literals too, if it is told to."""
    params, x, own = {"a": normal(5, 6), "b": normal(6, 3)}, normal(4, 5), normal(1, 6)
    fn = lambda p, x: jnp.tanh(x @ p["a"] * np.float32([[1, 2, 3, 4, 5, 6]]) + own) @ p["b"]  # noqa: E731
    masks = all_alive(params)
    masks["b"] = masks["b"].at[:2].set(False)
    with simplified_constants(True):
        small = jp.compact(fn, params, masks, x)
        assert small.params["a"].shape == (5, 4)
        all_equal_the_masked_model(fn, params, masks, x, (small.apply, small.params))


def test_channels_are_permuted_beside_numbers_written_in_the_function():
    params, x, fn = {"a": normal(5, 6), "b": normal(6, 3)}, normal(4, 5), LITERALS["added"]
    found = jp.couplings(fn, params, x)
    permuted = jp.permute_channels(
        jp.Method(distribution=jp.NM(1, 2), select=["b"], layout=jp.FLAX), params, found
    ).params
    all_equal_the_masked_model(fn, params, all_alive(params), x, (fn, permuted))


# Keys are no numbers.


def drops(key, p, x):
    h = x @ p["a"]
    return jnp.where(jax.random.bernoulli(key, 0.5, (4, 1)), h, 0) @ p["b"]


def adds_noise(keys, p, x):
    return lax.scan(lambda h, key: (h + jax.random.normal(key, (4, 1)), None), x @ p["a"], keys)[0] @ p["b"]


KEYS = {
    "one": lambda key: lambda p, x: drops(key, p, x),
    "one of several": lambda key: lambda p, x: drops(jax.random.split(key, 3)[1], p, x),
    "scanned": lambda key: (lambda keys: lambda p, x: adds_noise(keys, p, x))(jax.random.split(key, 3)),
    "chosen": lambda key: lambda p, x: drops(lax.select(True, key, jax.random.fold_in(key, 1)), p, x),
}


@pytest.mark.parametrize("where", ["closed over", "among the params"])
def test_keys(where):
    key, x = jax.random.key(0), normal(4, 5)
    params = {"a": normal(5, 6), "b": normal(6, 3), "key": key}
    fns = {case: lambda p, x, of_key=of_key: of_key(p["key"])(p, x) for case, of_key in KEYS.items()}
    if where == "closed over":
        params, fns = {"a": params["a"], "b": params["b"]}, {case: of_key(key) for case, of_key in KEYS.items()}
    masks = jp.nonzero_masks(params)
    masks["b"] = masks["b"].at[:2].set(False)
    smalls = {case: jp.compact(fn, params, masks, x) for case, fn in fns.items()}
    assert {small.params["a"].shape for small in smalls.values()} == {(5, 4)}
    all_equal_the_masked_model(
        lambda p, x: {case: fn(p, x) for case, fn in fns.items()},
        params,
        masks,
        x,
        (lambda p, x: {case: small.apply(p, x) for case, small in smalls.items()}, smalls["one"].params),
    )
    assert jp.costs(jp.trace(fns["one"], params, x), masks, params=params).total.bytes


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn, self.b = nnx.RNN(nnx.GRUCell(5, 8, rngs=rngs), rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.b(self.rnn(x)[:, -1])


def test_a_module_with_keys_in_the_rest(relaxed):
    graph, params, rest = nnx.split(Recurrent(nnx.Rngs(0)), nnx.Param, ...)
    fn = lambda p, x: nnx.merge(graph, p, rest, copy=True)(x)  # noqa: E731
    masks, x = jp.nonzero_masks(params), normal(4, 3, 5)
    masks["b"]["kernel"][...] = masks["b"]["kernel"][...].at[:2].set(False)
    small = jp.compact(fn, params, masks, x)
    all_equal_the_masked_model(fn, params, masks, x, (small.apply, small.params))


def test_a_whole_state_with_keys_is_summed_up():
    state = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    rows = {leaf.name: leaf for leaf in jp.summarize(state).leaves}
    assert (rows["rngs/key"].weights, rows["rngs/key"].nnz) == (1, 1)
    assert jp.summarize(state, jp.nonzero_masks(state)).total == jp.summarize(state).total


# Batches of any size.


def merged_with_the_batch(p, x):
    """Channels of images become images: of a size times the batch's."""
    h = jax.nn.relu(x @ p["a"])
    h = jnp.moveaxis(h, -1, 1).reshape(-1, *x.shape[1:-1])
    h = (h - jnp.mean(x)).reshape(x.shape[0], -1, *x.shape[1:-1])
    return jnp.moveaxis(h, 1, -1) @ p["b"]


SYMBOLIC = {
    "grouped_query_attention": ("2 * b, t", (4, 3)),
    "merged with the batch": ("b, t, 5", (3, 4, 5)),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_smaller_models_are_exported_for_batches_of_any_size(name):
    symbols, size = SYMBOLIC[name]
    if name in MODELS:
        params, fn, shape = MODELS[name]()
    else:
        params, fn, shape = {"a": normal(5, 6), "b": normal(6, 3)}, merged_with_the_batch, (2, 2, 5)
    x = make_input(shape)
    masks = halved(fn, params, x)
    if name not in MODELS:
        masks["b"] = masks["b"].at[2:].set(False)
    small = jp.compact(fn, params, masks, x)
    assert any(any(axes) for axes in small.removed.values())
    like = jax.ShapeDtypeStruct(export.symbolic_shape(symbols), x.dtype)
    told = export.export(jax.jit(small.apply))(small.params, like)
    more = jnp.resize(x, size)
    all_equal_the_masked_model(fn, params, masks, more, (lambda p, x: told.call(p, x), small.params))
    by_symbols = jp.compact(fn, params, masks, like)
    assert by_symbols.removed == small.removed
    assert jp.couplings(fn, params, like).members == jp.couplings(fn, params, x).members
