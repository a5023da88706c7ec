"""Sweeps, and runs whose rounds are trainings of their own: grids, tables, what is shared, where a stop rule stops."""

import json

import jax
import numpy as np
import pytest
from lab_helpers import StopAt, Stopped, arrays_of, checkpoints, compiled_once, tiny, write_config

from jaxprune import cli
from jaxprune.lab import config, run, sweep

pytestmark = pytest.mark.usefixtures("relaxed")
SMALL = """
name = "grid"
model.widths = [16]
train.duration = "1 epoch"
train.learning_rate = 1e-2
finetune.duration = "5 steps"
"""


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    with compiled_once(tmp_path_factory):
        yield


def grid(folder, text, *words):
    return config.load_sweep(write_config(folder, SMALL + text), words)


# ---------------------------------------------------------------- grids


def test_a_grid_is_every_combination_in_the_order_of_the_file(tmp_path):
    found = grid(tmp_path, "[sweep]\nprune.preset = ['rigl', 'acdc']\nprune.sparsity = [0.5, 0.9]\nseeds = [[0], [1]]")
    assert list(found.axes) == ["prune.preset", "prune.sparsity", "seeds"]
    assert [tuple(point.values.values()) for point in found.points][:3] == [
        ("rigl", 0.5, [0]), ("rigl", 0.5, [1]), ("rigl", 0.9, [0])
    ]  # fmt: skip
    assert len({config.config_hash(point.config) for point in found.points}) == 8
    last = found.points[-1].config
    assert (last.prune.how, last.prune.sparsity, last.seeds) == ("alternating", 0.9, (1,))


def test_a_point_is_the_experiment_it_would_be_alone(tmp_path):
    [point] = grid(tmp_path, "[sweep]\nprune.sparsity = [0.7]").points
    alone = config.load(write_config(tmp_path, SMALL), ["--prune.sparsity", "0.7"])
    assert point.config == alone
    assert grid(tmp_path, "").points[0].config == config.load(write_config(tmp_path, SMALL))


def test_tables_may_be_swept_and_axes_replaced(tmp_path):
    text = "[sweep]\nprune = [{preset = 'nm'}, {preset = 'rigl', sparsity = 0.5}]"
    assert [point.config.prune.criterion for point in grid(tmp_path, text).points] == ["magnitude"] * 2
    assert len(grid(tmp_path, text, "--sweep.prune", "[{preset = 'nm'}]").points) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sweep]\nprune.sparsity = 0.5", "sweep.prune.sparsity: expected a list of distinct values, arrived 0.5"),
        ("[sweep]\nprune.sparsity = [0.5, 0.5]", "expected a list of distinct values"),
        ("[sweep]\nprune.sparsity = []", "expected a list of distinct values"),
        ("sweep = [1]", "sweep.: expected"),
        ("[sweep]\nprune.sparsity = [0.5, 90]", "prune.sparsity: expected a fraction in [0, 1), arrived 90"),
        ("[sweep]\nprune.sparsty = [0.5]", "did you mean sparsity?"),
        ("[sweep]\nprune.preset = ['rigI']", 'did you mean "rigl"?'),
    ],
)
def test_bad_grids_say_what_is_wrong(tmp_path, text, message):
    with pytest.raises(config.ConfigError) as caught:
        grid(tmp_path, text)
    assert message in str(caught.value)


def test_a_sweep_is_no_experiment(tmp_path):
    with pytest.raises(config.ConfigError, match="this is a sweep of several"):
        config.load(write_config(tmp_path, SMALL + "[sweep]\nprune.sparsity = [0.5]"))


# ---------------------------------------------------------------- tables


def fake(axes, errors):
    def point(values, error):
        return {"values": values, "accuracy": {"finetuned": {"mean": 1 - error, "std": 0.001}}}

    return {"axes": axes, "points": [point(values, error) for values, error in errors]}


def test_tables():
    one = fake(
        {"prune.preset": ["a", "b"], "prune.sparsity": [0.9, 0.95]},
        [({"prune.sparsity": s, "prune.preset": p}, e) for p, s, e in (("a", 0.9, 0.01), ("a", 0.95, 0.02),
                                                                     ("b", 0.9, 0.03), ("b", 0.95, 0.04))],
    )  # fmt: skip
    two = fake({"prune.preset": ["c"], "prune.sparsity": [0.9, 0.95]},
               [({"prune.preset": "c", "prune.sparsity": s}, 0.5) for s in (0.9, 0.95)])  # fmt: skip
    assert sweep.table([one, two]).splitlines() == [
        "| preset | 90 % | 95 % |",
        "| --- | --- | --- |",
        "| a | 1.00 ± 0.10 | 2.00 ± 0.10 |",
        "| b | 3.00 ± 0.10 | 4.00 ± 0.10 |",
        "| c | 50.00 ± 0.10 | 50.00 ± 0.10 |",
    ]
    rows = fake({"prune": [{"preset": "nm"}, {"preset": "x", "sparsity": 0.5}]},
                [({"prune": {"preset": "nm"}}, 0.1), ({"prune": {"preset": "x", "sparsity": 0.5}}, 0.2)])  # fmt: skip
    assert sweep.table([rows]).splitlines()[2:] == ["| nm | 10.00 ± 0.10 |", "| x, sparsity 50 % | 20.00 ± 0.10 |"]
    with pytest.raises(ValueError, match="need the same last axis"):
        sweep.table([one, rows])


# ---------------------------------------------------------------- runs

ROUNDS = ["--prune", "{how = 'iterative', sparsity = 0.75, rounds = 2, duration = '15 steps'}"]


def test_points_share_their_dense_training_and_are_done_once(tmp_path):
    text = "prune.how = 'iterative'\nprune.rounds = 2\nprune.duration = '10 steps'\nprune.rewind = 'rate'\n"
    points = grid(tmp_path, text + "[sweep]\nprune.sparsity = [0.5, 0.75]")
    watcher = StopAt()
    results = sweep.run(points, tmp_path, "a command", watcher)
    assert [name for _, name, _ in watcher.stages] == ["train", "prune", "prune", "finetune"] * 2
    assert [steps for name, steps in watcher.steps if name == "train"] == list(range(1, 21))  # once for both
    assert json.loads((tmp_path / "grid-sweep" / "results.json").read_text()) == results
    assert [round(point["sparsity"]["mean"], 2) for point in results["points"]] == [0.5, 0.75]
    assert len(results["points"][1]["rounds"][0]) == 2
    again = StopAt()
    assert sweep.run(points, tmp_path, "a command", again) == results
    assert again.stages == []


def test_the_command_does_sweeps_and_single_runs_in_turn(tmp_path, monkeypatch, capsys):
    """What is printed of a sweep is its table; `--out` is for one run."""
    done = []

    def fake(config, folder, command, watcher, *, shared=None):
        done.append((config.prune.sparsity, folder.parent, shared is not None))
        spread = {"mean": config.prune.sparsity, "std": 0.0, "values": [config.prune.sparsity]}
        stored = {"bytes": spread, "ratio": 2.0}
        return {
            "accuracy": {"dense": spread, "finetuned": spread}, "sparsity": spread, "artifact": stored, "hash": "abc"
        }  # fmt: skip

    monkeypatch.setattr(run, "run", fake)
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    for path, values in ((first, "[0.5, 0.75]"), (second, "[0.25]")):
        path.write_text(f"name = '{path.stem}'\n[sweep]\nprune.criterion = ['random']\nprune.sparsity = {values}")
    assert cli.main(["run", str(first), "--runs", str(tmp_path), "--quiet"]) == 0
    assert "| random | 50.00 ± 0.00 | 25.00 ± 0.00 |" in capsys.readouterr().out
    assert done == [(0.5, tmp_path, True), (0.75, tmp_path, True)]
    assert cli.main(["run", str(first), str(second), "--out", str(tmp_path / "x")]) == 2
    assert "--out names the folder of one run" in capsys.readouterr().err
    words = ["run", str(first), str(second), "--runs", str(tmp_path), "--quiet", "--sweep.prune.sparsity", "[0.9]"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count("| random | 10.00 ± 0.00 |") == 2


def test_a_run_in_rounds_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    words = ["--prune.rewind", "9 steps"]
    whole, part = (tiny(tmp_path / name, *ROUNDS, *words) for name in ("whole", "part"))
    results = run.run(whole, tmp_path / "whole" / "run", "a command")
    watcher = StopAt("prune", 11)
    watcher.step = lambda step: len([s for s in watcher.stages if s[1] == "prune"]) == 2 and StopAt.step(watcher, step)
    with pytest.raises(Stopped):
        run.run(part, tmp_path / "part" / "run", "a command", watcher)
    again = run.run(part, tmp_path / "part" / "run", "a command")
    assert again["accuracy"] == results["accuracy"]
    ends = [arrays_of(checkpoints(tmp_path / name / "run" / "seed_0" / "finetune")[-1]) for name in ("whole", "part")]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    early = arrays_of(checkpoints(tmp_path / "whole" / "run" / "seed_0" / "early")[-1])
    assert any(leaf.any() for leaf in early.values())


def test_the_stop_rule_of_a_run_steps_back_and_says_so(tmp_path):
    words = ["--prune", "{how = 'iterative', sparsity = 0.998, rounds = 8, duration = '30 steps', tolerance = 0.15}"]
    results = run.run(tiny(tmp_path, *words), tmp_path / "run", "a command")
    [rounds] = results["rounds"]
    lines = [one["text"] for one in rounds]
    assert "failed by" in lines[-1]
    assert all("failed" not in line for line in lines[:-1])
    good = len(lines) - 1
    assert 1 <= good < 8
    np.testing.assert_allclose(results["sparsity"]["mean"], 1 - 0.002 ** (good / 8), atol=1e-3)


def test_a_stop_rule_needs_samples_to_judge_by(tmp_path):
    words = ["--prune", "{how = 'iterative', sparsity = 0.9, tolerance = 0.1}", "--data.validation", "0"]
    with pytest.raises(config.ConfigError, match=r"prune.tolerance: needs held-out samples"):
        run.run(tiny(tmp_path, *words), tmp_path / "run", "a command")
