"""What weights meet: sums over captured inputs in float64, of whatever kind of function, however the data lie."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import plain_decoder
import pytest
from flax import linen, nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from trace_helpers import normal

import jaxprune as jp
from jaxprune import evidence

pytestmark = pytest.mark.usefixtures("quick")

WIDTHS = (5, 8, 3)


def linen_mlp():
    class MLP(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(WIDTHS[2])(linen.relu(linen.Dense(WIDTHS[1])(x)))

    module = MLP()
    params = module.init(jax.random.key(0), jnp.ones((1, WIDTHS[0])))
    return module.apply, params, ("params/Dense_1/kernel", "params/Dense_0/kernel"), False


def nnx_mlp():
    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(*WIDTHS[:2], rngs=rngs), nnx.Linear(*WIDTHS[1:], rngs=rngs)

        def __call__(self, x):
            return self.second(jax.nn.relu(self.first(x)))

    graph, params = nnx.split(MLP(nnx.Rngs(0)))
    return lambda params, x: nnx.merge(graph, params)(x), params, ("first/kernel", "second/kernel"), False


def equinox_mlp():
    model = eqx.nn.MLP(WIDTHS[0], WIDTHS[2], WIDTHS[1], 1, key=jax.random.key(0))
    params, rest = eqx.partition(model, eqx.is_array)
    apply = lambda params, x: jax.vmap(eqx.combine(params, rest))(x)  # noqa: E731
    return apply, params, ("layers/0/weight", "layers/1/weight"), True


def plain_mlp():
    params = {"a": normal(*WIDTHS[:2]), "b": normal(*WIDTHS[1:], seed=1)}
    hidden = jax.checkpoint(lambda a, x: jax.nn.relu(x @ a))
    return lambda params, x: hidden(params["a"], x) @ params["b"], params, "ab", False


MODELS = {"Linen": linen_mlp, "NNX": nnx_mlp, "Equinox": equinox_mlp, "plain": plain_mlp}


def batches(count=3, rows=20):
    """Of which a third is zero."""
    return [jnp.where(normal(rows, WIDTHS[0], seed=i) > -0.4, normal(rows, WIDTHS[0], seed=i), 0) for i in range(count)]


@pytest.mark.parametrize("model", MODELS)
def test_sums_are_those_of_float64(model, relaxed):
    """Of networks x -> relu(x a + bias) b, and masks by them."""
    apply, params, names, transposed = MODELS[model]()
    leaves = {name: np.asarray(leaf, np.float64) for name, leaf in jp.tree.named_leaves(params).items()}
    x = np.concatenate(batches()).astype(np.float64)
    first = leaves[names[0]].T if transposed else leaves[names[0]]
    bias = next((leaf for name, leaf in leaves.items() if leaf.shape == (WIDTHS[1],)), 0)
    expected = dict(zip(names, (x, np.maximum(x @ first + bias, 0)), strict=True))
    seen = evidence.of_activations(apply, params, batches(), moments=True)
    assert sorted(seen.leaves) == sorted(names)
    for name, rows in expected.items():
        np.testing.assert_allclose(seen.input_norms[name], np.sqrt((rows**2).sum(0)), rtol=1e-5)
        np.testing.assert_allclose(seen.input_means[name], np.abs(rows).mean(0), rtol=1e-5)
        np.testing.assert_allclose(seen.input_zero_fractions[name], (rows == 0).mean(0), rtol=1e-5)
        np.testing.assert_allclose(seen.moments[name], rows.T @ rows, rtol=1e-5, atol=1e-5)
        assert float(seen.leaves[name].tokens[0]) == len(rows)
    met = expected[names[1]]  # what the second meets, the first makes
    np.testing.assert_allclose(seen.output_means[names[0]], np.abs(met).mean(0), rtol=1e-5)
    np.testing.assert_allclose(seen.output_zero_fractions[names[0]], (met == 0).mean(0), rtol=1e-5)
    method = jp.Method(criterion=jp.wanda, distribution=jp.PerOutput(), layout=seen.layout)
    masks = jp.tree.named_leaves(jp.compute_masks(method, params, 0.5, **seen.for_(method)))
    for name, rows in expected.items():
        weight = leaves[name].T if transposed else leaves[name]
        order = np.argsort(np.abs(weight) * np.sqrt((rows**2).sum(0))[:, None], axis=0)
        dead = np.zeros(weight.shape, bool)
        np.put_along_axis(dead, order[: round(len(weight) / 2)], True, 0)
        np.testing.assert_array_equal(masks[name].T if transposed else masks[name], ~dead)


def test_of_stacked_layers_every_one_has_its_own():
    """A scanned decoder under `remat`, against the same with its layers in a list; attention itself is left alone."""
    apply, params = plain_decoder.decoder(3), plain_decoder.drawn(layers=2)
    select = lambda name, leaf: leaf.ndim > 1 and "layers" in name and "norm" not in name  # noqa: E731
    tokens = [jnp.asarray(np.random.default_rng(i).integers(0, 13, (2, 5))) for i in range(2)]
    of = lambda params: evidence.of_activations(apply, params, tokens, select=select, moments=True)  # noqa: E731
    apart, together = of(params), of(plain_decoder.stacked(params))
    assert sorted(together.leaves) == sorted(f"layers/{word}" for word in ("q", "k", "v", "o", "gate", "up", "down"))
    for i in range(2):
        for name in together.leaves:
            other = name.replace("layers/", f"layers/{i}/")
            np.testing.assert_allclose(together.input_norms[name][i], apart.input_norms[other], rtol=1e-5)
            np.testing.assert_allclose(together.moments[name][i], apart.moments[other], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(together.output_means[name][i], apart.output_means[other], rtol=1e-5)
    moments = evidence.bytes_of_moments(apply, plain_decoder.stacked(params), tokens[0], select=select)
    assert moments["layers/down"] == 2 * together.moments["layers/down"].nbytes == 2 * 2 * 4 * 20 * 20


def twice(w, x):
    return (x @ w) @ w


def in_while(w, x):
    return lax.while_loop(lambda carry: carry[0] < 2, lambda carry: (carry[0] + 1, carry[1] @ w), (0, x))[1]


def in_cond(w, x):
    return lax.cond(x[0, 0] > -100, lambda x: (x @ w) @ w, lambda x: x, x)


def in_scan(w, x):
    return lax.scan(lambda x, _: (x @ w, None), x, None, length=2)[0]


@pytest.mark.parametrize("apply", [twice, in_while, in_cond, in_scan])
def test_uses_of_one_leaf_are_summed(apply):
    w, x = normal(4, 4), normal(6, 4, seed=1)
    seen = evidence.of_activations(lambda p, x: apply(p["w"], x), {"w": w}, [x], moments=True)
    rows = np.concatenate([x, np.asarray(x, np.float64) @ np.asarray(w, np.float64)])
    np.testing.assert_allclose(seen.moments["w"], rows.T @ rows, rtol=1e-5)
    assert float(seen.leaves["w"].tokens[0]) == 12


def test_a_leaf_that_is_split_along_its_outputs_meets_its_inputs_once():
    split = lambda p, x: [x @ part for part in jnp.split(p["w"], 2, axis=1)]  # noqa: E731
    x = normal(6, 4)
    seen = evidence.of_activations(split, {"w": normal(4, 8)}, [x], moments=True)
    np.testing.assert_allclose(seen.moments["w"], x.T @ x, rtol=1e-5, atol=1e-6)
    assert float(seen.leaves["w"].tokens[0]) == 6


def test_data_on_eight_devices_give_the_same():
    apply, params, names, _ = plain_mlp()
    x = normal(64, WIDTHS[0])
    lying = jax.device_put(x, NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), PartitionSpec("data")))
    one, eight = (evidence.of_activations(apply, params, [data], moments=True) for data in (x, lying))
    for name in names:
        np.testing.assert_allclose(eight.input_norms[name], one.input_norms[name], rtol=1e-6)
        np.testing.assert_allclose(eight.moments[name], one.moments[name], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(eight.output_means[name], one.output_means[name], rtol=1e-6)
        np.testing.assert_array_equal(eight.output_zero_fractions[name], one.output_zero_fractions[name])


def test_under_jit_it_is_the_same():
    apply, params, _, _ = plain_mlp()
    norms = lambda params, x: evidence.of_activations(apply, params, [x]).input_norms  # noqa: E731
    x = batches(1)[0]
    jax.tree.map(np.testing.assert_allclose, jax.jit(norms)(params, x), norms(params, x))


def test_small_terms_are_not_lost():
    """2**24 and sixty times 0.81, of which float32 keeps none one by one."""
    rows = [jnp.full((1, 2), 4096.0), *[jnp.full((1, 2), 0.9)] * 60]
    seen = evidence.of_activations(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}, rows, moments=True)
    for found in (seen.input_norms["w"] ** 2, seen.moments["w"]):
        np.testing.assert_allclose(found, 2**24 + 48.6, rtol=0, atol=4)


def test_a_layout_that_the_product_contradicts_is_refused():
    apply, params, _, _ = equinox_mlp()
    seen = evidence.of_activations(apply, params, batches(1))
    method = jp.Method(criterion=jp.wanda, layout=jp.FLAX)
    with pytest.raises(ValueError, match=r"layers/0/weight.*layout=seen.layout"):
        seen.for_(method)
    assert seen.for_(jp.Method()) == {}


def test_refusals_name_the_leaf():
    params = {"w": normal(4, 4)}
    of = lambda apply, x, **how: evidence.of_activations(apply, params, x, **how)  # noqa: E731
    with pytest.raises(ValueError, match=r"'w' are not finite"):
        of(lambda p, x: x @ p["w"], [jnp.full((2, 4), 1e30)])
    with pytest.raises(ValueError, match=r"'w' .*its inputs here are outputs there"):
        of(lambda p, x: x @ p["w"] @ p["w"].T, [normal(2, 4)])
    with pytest.raises(ValueError, match=r"'w' runs into `mul`"):
        of(lambda p, x: x * p["w"], [normal(4, 4)])
    with pytest.raises(ValueError, match="no batch"):
        of(lambda p, x: x @ p["w"], [])
    with pytest.raises(ValueError, match="no product"):
        of(lambda p, x: p["w"][x], [jnp.arange(3)])
    with pytest.raises(ValueError, match="moments=True"):
        _ = of(lambda p, x: x @ p["w"], [normal(2, 4)]).moments
