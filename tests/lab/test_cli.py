"""The command line: help worth reading, problems in one line, exit codes for scripts."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time

import pytest
from lab_helpers import TINY, assert_same_run, checkpoints, finish, spawn, write_config

from jaxprune.lab.checkpoints import manifest
from jaxprune.lab.commands import main as cli
from jaxprune.lab.runs import run

pytestmark = pytest.mark.usefixtures("relaxed")  # optax itself promotes


@pytest.fixture(scope="module")
def programs():
    return os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, programs):
    """A whole run in a process of its own, as a user has it: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("reference")
    path = write_config(folder)
    said = finish(spawn(["run", path, "--out", folder / "run"], programs))
    assert said[0] == 0, said[2]
    return folder / "run", said


def refused(capsys, *words, code=2):
    """The lines on standard error of a command that is refused, without their `jaxprune: `."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    lines = err.splitlines()
    assert all(line.startswith("jaxprune: ") for line in lines)
    return [line.removeprefix("jaxprune: ") for line in lines]


# ---------------------------------------------------------------- help


HELP = {
    "": ["run an experiment", "list every key", "--version", "compare several", "bring data in",
         "exit codes: 0 done; 1 the run failed", "130 interr"],
    "run": ["CONFIG", "jaxprune keys", "--prune.sparsity 0.95", '--seeds "[0, 1, 2]"', "goes on where it stopped",
            "exit codes: 0", "--out", "--runs", "--quiet", "--debug"],
    "report": ["RUN", "Markdown table", "--json", "--out FILE", "--debug"],
    "keys": ["every key that a config may have", "Markdown"],
    "data": ["import", "readable"],
    "inspect": ["FILE", "bits per weight beside their entropy", "--json", "--markdown"],
    "convert": ["IN", "OUT", "--encoding NAME", "--no-deflate", "--quantize FORM", "--select PATTERN", "--to", "Orbax"],
    "predict": ["FILE", "IMAGE", "--formats FORMAT", "PNG or JPEG", "dark on light"],
    "oneshot": ["MODEL", "the same command goes on", "--sparsity F | --pattern N:M", "--calibrate FILE|FOLDER|self",
                "lose zeros", "--out FOLDER", "--json"],
    "data import": ["mnist, fashion_mnist or cifar10", "idx.gz", "--data-dir", "~/tensorflow_datasets", "TensorFlow"],
}  # fmt: skip


@pytest.mark.parametrize("command", HELP)
def test_help_is_worth_reading(capsys, command):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in HELP[command]:
        assert words in text


def test_help_needs_no_jax():
    code = "import sys; from jaxprune.lab.commands.main import main\n"
    code += "try: main(['run', '--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in sys.modules if m.startswith(('flax', 'orbax', 'matplotlib', 'tensorflow'))])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [[], ["run"], ["report"], ["data"], ["data", "import", "mnist"], ["prune", "x"]])
def test_an_incomplete_command_says_what_is_missing(capsys, words):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert re.search(r"required: (COMMAND|CONFIG|RUN|FOLDER)|invalid choice: 'prune'", err)
    assert "Traceback" not in err


def test_the_version_and_a_reader_that_has_enough(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"jaxprune \d+\.\d+\.\d+\n", capsys.readouterr().out)
    words = f"{sys.executable} -m jaxprune.lab.commands.main keys | head -1; echo ${{PIPESTATUS[0]}}"
    said = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert said.stdout.splitlines() == ["# Keys of a config", "0"]
    assert said.stderr == ""


# ---------------------------------------------------------------- run


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--prune.sparsty", "0.9"], r"--prune\.sparsty: unknown key, did you mean sparsity\?"),
        (["--prune.sparsity", "90"], r"--prune\.sparsity: expected a fraction in \[0, 1\), arrived 90, did .* 0\.9\?"),
        (["--train.batch_size", "many"], r'--train\.batch_size: expected a valid integer, arrived "many"'),
        (["--prune.sparsity"], r"--prune\.sparsity: expected a value after it"),
        (["--prune.sparsity", "--quiet"], r"--prune\.sparsity: expected a value after it"),
        (["--out=", "--prune.how", "never"], r"--prune\.how: expected .*arrived \"never\""),
    ],
)
def test_bad_overrides_are_one_line_and_code_2(tmp_path, capsys, words, line):
    said = refused(capsys, "run", write_config(tmp_path), "--runs", tmp_path / "runs", *words)
    assert len(said) == 1
    assert re.fullmatch(line, said[0]), said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("sparsity", "sparsty"), r".*tiny\.toml: prune\.sparsty: unknown key, did you mean sparsity\?"),
        (('"2 epochs"', "2"), r".*tiny\.toml: train\.duration: expected a duration such as .*arrived 2"),
        (("widths = [16]", 'widths = ["a"]'), r'.*tiny\.toml: model\.widths\.0: expected a valid integer, arrived "a"'),
        (("[model]", "[model"), r".*tiny\.toml: no valid TOML: .*line 3.*"),
    ],
)
def test_bad_configs_are_named_and_code_2(tmp_path, capsys, change, line):
    path = write_config(tmp_path, TINY.replace(*change))
    said = refused(capsys, "run", path, "--out", tmp_path / "run")
    assert any(re.fullmatch(line, one) for one in said), said
    assert not (tmp_path / "run").exists()


def test_a_missing_config_and_missing_data(tmp_path, capsys):
    assert refused(capsys, "run", tmp_path / "no.toml") == [
        f"{tmp_path}/no.toml: cannot be read: No such file or directory"
    ]
    words = ["--data.name", "mnist", "--data.data_dir", tmp_path / "nowhere"]
    said = refused(capsys, "run", write_config(tmp_path), "--out", tmp_path / "run", *words)
    assert len(said) == 1
    assert "not prepared" in said[0]
    assert "jaxprune data import mnist FOLDER" in said[0]


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="cannot be read") as raised:
        cli.main(["run", "--debug", str(tmp_path / "no.toml")])
    assert raised.traceback[-1].path.name == "config.py"
    said = subprocess.run(
        [sys.executable, "-m", "jaxprune.lab.commands.main", "report", "--debug", str(tmp_path / "no")],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1
    assert "Traceback (most recent call last)" in said.stderr


def test_overrides_go_before_and_after_the_config(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        run, "run", lambda config, folder, command, watcher: seen.append((config, folder, command)) or {}
    )
    monkeypatch.setattr("jaxprune.lab.report.html.summary_text", lambda results: "done")
    path = str(write_config(tmp_path))
    overrides = [["--prune.sparsity", "0.5"], ["--train.learning_rate=3e-3"], ["--seeds", "[1, 2]"]]
    for before in range(4):
        words = [word for part in overrides[:before] for word in part]
        words += ["--quiet", path, "--runs", "somewhere"]
        words += [word for part in overrides[before:] for word in part]
        assert cli.main(["run", *words]) == 0
    configs, folders, commands = zip(*seen, strict=True)
    assert {(c.prune.sparsity, c.train.learning_rate, c.seeds) for c in configs} == {(0.5, 3e-3, (1, 2))}
    assert {folder.as_posix() for folder in folders} == {f"somewhere/tiny-{run.cfg.config_hash(configs[0])}"}
    expected = f"jaxprune run {path} --prune.sparsity 0.5 --train.learning_rate=3e-3 --seeds '[1, 2]'"
    assert set(commands) == {expected}
    assert capsys.readouterr().out.splitlines()[:2] == ["done", f"report: {folders[0]}/report.html"]


def test_a_run_says_what_it_came_to(reference):
    folder, (code, out, err) = reference
    assert code == 0
    assert "Sparse = masked  yes, the same class on all 360 test samples." in out
    assert out.splitlines()[-1] == f"report: {folder / 'report.html'}"
    assert "seed 0 finetune" in err  # the bars
    assert "20/20" in err
    assert "Traceback" not in err


def test_a_finished_run_is_shown_again(reference, capsys):
    folder, (_, out, _) = reference
    assert cli.main(["run", str(folder.parent / "tiny.toml"), "--out", str(folder), "--quiet"]) == 0
    again = capsys.readouterr()
    assert again.out == out
    assert "is finished; delete the folder to run it again" in again.err


def test_a_run_that_diverges_is_code_1(tmp_path, programs, capsys):
    words = ["--train.optimizer", "sgd", "--train.learning_rate", "1e30"]
    said = refused(capsys, "run", write_config(tmp_path), "--out", tmp_path / "run", "--quiet", *words, code=1)
    assert len(said) == 1
    assert re.match(r"The loss is not finite at step \d+ of stage 'train'\. Lower train\.learning_rate", said[0])


def test_folders_that_are_not_this_runs_are_code_2(tmp_path, reference, capsys):
    (tmp_path / "mine.txt").touch()
    said = refused(capsys, "run", reference[0].parent / "tiny.toml", "--out", tmp_path)
    assert re.fullmatch(r".* is no run folder\. Choose another with --out\.", said[0])
    said = refused(capsys, "run", reference[0].parent / "tiny.toml", "--out", reference[0], "--prune.sparsity", "0.1")
    assert re.match(r".* was written by another config", said[0])


# ---------------------------------------------------------------- accidents, in processes of their own


def test_after_every_accident_the_same_command_goes_on(tmp_path, reference, programs):
    """Files that may not grow; Control-C in a save, where Orbax is cut short; Control-C at a moment from outside."""
    folder, words = tmp_path / "run", ["run", reference[0].parent / "tiny.toml", "--out", tmp_path / "run", "--quiet"]
    files_that_may_not_grow_are_one_line_and_the_old_checkpoint_survives(folder, words, programs)
    one_line = ["jaxprune: interrupted; the same command goes on from the last checkpoint"]
    code, out, err = finish(spawn(words, programs, "interrupt", "2@8"))
    assert (code, out, err.splitlines()) == (130, "", one_line)
    process = spawn(words, programs)
    while process.poll() is None and not checkpoints(folder / "seed_0" / "prune"):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out, err.splitlines()) == (130, "", one_line)
    assert finish(spawn(words, programs))[0] == 0
    assert_same_run(folder, reference[0])


def files_that_may_not_grow_are_one_line_and_the_old_checkpoint_survives(folder, words, programs):
    """RLIMIT_FSIZE stands for the full disk: what is refused here is refused to TensorStore's threads as well."""
    code, out, err = finish(spawn(words, programs, "full", 3))
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    assert re.match(r"jaxprune: .*00000027 could not be written: .*What was saved before is untouched", err)
    assert [path.name for path in checkpoints(folder / "seed_0/train")] == ["00000009", "00000018"]
    assert not list(folder.rglob(".tmp-0*"))
    last = checkpoints(folder / "seed_0/train")[-1]
    manifest.check_files(last, manifest.read_manifest(last))  # to the byte what was written


# ---------------------------------------------------------------- report


def test_report_of_one_run(reference, capsys):
    folder, (_, out, _) = reference
    (folder / "report.html").unlink()
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == out
    assert "<html" in (folder / "report.html").read_text()[:200]
    assert cli.main(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [json.loads((folder / "results.json").read_text())]


def test_report_of_several_runs(tmp_path, reference, capsys):
    page = tmp_path / "compared.html"
    results = json.loads((reference[0] / "results.json").read_text())
    results["name"] = "another"
    results["accuracy"]["dense"] = {"mean": 0.1234, "std": 0.01, "values": [0.1234]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    both = [str(reference[0]), str(tmp_path)]
    capsys.readouterr()
    assert cli.main(["report", *both, "--out", str(page)]) == 0
    table = capsys.readouterr().out.rstrip().splitlines()
    assert len(table) == 4
    assert all(line.startswith("|") and line.endswith("|") for line in table)
    for line, folder in zip(table[2:], both, strict=True):
        results = json.loads((run.Path(folder) / "results.json").read_text())
        assert f"{100 * results['accuracy']['dense']['mean']:.2f}" in line
    text = page.read_text()
    assert "data:image/png;base64" in text
    assert "tiny" in text
    assert "another" in text
    assert cli.main(["report", *both, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_report_of_what_is_no_finished_run(tmp_path, reference, capsys):
    assert refused(capsys, "report", tmp_path / "no") == [f"{tmp_path}/no is no run folder: it has no results.json."]
    (tmp_path / "config.toml").write_text("")
    said = refused(capsys, "report", reference[0], tmp_path)
    assert said == [f"{tmp_path} is not finished, run its command again: it has no results.json."]
    (tmp_path / "results.json").write_text('{"name": "ti')
    assert re.match(
        r".*/results\.json is damaged: .*\. Delete it and run again\.", refused(capsys, "report", tmp_path)[0]
    )


# ---------------------------------------------------------------- data import


def idx(shape, data):
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + data


@pytest.mark.parametrize(
    ("name", "cut"), [("train-images-idx3-ubyte", 1), ("t10k-labels-idx1-ubyte", 3), ("t10k-images-idx3-ubyte", 790)]
)
def test_truncated_idx_files_are_named_and_code_2(tmp_path, capsys, name, cut):
    for split, n in (("train", 3), ("t10k", 2)):
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx((n, 28, 28), bytes(784 * n)))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx((n,), bytes(n)))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-cut])
    assert cli.main(["data", "import", "mnist", str(tmp_path), "--data-dir", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jaxprune:")]
    assert len(lines) == 1
    assert name in lines[0]
    assert not list((tmp_path / "out").glob("mnist/*/*.array_record*"))


def test_an_unknown_data_set_is_code_2(tmp_path, capsys):
    assert cli.main(["data", "import", "minst", str(tmp_path)]) == 2
    assert "mnist" in capsys.readouterr().err


# ---- without the packages of the lab

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({missing!r}))
from jaxprune.lab.commands.main import main
sys.exit(main({words!r}))
"""


@pytest.mark.parametrize(
    "words", [["run", "experiments/quickstart.toml"], ["costs", "lenet_5", "--out", "x"], ["report", "somewhere"]]
)
def test_a_missing_extra_is_named(words):
    # quax and optax bring these two along
    code = WITHOUT.format(missing=sorted(cli.OF_THE_LAB - {"rich", "absl"}), words=words)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said.returncode == 1, said.stderr
    assert re.fullmatch(
        r"jaxprune: '\w+' is not installed. It comes with: pip install 'jaxprune\[lab\]'\n", said.stderr
    )


def test_a_missing_module_of_the_users_own_is_none_of_the_lab(capsys, tmp_path):
    (tmp_path / "one.toml").write_text("name = 'x'\n[prune]\ncriterion = 'no_such_module:f'\n")
    assert not any("lab" in line for line in refused(capsys, "run", tmp_path / "one.toml"))
