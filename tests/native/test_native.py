"""The native kernels: really called, inside their buffers, and missing without harm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_helpers import needs_kernels

from jaxprune import native, sparse

pytestmark = pytest.mark.filterwarnings("error")


def make_weight(n_in=300, n_out=40, density=0.2, seed=0):
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random((n_in, n_out)) < density, rng.normal(size=(n_in, n_out)), 0).astype(np.float32)
    return sparse.compress({"kernel": jnp.asarray(dense)}, "native")["kernel"], dense


@needs_kernels
def test_the_kernel_really_runs_under_jit_and_vmap():
    weight, dense = make_weight()
    x = jnp.ones((3, 5, dense.shape[0]))
    program = jax.jit(jax.vmap(lambda x, w: sparse.matmul(x, w), (0, None))).lower(x, weight).compile().as_text()
    assert program.count('custom_call_target="jaxprune_product"') == 1
    assert "while" not in program


@needs_kernels
def test_layers_need_no_transposes():
    weight, _ = make_weight(64, 64)

    def three_layers(x, w):
        for _ in range(3):
            x = jax.nn.relu(sparse.matmul(x, w))
        return x

    program = jax.jit(three_layers).lower(jnp.ones((32, 64)), weight).compile().as_text()
    assert program.count('custom_call_target="jaxprune_product"') == 3
    # x and y lie as the user has them: nothing is turned before, between or after.
    assert program.count(" copy(") == program.count(" transpose(") == 0


@needs_kernels
@pytest.mark.parametrize("what", ["x", "values"])
def test_gradients_equal_the_dense_ones(what):
    weight, dense = make_weight()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(9, dense.shape[0])).astype(np.float32))
    rows, cols = weight.coordinates()
    if what == "x":
        got = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(sparse.matmul(x, weight)))))(x)
        want = jax.grad(lambda x: jnp.sum(jnp.sin(x @ dense)))(x)
    else:
        got = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(sparse.matmul(x, weight.with_values(v))))))(weight.values)
        want = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(jnp.asarray(dense))[cols, rows]
    np.testing.assert_allclose(got, want, atol=2e-5)


def call(change):
    """The custom call itself, with the parts of a good call, but for `change`."""
    weight, dense = make_weight()
    none = jnp.zeros(0, jnp.float32)
    good = {
        "values": weight.values, "index": weight.index, "bounds": weight.bounds, "scale": none, "bias": none,
        "residual": none, "x": jnp.ones((3, dense.shape[0])), "shape": (3, 40), "dtype": jnp.float32,
        "tile": weight.tile, "window": (),
    }  # fmt: skip
    return jax.block_until_ready(native.product(**{**good, **change}))


WINDOW = (1, 1, 1, 1, 0, 0, 1, 1, 1, 1)
BAD_CALLS = [
    ({"bounds": jnp.zeros(7, jnp.int32)}, "`bounds` must have"),
    ({"bounds": jnp.zeros(7, jnp.float32)}, "`bounds` must be int32"),
    ({"index": jnp.zeros(3, jnp.uint8)}, "`values` must have `group` numbers for each of `index`"),
    ({"index": jnp.zeros(3, jnp.int32)}, "`index` must be uint8 or uint16"),
    ({"values": jnp.zeros(3, jnp.float16)}, "`values` must be float32, bfloat16 or int8"),
    ({"tile": -1}, "`tile` must be in"),
    ({"tile": 0}, "`index` must have 8 ceil\\(in / 64\\) \\* out bytes for a `tile` of 0"),
    ({"tile": 0, "group": 4}, "`group` must be 1 for a `tile` of 0"),
    ({"tile": 0, "index": jnp.zeros(3, jnp.uint16)}, "`index` must be uint8 for a `tile` of 0"),
    ({"tile": 0, "index": jnp.zeros(8 * 5 * 40, jnp.uint8)}, "`bounds` must have out \\+ 1 numbers"),
    ({"tile": 0, "window": WINDOW, "x": jnp.ones((3, 1, 1, 300)), "shape": (3, 1, 1, 40)}, "`window` must be empty"),
    ({"tile": 2**17}, "`tile` must be in"),
    ({"shape": (3, 41)}, "`bounds` must have"),
    ({"shape": (4, 40)}, "same batch"),
    ({"shape": (3, 1, 40)}, "the result must be"),
    ({"dtype": jnp.int32}, "the result must be float32 or bfloat16"),
    ({"x": jnp.ones((3, 300), jnp.int32)}, "`x` must be float32 or bfloat16"),
    ({"x": jnp.ones(300)}, "`x` must be \\(batch, in\\)"),
    ({"x": jnp.ones((3, 300, 1))}, "`x` must be \\(batch, in\\)"),
    ({"scale": jnp.ones(39)}, "`scale` must have"),
    ({"bias": jnp.ones(41)}, "`bias` must have"),
    ({"bias": jnp.ones(40, jnp.bfloat16)}, "`bias` must be float32"),
    ({"residual": jnp.ones((3, 39))}, "`residual` must have"),
    ({"residual": jnp.ones((3, 40), jnp.bfloat16)}, "`residual` must be of the result's dtype"),
    ({"window": (1, 1)}, "`window` must have 10 numbers"),
    ({"window": WINDOW}, "`x` must be \\(batch, height"),
    ({"window": (0, *WINDOW[1:]), "x": jnp.ones((3, 1, 1, 300)), "shape": (3, 1, 1, 40)}, "out of range"),
    ({"window": (*WINDOW[:9], 9), "x": jnp.ones((3, 1, 1, 300)), "shape": (3, 1, 1, 40)}, "out of range"),
]


@needs_kernels
@pytest.mark.parametrize(("change", "says"), BAD_CALLS)
def test_the_custom_call_refuses_what_does_not_fit(unchecked, change, says):
    with pytest.raises(Exception, match=says):
        call(change)


@needs_kernels
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "part",
    [
        lambda weight: {"index": weight.index.at[-1].set(255)},  # beyond the inputs of the last tile
        lambda weight: {"bounds": weight.bounds.at[5].set(10**9)},
        lambda weight: {"bounds": weight.bounds.at[5].set(-1)},
        lambda weight: {"bounds": weight.bounds[::-1]},
    ],
)
def test_the_custom_call_finds_indices_that_lead_outside(unchecked, batch, part):
    weight, dense = make_weight()
    change = part(weight) | {"x": jnp.ones((batch, dense.shape[0])), "shape": (batch, 40)}
    with pytest.raises(Exception, match="lead outside"):
        call(change)


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("index", np.full(8, 9, np.uint16), "outside"),
        ("index", np.zeros(8, np.uint16), "sorted"),
        ("index", np.zeros(7, np.uint16), "do not fit"),
        ("bounds", np.array([0, 4, 8, 9], np.int32), "do not fit"),
        ("bounds", np.array([0, 9, 8], np.int32), "climb"),
        ("bounds", np.array([1, 4, 8], np.int32), "climb"),
    ],
)
def test_parts_that_point_outside_are_refused(part, value, says):
    good = {"index": np.tile(np.arange(4, dtype=np.uint16), 2), "bounds": np.array([0, 4, 8], np.int32)}
    sparse.NativeWeight(np.ones(8, np.float32), leaf_shape=(4, 2), tile=128, **good)
    with pytest.raises(ValueError, match=says):
        sparse.NativeWeight(np.ones(8, np.float32), leaf_shape=(4, 2), tile=128, **{**good, part: value})


def test_without_kernels_the_reason_and_the_way_out_are_said(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    native._library.cache_clear()
    try:
        assert native.instruction_set() == ""
        weight, dense = make_weight()
        with pytest.raises(TypeError, match=r"'kernel'.*C\+\+ compiler"):
            sparse.matmul(jnp.ones((2, dense.shape[0])), weight)
    finally:
        native._library.cache_clear()


@needs_kernels
def test_kernels_of_another_version_are_not_called(monkeypatch):
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    assert "another version of jaxprune" in native._library.__wrapped__()


@needs_kernels
@pytest.mark.parametrize("after", [lambda y: y, lambda y: jax.nn.relu(y + 1.0)])
def test_a_program_for_a_gpu_is_refused_when_it_is_lowered(after):
    weight, _ = make_weight()
    program = jax.jit(sparse.apply(lambda x, w: after(x @ w))).trace(jnp.ones((3, 300)), weight)
    with pytest.raises(TypeError, match=r"run on CPU.*bcoo"):
        program.lower(lowering_platforms=("cuda",))
