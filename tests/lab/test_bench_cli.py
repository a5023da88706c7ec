"""The command `jaxprune bench`: end to end, refusals in one line, figures and rows on disk."""

import functools
import json
import sys

import jax
import pytest
from bench_helpers import PNG, PROFILES, lines_of, nonzeros
from lab_helpers import write_config
from sparse_helpers import needs_kernels

from jaxprune import sparse
from jaxprune.lab.bench import (
    layers,
    options,
    rows,
    session,
    sparsify,
    whole,
)
from jaxprune.lab.commands import main as cli
from jaxprune.lab.report import results

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    monkeypatch.setattr(rows, "measure_peak", functools.partial(rows.measure_peak, 64, 1, 2))


def refused(capsys, *words):
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err.removeprefix("jaxprune: ").rstrip("\n")


@needs_kernels
@pytest.mark.parametrize("name", ["40", "lenet_300_100"])
def test_bench_train_end_to_end(name, tmp_path, capsys, relaxed):
    words = ["bench", "train", name, "--batches", "4,8", "--sparsities", "0.5", "0.9", "--repeats", "2",
             "--out", str(tmp_path), "--quiet"]  # fmt: skip
    assert cli.main(words) == 0
    found = lines_of(tmp_path / "bench.jsonl")
    assert [(row["sparsity"], row["batch"], row["contestant"]) for row in found] == [
        (share, batch, who) for share in (0.5, 0.9) for batch in (4, 8) for who in ("dense", "native")
    ]
    assert {row["kind"] for row in found} == {"train"}
    dense, ours = found[-2:]
    assert ours["custom_calls"]["jaxprune_sampled"] == 3
    assert ours["bytes"] < dense["bytes"] / 2
    assert ours["macs"] == dense["macs"] < dense["dense_macs"] / 5
    out = capsys.readouterr().out
    assert "Break-even" in out
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["roofline.png", "training.png"]


def test_bench_train_refusals(capsys, monkeypatch):
    assert "is no model (resnet50, vgg19" in refused(capsys, "bench", "train", "resnet5")
    assert "1 or more; 0 arrived" in refused(capsys, "bench", "train", "40", "--batch", 0)
    monkeypatch.setattr(sparse.native, "why_missing", lambda: "There is no compiler.")
    assert "Only the native kernels train on non-zeros. There is no compiler." in refused(
        capsys, "bench", "train", "40"
    )


def test_bench_layers_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    words = ["bench", "layers", "--sizes", "32", "24x40", "--batches", "1,4", "--sparsities", "0.5", "0.9",
             "--formats", "bcsr", "--repeats", "2", "--out", str(tmp_path / "out"), "--quiet"]  # fmt: skip
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    found = lines_of(tmp_path / "out" / "bench.jsonl")
    assert len(found) == 2 * 2 * 2 * 3
    assert {row["contestant"] for row in found} == {"dense", "bcsr", "scipy_csr"}
    row = next(
        r for r in found if (r["model"], r["batch"], r["sparsity"]) == ("32x32", 4, 0.9) and r["contestant"] == "bcsr"
    )
    assert row["macs"] == 4 * row["nnz"] == 4 * 3 * (1024 - 922)
    assert row["dense_macs"] == 4 * 3 * 1024
    assert row["custom_calls"] == {"cpu_csr_sparse_dense_ffi": 3}
    assert row["bytes"] == 3 * (102 * 8 + 33 * 4)
    assert row["intensity"] == pytest.approx(2 * row["macs"] / (row["bytes"] + 2 * 4 * 32 * 4))
    assert (row["layers"], row["compressed_leaves"]) == (3, 3)
    assert 2 * 3 <= row["runs"] == len(row["seconds"]) <= 2 * 30
    assert row["command"] == "jaxprune " + " ".join(words)
    assert set(row["peak"]) == {"gflops", "gbytes", "how"}
    assert {"processor", "cores", "jax", "platform"} <= set(row["machine"])
    assert row["date"].startswith("20")
    assert {r["layers"] for r in found if r["model"] == "24x40"} == {1}
    for text in (
        "cpu_csr_sparse_dense_ffi x3",
        "peak: ",
        "Break-even",
        "PyTorch is not installed",
        "bench.jsonl",
        "24x40",
    ):
        assert text in out
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["roofline.png", "speedup.png"]
    for name in pictures:
        data = (tmp_path / "out" / name).read_bytes()
        assert data.startswith(PNG)
        assert len(data) > 10_000
    assert cli.main(["bench", "plot", str(tmp_path / "out" / "bench.jsonl"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "speedup.png").read_bytes() == (tmp_path / "out" / "speedup.png").read_bytes()


@pytest.mark.usefixtures("relaxed")
def test_bench_model_end_to_end(tmp_path, capsys):
    words = ["bench", "model", "lenet_300_100", "--batch", "2", "--image", "8", "--sparsity", "0.9",
             "--formats", "bcsr", "--repeats", "5", "--out", str(tmp_path), "--tune",
             "--cache", str(tmp_path / "cache")]  # fmt: skip
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "lenet_300_100 8x8" in said.out
    assert "1/1" in said.err  # the bar
    dense, bcsr, tuned = lines_of(tmp_path / "bench.jsonl")
    assert [row["contestant"] for row in (dense, bcsr, tuned)] == ["dense", "bcsr", "tune"]
    assert dense["dense_macs"] == 2 * (64 * 300 + 300 * 100 + 100 * 10)
    assert dense["macs"] == 2 * (1920 + 3000 + 100)
    assert bcsr["compressed_leaves"] == 3
    assert tuned["refused"] == ""
    assert tuned["compressed_leaves"] + sum(map(len, tuned["dense_leaves"].values())) == 3
    assert (tmp_path / "models.png").read_bytes().startswith(PNG)


def test_bench_model_with_a_profile(tmp_path, capsys):
    words = ["bench", "model", "resnet50", "--batch", "1", "--image", "32", "--profile", f"{PROFILES}:pruned_85",
             "--formats", "bcsr", "--repeats", "2", "--out", str(tmp_path), "--quiet"]  # fmt: skip
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    dense, bcsr = lines_of(tmp_path / "bench.jsonl")
    assert dense["sparsity"] == bcsr["sparsity"] == "pruned_85"
    assert dense["weights"] == 25_502_912
    assert bcsr["nnz"] == sum(line.nonzero for line in sparsify.read_profile(f"{PROFILES}:pruned_85").values())
    if bcsr["compressed_leaves"] == 1:
        assert "resnet50 32x32 bcsr: 53 of 54 leaves dense" in out


def test_rows_of_one_folder_come_together_and_the_last_counts(tmp_path):
    common = {"kind": "layers", "model": "8x8", "batch": 1, "sparsity": 0.5, "refused": ""}
    rows.append(tmp_path / "a" / "bench.jsonl", [{**common, "contestant": "dense", "ratio": 1.0}])
    rows.append(tmp_path / "a" / "bench.jsonl", [{**common, "contestant": "bcsr", "ratio": r} for r in (0.5, 0.6)])
    assert [(row["contestant"], row["ratio"]) for row in results.read_rows(tmp_path / "a" / "bench.jsonl")] == [
        ("dense", 1.0),
        ("bcsr", 0.6),
    ]


def test_interrupted_is_130_and_says_where_the_rows_are(tmp_path, capsys, monkeypatch):
    def stop(*args):
        yield [{"kind": "layers", "model": "8x8", "batch": 1, "sparsity": 0.5, "contestant": "dense", "refused": "x"}]
        raise KeyboardInterrupt

    monkeypatch.setattr(layers, "measure", stop)
    assert cli.main(["bench", "layers", "--formats", "bcsr", "--out", str(tmp_path), "--quiet"]) == 130
    assert f"what was measured is in {tmp_path}/bench.jsonl" in capsys.readouterr().err
    assert len(lines_of(tmp_path / "bench.jsonl")) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["layers", "--sparsities", "90"], "Did you mean 0.9?"),
        (["layers", "--sparsities", "half"], "--sparsities takes fractions in [0, 1)"),
        (["layers", "--formats", "natve"], "There is no format 'natve' to measure. There are: bcoo, bcsr"),
        (["layers", "--sizes", "10x"], "A size is a number, or INxOUT such as 768x3072; '10x' arrived."),
        (["layers", "--batches", "0"], "are 1 or more; 0 arrived"),
        (["layers", "--batches", "one"], "--batches takes whole numbers"),
        (["layers", "--platform", "tpu"], "tpu"),
        (["model", "resnet"], "There is no model 'resnet' to measure. There are: resnet50, vgg19"),
        (["model"], "Give a model's name (resnet50"),
        (["model", "resnet50", "--sparsity", "83"], "Did you mean 0.83?"),
        (["model", "resnet50", "--profile", "nowhere.csv:a"], "nowhere.csv cannot be read: No such file or directory."),
        (["model", "resnet50", "--profile", f"{PROFILES}:a"], "There: "),
        (["model", "mlp", "--profile", f"{PROFILES}:pruned_83"], "has a layer 'conv1', the model has not"),
        (["model", "resnet50", "--image", "16"], "it needs 32 x 32 pixels or more, 16 arrived"),
        (["model", "mlp", "--sparsity", "0.5", "--run", "x"], "give one of them"),
        (["model", "--run", "nowhere"], "nowhere is no run folder: it has no results.json."),
        (["plot", "nowhere.jsonl"], "nowhere.jsonl cannot be read: No such file or directory."),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_code_2(tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    if "--platform" in words:
        monkeypatch.setattr(jax.config, "update", lambda *_: None)
    elif words[-1].endswith(":a") and "nowhere" not in words[-1]:
        line = "holds no profile 'a'. Columns of non-zeros there: pruned_70, pruned_83, pruned_85."
    elif "mlp" in words and "--profile" in words:
        line = "the model has not"
    said = refused(capsys, "bench", *words)
    assert line in said
    assert not (tmp_path / "bench").exists()


def test_files_that_are_no_rows_are_refused(tmp_path, capsys):
    file = tmp_path / "bench.jsonl"
    for text in ("{", '{"a": 1}', "[]", "3"):
        file.write_text(text)
        assert "does not hold lines of `jaxprune bench`" in refused(capsys, "bench", "plot", file)
    file.write_text("")
    assert "nothing to draw" in refused(capsys, "bench", "plot", file)


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        ([], ["bench layers", "bench model resnet50", "bench plot"]),
        (["layers"], ["--sizes", "768x3072", "--no-rivals", "fractions removed"]),
        (["model"], ["--profile", "resnet50.csv:pruned_83", "--tune", "--run", "vgg19"]),
        (["plot"], ["FILE", "--out"]),
    ],
)
def test_help_has_examples(capsys, words, texts):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *words, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "jaxprune bench" in out
    assert all(text in out for text in texts)


def test_defaults_suit_the_device():
    on_cpu, on_gpu = session.default_formats("cpu"), session.default_formats("gpu")
    assert {"native", "bcsr"} <= set(on_cpu)
    assert "bcoo" not in on_cpu
    assert {"bcoo", "bcsr"} <= set(on_gpu)
    assert not any(name.startswith("native") for name in on_gpu)
    assert options.SPARSITIES == ["0.5", "0.7", "0.9", "0.95", "0.99"]


@needs_kernels
def test_native_rows_name_their_kernel(tmp_path):
    assert cli.main(["bench", "layers", "--sizes", "32", "--batches", "2", "--sparsities", "0.9", "--formats", "native",
                     "--repeats", "2", "--no-rivals", "--out", str(tmp_path), "--quiet"]) == 0  # fmt: skip
    _, row = lines_of(tmp_path / "bench.jsonl")
    assert sum(row["custom_calls"].values()) == 3
    assert all(target.startswith("jaxprune") for target in row["custom_calls"])


def test_without_kernels_it_says_why_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sparse.native, "_library", lambda: "The native kernels were not built. Install g++.")
    words = ["bench", "layers", "--sizes", "32", "--batches", "2", "--sparsities", "0.9", "--formats", "native", "bcsr",
             "--repeats", "2", "--no-rivals", "--out", str(tmp_path)]  # fmt: skip
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "native formats are left out: The native kernels were not built. Install g++." in out
    found = lines_of(tmp_path / "bench.jsonl")
    assert [(row["contestant"], bool(row["refused"])) for row in found] == [
        ("dense", False), ("native", True), ("bcsr", False)]  # fmt: skip


# ---------------------------------------------------------------- runs


@pytest.mark.usefixtures("relaxed")
def test_the_model_of_a_finished_run(tmp_path, capsys):
    config = write_config(tmp_path)
    assert cli.main(["run", str(config), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    network = whole.of_run(tmp_path / "run")
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert nonzeros(network.params) == {
        leaf["name"]: leaf["nnz"] for leaf in result["leaves"] if leaf["name"].endswith("kernel")
    }
    words = ["bench", "model", "--run", tmp_path / "run", "--batch", "2", "--formats", "bcsr", "--repeats", "2",
             "--out", tmp_path / "out", "--quiet"]  # fmt: skip
    assert cli.main([str(word) for word in words]) == 0
    assert {row["sparsity"] for row in lines_of(tmp_path / "out" / "bench.jsonl")} == {"run run"}
    assert whole.UNIFORM == 0.9
