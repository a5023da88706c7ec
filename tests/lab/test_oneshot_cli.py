"""`jaxprune oneshot`: what it writes, going on after a kill to the same bits, and what is refused."""

import json
import os
import signal
import subprocess
import sys

import jax
import language_helpers as helpers
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab.commands import generate, oneshot
from jaxprune.lab.commands import main as cli
from jaxprune.lab.models import language
from jaxprune.lab.models.language import decoder, evaluation, gguf, hugging_face, llama2c, texts, tokenizers
from jaxprune.lab.models.language.config import Config
from jaxprune.lab.runs.solved import SolvedFiles
from jaxprune.oneshot.order import Solution

pytestmark = pytest.mark.usefixtures("relaxed", "quick")

CONFIG = Config(262, 32, 2, 2, 1, 32, length=32)
TOKENIZER = tokenizers.Pieces([b"<unk>", b"<s>", b"</s>", *[b"<byte>"] * 256, b" ", b"a", b"b"], [0.0] * 262)
SMALL = ["--samples", "4", "--length", "8", "--evaluate-samples", "3", "--batch", "2"]
PRODUCTS = ["down", "gate", "key", "out", "query", "up", "value"]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A file of llama2.c with its tokenizer behind it."""
    path = tmp_path_factory.mktemp("story") / "a.bin"
    llama2c.write(path, helpers.small(CONFIG), CONFIG)
    with path.open("ab") as file:
        file.write(llama2c.write_tokenizer(list(TOKENIZER.pieces), list(TOKENIZER.scores)))
    return path


def words(model, out, *more, method="sparsegpt", sparsity="0.5"):
    return [str(one) for one in ("oneshot", model, "--method", method, *SMALL, "--out", out, *more)] + (
        ["--sparsity", sparsity] if sparsity else []
    )


@pytest.fixture(scope="module")
def whole(story, quick, tmp_path_factory):
    """The folder of a run that nothing disturbed; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert cli.main(words(story, folder)) == 0
    return folder


def same_weights(one, other):
    leaves = [tree.named_leaves(jp.load(folder / "model.jaxprune")) for folder in (one, other)]
    for name, leaf in leaves[0].items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(leaves[1][name]), err_msg=name)


# ---------------------------------------------------------------- what is written


def test_model_report_and_table(story, whole, capsys):
    """The weights are those of `jp.oneshot.prune` on the texts of the folder, the figures those of `compare`."""
    assert {path.name for path in whole.iterdir()} == {
        "calibrate.jaxprune", "evaluate.jaxprune", "model.bin", "model.jaxprune", "oneshot.json", "report.json",
        "tokenizer.bin"}  # fmt: skip
    model, report = language.read(story), json.loads((whole / "report.json").read_text())
    tokens = {word: jp.load(whole / f"{word}.jaxprune")["tokens"] for word in ("calibrate", "evaluate")}
    np.testing.assert_array_equal(tokens["calibrate"], texts.sampled(model.params, model.config, 4, 8, 1))
    np.testing.assert_array_equal(tokens["evaluate"], texts.sampled(model.params, model.config, 3, 8, 0))
    assert report["texts"] == {word: texts.digest(np.asarray(one)) for word, one in tokens.items()}
    forward = lambda params, x: decoder.forward(params, x, CONFIG)  # noqa: E731
    batches = [tokens["calibrate"][:2], tokens["calibrate"][2:]]
    params, masks = jp.oneshot.prune(
        forward, model.params, batches, jp.oneshot.SparseGPT(), 0.5, select="*kernel", order="blocks", fit="own"
    )
    found = tree.named_leaves(jp.load(whole / "model.jaxprune"))
    kept = tree.named_leaves(jp.load(whole / "model.jaxprune", to="masks"))
    for name, leaf in tree.named_leaves(params).items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(kept[name], tree.named_leaves(masks)[name])
    one = evaluation.compare(forward, params, model.params, np.asarray(tokens["evaluate"]))
    assert report["found"]["perplexity"] == pytest.approx(one.perplexity, rel=1e-4)
    assert report["found"]["divergence"] == pytest.approx(one.divergence, rel=1e-3)
    assert report["sparsity"] == 0.5
    assert sorted(report["errors"]) == [f"layers/{i}/{name}/kernel" for i in range(2) for name in PRODUCTS]
    assert all(0.05 < error < 0.5 for error in report["errors"].values())
    assert cli.main(words(story, whole)) == 0  # finished: shown
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["perplexity", f"{one.perplexity:.3f}", f"{one.dense:.3f}"]
    assert [line.split()[0] for line in lines[-2:]] == ["layers/0", "layers/1"]
    assert cli.main(words(story, whole, "--json")) == 0
    assert json.loads(capsys.readouterr().out) == report


def test_its_folder_and_its_files_write_stories(whole, capsys):
    """Also as llama2.c has it, with the tokenizer."""
    for path in (whole, whole / "model.bin"):
        assert cli.main(["generate", str(path), "ab", "--tokens", "3", "--formats", "bcsr", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["text"].startswith("ab")
        assert list(found["speeds"]) == ["dense", "bcsr"]
    ours, theirs = (tree.named_leaves(generate.load(path).params) for path in (whole, whole / "model.bin"))
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name])


def test_gguf_and_hugging_face_are_written_as_they_came(tmp_path, capsys):
    """With what their files said besides, but for the type; half of the weights of every matrix are zero there."""
    params = helpers.small(CONFIG)
    gguf.write_model(tmp_path / "a.gguf", params, CONFIG, metadata={"general.name": "A", "general.file_type": 3})
    hugging_face.write(tmp_path / "hf", params, CONFIG)
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert cli.main(words(tmp_path / "a.gguf", tmp_path / "1", "--format", "Q8_0", method="magnitude")) == 0
    assert cli.main(words(tmp_path / "hf", tmp_path / "2", "--format", "BF16", method="magnitude")) == 0
    assert "layers/0/query/kernel, relative error 0." in capsys.readouterr().err
    file = gguf.read(tmp_path / "1" / "model.gguf")
    assert file.tensors["blk.1.ffn_up.weight"].type == "Q8_0"
    assert file.metadata["general.name"] == "A"
    assert "general.file_type" not in file.metadata
    for path in (tmp_path / "1" / "model.gguf", tmp_path / "1"):
        matrices = [leaf for name, leaf in tree.named_leaves(generate.read(path).params).items() if "kernel" in name]
        assert len(matrices) == 14
        assert all(np.mean(np.asarray(leaf) == 0) >= 0.5 for leaf in matrices)
    said = json.loads((tmp_path / "2" / "config.json").read_text())
    assert said["torch_dtype"] == "bfloat16"
    assert (tmp_path / "2" / "tokenizer.json").read_text() == "{}"
    ours = np.asarray(generate.read(tmp_path / "2").params["layers"][0]["up"]["kernel"])
    back = np.asarray(language.read(tmp_path / "2").params["layers"][0]["up"]["kernel"])
    np.testing.assert_allclose(back, ours, rtol=2**-8)


@pytest.mark.parametrize("method", ["alternating", "alternating-diagonal"])
def test_texts_of_files_and_an_nm_pattern(story, tmp_path, capsys, method):
    """Calibrated all over a folder of texts, evaluated on the first windows of a file."""
    (tmp_path / "texts").mkdir()
    for i, text in {2: "ab " * 30, 10: "b" * 90}.items():
        (tmp_path / "texts" / f"part_{i}.txt").write_text(f"\n {text}\n")
    files = texts.files_of(tmp_path / "texts")
    assert [path.name for path in files] == ["part_2.txt", "part_10.txt"]
    tokens = TOKENIZER.encode("ab " * 29 + "ab\n\n" + "b" * 90)
    windows = texts.windows(TOKENIZER, files, 8)
    np.testing.assert_array_equal(windows, np.reshape(tokens[: len(tokens) // 8 * 8], (-1, 8)))
    more = ["--calibrate", tmp_path / "texts", "--evaluate", files[1], "--pattern", "2:4"]
    out = tmp_path / "out"
    assert cli.main([*words(story, out, *more, method=method, sparsity=None), "--evaluate-length", "5"]) == 0
    report = json.loads((out / "report.json").read_text())
    spread = windows[np.arange(4) * len(windows) // 4]
    first = texts.windows(TOKENIZER, files[1:], 5)[:3]
    assert report["texts"] == {"calibrate": texts.digest(spread), "evaluate": texts.digest(first)}
    assert report["sparsity"] == 0.5
    kernel = np.asarray(jp.load(out / "model.jaxprune")["layers"][0]["down"]["kernel"])
    assert (np.count_nonzero(kernel.reshape(-1, 4, kernel.shape[1]), axis=1) == 2).all()
    assert not (out / "calibrate.jaxprune").exists()


# ---------------------------------------------------------------- going on


def killed(monkeypatch, story, out, after):
    """A run that ends when so many matrices are solved."""
    put = SolvedFiles.__setitem__

    def counted(self, place, solution):
        if len(self) == after:
            raise KeyboardInterrupt
        put(self, place, solution)

    with monkeypatch.context() as patch:
        patch.setattr(SolvedFiles, "__setitem__", counted)
        assert cli.main(words(story, out)) == cli.EXIT_INTERRUPTED
    assert len(list((out / "solved").iterdir())) == after


def test_a_killed_run_goes_on_to_the_same_weights(monkeypatch, story, whole, tmp_path, capsys):
    """Also if a matrix is damaged, another cut off, one of another run; and texts are damaged. The others are kept."""
    out, put, again = tmp_path / "out", SolvedFiles.__setitem__, []
    killed(monkeypatch, story, out, after=9)
    solved = sorted((out / "solved").iterdir())
    whole_file = solved[0].read_bytes()
    solved[0].write_bytes(whole_file[:-1] + bytes([whole_file[-1] ^ 1]))
    solved[1].write_bytes(solved[1].read_bytes()[:100])
    SolvedFiles(out / "solved", "other", print)["layers/0/out/kernel", 0] = Solution(np.zeros((16, 16)), np.ones(1), 0)
    (out / "evaluate.jaxprune").write_bytes(b"nothing")
    capsys.readouterr()
    monkeypatch.setattr(SolvedFiles, "__setitem__", lambda *a: (again.append(a[1]), put(*a)))
    assert cli.main(words(story, out)) == 0
    assert len(again) == 14 - 9 + 3
    err = capsys.readouterr().err
    assert err.count("is deleted, and solved again: it is damaged") == 2
    assert err.count("is deleted, and solved again: it is of another run") == 1
    assert "evaluate.jaxprune is damaged" in err
    assert not (out / "solved").exists()
    same_weights(out, whole)
    assert json.loads((out / "report.json").read_text()) == json.loads((whole / "report.json").read_text())


@pytest.mark.slow
def test_a_process_killed_inside_a_write_goes_on(story, tmp_path):
    """Three processes: one in peace, one that dies in its eighth write, one that goes on."""
    code = "import os, signal, sys; from jaxprune.lab.commands import main as cli\nreal, seen = os.replace, []\n"
    code += "def die(*a):\n seen.append(1)\n"
    code += " if len(seen) == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)\n real(*a)\n"
    code += "os.replace = die\nsys.exit(cli.main(sys.argv[2:]))"

    def code_of(out, dies):
        command = [sys.executable, "-c", code, str(dies), *words(story, out)]
        return subprocess.run(command, capture_output=True, env=os.environ).returncode

    assert code_of(tmp_path / "whole", 0) == 0
    assert code_of(tmp_path / "out", 8) == -signal.SIGKILL
    assert list((tmp_path / "out" / "solved").glob(".*.tmp"))
    assert code_of(tmp_path / "out", 0) == 0
    same_weights(tmp_path / "out", tmp_path / "whole")


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "--sparsity is": (["--sparsity", "50"], "Did you mean 0.5?"),
    "--format Q4_1": (["--format", "Q4_1"], "--format Q4_1 loses zeros"),
    "--format Q8_0": (["--format", "Q8_0"], "--format Q8_0 is not written for"),
    "--pattern": (["--pattern", "2-4"], "--pattern is N:M, such as 2:4, '2-4' arrived."),
    "--batch": (["--batch", "0"], "--batch is 0, 1 or more was expected."),
    "no text": (["--calibrate", "FOLDER"], "has no text files"),
    "few": (["--calibrate", "FOLDER/few.txt"], "few.txt has 1 windows of 8 tokens, 4 were asked for."),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(story, tmp_path, capsys, what):
    """Before anything is computed, or a folder made."""
    more, message = REFUSED[what]
    folder = tmp_path / "texts"
    folder.mkdir()
    if "few" in what:
        (folder / "few.txt").write_text("ab ab ab")
    more = [word.replace("FOLDER", str(folder)) for word in more]
    sparsity = None if {"--sparsity", "--pattern"} & set(more) else "0.5"
    capsys.readouterr()
    assert cli.main(words(story, tmp_path / "out", *more, sparsity=sparsity)) == cli.EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert not (tmp_path / "out").exists()


def test_another_run_in_the_folder_is_refused(story, whole, tmp_path, capsys):
    before = {path: path.read_bytes() for path in whole.iterdir()}
    assert cli.main(words(story, whole, "--seed", "3", sparsity="0.6")) == cli.EXIT_USAGE
    err = capsys.readouterr().err
    assert "holds another run: sparsity was 0.5, is 0.6; seed was 0, is 3. Take another --out" in err
    assert {path: path.read_bytes() for path in whole.iterdir()} == before
    assert cli.main(words(story, story.parent)) == cli.EXIT_USAGE
    assert "is not empty, and holds no run" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "oneshot.json").write_text("{")
    assert cli.main(words(story, tmp_path / "out")) == cli.EXIT_USAGE
    assert "oneshot.json is damaged" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_needs_one_for_texts_alone(tmp_path, capsys):
    llama2c.write(tmp_path / "a.bin", helpers.small(CONFIG), CONFIG)
    (tmp_path / "a.txt").write_text("ab " * 40)
    assert cli.main(words(tmp_path / "a.bin", tmp_path / "out", "--calibrate", tmp_path / "a.txt")) == cli.EXIT_USAGE
    assert "has no tokenizer for the texts of --calibrate. Name one: --tokenizer FILE." in capsys.readouterr().err


# ---------------------------------------------------------------- parts


def test_a_folder_of_solved_matrices_is_a_mapping(tmp_path):
    notes = []
    kept = SolvedFiles(tmp_path / "solved", "stamp", notes.append)
    assert len(kept) == 0
    one = Solution(np.float32([[-0.0, 1]]), np.array([[True, False]]), 0.25)
    kept["a/b c", 3] = one
    (place, found), *_ = kept.items()
    assert place == ("a/b c", 3)
    assert (found.weight.tobytes(), found.mask.tobytes(), found.error) == (
        one.weight.tobytes(),
        one.mask.tobytes(),
        0.25,
    )
    assert ("a/b c", 2) not in kept
    del kept["a/b c", 3]
    assert list(kept) == notes == []
    with pytest.raises(KeyError):
        del kept["a/b c", 3]


def test_options_of_both_kinds_or_none_are_refused(tmp_path):
    for how in ({}, {"sparsity": 0.5, "pattern": "2:4"}):
        with pytest.raises(ValueError, match="Either --sparsity or --pattern"):
            oneshot.Options(tmp_path / "a.bin", tmp_path / "out", **how)
    with pytest.raises(ValueError, match="--allocate goes with --sparsity"):
        oneshot.Options(tmp_path / "a.bin", tmp_path / "out", pattern="2:4", allocate=True)


def test_matrices_may_differ_in_sparsity(story, tmp_path, capsys):
    assert cli.main(words(story, tmp_path / "out", "--allocate")) == 0
    masks = tree.named_leaves(jp.load(tmp_path / "out" / "model.jaxprune", to="masks"))
    pruned = [np.asarray(mask) for name, mask in masks.items() if "kernel" in name]
    shares = {round(1 - float(mask.mean()), 2) for mask in pruned}
    assert len(shares) > 2
    assert sum(map(np.count_nonzero, pruned)) / sum(mask.size for mask in pruned) == pytest.approx(0.5, abs=0.01)
