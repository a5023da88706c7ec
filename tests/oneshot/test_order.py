"""Orders of one-shot pruning against float64, scans against lists, stages, blocks, and what is refused."""

import functools
import itertools
import re
from contextlib import nullcontext as quiet

import jax
import jax.numpy as jnp
import numpy as np
import plain_decoder
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from trace_helpers import normal

import jaxprune as jp
from jaxprune import tree
from jaxprune.oneshot.cuts import blocks
from jaxprune.oneshot.least_squares import Wanda
from jaxprune.oneshot.program import flat

pytestmark = pytest.mark.usefixtures("quick")

prune = functools.partial(jp.oneshot.prune, pattern=jp.Uniform())

WIDTHS = (5, 8, 6, 9, 3)  # 6 is the narrowest in the middle: two blocks of two


def mlp(params, x):
    for name in sorted(params):
        x = jax.nn.relu(x @ params[name])
    return x


def mlp_params():
    return {f"w{i}": normal(a, b, seed=i) for i, (a, b) in enumerate(itertools.pairwise(WIDTHS))}


def batches(count=3, rows=20):
    return [normal(rows, WIDTHS[0], seed=100 + i) for i in range(count)]


def wanda64(target, moments, sparsity):
    scores = np.abs(target) * np.sqrt(np.diag(moments))[:, None]
    dead = np.argsort(scores, axis=None, kind="stable")[: round(target.size * sparsity)]
    return np.where(np.isin(np.arange(target.size), dead).reshape(target.shape), 0, target)


def pruned64(params, x, sparsity, blocks, fit, damping=0.01):
    """Of blocks, each a list of names: inputs of a block by the pruned ones before, within it by dense weights."""
    ours = dense = x
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    found = {}
    for block in blocks:
        inputs = ours
        for name in block:
            w, moments = weights[name], inputs.T @ inputs
            target = w
            if fit == "dense":
                held = damping * np.mean(np.diag(moments)) * np.eye(len(w))
                target = np.linalg.solve(moments + held, inputs.T @ dense @ w + held @ w)
            found[name] = wanda64(target, moments, sparsity)
            inputs, dense = (np.maximum(one @ w, 0) for one in (inputs, dense))
        for name in block:
            ours = np.maximum(ours @ found[name], 0)
    return found


BLOCKS = {
    "layers": [["w0", "w1", "w2", "w3"]],
    "blocks": [["w0", "w1"], ["w2", "w3"]],
    "products": [["w0"], ["w1"], ["w2"], ["w3"]],
}


@pytest.mark.parametrize("fit", ["own", "dense"])
@pytest.mark.parametrize("order", BLOCKS)
def test_weights_are_those_of_float64(order, fit):
    params, told = mlp_params(), []
    warned = (
        pytest.warns(UserWarning, match="models have collapsed") if (order, fit) == ("blocks", "dense") else quiet()
    )
    with warned:
        new, masks = prune(
            mlp, params, iter(batches()), Wanda(), 0.4, order=order, fit=fit, progress=lambda *a: told.append(a)
        )
    expected = pruned64(params, np.concatenate(batches()).astype(np.float64), 0.4, BLOCKS[order], fit)
    for name, want in expected.items():
        np.testing.assert_allclose(new[name], want, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(masks[name], want != 0)
        np.testing.assert_array_equal(new[name] == 0, ~masks[name])
    assert [one[:3] for one in told] == [(i + 1, 4, (f"w{i}", 0)) for i in range(4)]


@pytest.mark.parametrize(("order", "fit"), [("products", "dense"), ("blocks", "own")])
def test_the_fit_that_goes_with_an_order(order, fit):
    chosen, said = (
        prune(mlp, mlp_params(), batches(), Wanda(), 0.5, order=order, **more)[0] for more in ({}, {"fit": fit})
    )
    for name, leaf in said.items():
        np.testing.assert_array_equal(chosen[name], leaf)


class Stops(dict):
    """Keeps so many matrices; then the process is killed."""

    def __init__(self, after):
        self.after = after

    def __setitem__(self, place, solution):
        if len(self) == self.after:
            raise RuntimeError("killed")
        super().__setitem__(place, solution)


@pytest.mark.parametrize("order", ["products", "layers"])
@pytest.mark.parametrize("after", [1, 3])
def test_what_is_kept_is_taken_as_it_is_and_ends_the_same(order, after):
    """Of the two matrices of a stack one is kept, or three of four."""
    params = {"a": normal(2, 8, 8), "b": normal(2, 8, 8, seed=1)}
    apply = lambda params, x: lax.scan(lambda x, w: (jnp.tanh(x @ w[0]) @ w[1], None), x, (params["a"], params["b"]))[0]  # noqa: E731
    data = [normal(20, 8, seed=i) for i in range(2)]
    of = lambda **more: prune(apply, params, data, Wanda(refit=True), 0.5, order=order, **more)  # noqa: E731
    whole, kept, told = of(), Stops(after), []
    with pytest.raises(RuntimeError, match="killed"):
        of(kept=kept)
    first = dict(kept)
    kept.after = None
    again = of(kept=kept, progress=lambda *a: told.append(a))
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert all(kept[place] is solution for place, solution in first.items())
    assert {one[2]: one[3] for one in told} == {place: solution.error for place, solution in kept.items()}
    assert {type(solution.weight) for solution in kept.values()} == {np.ndarray}
    kept["a", 1] = kept["a", 1]._replace(weight=np.zeros((8, 8), np.float32), mask=np.zeros((8, 8), bool))
    assert not of(kept=kept)[0]["a"][1].any()
    kept["a", 1] = kept["a", 1]._replace(mask=np.zeros((4, 8), bool))
    with pytest.raises(ValueError, match=r"`kept` has a mask \(4, 8\) bool for layer 1 of 'a'"):
        of(kept=kept)


def test_errors_told_are_relative_to_the_outputs_wanted():
    params, x, told = {"w0": normal(5, 8)}, batches(), []
    new, _ = prune(mlp, params, x, Wanda(), 0.5, fit="own", progress=lambda *a: told.append(a))
    outputs, wanted = (np.concatenate(x).astype(np.float64) @ np.asarray(one["w0"]) for one in (new, params))
    error = np.linalg.norm(outputs - wanted) / np.linalg.norm(wanted)
    assert told == [(1, 1, ("w0", 0), pytest.approx(error, rel=1e-4))]


def matrices(name, leaf):
    return leaf.ndim > 1 and "layers" in name and "norm" not in name


def tokens(count=2):
    return [jnp.asarray(np.random.default_rng(i).integers(0, 13, (2, 6))) for i in range(count)]


@pytest.mark.parametrize("order", ["products", "layers"])
def test_a_scan_over_layers_is_pruned_as_the_layers_in_a_list(order):
    params, apply = plain_decoder.drawn(layers=2), plain_decoder.decoder(3)
    of = lambda params: prune(apply, params, tokens(), Wanda(refit=True), 0.5, select=matrices, order=order)  # noqa: E731
    (apart, masks), (together, masks_together) = of(params), of(plain_decoder.stacked(params))
    for one, other in ((apart, together), (masks, masks_together)):
        for name, leaf in tree.named_leaves(plain_decoder.stacked(one)).items():
            np.testing.assert_allclose(tree.named_leaves(other)[name], leaf, rtol=1e-3, atol=1e-4)
    counts = {
        name: int((~mask).sum()) for name, mask in tree.named_leaves(masks_together).items() if "layers/q" in name
    }
    assert counts == {"layers/q": 2 * 72}
    np.testing.assert_array_equal(together["embed"], params["embed"])


STAGES = {
    "products": [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]],
    "blocks": [["q", "k", "v", "o"], ["gate", "up", "down"]],
}


@pytest.mark.parametrize("order", STAGES)
def test_stages_and_blocks_of_a_decoder(order):
    """And at each cut one array of (batch, length, width) waits, in both orders."""
    params = plain_decoder.drawn(layers=2)
    names = {name for name, leaf in tree.named_leaves(params).items() if matrices(name, leaf)}
    pieces = blocks(flat(plain_decoder.decoder(3), params, tokens()[0], names), order)
    found = [[step.site.name for step in part.solved] for piece in pieces for part in piece]
    assert found == [[f"layers/{i}/{word}" for word in stage] for i in range(2) for stage in STAGES[order]]
    waiting = [[var.aval.shape for var in part.before] for piece in pieces for part in piece]
    assert [one for one in waiting if one != waiting[0]] == [[(2, 6, 12)]] * sum(map(len, pieces[1:]))
    assert all(piece[-1].products == [step for part in piece for step in part.solved] for piece in pieces)


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("order", ["products", "blocks", "layers"])
def test_donated_leaves_are_deleted_and_the_result_is_the_same(order, stack):
    params = plain_decoder.drawn(layers=2)
    params = plain_decoder.stacked(params) if stack else params
    donated = jax.tree.map(jnp.copy, params)
    of = lambda params, **more: prune(  # noqa: E731
        plain_decoder.decoder(3), params, tokens(), Wanda(), 0.5, select=matrices, order=order, **more
    )
    want, got = of(params), of(donated, donate=True)
    for one, other in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(one, other)
    deleted = {name for name, leaf in tree.named_leaves(donated).items() if leaf.is_deleted()}
    assert deleted == {name for name, leaf in tree.named_leaves(params).items() if matrices(name, leaf)}


def test_fitting_the_dense_outputs_comes_closer_to_them():
    params, x = mlp_params(), batches(8)
    error = {}
    for fit in ("own", "dense"):
        new, _ = prune(mlp, params, x, Wanda(refit=True), 0.3, fit=fit)
        error[fit] = sum(float(jnp.sum((mlp(new, one) - mlp(params, one)) ** 2)) for one in x)
    assert error["dense"] < 0.9 * error["own"]


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))


def convolutions(params, x):
    for name in ("a", "b"):
        x = jax.nn.relu(conv(x, params[name]))
    return jnp.mean(x, (2, 3)) @ params["head"]


def test_convolutions_are_matrices_of_windows_and_inputs():
    """The first, on inputs that are what they were, has the outputs of least squares: no residual meets its inputs."""
    params = {"a": normal(4, 3, 3, 3), "b": normal(6, 4, 2, 2, seed=1), "head": normal(6, 5, seed=2)}
    x = [normal(4, 3, 7, 7, seed=9)]
    new, masks = prune(convolutions, params, x, Wanda(refit=True, damping=1e-6), 0.5)
    assert [int((~mask).sum()) for mask in masks.values()] == [54, 48, 15]
    gradient = jax.grad(lambda w: jnp.sum((conv(x[0], w) - conv(x[0], params["a"])) ** 2))(new["a"])
    assert float(jnp.max(jnp.abs(jnp.where(masks["a"], gradient, 0)))) < 1e-2 < float(jnp.max(jnp.abs(gradient)))
    two, masks = prune(convolutions, params, x, Wanda(), pattern=jp.NM(2, 4), select=["b"])
    np.testing.assert_array_equal(masks["b"].sum(axis=1), np.full((6, 2, 2), 2))
    np.testing.assert_array_equal(two["a"], params["a"])


def test_a_leaf_that_is_split_into_products_of_one_stage_is_solved_once():
    def apply(params, x):
        q, k = jnp.split(params["qk"], 2, axis=1)
        return (jnp.tanh(x @ q) * (x @ k)) @ params["o"]

    params, told = {"qk": normal(5, 8), "o": normal(4, 3, seed=1)}, []
    new, _ = prune(apply, params, batches(), Wanda(), 0.5, fit="own", progress=lambda *a: told.append(a[2]))
    assert told == [("qk", 0), ("o", 0)]
    whole = np.concatenate(batches()).astype(np.float64)
    np.testing.assert_allclose(new["qk"], wanda64(np.asarray(params["qk"]), whole.T @ whole, 0.5), rtol=1e-6)


def test_data_on_eight_devices_give_the_same():
    params, x = mlp_params(), [normal(64, WIDTHS[0], seed=3)]
    lying = NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), PartitionSpec("data"))
    one, _ = prune(mlp, params, x, Wanda(refit=True), 0.5)
    eight, _ = prune(mlp, params, [jax.device_put(x[0], lying)], Wanda(refit=True), 0.5)
    for name, leaf in one.items():
        np.testing.assert_allclose(eight[name], leaf, rtol=1e-3, atol=1e-4)


class NotANumber:
    """What a failed Cholesky factorization gives."""

    damping = 0.01

    def __call__(self, target, moments, sparsity, pattern):
        return target * jnp.nan, jnp.ones(target.shape, bool)


W = {"w": jnp.ones((4, 4))}
REFUSED = {
    "'w' is used inside a `while`": (lambda p, x: lax.while_loop(lambda x: x[0, 0] < 0, lambda x: x @ p["w"], x), {}),
    "'w' is used in products that come one after the other": (lambda p, x: x @ p["w"] @ p["w"], {}),
    "'w' is used as embedding as well": (lambda p, x: (x + p["w"][jnp.int32(x[0])]) @ p["w"], {}),
    "Inputs of 'w' are not finite": (lambda p, x: (x / 0) @ p["w"], {}),
    "The moments of 'w' are not positive definite": (
        lambda p, x: jnp.ones_like(x) @ p["w"], {"solver": NotANumber()}),
    "`NM(2, 3)` needs runs of 3 along the input axis, but 'w' has 4": (
        lambda p, x: x @ p["w"], {"pattern": jp.NM(2, 3)}),
    "`order` is one of": (lambda p, x: x @ p["w"], {"order": "block"}),
    "`fit` is one of": (lambda p, x: x @ p["w"], {"fit": "mine"}),
    "`sparsity` is the fraction removed": (lambda p, x: x @ p["w"], {"sparsity": None}),
    "Did you mean 0.5?": (lambda p, x: x @ p["w"], {"sparsity": 50}),
    "There is no batch": (lambda p, x: x @ p["w"], {"batches": []}),
    "Batches must be alike": (lambda p, x: x @ p["w"], {"batches": [normal(4, 4), normal(3, 4)]}),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message, unchecked):
    apply, how = REFUSED[message]
    how = {"batches": [normal(4, 4)], "solver": Wanda(), "sparsity": 0.5} | how
    with pytest.raises(ValueError, match=re.escape(message)):
        prune(apply, W, **how)


@pytest.mark.parametrize("order", ["products", "layers"])
def test_selected_leaves_that_are_in_no_product_stay(order, relaxed):
    params = {"a": {"kernel": normal(8, 6), "bias": normal(6, seed=1)}, "b": {"kernel": normal(6, 4, seed=2)}}

    def apply(params, x):
        return jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]

    def prune(select):
        return jp.oneshot.prune(apply, params, [normal(20, 8)], jp.oneshot.Magnitude(), 0.5, select=select, order=order)

    pruned, masks = prune(["a/*"])
    np.testing.assert_array_equal(pruned["a"]["bias"], params["a"]["bias"])
    assert [int(mask.sum()) for mask in jax.tree.leaves(masks)] == [6, 24, 24]
    with pytest.raises(ValueError, match=r"selected leaf|selected leaves is in a product: 'a/bias'"):
        prune(["a/bias"])


def test_a_loss_weighs_the_outputs_and_is_refused_by_solvers_that_cannot():
    params, data = mlp_params(), batches()
    loss = lambda params, x: jnp.sum(jnp.sin(mlp(params, x)))  # noqa: E731
    plain, _ = prune(mlp, params, data, jp.oneshot.AlternatingDirections(), 0.5, order="layers")
    weighed, masks = prune(mlp, params, data, jp.oneshot.AlternatingDirections(), 0.5, order="layers", loss=loss)
    assert any(not np.array_equal(plain[name], weighed[name]) for name in params)
    assert all(int(jnp.sum(~masks[name])) == round(0.5 * params[name].size) for name in params)
    stacks = plain_decoder.stacked(plain_decoder.drawn())
    tokens = [jnp.asarray(np.random.default_rng(s).integers(0, 13, (3, 5)), jnp.int32) for s in range(2)]
    apply = plain_decoder.decoder(heads=2)
    score = lambda params, tokens: -jnp.sum(jax.nn.log_softmax(apply(params, tokens)[:, :-1])[..., 0])  # noqa: E731
    found, _ = prune(apply, stacks, tokens, jp.oneshot.AlternatingDirections(), 0.5, select="layers/[!n]*", loss=score)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    with pytest.raises(ValueError, match="cannot weigh outputs"):
        prune(mlp, params, data, Wanda(), 0.5, loss=loss)
