"""Figures hold the numbers they were given: read back from the axes, then at the edges."""

import base64
import sys
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from jaxprune.lab.report import figures, style, wording

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def weights():
    dense = np.random.default_rng(0).normal(0, 0.05, 5000).astype(np.float32)
    pruned = np.where(np.abs(dense) >= 0.06, dense, 0)
    return {"dense": dense, "pruned": pruned, "fine-tuned": pruned * np.float32(1.2)}


def record(step, stage="train", seed=0, validation=0.9, sparsity=0.0):
    return {"seed": seed, "stage": stage, "step": step, "epoch": step / 100, "loss": 0.1, "train_accuracy": 0.95,
            "validation_accuracy": validation, "sparsity": sparsity, "seconds": 1.0}  # fmt: skip


def leaf(name="layers/0/kernel", weights=1000, nnz=100):
    return {"name": name, "shape": [weights], "weights": weights, "nnz": nnz, "sparsity": 1 - nnz / weights,
            "bytes": 4 * weights, "sparse_bytes": 12 * nnz}  # fmt: skip


def stat(mean, std=0.0):
    return {"mean": mean, "std": std, "values": [mean]}


def result(name, sparsity=0.9, sparse=0.97, dataset="digits", **accuracy):
    stages = {"dense": stat(0.98, 0.002), "pruned": stat(0.6), "finetuned": stat(sparse), "sparse": stat(sparse)}
    return {"name": name, "dataset": {"name": dataset}, "sparsity": stat(sparsity), "accuracy": {**stages, **accuracy}}


def bars(axes):
    """Heights and edges of the stairs a histogram panel holds."""
    (stairs,) = axes.patches
    values, edges, _ = stairs.get_data()
    return values, edges


def is_drawable(figure):
    assert isinstance(figure, Figure)
    data = figures.png(figure)  # warnings about glyphs, layout or limits would be errors here
    assert data.startswith(PNG)
    return data


def lines(axes):
    """Data lines of an axes, without the rules between stages."""
    return [line for line in axes.lines if not line.get_label().startswith("_")]


# histograms


def test_histograms_count_every_weight_and_leave_out_zeros_after_pruning(weights):
    figure = figures.weight_histograms(weights, threshold=0.06)
    dense, pruned, tuned = figure.axes
    left = np.count_nonzero(weights["pruned"])
    assert [bars(axes)[0].sum() for axes in figure.axes] == [5000, left, left]
    assert dense.get_title() == "Before pruning\n5,000 weights"
    assert pruned.get_title() == f"After pruning\n{left:,} weights\n{5000 - left:,} zeros left out"
    assert tuned.get_title() == f"After fine-tuning\n{left:,} weights\n{5000 - left:,} zeros left out"
    is_drawable(figure)


def test_histograms_share_axes_and_bins_and_equal_numpy(weights):
    figure = figures.weight_histograms(weights)
    assert len({axes.get_xlim() for axes in figure.axes}) == len({axes.get_ylim() for axes in figure.axes}) == 1
    edges = bars(figure.axes[0])[1]
    for axes, values in zip(figure.axes, weights.values(), strict=True):
        np.testing.assert_array_equal(bars(axes)[1], edges)
        kept = values if axes is figure.axes[0] else values[values != 0]
        np.testing.assert_array_equal(bars(axes)[0], np.histogram(kept.astype(np.float64), edges)[0])


def test_dense_zeros_are_weights_like_others():
    figure = figures.weight_histograms({"dense": np.array([0.0, 0.0, 1.0])})
    assert bars(figure.axes[0])[0].sum() == 3


def test_threshold_is_marked_and_falls_on_an_edge(weights):
    figure = figures.weight_histograms(weights, threshold=0.06)
    values, edges = bars(figure.axes[1])
    assert [line.get_xdata()[0] for line in figure.axes[1].lines] == [-0.06, 0.06]
    assert np.isclose(edges, 0.06).any()
    centres = (edges[1:] + edges[:-1]) / 2
    assert values[np.abs(centres) < 0.06].sum() == 0
    assert "0.06" in figure.get_supxlabel()


def test_a_peak_that_dwarfs_the_survivors_gets_a_log_axis():
    dense = np.concatenate([np.full(100_000, 1e-4), np.linspace(0.5, 1, 50)])
    figure = figures.weight_histograms({"dense": dense, "pruned": np.where(dense > 0.1, dense, 0)})
    assert figure.axes[0].get_yscale() == "log"
    assert "log" in figure.axes[0].get_ylabel()
    is_drawable(figure)


@pytest.mark.parametrize("empty", [np.zeros(0), np.zeros(7, np.float32)])
def test_nothing_left_is_said(empty):
    figure = figures.weight_histograms({"dense": np.ones(3), "pruned": empty, "fine-tuned": empty}, threshold=2.0)
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["no weights left"] * 2
    is_drawable(figure)


@pytest.mark.parametrize("threshold", [None, 0.0, 1e-12, 1e12])
def test_odd_weights_and_thresholds_draw(threshold):
    odd = np.array([[np.nan, np.inf], [0.0, 1.0]], np.float32)
    figure = figures.weight_histograms({"dense": odd, "pruned": np.zeros(0)}, threshold)
    assert "2 weights\n2 not finite, left out" in figure.axes[0].get_title()
    assert bars(figure.axes[0])[1].size < 1000
    is_drawable(figure)
    is_drawable(figures.weight_histograms({"dense": np.zeros(4)}, threshold))


def test_histograms_of_nothing_known_are_refused():
    with pytest.raises(ValueError, match=r"'dense', 'pruned', 'fine-tuned'.*\['sparse'\]"):
        figures.weight_histograms({"sparse": np.ones(3)})


# curves


def test_curve_holds_accuracy_and_sparsity_of_every_seed():
    metrics = [record(100 * i, validation=0.5 + i / 100 + seed / 10, sparsity=i / 10, seed=seed)
               for seed in (0, 3) for i in range(1, 6)]  # fmt: skip
    figure = figures.training_curve(metrics)
    left, right = figure.axes
    assert [line.get_label() for line in lines(left)] == ["validation accuracy, seed 0", "validation accuracy, seed 3"]
    for seed, line in zip((0, 3), lines(left), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), [100, 200, 300, 400, 500])
        np.testing.assert_allclose(line.get_ydata(), [50 + i + 10 * seed for i in range(1, 6)])
    np.testing.assert_allclose(lines(right)[1].get_ydata(), [10, 20, 30, 40, 50])
    assert left.get_ylabel() == "validation accuracy"
    assert "2 seeds" in left.get_xlabel()
    is_drawable(figure)


def test_curve_marks_and_names_stages():
    metrics = [record(100), record(200), record(300, "prune", sparsity=0.5), record(400, "prune", sparsity=0.9)]
    figure = figures.training_curve([*metrics, record(500, "finetune", sparsity=0.9)])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["train", "prune", "fine-tune"]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_")] == [200, 400]
    assert [(band.get_x(), band.get_width()) for band in axes.patches] == [(0, 200), (200, 200), (400, 100)]


def test_stages_too_narrow_for_a_name_are_in_the_legend():
    rounds = [record(1000)]
    for i in range(20):
        rounds += [record(1010 + 20 * i, "prune"), record(1020 + 20 * i, "finetune")]
    axes = figures.training_curve(rounds).axes[0]
    assert [text.get_text() for text in axes.texts] == ["train"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["prune", "fine-tune"]


def test_curve_without_validation_says_what_it_shows():
    left = figures.training_curve([record(1, validation=None), record(2, validation=None)]).axes[0]
    np.testing.assert_allclose(lines(left)[0].get_ydata(), [95, 95])
    assert "training accuracy" in left.get_ylabel()


def test_a_record_without_validation_is_passed_over():
    left, right = figures.training_curve([record(1), record(2, validation=None), record(3)]).axes
    np.testing.assert_array_equal(lines(left)[0].get_xdata(), [1, 3])
    np.testing.assert_array_equal(lines(right)[0].get_xdata(), [1, 2, 3])


@pytest.mark.parametrize(
    "metrics",
    [[], [record(0)], [record(7)], [record(5), record(5, "prune")], [record(1, "warm $up"), record(2, "x" * 80)]],
    ids=["none", "step 0", "one", "one-shot at the same step", "stages nobody planned"],
)
def test_short_curves_draw(metrics):
    is_drawable(figures.training_curve(metrics))


# leaves


def test_leaf_bars_hold_sparsity_in_order_with_counts_written_out():
    leaves = [leaf("a/kernel", 1000, 1000), leaf("b/kernel", 19200, 1920), leaf("c", 5, 0)]
    figure = figures.leaf_sparsity(leaves)
    (axes,) = figure.axes
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [0, 90, 100])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a/kernel", "b/kernel", "c"]
    expected = ["1,000 of 1,000 left", "1,920 of 19,200 left", "0 of 5 left"]
    assert [text.get_text() for text in axes.texts] == expected
    assert axes.yaxis_inverted()
    is_drawable(figure)


def test_forty_long_names_neither_overlap_nor_leave_the_picture():
    name = "encoder/transformer_block_{}/self_attention/query_projection/kernel"
    figure = figures.leaf_sparsity([leaf(name.format(i)) for i in range(40)])
    figure.draw_without_rendering()  # text has a place only once the layout is done
    labels = figure.axes[0].get_yticklabels()
    assert len({label.get_text() for label in labels}) == 40
    for side in (labels, figure.axes[0].texts):
        boxes = [text.get_window_extent() for text in side]
        assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_more_leaves_than_fit_keep_the_largest_and_say_so():
    figure = figures.leaf_sparsity([leaf(f"{i}", weights=10 + i, nnz=1) for i in range(100)])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(i) for i in range(20, 100)]
    assert "80 largest of 100" in axes.get_title(loc="left")


@pytest.mark.parametrize("leaves", [[], [leaf("only")], [leaf("$\\frac{a$ <b>")]], ids=["none", "one", "formula"])
def test_few_and_odd_leaves_draw(leaves):
    is_drawable(figures.leaf_sparsity(leaves))


# comparison


def points(axes):
    """Label -> (x, y) of the markers of every stage."""
    return {bar.get_label(): bar.lines[0].get_data(orig=False) for bar in axes.containers}


def test_comparison_has_a_named_row_per_run_and_error_bars():
    figure = figures.comparison([result("one"), result("two", 0.95, sparse=0.9)])
    (axes,) = figure.axes
    assert [t.get_text().split("\n") for t in axes.get_yticklabels()] == [
        ["one", "10 % of weights kept"],
        ["two", "5 % of weights kept"],
    ]
    found = points(axes)
    assert list(found) == ["dense", "pruned", "fine-tuned", "sparse"]
    np.testing.assert_allclose(found["sparse"][0], [97, 90])
    np.testing.assert_array_equal(np.round(found["sparse"][1]), [0, 1])
    (segments,) = axes.containers[0].lines[2]
    np.testing.assert_allclose([s[:, 0] for s in segments.get_segments()], [[97.8, 98.2]] * 2)
    is_drawable(figure)


def test_three_sparsities_add_a_panel_over_kept_weights():
    figure = figures.comparison([result("a", 0.9), result("b", 0.5), result("c", 0.99, sparse=0.8)])
    axes = figure.axes[1]
    kept, accuracy = points(axes)["sparse"]
    np.testing.assert_allclose(kept, [1, 10, 50])
    np.testing.assert_allclose(accuracy, [80, 97, 97])
    assert axes.get_xscale() == "log"
    assert axes.xaxis_inverted()
    is_drawable(figure)


def test_runs_on_different_data_are_not_drawn_as_one_curve():
    runs = [result("a", 0.9), result("b", 0.5, dataset="mnist"), result("c", 0.99)]
    assert len(figures.comparison(runs).axes) == 1


def test_a_stage_that_a_run_lacks_is_left_out():
    figure = figures.comparison([result("a"), result("b", finetuned=None)])
    assert len(points(figure.axes[0])["fine-tuned"][0]) == 1


@pytest.mark.parametrize(
    "results",
    [[], [result("$x")], [result("same", s) for s in (0.0, 0.9, 0.901, 1.0)], [result("x" * 90)] * 12],
    ids=["none", "one", "all and nothing kept", "many long names"],
)
def test_odd_comparisons_draw(results):
    is_drawable(figures.comparison(results))


# files, colours, state


def test_labels_on_a_log_axis_keep_apart_and_the_ends_stay():
    assert style.apart([1, 2, 4, 4.1, 90, 100], 0.1) == [100, 4.1, 2, 1]
    assert style.apart([5], 0.1) == [5]
    assert style.apart([], 0.1) == []


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1.5e6, "1.5 MB"), (2e10, "20 GB")]
)
def test_bytes_have_the_largest_unit_that_leaves_one(value, text):
    assert wording.bytes_text(value) == text


def test_save_and_data_uri_hold_the_same_picture(tmp_path):
    figures.save(figures.leaf_sparsity([leaf()]), tmp_path / "new" / "leaf.png")
    data = (tmp_path / "new" / "leaf.png").read_bytes()
    assert data == figures.png(figures.leaf_sparsity([leaf()]))
    head, _, body = figures.data_uri(data).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(body) == data


def test_a_stage_has_one_colour_everywhere(weights):
    panels = figures.weight_histograms(weights).axes
    rows = figures.comparison([result("a")]).axes[0].containers
    for panel, row in zip(panels, rows, strict=False):
        assert to_hex(panel.patches[0].get_facecolor()) == to_hex(row.lines[0].get_color())


def test_pyplot_is_never_touched():
    assert "pyplot" not in figures.__dict__
    if "matplotlib.pyplot" in sys.modules:  # somebody else's import: it must know none of our figures
        figures.leaf_sparsity([leaf()])
        assert not sys.modules["matplotlib.pyplot"].get_fignums()
