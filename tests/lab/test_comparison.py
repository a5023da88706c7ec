"""Tables of results beside published figures, the file that they stand in, and curves over the weights kept."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxprune.lab.commands import main as cli
from jaxprune.lab.report import comparison, curves, figures

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def stat(*values):
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "values": list(values)}


def one(removed, *, group=(), accuracy=0.99):
    return {"removed": removed, "accuracy": accuracy, "bytes": 1000 * (1 - removed), "sparse_bytes": 5, "group": group}


def result(**changes):
    """Two seeds at 90 %."""
    about = {"name": "a", "title": "A | B", "command": "jaxprune run a.toml", "seeds": [0, 1]}
    accuracy = {"dense": stat(0.98, 0.982), "finetuned": stat(0.97, 0.974)}
    stored = {"ratio": 12.34, "accuracy": stat(0.96, 0.96), "dense_bytes": 1000, "bytes": stat(80, 82)}
    machine = {"processor": "CPU", "cores": "2", "jax": "0.10"}
    told = {"sparsity": stat(0.9, 0.9), "seconds": stat(60, 120), "artifact": stored, "machine": machine}
    return about | {"accuracy": accuracy} | told | changes


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]


def test_an_experiment_is_a_row():
    theirs = [{"who": "Han", "removed": 0.917, "accuracy": 0.984}, {"who": "S1", "smaller": 10.0}, {"who": "C"}]
    head, rule, row = cells(comparison.overview([result(published=theirs)]))
    assert head[:5] == ["experiment", "command", "minutes", "machine", "seeds"]
    assert rule == ["---"] * len(head)
    assert row == [
        "A \\| B", "`jaxprune run a.toml`", "3", "CPU, 2 cores, jax 0.10", "2", "90.00 %", "98.10 ± 0.14",
        "97.20 ± 0.28", "12.3x smaller, 96.00 ± 0.00",
        "98.40 at 91.70 % removed (Han); file 10x smaller (S1); C",
    ]  # fmt: skip


@pytest.mark.parametrize(("cores", "prefix"), [("2", ""), ("1 of 2", "taskset -c 0 "), ("3 of 8", "taskset -c 0-2 ")])
def test_the_command_says_the_cores_that_digits_depend_on(cores, prefix):
    one = result()
    one["machine"] |= {"cores": cores}
    row = cells(comparison.overview([one]))[2]
    assert (row[1], row[3]) == (f"`{prefix}jaxprune run a.toml`", f"CPU, {cores} cores, jax 0.10")


def test_points_that_set_tables_are_told_apart_by_what_is_not_the_same():
    points = [{"values": {"prune": {"how": "x", "select": [name], **more}, "seeds": [1, 2]}}
              for name, more in (("a*", {}), ("b*", {"sparsity": 0.5}))]  # fmt: skip
    assert curves.point_names(points) == ["select a*", "select b*, sparsity 50 %"]
    assert curves.point_names([{}]) == [""]
    grid = [{"values": {"prune.groups": [["a*"], ["b*"]], "prune.freeze": freeze}} for freeze in (True, False)]
    assert curves.point_names(grid) == ["freeze true", "freeze false"]
    assert curves.point_names(grid[:1]) == ["groups a* b*, freeze true"]


def test_points_of_a_sweep_are_rows_and_published_figures_stand_where_they_are_nearest():
    theirs = [{"who": "X", "removed": r, "accuracy": 0.5} for r in (0.5, 0.93, 0.982)]
    points = [result(sparsity=stat(s, s), published=theirs, values={"prune.sparsity": s}) for s in (0.9, 0.98)]
    rows = cells(comparison.overview([{"name": "s", "title": "", "command": "c", "points": points}]))[2:]
    assert [row[0] for row in rows] == ["s; sparsity 90 %", "sparsity 98 %"]
    assert rows[0][-1] == "50.00 at 50.00 % removed (X); 50.00 at 93.00 % removed (X)"
    assert rows[1][-1] == "50.00 at 98.20 % removed (X)"


def test_rounds_are_rows_with_the_spread_over_seeds():
    """The last is what the run ended with."""
    rounds = [[one(0.5), one(0.75, accuracy=0.97)], [one(0.5), one(0.75, accuracy=0.99)]]
    theirs = [{"who": "S2", "removed": 0.75, "accuracy": 0.9}]
    text = comparison.levels([result(rounds=rounds, published=theirs)])
    assert cells(text)[0] == ["kept", "removed", "ours", "file, times smaller", "published"]
    assert cells(text)[2:] == [
        ["0.5", "50.00 %", "99.00 ± 0.00", "2", "-"],
        ["0.25", "75.00 %", "97.20 ± 0.28", "12.3", "90.00 at 75.00 % removed (S2)"],
    ]


@pytest.mark.parametrize(
    ("shares", "row"),
    [
        ((0.5, 0.7, 0.93, 0.95), "93.00 % removed, file 9.3x smaller (X); 95.00 % removed, file 9.5x smaller (X)"),
        ((0.4, 0.5), "50.00 % removed, file 5x smaller (X)"),
        ((), "-"),
    ],
)
def test_of_many_rounds_the_row_has_the_figures_of_the_last(shares, row):
    theirs = [{"who": "X", "removed": r, "smaller": 10.0 * r} for r in shares]
    found = result(rounds=[[one(0.5), one(0.9)]] * 2, published=theirs)
    assert cells(comparison.overview([found]))[2][-1] == row


def test_rounds_that_differ_between_seeds_or_go_by_groups_are_no_levels():
    ragged = result(rounds=[[one(0.5)], [one(0.6)]])
    grouped = result(rounds=[[one(0.5, group=["a"])]] * 2)
    for found in (ragged, grouped, result()):
        [level] = curves.levels(found)
        assert (level.removed, level.accuracy) == (0.9, [0.97, 0.974])
        assert curves.of_runs([found]) == {}


MARKED = """# Title
<!-- table: overview r/a.json -->
old
<!-- end -->
Prose, with a <!-- comment -->.
<!-- table: levels r/b.json -->
<!-- end -->
"""


def test_a_file_is_filled_where_it_says_so(tmp_path, capsys):
    (tmp_path / "r").mkdir()
    rounds = [[one(0.5), one(0.75)]] * 2
    for name, found in (("a", result()), ("b", result(rounds=rounds))):
        (tmp_path / "r" / f"{name}.json").write_text(json.dumps(found))
    path = tmp_path / "README.md"
    path.write_text(MARKED)
    assert cli.main(["report", "--table", str(path)]) == 0
    assert "2 tables written" in capsys.readouterr().out
    filled = path.read_text()
    expected = MARKED.replace("old", comparison.overview([result()]))
    expected = expected.replace("b.json -->\n", f"b.json -->\n{comparison.levels([result(rounds=rounds)])}\n")
    assert filled == expected
    comparison.fill(path)
    assert path.read_text() == filled


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nothing", "marks no table"),
        (
            "<!-- table: odd a.json -->\n<!-- end -->",
            "A table is one of overview, .*; 'odd' arrived",
        ),
        ("<!-- table: overview no.json -->\n<!-- end -->", "no.json cannot be read"),
        ("<!-- table: overview bad.json -->\n<!-- end -->", "bad.json holds no results"),
    ],
)
def test_a_file_that_cannot_be_filled_stays_as_it_is(tmp_path, text, says):
    path = tmp_path / "a.md"
    path.write_text(text)
    (tmp_path / "bad.json").write_text("[]")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=says):
        comparison.fill(path)
    assert path.read_text() == text


@pytest.mark.parametrize("name", ["experiments/README.md", "docs/benchmarks.md", "docs/presets.md"])
def test_the_tables_that_are_committed_are_those_of_the_committed_results(tmp_path, name):
    """`jaxprune report --table FILE` wrote them."""
    text = (EXPERIMENTS.parent / name).read_text()
    copy = tmp_path / "docs" / "README.md"
    copy.parent.mkdir()
    for seen in (tmp_path / "experiments", copy.parent / "experiments"):
        seen.symlink_to(EXPERIMENTS)
    (copy.parent / "results").symlink_to(EXPERIMENTS / "results")
    copy.write_text(text)
    assert comparison.fill(copy)
    assert copy.read_text() == text


def test_curves_hold_what_they_were_given():
    rounds = [[one(0.5), one(0.75, accuracy=0.97), one(0.9)], [one(0.5), one(0.75, accuracy=0.99), one(0.9)]]
    theirs = [{"who": "S2", "removed": r, "accuracy": 0.9} for r in (0.2, 0.5, 0.9)]
    drawn = curves.of_runs([result(rounds=rounds, published=theirs)])
    assert set(drawn) == {"accuracy_over_kept", "size_over_kept"}
    [axes] = drawn["accuracy_over_kept"].axes
    [ours] = axes.containers
    np.testing.assert_allclose(ours.lines[0].get_xydata(), [(50, 99), (25, 98), (10, 97.2)])
    np.testing.assert_allclose(
        next(line for line in axes.lines if line.get_label() == "S2").get_xydata(), [(80, 90), (50, 90), (10, 90)]
    )
    file, sparse = (line for line in drawn["size_over_kept"].axes[0].lines if not line.get_label().startswith("_"))
    np.testing.assert_allclose(file.get_ydata(), [500, 250, 81])
    assert list(sparse.get_ydata()) == [5, 5, 5]
    for figure in drawn.values():
        assert figures.png(figure).startswith(b"\x89PNG")


def test_points_of_one_level_each_are_one_curve():
    points = [result(sparsity=stat(s, s), values={"prune.sparsity": s}) for s in (0.98, 0.9, 0.95)]
    [ours] = curves.of_runs(points)["accuracy_over_kept"].axes[0].containers
    np.testing.assert_allclose(ours.lines[0].get_xydata()[:, 0], [10, 5, 2])


def test_latencies_are_rows_by_batch_and_sparsity():
    def row(contestant, batch, sparsity, ms, ratio=1.0, refused=""):
        return {"contestant": contestant, "batch": batch, "sparsity": sparsity, "median_ms": ms, "ratio": ratio,
                "refused": refused}  # fmt: skip

    measured = [row("dense", 64, 0.9, 8.0), row("native", 64, 0.9, 4.0, 2.0), row("bcoo", 64, 0.9, 0, refused="no"),
                row("dense", 1, 0.9, 0.5), row("native", 1, 0.9, 0.25, 2.0)]  # fmt: skip
    assert cells(comparison.latency(measured)) == [
        ["batch", "removed", "dense, ms", "native, ms", "bcoo, ms"], ["---"] * 5,
        ["1", "90 %", "0.5", "0.25 (2.00x)", "-"], ["64", "90 %", "8", "4 (2.00x)", "-"],
    ]  # fmt: skip
