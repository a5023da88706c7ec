"""What one does with masks: exact zeros, identity gradients, counts, bits; eager and under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.masks import apply_masks, nonzero_masks, overlap, pack_masks, rewind, sparsity_of, straight_through
from jaxprune.masks import unpack_masks as unpack

DTYPES = ["float32", "bfloat16", "float16"]
SHAPES = {"a": (4, 3), "b": [(5,), ()], "c": (3, 3, 2)}
SEEDS = st.integers(0, 10)


def is_shape(node):
    return isinstance(node, tuple)


def make_params(dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), dtype), SHAPES, is_leaf=is_shape)


def make_masks(alive=0.5, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: jnp.asarray(rng.random(shape) < alive), SHAPES, is_leaf=is_shape)


def bits(leaf):
    return np.asarray(leaf).tobytes()


def flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


jitted = {
    name: jax.jit(getattr(jp.masks, name)) for name in ("apply_masks", "straight_through", "overlap", "sparsity_of")
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "apply", [apply_masks, straight_through, rewind, jitted["apply_masks"], jitted["straight_through"]]
)
def test_dead_is_plus_zero_and_alive_is_untouched(apply, dtype):
    """To the bit: not -0.0, whatever stands there; denormals alive stay."""
    params, masks = make_params(dtype), make_masks()
    params["a"] = jnp.asarray([[-1.0, jnp.nan, 1e-45], [jnp.inf, -jnp.inf, -0.0]] * 2, dtype)
    out = apply(params, masks)
    assert jax.tree.structure(out) == jax.tree.structure(params)
    for new, old, mask in zip(*map(jax.tree.leaves, (out, params, masks)), strict=True):
        assert new.dtype == old.dtype
        want = np.where(mask, np.asarray(old), np.zeros((), old.dtype))
        assert bits(new) == bits(want)


def test_the_derivative_of_straight_through_is_the_identity():
    params, masks = make_params(), make_masks()
    scale = make_params(seed=1)

    def loss(apply, params):
        return sum(jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (apply(params, masks), scale)), strict=True))

    through = jax.jit(jax.grad(lambda p: loss(straight_through, p)))(params)
    plain = jax.grad(lambda p: loss(apply_masks, p))(params)
    np.testing.assert_array_equal(flat(through), flat(scale))
    np.testing.assert_array_equal(flat(plain), np.where(flat(masks), flat(scale), 0))
    _, tangent = jax.jvp(lambda p: straight_through(p, masks), (params,), (scale,))
    np.testing.assert_array_equal(flat(tangent), flat(scale))


@given(seed=SEEDS, alive=st.sampled_from([0.0, 0.3, 1.0]))
def test_pack_and_unpack_are_inverse(seed, alive):
    masks = make_masks(alive, seed)
    packed = pack_masks(masks)
    for bytes_, mask in zip(jax.tree.leaves(packed), jax.tree.leaves(masks), strict=True):
        assert bytes_.dtype == jnp.uint8
        np.testing.assert_array_equal(bytes_, np.packbits(np.asarray(mask).ravel()))
    shapes = jax.tree.map(lambda mask: jax.ShapeDtypeStruct(mask.shape, jnp.float32), masks)
    for like in (masks, make_params(), shapes):
        back = unpack(packed, like)
        assert jax.tree.structure(back) == jax.tree.structure(masks)
        assert all(leaf.dtype == bool for leaf in jax.tree.leaves(back))
        assert [bits(leaf) for leaf in jax.tree.leaves(back)] == [bits(leaf) for leaf in jax.tree.leaves(masks)]


def test_pack_and_unpack_under_jit():
    masks = make_masks()
    back = jax.jit(lambda m: unpack(pack_masks(m), m))(masks)
    np.testing.assert_array_equal(flat(back), flat(masks))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: {**p, "a": jnp.zeros(3, jnp.uint8)},
            r"The packed masks have shape \(3,\) at 'a', the params \(2,\)",
        ),
        (lambda p: {"a": p["a"], "b": p["b"]}, "The packed masks have no leaf 'c', the params do"),
    ],
)
def test_unpack_refuses_what_does_not_fit(change, message):
    masks = make_masks()
    with pytest.raises(ValueError, match=message):
        unpack(change(pack_masks(masks)), masks)


@pytest.mark.parametrize("dtype", [*DTYPES, "int8", "bool"])
def test_nonzero_masks(dtype):
    """Denormal numbers are not zero, also where the processor takes them for it."""
    values = [0.0, -0.0, 1.0, -2.0]
    if dtype in DTYPES:
        values += [float(jnp.finfo(dtype).smallest_subnormal), -float(jnp.finfo(dtype).smallest_subnormal)]
        values += [np.inf, np.nan]
    leaf = jnp.asarray(np.array(values).astype(dtype))
    want = np.array(values) != 0
    np.testing.assert_array_equal(nonzero_masks([leaf])[0], want)
    np.testing.assert_array_equal(jax.jit(nonzero_masks)([leaf])[0], want)


def test_nonzero_masks_find_the_masks_again():
    params, masks = make_params(), make_masks()
    np.testing.assert_array_equal(flat(nonzero_masks(apply_masks(params, masks))), flat(masks))


@given(seed=SEEDS, alive=st.sampled_from([0.0, 0.3, 1.0]))
def test_sparsity_of_is_the_fraction_removed(seed, alive):
    masks = make_masks(alive, seed)
    for count in (sparsity_of, jitted["sparsity_of"]):
        np.testing.assert_allclose(float(count(masks)), 1 - flat(masks).mean(), atol=1e-6)
    assert float(sparsity_of(masks, "a")) == pytest.approx(1 - np.asarray(masks["a"]).mean(), abs=1e-6)
    rest = {"a": False, "*": True}
    assert float(sparsity_of(masks, rest)) == pytest.approx(1 - flat([masks["b"], masks["c"]]).mean(), abs=1e-6)


def test_sparsity_of_the_weights_alone():
    masks = {"kernel": jnp.array([[True, False]]), "bias": jnp.ones(6, bool)}
    assert float(sparsity_of(masks, jp.weights)) == 0.5
    assert float(sparsity_of(masks)) == 0.125


@pytest.mark.parametrize("select", [None, "x"])
def test_sparsity_of_nothing_is_refused(select):
    with pytest.raises(ValueError, match="`sparsity_of` was given no weights to count"):
        sparsity_of({"a": jnp.ones((0, 2), bool)}, select)


@given(first=SEEDS, second=SEEDS)
def test_overlap_is_jaccards(first, second):
    a, b = make_masks(0.4, first), make_masks(0.6, second)
    want = (flat(a) & flat(b)).sum() / (flat(a) | flat(b)).sum()
    for like in (overlap, jitted["overlap"]):
        np.testing.assert_allclose(float(like(a, b)), want, rtol=1e-6)
    assert float(overlap(a, a)) == 1
    assert float(overlap(a, jax.tree.map(jnp.logical_not, a))) == 0


def test_nothing_overlaps_with_nothing():
    assert float(overlap(make_masks(0), make_masks(0))) == 1


@pytest.mark.parametrize("function", [apply_masks, straight_through, rewind, lambda p, m: overlap(p, m)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {**m, "a": jnp.ones((3, 4), bool)}, r"masks have shape \(3, 4\) at 'a', the params \(4, 3\)"),
        (lambda m: {"a": m["a"], "b": m["b"]}, "masks have no leaf 'c', the params do. They have: 'a', 'b/0', 'b/1'"),
        (lambda m: {**m, "d": m["a"]}, "masks have a leaf 'd', the params do not"),
    ],
)
def test_another_structure_is_refused(function, change, message):
    masks = make_masks()
    params = masks if function not in (apply_masks, straight_through, rewind) else make_params()
    with pytest.raises(ValueError, match=message):
        function(params, change(masks))
