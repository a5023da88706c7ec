"""Sweeps, and runs whose rounds are trainings of their own: grids, tables, what is shared, where a stop rule stops."""

import itertools
import json
import re
import zlib
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from lab_helpers import StopAt, Stopped, arrays_of, checkpoints, tiny, write_config

import jaxprune as jp
from jaxprune import storage
from jaxprune.lab.bench import of_run
from jaxprune.lab.commands import convert, predict
from jaxprune.lab.commands import main as cli
from jaxprune.lab.data import sets
from jaxprune.lab.data.samples import samples_of
from jaxprune.lab.recipe import config
from jaxprune.lab.report import html, sweeps
from jaxprune.lab.report import results as on_disk
from jaxprune.lab.runs import run, stages, sweep
from jaxprune.training.loops import Round

pytestmark = pytest.mark.usefixtures("relaxed", "quick")
SMALL = """
name = "grid"
model.widths = [16]
train.duration = "1 epoch"
train.learning_rate = 1e-2
finetune.duration = "5 steps"
"""


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


def test_what_is_overridden_is_the_same_in_all_points(tmp_path):
    text = "[sweep]\nprune.preset = ['rigl', 'set']\nprune.sparsity = [0.5, 0.9]"
    found = grid(tmp_path, text, "--prune.sparsity", "0.7")
    assert list(found.axes) == ["prune.preset"]
    assert [(one.config.prune.preset, one.config.prune.sparsity) for one in found.points] == [
        ("rigl", 0.7),
        ("set", 0.7),
    ]
    alone = grid(tmp_path, text, "--prune.sparsity=0.7", "--prune.preset=set")
    assert (list(alone.axes), alone.points[0].config) == ([], found.points[1].config)
    text = "[sweep]\nprune = [{preset = 'set'}, {preset = 'rigl', sparsity = 0.5}]"
    found = grid(tmp_path, text, "--prune.sparsity", "0.7", "--prune.distribution.name", "uniform")
    assert [one.config.prune.sparsity for one in found.points] == [0.7, 0.7]
    assert [one.config.prune.distribution.name for one in found.points] == ["uniform"] * 2
    assert found.axes["prune"][0] == {"preset": "set", "sparsity": 0.7, "distribution": {"name": "uniform"}}
    text = "[sweep]\nprune.distribution = ['erk', {name = 'uniform'}]\nprune.sparsity = [0.5]"
    with pytest.raises(config.ConfigError, match=r"prune\.distribution\.floor"):
        grid(tmp_path, text, "--prune.distribution.floor", "0.1")
    with pytest.raises(config.ConfigError, match=r'--data\.name\.x: name is "digits" in the file, not a table'):
        grid(tmp_path, "[sweep]\ndata.name = ['digits']", "--data.name.x", "1")


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


def fake(axes, errors, seeds=3, name="fake"):
    def point(values, error):
        values_of_seeds = [1 - error - 0.001, 1 - error, 1 - error + 0.001]
        accuracy = {"mean": 1 - error, "std": 0.001, "values": values_of_seeds[:seeds]}
        stat = {"mean": 0.5, "std": 0.0, "values": [0.5] * seeds}
        about = {"hash": f"{zlib.crc32(str(values).encode()):08x}", "sparsity": stat}
        about |= {"artifact": {"ratio": 2.0, "accuracy": stat, "bytes": stat}}
        about |= {"values": values, "seeds": [*range(seeds)]}
        return {**about, "accuracy": {"dense": accuracy, "finetuned": accuracy}}

    about = {"name": name, "title": "", "command": "a command"}
    return {**about, "axes": axes, "points": [point(values, error) for values, error in errors]}


def test_tables():
    one = fake(
        {"prune.preset": ["a", "b"], "prune.sparsity": [0.9, 0.95]},
        [({"prune.sparsity": s, "prune.preset": p}, e) for p, s, e in (("a", 0.9, 0.01), ("a", 0.95, 0.02),
                                                                     ("b", 0.9, 0.03), ("b", 0.95, 0.04))],
    )  # fmt: skip
    two = fake({"prune.preset": ["c"], "prune.sparsity": [0.9, 0.95]},
               [({"prune.preset": "c", "prune.sparsity": s}, 0.5) for s in (0.9, 0.95)])  # fmt: skip
    assert sweeps.table([one, two]).splitlines() == [
        "| preset | 90 % | 95 % |",
        "| --- | --- | --- |",
        "| a | 1.00 ± 0.10 | 2.00 ± 0.10 |",
        "| b | 3.00 ± 0.10 | 4.00 ± 0.10 |",
        "| c | 50.00 ± 0.10 | 50.00 ± 0.10 |",
    ]
    rows = fake({"prune": [{"preset": "nm"}, {"preset": "x", "sparsity": 0.5}]},
                [({"prune": {"preset": "nm"}}, 0.1), ({"prune": {"preset": "x", "sparsity": 0.5}}, 0.2)])  # fmt: skip
    assert sweeps.table([rows]).splitlines()[2:] == ["| nm | 10.00 ± 0.10 |", "| x, sparsity 50 % | 20.00 ± 0.10 |"]
    with pytest.raises(ValueError, match="need the same last axis"):
        sweeps.table([one, rows])


GRIDS = {
    "two axes": fake({"prune.preset": ["a"], "prune.sparsity": [0.5, 0.9]},
                     [({"prune.preset": "a", "prune.sparsity": s}, 0.25) for s in (0.5, 0.9)]),
    "one axis": fake({"prune.sparsity": [0.5]}, [({"prune.sparsity": 0.5}, 0.25)]),
    "one seed": fake({"prune.sparsity": [0.5]}, [({"prune.sparsity": 0.5}, 0.25)], seeds=1),
    "tables": fake({"prune": [{"preset": "a"}, {"preset": "b"}]},
                   [({"prune": {"preset": p}}, 0.25) for p in "ab"], name="other"),
}  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_a_table_on_the_terminal_says_what_its_numbers_are(grid):
    caption, empty, head, _, row, *_ = sweeps.text([grid]).splitlines()
    assert caption.startswith(f"{grid['name']}: test error after fine-tuning in per cent")
    assert not empty
    several = len(grid["points"][0]["seeds"]) > 1
    assert ("mean ± standard deviation over 3 seeds" in caption, "± 0.10" in row) == (several, several)
    assert ("Columns: prune.sparsity." in caption) == (len(grid["axes"]) == 2)
    assert ("error, %" in head) == (len(grid["axes"]) == 1)
    assert "25.00" in row


def test_sweeps_of_other_axes_have_tables_of_their_own():
    """After hours of runs nothing may be lost because the last tables do not fit together."""
    text = sweeps.text(list(GRIDS.values()))
    assert text.count("test error after fine-tuning") == 3
    assert "fake, fake: test error" in text  # the same axes
    assert text.count("25.00") == 6


@pytest.mark.parametrize("older", [False, True])
def test_sweeps_and_runs_are_reported_side_by_side(tmp_path, capsys, older):
    """Folders as a shell finds them, `runs/fake-*`: a sweep alone is its table, with runs each point is a row."""
    stat = {"mean": 0.7, "std": 0.0, "values": [0.7]}
    there = {"dataset": {"name": "digits", "train": 1, "validation": 1, "test": 4}, "leaves": [], "seconds": stat}
    there |= {"sparse": {"format": "bcoo", "agreement": {"values": [1.0]}, "bytes": 1, "dense_bytes": 2}}
    there |= {"finished": "2026-02-03T04:06:06+00:00", "overall_sparsity": stat, "command": "a command"}
    points = GRIDS["two axes"]["points"]
    kept = ["values", "seeds", "hash", "sparsity", "accuracy", *([] if older else ["artifact"])]
    folders = {"fake-sweep": GRIDS["two axes"] | {"points": [{key: one[key] for key in kept} for one in points]}}
    folders |= {f"fake-{one['hash']}": {**one, "name": "fake", **there} for one in points[older:]}
    folders |= {"fake-zz": {**points[0], "name": "elsewhere", "hash": "00000001", **there, "accuracy": {"dense": stat}}}
    for name, results in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    assert cli.main(["report", str(tmp_path / "fake-sweep")]) == 0
    said = capsys.readouterr().out
    assert said == f"{sweeps.text([folders['fake-sweep']])}\n\nreport: {tmp_path}/fake-sweep/report.html\n"
    assert "<html" in (tmp_path / "fake-sweep" / "report.html").read_text()
    whole, page = [str(tmp_path / name) for name in sorted(folders)], tmp_path / "page.html"
    both = ["fake: sparsity 50 %", "fake: sparsity 90 %"]
    for words, expected in ((whole, [*both, "elsewhere"]), ([whole[-1], str(tmp_path / "fake-sweep")], both)):
        assert cli.main(["report", *words, "--out", str(page)]) == 0
        names = [row.split(" | ")[0].removeprefix("| ") for row in capsys.readouterr().out.strip().splitlines()[2:]]
        assert sorted(names) == sorted({*expected, "elsewhere"})
        assert all(name in page.read_text() for name in names)
    assert cli.main(["bench", "model", "--run", str(tmp_path / "fake-sweep")]) == 2
    assert f"is a sweep: name one of its runs, such as {tmp_path}/fake-" in capsys.readouterr().err


def test_a_key_that_is_missing_is_said_in_a_sentence(tmp_path, capsys, monkeypatch):
    """Whatever a results file lacks: the file is named, and no bare key is all that is said."""
    whole = dict.fromkeys(on_disk.OF_A_RUN, 0)
    for kind in (dict(GRIDS["one axis"]), whole):
        for key in kind:
            if key in on_disk.OF_A_RUN | on_disk.OF_A_SWEEP and key != "points":
                torn = {one: value for one, value in kind.items() if one != key}
                (tmp_path / "results.json").write_text(json.dumps(torn))
                if {*torn} >= (on_disk.OF_A_SWEEP if "points" in torn else on_disk.OF_A_RUN):
                    continue
                assert cli.main(["report", str(tmp_path)]) == 2
                said = capsys.readouterr().err
                assert re.fullmatch(rf"jaxprune: \S+results.json is damaged: it has no {key}\. Delete it .*\n", said)
    (tmp_path / "results.json").write_text(json.dumps(whole))
    monkeypatch.setattr(html, "summary_text", lambda results: {}["sparsity"])
    assert cli.main(["report", str(tmp_path)]) == 1
    assert re.match("jaxprune: KeyError: 'sparsity'. This was not foreseen", capsys.readouterr().err)
    for kind in ("grid", "presets", "rows", "levels", "overview"):
        (tmp_path / "results.json").write_text('{"name": "x", "command": "y"}')
        (tmp_path / "x.md").write_text(f"<!-- table: {kind} results.json -->\n<!-- end -->")
        assert cli.main(["report", "--table", str(tmp_path / "x.md")]) == 2
        assert f"A table '{kind}' cannot be made of results.json: '" in capsys.readouterr().err


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
    said = capsys.readouterr().out
    assert "| random | 50.00 | 25.00 |" in said
    assert said.endswith(f"\nreport: {tmp_path}/a-sweep/report.html\n")
    assert done == [(0.5, tmp_path, True), (0.75, tmp_path, True)]
    assert cli.main(["run", str(first), str(second), "--out", str(tmp_path / "x")]) == 2
    assert "--out names the folder of one run" in capsys.readouterr().err
    words = ["run", str(first), str(second), "--runs", str(tmp_path), "--quiet", "--sweep.prune.sparsity", "[0.9]"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count("| random | 10.00 |") == 2


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


def failed(record):
    return record["score"] < record["needed"]


def test_the_stop_rule_of_a_run_steps_back_and_says_so(tmp_path):
    words = ["--prune", "{how = 'iterative', sparsity = 0.998, rounds = 8, duration = '30 steps', tolerance = 0.15}"]
    results = run.run(tiny(tmp_path, *words), tmp_path / "run", "a command")
    [rounds] = results["rounds"]
    assert [failed(one) for one in rounds] == [False] * (len(rounds) - 1) + [True]
    missing = 100 * (rounds[-1]["needed"] - rounds[-1]["score"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("failed by") == page.count(f"failed by {missing:.2f} points") == 1
    good = len(rounds) - 1
    assert 1 <= good < 8
    np.testing.assert_allclose(results["sparsity"]["mean"], 1 - 0.002 ** (good / 8), atol=1e-3)


def test_a_stop_rule_needs_samples_to_judge_by(tmp_path):
    words = ["--prune", "{how = 'iterative', sparsity = 0.9, tolerance = 0.1}", "--data.validation", "0"]
    with pytest.raises(config.ConfigError, match=r"prune.tolerance: needs held-out samples"):
        run.run(tiny(tmp_path, *words), tmp_path / "run", "a command")


def test_rounds_at_given_levels_leave_a_record_and_a_file_each(tmp_path):
    words = ["--prune", "{how = 'iterative', levels = [0.25, 0.5, 0.75], duration = '6 steps'}"]
    results = run.run(tiny(tmp_path, *words, "--title", "three"), tmp_path / "run", "a command")
    [rounds] = results["rounds"]
    assert [round(one["removed"], 3) for one in rounds] == [0.25, 0.5, 0.75]
    assert sorted(one["bytes"] for one in rounds) == [one["bytes"] for one in rounds][::-1]
    assert rounds[-1]["sparse_bytes"] == results["sparse"]["bytes"] < rounds[0]["sparse_bytes"]
    assert (results["title"], set(results["machine"])) == ("three", {"processor", "cores", "jax"})
    for number, one in enumerate(rounds, 1):
        model = predict.load(tmp_path / "run" / "seed_0" / "rounds" / f"{number}.jaxprune")
        assert sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(model.params) if leaf.ndim > 1) == round(
            (1 - one["removed"]) * sum(leaf.size for leaf in jax.tree.leaves(model.params) if leaf.ndim > 1)
        )
    figures = {path.stem for path in (tmp_path / "run" / "figures").iterdir()}
    assert {"accuracy_over_kept", "size_over_kept"} <= figures
    assert "<h2>Rounds</h2>" in (tmp_path / "run" / "report.html").read_text()
    network = of_run.of_run(tmp_path / "run")
    made = of_run.rounds_of(tmp_path / "run", network.params)
    assert [round(sparsity, 3) for sparsity in made] == [0.25, 0.5, 0.75]
    for read, number in zip(made.values(), (1, 2, 3), strict=True):
        path = tmp_path / "run" / "seed_0" / "rounds" / f"{number}.jaxprune"
        jax.tree.map(np.testing.assert_array_equal, read(), jp.load(path, like=network.params))


def test_groups_go_one_after_the_other_while_the_others_stay_as_they_are(tmp_path):
    """Thresholds grow until the group's training no longer recovers; the first may lose half of what may go."""
    sigma = "distribution = {name = 'sigma_threshold', k = 0.5}, growth = 2.0, rounds = 9, tolerance = 0.1"
    words = [
        "--prune",
        f"{{how = 'iterative', {sigma}, duration = '9 steps', groups = [['layers/1/*'], ['layers/0/*']]}}",
    ]
    results = run.run(tiny(tmp_path, *words, "--finetune.duration", "0 steps"), tmp_path / "run", "a command")
    [rounds] = results["rounds"]
    assert [next(one) for _, one in itertools.groupby(one["group"][0] for one in rounds)] == [
        "layers/1/*",
        "layers/0/*",
    ]
    groups = [[one for one in rounds if one["group"] == [name]] for name in ("layers/1/*", "layers/0/*")]
    for group in groups:
        assert [one["number"] for one in group] == list(range(1, len(group) + 1))
        assert failed(group[-1]) or len(group) == 9
    assert len({one["needed"] for one in groups[0]}) == 1
    np.testing.assert_allclose(groups[0][0]["needed"] - groups[1][0]["needed"], 0.05)
    own = tmp_path / "run" / "seed_0"
    files = [jp.load(own / "rounds" / f"{number}.jaxprune") for number in (1, len(groups[0]) + 1)]
    dense = arrays_of(checkpoints(own / "train")[-1])
    first = [leaf["kernel"] for leaf in (files[0]["layers"][0], files[0]["layers"][1])]
    assert any(np.array_equal(first[0], leaf) for leaf in dense.values())
    assert not any(np.array_equal(first[1], leaf) for leaf in dense.values())
    good = next(one for one in groups[0][::-1] if not failed(one))
    kept = jp.load(own / "rounds" / f"{good['number']}.jaxprune")["layers"][1]["kernel"]
    np.testing.assert_array_equal(files[1]["layers"][1]["kernel"], kept)


@pytest.mark.parametrize("patience", [1, 2])
def test_groups_in_turn_go_on_until_each_has_failed(tmp_path, patience):
    """A round of each, all to the same bar; one that has failed, and again if there is patience, is not asked again."""
    sigma = "distribution = {name = 'sigma_threshold', k = 0.5}, growth = 1.6, rounds = 5, tolerance = 0.4"
    groups = f"groups = [['layers/1/*'], ['layers/0/*']], in_turn = true, freeze = false, patience = {patience}"
    words = ["--prune", f"{{how = 'iterative', {sigma}, duration = '9 steps', {groups}}}"]
    results = run.run(tiny(tmp_path, *words, "--finetune.duration", "0 steps"), tmp_path / "run", "a command")
    [rounds] = results["rounds"]
    left, done, row = list(rounds), {"layers/1/*": 0, "layers/0/*": 0}, {"layers/1/*": 0, "layers/0/*": 0}
    while done:
        for name in list(done):
            one = left.pop(0)
            assert (one["group"], one["number"]) == ([name], done[name] + 1)
            done[name] += not failed(one)
            row[name] = row[name] + 1 if failed(one) else 0
            if done[name] == 5 or row[name] == patience:
                del done[name]
    assert not left
    assert row == {"layers/1/*": patience, "layers/0/*": 0}
    assert len({one["needed"] for one in rounds}) == 1
    good = [one for one in rounds if not failed(one)]
    np.testing.assert_allclose(results["sparsity"]["mean"], good[-1]["removed"], atol=1e-6)


@pytest.mark.parametrize(
    ("patience", "turns"),
    [(1, "a1 b1- a2 a3 a4"), (2, "a1 b1- a2 b1 a3- b2- a3 b2 a4- b3- a4- b3-"), (3, "a1- b1- a1- b1- a1- b1 b2 b3 b4")],
)
def test_a_group_in_turn_ends_when_it_fails_so_often_in_a_row(patience, turns):
    """Each word a group, its level, and a minus if the round fails; a round that recovers clears what failed before."""
    left = turns.split()
    levels = (0.1, 0.2, 0.3, 0.4)
    prune = config.Prune(
        how="iterative", levels=levels, tolerance=0.1, groups=(("a",), ("b",)), in_turn=True, patience=patience
    )

    def rounds_of(patterns, method, level, state, early, reference, first):
        asked = left.pop(0)
        assert (patterns[0] + str(first), level) == (asked.rstrip("-"), [levels[first - 1]])
        return state._replace(rounds=(Round(first, level[0], 0.8 if "-" in asked else 1.0, 0.9),))

    seed: Any = SimpleNamespace(
        config=SimpleNamespace(prune=prune), _early=lambda: None, _validate=lambda params: 1.0, _rounds_of=rounds_of
    )
    stages._SeedStages._in_rounds(seed, {"a": jax.numpy.ones(3)}, jp.Method())
    assert not left


def test_removed_is_the_share_of_all_selected_weights_and_time_that_of_all_rounds(tmp_path):
    """Of a leaf too that keeps all of its own."""
    rules = "{'layers/1/*' = 0.0, '*' = {name = 'sigma_threshold', k = 0.5}}"
    rounds = "how = 'iterative', rounds = 3, tolerance = 0.9, duration = '2 steps'"
    words = ["--prune", f"{{{rounds}, distribution = {{name = 'by_rule', rules = {rules}}}}}"]
    results = run.run(tiny(tmp_path, *words), tmp_path / "run", "a command")
    first, second = (leaf for leaf in results["leaves"] if leaf["name"].endswith("kernel"))
    assert first["nnz"] < first["weights"]
    assert second["nnz"] == second["weights"]
    removed = pytest.approx((first["weights"] - first["nnz"]) / (first["weights"] + second["weights"]))
    assert results["sparsity"]["mean"] == results["rounds"][0][-1]["removed"] == removed
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["sparsity"] for line in lines][-1] == removed
    last = {"train": 2.0, "finetune": 1.0}  # epochs; rounds are shorter than one
    ends = [one["seconds"] for one in lines if one["epoch"] == last.get(one["stage"], one["epoch"])]
    assert len(ends) == 2 + 3
    assert results["seconds"]["mean"] == pytest.approx(sum(ends))


def test_groups_whose_others_are_not_frozen_train_everything(tmp_path):
    """Leaves of no group yet move, and keep their weights; zeros of earlier groups stay zeros."""
    groups = "groups = [['layers/1/*'], ['*0/kernel']], freeze = false"
    sigma = "distribution = {name = 'sigma_threshold', k = 1.0}"
    words = ["--prune", f"{{how = 'iterative', {sigma}, rounds = 1, duration = '9 steps', {groups}}}"]
    run.run(tiny(tmp_path, *words), tmp_path / "run", "a command")
    own = tmp_path / "run" / "seed_0"
    dense = arrays_of(checkpoints(own / "train")[-1]).values()
    files = [jp.load(own / "rounds" / f"{number}.jaxprune")["layers"] for number in (1, 2)]
    first, second = ([np.asarray(layers[place]["kernel"]) for place in (0, 1)] for layers in files)
    assert np.all(first[0] != 0)
    assert not any(np.array_equal(first[0], leaf) for leaf in dense)
    assert np.any(second[0] == 0)
    np.testing.assert_array_equal(second[1] == 0, first[1] == 0)
    assert np.any(second[1] != first[1])


def test_less_dropout_where_less_is_left_and_another_key_in_every_round(tmp_path, monkeypatch):
    """Training after pruning uses the rates of the masks, training before it the model's."""
    seen = []
    real = stages.train.run_stage

    def run_stage(stage, apply, *args, **kwargs):
        key = tuple(jax.random.key_data(stage.key).tolist())
        seen.append((stage.name, getattr(apply, "keywords", {}).get("rates"), key))
        return real(stage, apply, *args, **kwargs)

    monkeypatch.setattr(stages.train, "run_stage", run_stage)
    words = [
        "--prune",
        "{how = 'iterative', levels = [0.5, 0.75], duration = '3 steps'}",
        "--finetune.duration",
        "3 steps",
    ]
    dropout = ["--model.dropout", "0.4", "--model.adjust_dropout", "true", "--prune.distribution", "uniform"]
    run.run(tiny(tmp_path, *words, *dropout), tmp_path / "run", "a command")
    assert [name for name, _, _ in seen] == ["train", "prune", "prune", "finetune"]
    assert seen[0][1] is None
    for (_, rates, _), kept in zip(seen[1:], (0.5, 0.25, 0.25), strict=True):
        np.testing.assert_allclose(rates["layers/0/kernel"], 0.4 * kept**0.5, rtol=1e-3)
    assert len({key for _, _, key in seen}) == 4


def test_units_that_are_dead_go_before_the_file_is_written(tmp_path):
    words = [
        "--prune.sparsity",
        "0.97",
        "--store.compact",
        "true",
        "--store.quantize",
        "codebook",
        "--store.duration",
        "4 steps",
    ]
    results = run.run(tiny(tmp_path, *words), tmp_path / "run", "a command")
    stored = results["artifact"]
    assert stored["shapes"]["layers/0/kernel"][1] == stored["shapes"]["layers/1/kernel"][0] < 16
    assert stored["dense_bytes"] == results["sparse"]["dense_bytes"]
    model = predict.load(tmp_path / "run" / "seed_0" / "model.jaxprune")
    dataset = sets.load("digits")
    samples = samples_of(dataset.test_images, dataset.test_labels, dataset.scale)
    classes = stages.train.predict(jax.jit(model.apply), model.params, samples)
    assert stages.train.accuracy(classes, samples) == stored["accuracy"]["mean"]


def test_a_compacted_file_of_another_model_is_refused(tmp_path):
    words = ["--store.compact", "true", "--prune.sparsity", "0.97"]
    run.run(tiny(tmp_path, *words), tmp_path / "run", "a command")
    with storage.Artifact(tmp_path / "run" / "seed_0" / "model.jaxprune") as file:
        about = convert.metadata_of(file)
    params = jp.load(tmp_path / "run" / "seed_0" / "model.jaxprune")
    params["layers"][0]["kernel"] = params["layers"][0]["kernel"][:, :-1]
    jp.save(tmp_path / "odd.jaxprune", params, metadata=about)
    with pytest.raises(ValueError, match=r"odd.jaxprune: its tensors do not fit together in a mlp"):
        predict.load(tmp_path / "odd.jaxprune")
