"""Masked low-rank adapters: the formula in float64, zeros to the bit, gradients through what is alive, refusals."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import tree
from jaxprune.layout import Axes
from jaxprune.training import adapted, adapters, init_adapters

pytestmark = pytest.mark.usefixtures("quick")

SHAPES = {"first/kernel": (7, 5), "conv/kernel": (3, 2, 4, 6), "stack/kernel": (3, 4, 8), "last/weight": (5, 7)}
LAYOUT = jp.layout.BY_NAME.with_rules({"stack/kernel": Axes(layers=(0,), inputs=(1,), outputs=(2,))})
init = functools.partial(init_adapters, rank=2, select=tuple(SHAPES), layout=LAYOUT)
merge = functools.partial(adapted, layout=LAYOUT)


def drawn(dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    params = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}
    params["first/bias"] = jnp.ones(5, dtype)
    masks = {name: jnp.asarray(rng.random(leaf.shape) < 0.5) for name, leaf in params.items()}
    return params, masks | {"first/bias": jnp.ones(5, bool)}


def trained(params, seed=1):
    """Adapters both of whose factors are something."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), init(jax.random.key(0), params)
    )


def product(name, adapter):
    """A B in float64, index by index of the leaf."""
    a, b = (np.asarray(leaf, np.float64) for leaf in adapter)
    if name == "stack/kernel":
        return np.stack([x @ y for x, y in zip(a, b, strict=True)])
    if name == "conv/kernel":
        return np.einsum("hwir,ro->hwio", a.reshape(3, 2, 4, -1), b)
    return (a @ b).T if name.endswith("weight") else a @ b


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [True, False])
def test_it_is_the_formula(dtype, masked):
    params, masks = drawn(dtype)
    factors = trained(params)
    found = jax.jit(merge)(params, factors, masks if masked else None, scale=0.5)
    for name, leaf in params.items():
        want = np.asarray(leaf, np.float64)
        if name in SHAPES:
            want = want + 0.5 * product(name, factors[name])
            want = np.where(masks[name], want, 0) if masked else want
        assert found[name].dtype == leaf.dtype
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(np.asarray(found[name], np.float64), want, rtol=tolerance, atol=tolerance)
        if masked:
            bits = np.asarray(found[name]).view("uint32" if dtype == "float32" else "uint16")
            assert not np.any(bits[~np.asarray(masks[name])])  # +0, to the bit


def test_a_nan_under_a_dead_weight_stays_out():
    params, masks = drawn()
    params = {name: jnp.where(masks[name], leaf, jnp.nan) for name, leaf in params.items()}
    factors = trained(params)
    loss = lambda factors: sum(jnp.sum(leaf**2) for leaf in merge(params, factors, masks).values())  # noqa: E731
    for leaf in jax.tree.leaves((merge(params, factors, masks), jax.grad(loss)(factors))):
        assert np.isfinite(leaf).all()


def test_to_begin_with_nothing_changes():
    params, masks = drawn()
    pruned = jp.apply_masks(params, masks)
    factors = init(jax.random.key(0), params)
    jax.tree.map(np.testing.assert_array_equal, merge(pruned, factors, masks), pruned)
    assert {name: (one.a.shape, one.b.shape) for name, one in factors.items()} == {
        "first/kernel": ((7, 2), (2, 5)),
        "conv/kernel": ((24, 2), (2, 6)),
        "stack/kernel": ((3, 4, 2), (3, 2, 8)),
        "last/weight": ((7, 2), (2, 5)),
    }
    assert all(one.a.dtype == jnp.float32 for one in init(jax.random.key(0), drawn("bfloat16")[0]).values())
    wide = init_adapters(jax.random.key(0), {"kernel": jax.ShapeDtypeStruct((400, 300), jnp.float32)}, 64)
    np.testing.assert_allclose(np.std(wide["kernel"].a), 400**-0.5, rtol=0.03)


def test_gradients_come_through_alive_weights_alone():
    params, masks = drawn()
    factors = trained(params)
    wanted = {name: jnp.asarray(np.random.default_rng(2).normal(size=leaf.shape), jnp.float32)
              for name, leaf in params.items()}  # fmt: skip

    def loss(factors):
        return sum(jnp.sum(wanted[name] * leaf) for name, leaf in merge(params, factors, masks, scale=2.0).items())

    found = jax.grad(loss)(factors)
    for name in ("first/kernel", "stack/kernel"):
        back = 2 * np.where(masks[name], np.asarray(wanted[name], np.float64), 0)
        a, b = (np.asarray(leaf, np.float64) for leaf in factors[name])
        np.testing.assert_allclose(found[name].a, back @ np.swapaxes(b, -1, -2), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[name].b, np.swapaxes(a, -1, -2) @ back, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rank", "params", "words"),
    [
        (0, {"kernel": (7, 5)}, r"`rank` is from 1 to 5 for 'kernel', which is 7 x 5 as a matrix; got 0"),
        (6, {"kernel": (7, 5)}, "or leave the leaf out with `select`"),
        (1, {"layers/kernel": (3, 7, 5)}, "'layers/kernel' .* may be stacked layers of a scan"),
        (1, {"theta": (7, 5)}, "the name 'theta' .* does not tell which axis"),
    ],
)
def test_what_has_no_adapter_says_why(rank, params, words):
    params = {name: jnp.ones(shape) for name, shape in params.items()}
    with pytest.raises(ValueError, match=words):
        init_adapters(jax.random.key(0), params, rank)


def test_adapters_and_masks_of_other_params_are_refused():
    params, masks = drawn()
    factors = trained(params)
    with pytest.raises(ValueError, match="The masks have shape"):
        merge(params, factors, masks | {"first/kernel": jnp.ones((7, 6), bool)})
    with pytest.raises(ValueError, match="an adapter for 'second/kernel', but no such leaf"):
        merge(params, factors | {"second/kernel": factors["first/kernel"]}, masks)
    with pytest.raises(ValueError, match=r"of 'first/kernel' \(7, 5\) has factors \(24, 2\), \(2, 6\); \(7, 2\) and"):
        merge(params, factors | {"first/kernel": factors["conv/kernel"]}, masks)


def test_a_pruned_network_is_distilled_by_its_adapters(relaxed):
    """Adapters alone are trained; the merged network is nearer to the dense one on what it never saw, and as sparse."""
    rng = np.random.default_rng(0)
    x, unseen = (jnp.asarray(rng.normal(size=(n, 12)), jnp.float32) for n in (256, 256))
    dense = {name: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)
             for name, shape in (("first/kernel", (12, 24)), ("second/kernel", (24, 6)))}  # fmt: skip

    def model(params, x):
        return jax.nn.relu(x @ params["first/kernel"]) @ params["second/kernel"]

    masks = jp.compute_masks(jp.Method(distribution=jp.Uniform()), dense, 0.5)
    pruned = jp.apply_masks(dense, masks)
    tx = optax.adam(0.02)

    def far(params, x):
        return jp.distillation_loss(model(params, x), model(dense, x), temperature=2.0)

    def step(carry, _):
        factors, state = carry
        grads = jax.grad(lambda factors: far(adapted(pruned, factors, masks), x))(factors)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(factors, updates), state), None

    factors = init_adapters(jax.random.key(0), pruned, 4)
    (factors, _), _ = jax.jit(lambda *carry: jax.lax.scan(step, carry, None, 200))(factors, tx.init(factors))
    merged = adapted(pruned, factors, masks)
    assert float(far(merged, unseen)) < float(far(pruned, unseen)) / 1.5
    for name, mask in masks.items():
        np.testing.assert_array_equal(merged[name] != 0, mask)
    # Further training with the masks kept, as after any pruning.
    chain = optax.chain(optax.adam(1e-3), jp.keep_params_sparse(masks))
    updates, _ = chain.update(jax.grad(far)(merged, x), chain.init(merged), merged)
    after = tree.named_leaves(optax.apply_updates(merged, updates))
    assert not any(np.any(after[name][~mask]) for name, mask in masks.items())


def test_the_example_runs(relaxed):
    found = doctest.DocTestFinder().find(adapters.adapted, module=adapters)
    results = [doctest.DocTestRunner().run(test) for test in found]
    assert sum(r.attempted for r in results) > 8
    assert sum(r.failed for r in results) == 0
