"""Sensitivity: every leaf pruned alone, one program for all sparsities, results as plain data and as a figure."""

import csv
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.lab.report import cost_figures, figures
from jaxprune.search.sensitivity import Sensitivity

pytestmark = pytest.mark.usefixtures("quick")

RNG = np.random.default_rng(0)
PARAMS = {
    "first": {"kernel": jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32), "bias": jnp.ones(8)},
    "last": {"kernel": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)},
}
X = jnp.asarray(RNG.normal(size=(200, 6)), jnp.float32)


def logits(params):
    hidden = jax.nn.relu(X @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["last"]["kernel"]


LABELS = jnp.argmax(logits(PARAMS), axis=1)


def accuracy(params):
    return jnp.mean(jnp.argmax(logits(params), axis=1) == LABELS)


def by_hand(name, sparsity):
    """The smallest weights of one leaf taken away in NumPy; ties do not happen."""
    params = jax.tree.map(np.array, PARAMS)
    leaf = params[name]["kernel"].reshape(-1)
    leaf[np.argsort(np.abs(leaf))[: round(leaf.size * sparsity)]] = 0
    return float(accuracy(jax.tree.map(jnp.asarray, params)))


SPARSITIES = (0.25, 0.5, 0.75)


@pytest.fixture(scope="module")
def found():
    return jp.sensitivity(jp.Method(), PARAMS, accuracy, SPARSITIES)


def test_each_leaf_is_pruned_alone(found):
    assert (found.names, found.sparsities, found.dense) == (("first/kernel", "last/kernel"), SPARSITIES, 1.0)
    for name, row in zip(found.names, found.accuracies, strict=True):
        assert row == tuple(by_hand(name.split("/")[0], sparsity) for sparsity in SPARSITIES)
    assert min(map(min, found.accuracies)) < 1  # something did suffer


def test_a_jitted_evaluation_is_traced_once(found):
    traces = []

    @jax.jit
    def counted(params):
        traces.append(None)
        return accuracy(params)

    assert jp.sensitivity(jp.Method(), PARAMS, counted, SPARSITIES) == found
    assert len(traces) == 1


def test_a_leaf_is_pruned_by_one_program():
    traces = []

    def criterion(params, **_):
        traces.append(list(params))
        return jp.magnitude(params)

    jp.sensitivity(jp.Method(criterion=criterion), PARAMS, accuracy, SPARSITIES)
    assert traces == [["first/kernel"], ["last/kernel"]]


def test_an_evaluation_may_count_in_python_and_the_params_stay():
    before = jax.tree.map(np.array, PARAMS)
    jp.sensitivity(jp.Method(), PARAMS, lambda params: float(np.mean(np.asarray(logits(params)) > 0)), (0.5,))
    jax.tree.map(np.testing.assert_array_equal, before, PARAMS)


def test_any_method_and_its_evidence():
    grads = jax.grad(lambda params: jnp.sum(logits(params) ** 2))(PARAMS)
    method = jp.Method(criterion=jp.taylor, granularity=jp.Output(), distribution=jp.Uniform(), select=("last/*",))
    found = jp.sensitivity(method, PARAMS, accuracy, (1 / 3,), grads=grads)
    masks = jp.compute_masks(method, PARAMS, 1 / 3, grads=grads)
    assert found.names == ("last/kernel",)
    assert found.accuracies == ((float(accuracy(jp.apply_masks(PARAMS, masks))),),)


def test_plain_data(found):
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert found.to_dict()["accuracies"]["last/kernel"] == list(found.accuracies[1])
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert lines[0] == {"leaf": "", "sparsity": "0.0", "accuracy": "1.0"}
    assert len(lines) == 1 + 2 * 3
    assert [float(line["accuracy"]) for line in lines[4:]] == list(found.accuracies[1])


def test_tables():
    found = Sensitivity(("a", "b/kernel"), (0.5, 0.975), ((0.9, 0.1), (0.8, 0.25)), 0.95)
    assert str(found).splitlines() == [
        "leaf          0%     50%   97.5%",
        "--------  ------  ------  ------",
        "a         0.9500  0.9000  0.1000",
        "b/kernel  0.9500  0.8000  0.2500",
    ]
    assert found.to_markdown().splitlines()[1:3] == ["| --- | ---: | ---: | ---: |", "| a | 0.9500 | 0.9000 | 0.1000 |"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jp.sensitivity(jp.Method(), PARAMS, accuracy, ()), "`sparsities` is empty"),
        (lambda: jp.sensitivity(jp.Method(), PARAMS, accuracy, (0.5, 90)), "Did you mean 0.9"),
        (lambda: jp.sensitivity(jp.Method(), PARAMS, logits), r"one number.*as it is it gave shape \(200, 3\).*mean"),
        (lambda: jp.sensitivity(jp.Method(select=("x",)), PARAMS, accuracy), "'x', which matches no leaf"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_another_order_is_refused(unchecked):
    with pytest.raises(TypeError, match=r"`Method` and a function .* order; function came first and Method third"):
        jp.sensitivity(accuracy, PARAMS, jp.Method())


# ---------------------------------------------------------------- the figure


def test_a_line_a_leaf_and_the_dense_accuracy(found):
    figure = cost_figures.leaf_sensitivity(found, "tiny $5")
    *lines, dense = figure.axes[0].lines
    drawn = {line.get_label(): tuple(line.get_ydata()) for line in lines}
    assert drawn == {n: tuple(100 * a for a in row) for n, row in zip(found.names, found.accuracies, strict=True)}
    assert (dense.get_label(), set(dense.get_ydata())) == ("dense", {100.0})
    assert figures.png(figure).startswith(b"\x89PNG")


def test_of_many_leaves_those_that_suffer_most_are_named():
    names = tuple(f"layer{i}" for i in range(30))
    rows = tuple((0.9, i / 30) for i in range(30))
    figure = cost_figures.leaf_sensitivity(Sensitivity(names, (0.5, 0.9), rows, 0.95))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [*(f"layer{i}" for i in range(7)), "dense", "23 others"]
    assert figures.png(figure)
