"""Permutation: the order found, its optimality where it can be counted out, and that the function stays the same."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compact_models import MODELS, Draw, batch_norm, conv, dense, flat, make_input
from jax.sharding import NamedSharding, PartitionSpec

import jaxprune as jp
from jaxprune import tree
from jaxprune.channels import regrouping
from jaxprune.channels.regrouping import regroup

pytestmark = pytest.mark.usefixtures("quick")


def kept(rows, n, m):
    """Sum over runs and columns of the n largest of m; rows (rows, columns)."""
    rows = np.asarray(rows, np.float64)
    return np.sort(rows.reshape(-1, m, rows.shape[1]), 1)[:, m - n :].sum()


def most(rows, n, m):
    """The most that two runs retain, over all ways of parting the rows."""
    ways = ((0, *some) for some in itertools.combinations(range(1, 2 * m), m - 1))
    return max(kept(rows[[*way, *np.setdiff1d(np.arange(2 * m), way)]], n, m) for way in ways)


def normal(*shape, seed=0):
    return np.abs(np.random.default_rng(seed).normal(size=shape))


# The search.


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4), (2, 5), (3, 6)])
def test_two_runs_come_to_the_optimum(n, m):
    for seed in range(5):
        rows = normal(2 * m, 3, seed=seed)
        np.testing.assert_allclose(kept(rows[regroup(rows, n, m, 100)], n, m), most(rows, n, m), rtol=1e-6)


def test_all_permutations_of_four_rows():
    rows = normal(4, 3)
    best = max(kept(rows[list(order)], 1, 2) for order in itertools.permutations(range(4)))
    np.testing.assert_allclose(kept(rows[regroup(rows, 1, 2, 100)], 1, 2), best, rtol=1e-6)


@pytest.mark.parametrize(("n", "m", "runs"), [(1, 2, 6), (2, 4, 5), (4, 8, 3)])
def test_no_exchange_between_two_runs_is_left_that_gains(n, m, runs):
    rows = normal(runs * m, 6)
    order = regroup(rows, n, m, 100).reshape(-1, m)
    for one, two in itertools.combinations(order, 2):
        before = kept(rows[[*one, *two]], n, m)
        if m <= 6:
            assert most(rows[[*one, *two]], n, m) <= before * (1 + 1e-6)
        for a, b in itertools.product(range(m), repeat=2):
            now = np.stack([one, two])
            now[0, a], now[1, b] = now[1, b], now[0, a]
            assert kept(rows[now.reshape(-1)], n, m) <= before * (1 + 1e-6)


@hypothesis.given(
    rows=st.integers(0, 2**32 - 1),
    runs=st.integers(1, 5),
    columns=st.integers(1, 4),
    values=st.sampled_from([1, 3, 99]),
)
def test_what_is_retained_never_falls(rows, runs, columns, values):
    rows = np.random.default_rng(rows).integers(0, values, (4 * runs, columns)).astype(float)
    order = regroup(rows, 2, 4, 100)
    assert sorted(order) == list(range(4 * runs))
    assert kept(rows[order], 2, 4) >= kept(rows, 2, 4)
    if kept(rows[order], 2, 4) == kept(rows, 2, 4):
        assert order.tolist() == sorted(order)  # a tie changes nothing
    assert order.tolist() == regroup(rows * 2.0**100, 2, 4, 100).tolist()


def test_rounding_breaks_no_ties():
    """What (ab, cd) retains of a column (ac, bd) retains of another, and (ad, bc) is worse."""
    for seed in range(20):
        half = normal(4, 50, seed=seed) + np.array([[3], [0], [0], [3]])
        rows = np.concatenate([half, half[[0, 2, 1, 3]]], 1)[:, np.random.default_rng(seed).permutation(100)]
        assert regroup(rows, 1, 2, 1).tolist() == [0, 1, 2, 3]


def test_the_order_does_not_depend_on_how_much_is_held_at_once(monkeypatch):
    rows = normal(24, 20)
    want = regroup(rows, 2, 4, 100)
    monkeypatch.setattr(regrouping, "HELD", 24 * 7)
    monkeypatch.setattr(regrouping, "AT_ONCE", 50)
    assert regroup(rows, 2, 4, 100).tolist() == want.tolist()


def test_fewer_rounds_retain_less():
    rows = normal(64, 8)
    results = [kept(rows[regroup(rows, 2, 4, rounds)], 2, 4) for rounds in (0, 1, 100)]
    assert results[0] == kept(rows, 2, 4)
    assert results == sorted(set(results))


# Models. Widths are multiples of 4, but for those of which it is told.


def images():
    """Convolutions, batch norm, a residual sum, flattening, two readers of the stem."""
    draw = Draw()
    params = {"stem": draw.layer(3, 3, 2, 8), "a": draw.layer(3, 3, 8, 12), "n": draw.norm(12)}
    params |= {"b": draw.layer(1, 1, 12, 8), "fc": draw.layer(8 * 9, 16), "out": draw.layer(16, 3)}

    def fn(p, x):
        x = jax.nn.relu(conv(p["stem"], x))
        x = x + conv(p["b"], jax.nn.relu(batch_norm(p["n"], conv(p["a"], x))))
        return dense(p["out"], jax.nn.relu(dense(p["fc"], flat(x))))

    return params, fn, (2, 3, 3, 2)


def joined(left, right):
    def model():
        draw = Draw()
        params = {"l": draw.layer(6, left), "r": draw.layer(6, right), "both": draw.layer(left + right, 3)}

        def fn(p, x):
            x = jnp.concatenate([jax.nn.relu(dense(p["l"], x)), jnp.tanh(dense(p["r"], x))], -1)
            return dense(p["both"], x)

        return params, fn, (5, 6)

    return model


def channels_first(side):
    def model():
        draw = Draw()
        params = {"a": draw(1, 1, 2, 8), "fc": draw.layer(8 * side * side, 3)}

        def fn(p, x):
            return dense(p["fc"], flat(jnp.moveaxis(jax.nn.relu(jnp.einsum("nhwc,xyco->nhwo", x, p["a"])), 3, 1)))

        return params, fn, (2, side, side, 2)

    return model


STACK = jp.FLAX.with_rules({"up": jp.layout.Axes((0,), (), (1,), (2,)), "down": jp.layout.Axes((0,), (), (1,), (2,))})
CASES = {
    "mlp": (MODELS["mlp"], ["1/kernel"], jp.FLAX),
    "images": (images, ["a/kernel", "b/kernel", "fc/kernel", "out/kernel"], jp.FLAX),
    "joined": (joined(8, 12), ["both/kernel"], jp.FLAX),
    "gated": (MODELS["gated"], ["down/kernel"], jp.FLAX),
    "stacked": (MODELS["stacked_layers"], ["down"], STACK),  # runs of 2
}


def permuted(case, n=2, m=4, **how):
    make, select, layout = CASES[case]
    params, fn, shape = make()
    method = jp.Method(distribution=jp.NM(n, m), select=select, layout=layout)
    x = make_input(shape)
    return method, params, fn, x, jp.permute_channels(method, params, jp.couplings(fn, params, x), **how)


@pytest.mark.parametrize("case", CASES)
def test_the_function_stays_and_the_score_grows(case):
    n, m = (1, 2) if case == "stacked" else (2, 4)
    method, params, fn, x, found = permuted(case, n, m)
    want, got = (RUN.get(case, jax.jit(fn))(each, x) for each in (params, found.params))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    layers = jp.Channels(jp.couplings(fn, params, x)).layers
    assert {name: sorted(order) for name, order in found.orders.items()} == {
        name: list(range(len(layer))) for name, layer in layers.items()
    }
    # What is promised is what masks keep.
    masks = [tree.named_leaves(jp.compute_masks(method, each)) for each in (params, found.params)]
    leaves = [tree.named_leaves(each) for each in (params, found.params)]
    for name, gain in found.gains.items():
        shares = [
            np.abs(leaf[name])[mask[name]].sum() / np.abs(leaf[name]).sum()
            for leaf, mask in zip(leaves, masks, strict=True)
        ]
        np.testing.assert_allclose(gain, shares, rtol=1e-5)
        assert gain[1] > gain[0]


@pytest.mark.parametrize("leaves", [["a/kernel"], ["fc/kernel"], ["a/kernel", "fc/kernel"]])
def test_two_runs_of_a_model_come_to_the_optimum_of_all_that_read_them(leaves):
    """Taps of a window, positions of a flattened image, and both at once."""
    params, fn, shape = images()
    method = jp.Method(distribution=jp.NM(2, 4), select=leaves)
    found = jp.permute_channels(method, params, jp.couplings(fn, params, make_input(shape)))

    def rows(params):
        parts = {"a/kernel": params["a"]["kernel"], "fc/kernel": params["fc"]["kernel"]}
        rows = {
            "a/kernel": np.moveaxis(np.abs(parts["a/kernel"]), 2, 0).reshape(8, -1),
            "fc/kernel": np.abs(parts["fc/kernel"]).reshape(9, 8, 16).swapaxes(0, 1).reshape(8, -1),
        }
        return np.concatenate([rows[name] for name in leaves], 1)

    np.testing.assert_allclose(kept(rows(found.params), 2, 4), most(rows(params), 2, 4), rtol=1e-6)
    order = order_of(params["stem"]["bias"], found.params["stem"]["bias"])
    assert order == found.orders["a/kernel:2"].tolist()  # named after its first kernel
    np.testing.assert_array_equal(rows(found.params), rows(params)[order])


def test_channels_read_backwards():
    params = {"a": jnp.asarray(normal(6, 8), jnp.float32), "b": jnp.asarray(normal(8, 3, seed=1), jnp.float32)}
    found = jp.couplings(lambda p, x: jax.nn.relu(x @ p["a"])[:, ::-1] @ p["b"], params, jnp.ones((5, 6)))
    got = jp.permute_channels(jp.Method(distribution=jp.NM(2, 4), select=["b"], layout=jp.FLAX), params, found)
    np.testing.assert_allclose(kept(got.params["b"], 2, 4), most(np.asarray(params["b"]), 2, 4), rtol=1e-6)


def order_of(before, after):
    """New place -> old, of biases no two of which are equal."""
    return [before.tolist().index(bias) for bias in after.tolist()]


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    seed=st.integers(0, 99), case=st.sampled_from(["mlp", "images", "joined"]), runs=st.sampled_from([(1, 2), (2, 4)])
)
def test_whatever_the_weights_their_sum_never_falls(seed, case, runs):
    make, select, layout = CASES[case]
    params, _, _ = make()
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.integers(0, 4, leaf.shape) + 0.1, jnp.float32), params)
    method = jp.Method(distribution=jp.NM(*runs), select=select, layout=layout)
    found = jp.permute_channels(method, params, COUPLINGS[case])
    sizes = {name: float(np.abs(leaf).sum()) for name, leaf in tree.named_leaves(params).items()}
    before, after = (sum(gain[i] * sizes[name] for name, gain in found.gains.items()) for i in (0, 1))
    assert after >= before * (1 - 1e-6)
    same = [np.sort(np.asarray(leaf), None) for tree in (params, found.params) for leaf in jax.tree.leaves(tree)]
    for a, b in zip(same[: len(same) // 2], same[len(same) // 2 :], strict=True):
        np.testing.assert_array_equal(a, b)
    want, got = (RUN[case](each, X[case]) for each in (params, found.params))
    np.testing.assert_allclose(got, want, rtol=1e-3)


RUN = {case: jax.jit(CASES[case][0]()[1]) for case in ("mlp", "images", "joined")}
X = {case: make_input(CASES[case][0]()[2]) for case in RUN}
COUPLINGS = {case: jp.couplings(fn, params, X[case]) for case in X for params, fn, _ in [CASES[case][0]()]}


def test_only_named_leaves_change_the_order_of_their_inputs():
    *_, found = permuted("images", leaves=["out/*", "b/kernel"])
    moved = {name for name, order in found.orders.items() if list(order) != sorted(order)}
    assert moved == {"a/kernel:3", "fc/kernel:1"}
    before, after = found.gains["a/kernel"]
    assert before == after


def test_runs_that_cross_from_one_layer_to_another_keep_their_channels():
    params, fn, shape = joined(10, 6)()
    method = jp.Method(distribution=jp.NM(2, 4), select=["both/kernel"])
    found = jp.permute_channels(method, params, jp.couplings(fn, params, make_input(shape)))
    left, right = (order_of(params[name]["bias"], found.params[name]["bias"]) for name in "lr")
    assert left[8:] == [8, 9]
    assert left != sorted(left)
    assert right == sorted(right)  # one run of four alone, which has nothing to exchange with


def test_leaves_keep_their_dtype_and_shards():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), MODELS["mlp"]()[0])
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("x",))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec("x")))
    method = jp.Method(distribution=jp.NM(2, 4), select=["1/kernel"])
    found = jp.permute_channels(method, params, COUPLINGS["mlp"])
    assert found.orders["0/kernel:1"].tolist() != list(range(12))
    for a, b in zip(*map(jax.tree.leaves, (params, found.params)), strict=True):
        assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding)


def test_evidence_takes_the_same_order():
    params, fn, shape = MODELS["mlp"]()
    x = make_input(shape)
    gradients = jax.jit(jax.grad(lambda params: jnp.sum(fn(params, x) ** 2)))
    grads = gradients(params)
    method = jp.Method(criterion=jp.taylor, distribution=jp.NM(2, 4), select=["1/kernel"])
    found = jp.permute_channels(method, params, COUPLINGS["mlp"], grads=grads)
    moved = jp.channels.reorder(grads, COUPLINGS["mlp"], found.orders)
    for a, b in zip(jax.tree.leaves(gradients(found.params)), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


REFUSED = {
    "another distribution": ("mlp", {"distribution": jp.PerOutput()}, {}, r"along the inputs, .* PerOutput"),
    "along the outputs": ("mlp", {"distribution": jp.NM(2, 4, "outputs")}, {}, "along the inputs"),
    "blocks": ("mlp", {"granularity": jp.Block(2, 2)}, {}, "6 groups of the 12 inputs of '1/kernel'. Use `Element`"),
    "inputs that do not divide": ("mlp", {"select": ["2/kernel"]}, {}, "'2/kernel' has 10 inputs"),
    "no such leaf": ("mlp", {}, {"leaves": "9/*"}, "`leaves` names '9/.', but the method selects '1/kernel'"),
    "inputs of the model": (
        "images", {"select": ["stem/kernel"], "distribution": jp.NM(1, 2)}, {"leaves": ["stem/kernel"]},
        "The 2 inputs of 'stem/kernel' must keep their order: it is an input of the function. Leave it out of `leaves`",
    ),
    "another model": ("gated", {}, {"couplings": "mlp"}, "those of another model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_permuted_is_refused(case):
    model, method, how, words = REFUSED[case]
    make, select, layout = CASES[model]
    params, fn, shape = make()
    method = jp.Method(**({"distribution": jp.NM(2, 4), "select": select, "layout": layout} | method))
    found = COUPLINGS[how["couplings"]] if "couplings" in how else jp.couplings(fn, params, make_input(shape))
    with pytest.raises(ValueError, match=words):
        jp.permute_channels(method, params, found, leaves=how.get("leaves"))


@pytest.mark.parametrize("side", [3, 4])
def test_runs_of_positions_are_refused_if_named_and_kept_if_not(side):
    """Flattened with the channels first, a run of 4 lies within a channel (of 16 positions), or across two (of 9)."""
    params, fn, shape = channels_first(side)()
    method = jp.Method(distribution=jp.NM(2, 4), select=["fc/kernel"])
    found = jp.couplings(fn, params, make_input(shape))
    kept = jp.permute_channels(method, params, found)
    assert kept.orders["a:3"].tolist() == list(range(8))
    assert kept.gains["fc/kernel"][0] == kept.gains["fc/kernel"][1]
    with pytest.raises(ValueError, match="no 4 channels that the function treats the same fill the same runs of 4"):
        jp.permute_channels(method, params, found, leaves="fc/*")


def test_operations_that_cannot_be_followed_are_named():
    def fn(params, x):
        return jax.lax.top_k(x @ params["w"], 4)[0] @ params["v"]

    params = {"w": jnp.ones((6, 8)), "v": jnp.ones((4, 2))}
    method = jp.Method(distribution=jp.NM(2, 4), select=["v"], layout=jp.FLAX)
    found = jp.couplings(fn, params, jnp.ones((5, 6)))
    with pytest.raises(ValueError, match=r"The 4 inputs of 'v' must keep their order: .* not be followed: top_k at"):
        jp.permute_channels(method, params, found, leaves="v")
