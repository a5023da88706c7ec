"""What a benchmark says comes from shapes and times: contests, rows, rivals, figures."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_helpers import PEAK, PLAN, PNG, nonzeros, pruned_resnet

from jaxprune import sparse
from jaxprune.lab.bench import (
    contest,
    figures,
    layers,
    rivals,
    rows,
)
from jaxprune.lab.models import parts
from jaxprune.lab.report import figures as lab_figures


@pytest.fixture(scope="module")
def small_resnet():
    return pruned_resnet()


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.5, 0.5), (0.9, 2.5)], ("at", 0.6)),
        ([(0.9, 2.5), (0.5, 0.5)], ("at", 0.6)),
        ([(0.5, 1.2), (0.9, 2.5)], ("below", 0.5)),
        ([(0.5, 0.2), (0.9, 0.9)], ("none", None)),
        ([(0.5, 1.0), (0.9, 2.0)], ("at", 0.5)),
        ([(0.5, 1.1), (0.7, 0.8), (0.9, 1.2)], ("at", 0.8)),  # not yet at 0.5, where it won once
        ([(0.5, 1.1), (0.7, 0.8)], ("none", None)),
        ([], ("none", None)),
    ],
)
def test_break_even(points, expected):
    word, sparsity = rows.break_even(points)
    assert (word, sparsity) == (expected[0], pytest.approx(expected[1]))


def test_rates_are_what_they_say():
    work = rows.Work(macs=500_000, dense_macs=2_000_000, nnz=50, weights=200, activations=600)
    row = rows.rates([0.001, 0.002, 0.003], 400, 60, work, base=0.006, peak=PEAK)
    assert (row["median_ms"], row["low_ms"], row["high_ms"], row["runs"]) == (2.0, 1.5, 2.5, 3)
    assert row["ratio"] == pytest.approx(3.0)
    assert row["gflops"] == pytest.approx(0.5)
    assert row["dense_gflops"] == pytest.approx(2.0)
    assert row["gbytes"] == pytest.approx(5e-4)
    assert row["intensity"] == pytest.approx(1000.0)
    assert row["of_peak_gflops"] == pytest.approx(0.005)
    assert row["of_peak_gbytes"] == pytest.approx(2.5e-5)
    assert row["of_roof"] == pytest.approx(0.005)
    assert row["effective_sparsity"] == pytest.approx(0.75)
    assert (row["nse"], row["nnz"], row["bytes"]) == (60, 50, 400)


def test_work_counts_living_weights_times_positions():
    params = {"a": {"kernel": jnp.zeros((3, 3, 2, 4)).at[1, 1].set(1.0), "bias": jnp.ones(4)}}

    def apply(params, x):
        return parts.conv(params["a"], x)

    work = rows.work_of(apply, params, jnp.ones((2, 5, 6, 2)))
    positions = 2 * 5 * 6
    assert work == rows.Work(8 * positions, 72 * positions, 8, 72, 4 * positions * (2 + 4))


def test_a_contest_names_kernels_and_refuses_wrong_answers(monkeypatch):
    params = layers.weights((64, 64), 0.5, PLAN)
    x = jax.random.normal(jax.random.key(0), (4, 64))
    entries = contest.enter(params, ["bcsr"])
    results = contest.run(layers.chain, entries, x, repeats=3)
    assert results["bcsr"].custom_calls == {"cpu_csr_sparse_dense_ffi": 3}
    assert results["dense"].custom_calls == {}
    assert all(3 * 3 <= len(r.runs) <= 3 * 30 and r.lower > 0 and r.compile > 1e-3 for r in results.values())
    assert results["bcsr"].error < 1e-5
    wrong = entries["bcsr"]._replace(
        params=jax.tree.map(lambda a: a * 2 if a.dtype == jnp.float32 else a, entries["bcsr"].params)
    )
    with pytest.raises(contest.WrongAnswer, match="bcsr answers differently from dense"):
        contest.run(layers.chain, {**entries, "bcsr": wrong}, x, repeats=3)


def test_what_cannot_run_is_refused_and_the_rest_goes_on(monkeypatch):
    def refuse(*args, **kwargs):
        raise TypeError("Leaf 'x' is stored for the native kernels. There are none.")

    monkeypatch.setattr(sparse, "apply", lambda fn: refuse)
    found = [row for case in layers.measure(PLAN, PEAK, lambda *_: None) for row in case]
    bad = [row for row in found if row["contestant"] == "bcsr"]
    assert len(bad) == 2
    assert all("There are none." in row["refused"] and "seconds" not in row for row in bad)
    assert {row["contestant"] for row in found if not row["refused"]} >= {"dense"}


def test_leaves_that_stay_dense_are_named_with_the_reason(small_resnet):
    _, params, _ = small_resnet
    few = {k: params[k] for k in ("layer1.0.conv1", "layer1.0.conv2", "fc")}
    stored = {**sparse.compress({"fc": few["fc"]}, "bcsr"), **{k: few[k] for k in few if k != "fc"}}
    stayed = contest.stayed_dense(few, stored, format="bcoo")
    assert sorted(itertools.chain(*stayed.values())) == ["layer1.0.conv1/kernel", "layer1.0.conv2/kernel"]
    assert contest.stored_slots(stored) == (stored["fc"]["kernel"].nse + 64 * 64 + 9 * 64 * 64, 1)
    planned = contest.stayed_dense(few, stored, planned="dense was faster")
    assert list(planned) == ["kept dense by the plan: dense was faster"]


# ---------------------------------------------------------------- rivals


def test_rivals_compute_the_same_layers():
    params = layers.weights((48, 48), 0.8, PLAN)
    x = jax.random.normal(jax.random.key(0), (5, 48))
    found = rivals.rivals([np.asarray(leaf) for leaf in jax.tree.leaves(params)], np.asarray(x))
    assert "scipy_csr" in {rival.name for rival in found}
    for rival in found:
        np.testing.assert_allclose(rival.call().T, layers.chain(params, x), atol=1e-5)
        assert rival.nse == (3 * 48 * 48 if rival.name == "torch_dense" else sum(nonzeros(params).values()))


class FakeTorch:
    """As much of PyTorch as the rival touches, in NumPy."""

    __version__ = "0"
    threads = None

    class inference_mode:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    class Tensor:
        def __init__(self, array):
            self.array = array

        def __matmul__(self, other):
            return FakeTorch.Tensor(self.array @ other.array)

        def numpy(self):
            return self.array

    def set_num_threads(self, n):
        self.threads = n

    def from_numpy(self, array):
        return self.Tensor(array)

    def relu(self, tensor):
        return self.Tensor(np.maximum(tensor.array, 0))

    def sparse_csr_tensor(self, bounds, index, values, size):
        assert bounds.array.dtype == index.array.dtype == np.int32
        matrix = np.zeros(size, np.float32)
        outputs = np.repeat(np.arange(size[0]), np.diff(bounds.array))
        matrix[outputs, index.array] = values.array
        return self.Tensor(matrix)


def test_pytorch_runs_where_it_is_installed(monkeypatch):
    fake = FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert rivals.missing() == []
    weight = np.random.default_rng(0).standard_normal((6, 4), np.float32) * (np.arange(4) != 2)
    x = np.ones((3, 6), np.float32)
    found = {rival.name: rival for rival in rivals.rivals([weight], x)}
    assert set(found) == {"scipy_csr", "torch_csr", "torch_dense"}
    for rival in found.values():
        np.testing.assert_allclose(rival.call().T, np.maximum(x @ weight, 0), rtol=1e-5)
    assert found["torch_csr"].nse == 18
    assert found["torch_csr"].bytes == 18 * 8 + 5 * 4
    assert fake.threads >= 1


def test_missing_rivals_are_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    assert [line.split(" is not")[0] for line in rivals.missing()] == ["SciPy", "PyTorch"]
    assert rivals.rivals([np.ones((2, 2), np.float32)], np.ones((1, 2), np.float32)) == []
    assert rivals.versions() == {}


# ---------------------------------------------------------------- figures


def drawn_rows():
    found = [row for case in layers.measure(PLAN, PEAK, lambda *_: None) for row in case]
    return [{**row, "peak": PEAK._asdict()} for row in found]


def test_figures_hold_the_numbers():
    found = drawn_rows()
    made = figures.all_figures(found)
    assert set(made) == {"speedup", "roofline"}
    axes = made["speedup"].axes[0]
    points = next(line for line in axes.lines if line.get_marker() == "o")
    expected = sorted((r["sparsity"], r["ratio"]) for r in found if r["contestant"] == "bcsr")
    np.testing.assert_allclose(points.get_xdata(), [1 - s for s, _ in expected])
    np.testing.assert_allclose(points.get_ydata(), [ratio for _, ratio in expected])
    roof = made["roofline"].axes[0].lines[0]
    assert max(roof.get_ydata()) == PEAK.gflops
    assert all(lab_figures.png(figure).startswith(PNG) for figure in made.values())


def test_break_even_is_where_the_drawn_line_crosses():
    found = [{**row, "ratio": 0.5 if row["sparsity"] == 0.5 else 2.5} for row in drawn_rows()]
    axes = figures.speedup(found).axes[0]
    assert "60 %" in [text.get_text() for text in axes.texts]
    curve = max(axes.lines, key=lambda line: len(line.get_xdata()))
    assert np.interp(0.6, 1 - np.asarray(curve.get_xdata()), curve.get_ydata()) == pytest.approx(1.0, abs=1e-3)
