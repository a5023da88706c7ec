"""`jaxprune inspect` and `convert`: every file and checkpoint into every other, masks and metadata along."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from file_helpers import LINEAR, write_linear

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab.checkpoints import checkpoint
from jaxprune.lab.commands import convert
from jaxprune.lab.commands import main as cli
from jaxprune.lab.models import pretrained
from jaxprune.lab.runs import train
from jaxprune.storage import Artifact

pytestmark = pytest.mark.usefixtures("relaxed")  # optax itself promotes


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A pruned linear model as a file of ours, and its params; not to be changed."""
    return write_linear(tmp_path_factory.mktemp("linear"))


def call(capsys, *words, code=0):
    """Standard output of a command, or the lines on standard error if it is to fail."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return err.splitlines() if code else out


def same(path, expected):
    """Every leaf of the file, by name, to the bit."""
    loaded = {name: np.asarray(leaf) for name, leaf in tree.named_leaves(jp.load(path)).items()}
    wanted = {name: np.asarray(leaf) for name, leaf in tree.named_leaves(expected).items()}
    assert loaded.keys() == wanted.keys()
    for name, array in wanted.items():
        assert loaded[name].dtype == array.dtype, name
        assert loaded[name].tobytes() == array.tobytes(), name


def metadata(path):
    with Artifact(path) as file:
        return file.metadata


# ---------------------------------------------------------------- inspect


def test_inspect(linear, capsys):
    path, params = linear
    text = call(capsys, "inspect", path)
    assert text.splitlines()[0] == f"{path}: version 1"
    assert "layers/0/kernel" in text
    assert "50.00%" in text
    assert 'model: {"name": "mlp", "widths": []}' in text
    plain = json.loads(call(capsys, "inspect", path, "--json"))
    assert plain["metadata"]["data"] == "digits"
    assert plain["total"]["bytes"] == path.stat().st_size
    rows = {row["name"]: row for row in plain["tensors"]}
    assert rows["layers/0/kernel"]["nnz"] == np.count_nonzero(params["layers"][0]["kernel"])
    assert "| layers/0/kernel | 64x10 |" in call(capsys, "inspect", path, "--markdown")


def test_inspect_of_plain_safetensors(linear, tmp_path, capsys):
    call(capsys, "convert", linear[0], tmp_path / "a.safetensors")
    text = call(capsys, "inspect", tmp_path / "a.safetensors")
    assert text.startswith(f"{tmp_path / 'a.safetensors'}: plain safetensors")
    assert json.loads(call(capsys, "inspect", tmp_path / "a.safetensors", "--json"))["version"] is None


# ---------------------------------------------------------------- convert


@pytest.mark.parametrize("encoding", ["auto", "dense", "bitmask", "csr16", "csr32", "gaps3"])
@pytest.mark.parametrize("deflate", [True, False])
def test_between_encodings(linear, tmp_path, capsys, encoding, deflate):
    target = tmp_path / "b.jaxprune"
    words = ["--encoding", encoding, *([] if deflate else ["--no-deflate"])]
    said = call(capsys, "convert", linear[0], target, *words)
    assert said.startswith(f"{target} is written: {target.stat().st_size:,} bytes")
    same(target, linear[1])
    assert metadata(target) == metadata(linear[0])
    with Artifact(target) as file:
        record = file.records["layers/0/kernel"]
    assert encoding in ("auto", record.encoding)
    assert deflate or {part.coder for part in record.parts} == {"raw"}


def test_plain_safetensors_are_read_without_us_and_come_back(linear, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    call(capsys, "convert", linear[0], path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    start, end = header["layers/0/kernel"]["data_offsets"]
    kernel = np.frombuffer(data[8 + length + start : 8 + length + end], "<f4").reshape(64, 10)
    assert np.array_equal(kernel, linear[1]["layers"][0]["kernel"])
    call(capsys, "convert", path, tmp_path / "b.jaxprune")
    same(tmp_path / "b.jaxprune", linear[1])
    assert metadata(tmp_path / "b.jaxprune") == metadata(linear[0])


def test_living_zeros_stay_alive(tmp_path, capsys):
    params = {"kernel": np.float32([[0, 1], [2, 0]])}
    masks = {"kernel": np.array([[True, True], [True, False]])}
    jp.save(tmp_path / "a.jaxprune", params, masks=masks)
    call(capsys, "convert", tmp_path / "a.jaxprune", tmp_path / "b.jaxprune", "--encoding", "gaps2")
    call(capsys, "convert", tmp_path / "b.jaxprune", tmp_path / "c.jaxprune", "--quantize", "codebook2")
    for name in "abc":
        loaded = jp.load(tmp_path / f"{name}.jaxprune", to="masks")
        assert np.array_equal(loaded["kernel"], masks["kernel"]), name


@pytest.mark.parametrize(
    ("form", "kind", "dtype"),
    [
        ("codebook4", "codebook4", "float32"),
        ("codebook1", "codebook1", "float32"),
        ("int8", "int8", "float32"),
        ("int4", "int4", "float32"),
        ("bfloat16", "raw", "bfloat16"),
        ("float16", "raw", "float16"),
    ],
)
def test_quantize_and_back(linear, tmp_path, capsys, form, kind, dtype):
    small, back = tmp_path / "small.jaxprune", tmp_path / "back.jaxprune"
    call(capsys, "convert", linear[0], small, "--quantize", form)
    with Artifact(small) as file:
        kernel, bias = (file.records[f"layers/0/{name}"] for name in ("kernel", "bias"))
    assert (kernel.values, kernel.dtype) == (kind, dtype)
    assert (bias.values, bias.dtype) == ("raw", "float32")
    assert "accuracy" in metadata(linear[0])
    assert "accuracy" not in metadata(small)
    assert small.stat().st_size < linear[0].stat().st_size
    masks = [tree.named_leaves(jp.load(path, to="masks"))["layers/0/kernel"] for path in (linear[0], small)]
    assert np.array_equal(*masks)
    call(capsys, "convert", small, back, "--quantize", "none")
    with Artifact(back) as file:
        assert {record.values for record in file.records.values()} == {"raw"}
    same(back, jp.load(small))


def test_select(linear, tmp_path, capsys):
    call(capsys, "convert", linear[0], tmp_path / "a.jaxprune", "--quantize", "codebook3", "--select", "*/bias")
    with Artifact(tmp_path / "a.jaxprune") as file:
        assert {name: record.values for name, record in file.records.items()} == {
            "layers/0/kernel": "raw",
            "layers/0/bias": "codebook3",
        }
    call(capsys, "convert", tmp_path / "a.jaxprune", tmp_path / "b.jaxprune", "--quantize", "int8")
    with Artifact(tmp_path / "b.jaxprune") as file:  # what is not selected stays quantized as it was
        assert {record.values for record in file.records.values()} == {"int8", "codebook3"}


def test_orbax_reads_it_and_it_comes_back(linear, tmp_path, capsys):
    call(capsys, "convert", linear[0], tmp_path / "orbax", "--to", "orbax")
    with ocp.PyTreeCheckpointer() as checkpointer:
        kernel = np.asarray(checkpointer.restore(tmp_path / "orbax")["layers"][0]["kernel"])
    assert np.array_equal(kernel, linear[1]["layers"][0]["kernel"])
    call(capsys, "convert", tmp_path / "orbax", tmp_path / "b.jaxprune")
    same(tmp_path / "b.jaxprune", linear[1])
    assert metadata(tmp_path / "b.jaxprune") == metadata(linear[0])
    assert "is there already" in call(capsys, "convert", linear[0], tmp_path / "orbax", "--to", "orbax", code=2)[0]


def test_a_checkpoint_of_a_run(tmp_path, capsys):
    """Weights, masks, and what config.toml says; of the newest, or of the one that is named."""
    stage = tmp_path / "run" / "seed_5" / "finetune"
    params = {"layers": {"0": {"kernel": jnp.asarray([[0.0, 1.0], [2.0, 0.0]]), "bias": jnp.zeros(2, "bfloat16")}}}
    masks = {"layers": {"0": {"kernel": jnp.asarray([[True, True], [True, False]]), "bias": jnp.ones(2, bool)}}}
    tx = optax.chain(optax.adam(1e-3), jp.keep_params_sparse(masks))
    for step, factor in ((1, 1.0), (2, 3.0)):
        state = train.start(
            {"layers": {"0": {k: v * jnp.asarray(factor, v.dtype) for k, v in params["layers"]["0"].items()}}}, tx
        )
        checkpoint.save(stage, step, state, {"records": []})
    (tmp_path / "run" / "config.toml").write_text(LINEAR.format(data="mnist"))
    for source, factor in ((stage, 3.0), (stage / "00000001", 1.0)):
        call(capsys, "convert", source, tmp_path / "a.jaxprune")
        loaded = jp.load(tmp_path / "a.jaxprune")["layers"]["0"]
        assert np.array_equal(loaded["kernel"], factor * params["layers"]["0"]["kernel"])
        assert loaded["bias"].dtype == jnp.bfloat16
        kept = jp.load(tmp_path / "a.jaxprune", to="masks")["layers"]["0"]["kernel"]
        assert np.array_equal(kept, masks["layers"]["0"]["kernel"])
        about = metadata(tmp_path / "a.jaxprune")
        assert (about["name"], about["seed"], about["image"], about["data"]) == ("linear", 5, [28, 28, 1], "mnist")
    victim = next(file for file in (stage / "00000002" / "state").rglob("*") if file.is_file() and file.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    assert "00000002 cannot be used" in call(capsys, "convert", stage, tmp_path / "b.jaxprune", code=1)[0]


def test_keras_resnet50(tmp_path, monkeypatch, capsys):
    (tmp_path / "ResNet50").mkdir()
    (tmp_path / "ResNet50" / "model.json").touch()
    params = {"conv1": {"kernel": jnp.ones((2, 2))}}
    monkeypatch.setattr(pretrained, "load_resnet50", lambda folder: (pretrained.KERAS_RESNET50, params))
    monkeypatch.setattr(pretrained, "labels", lambda folder: ["tench", "goldfish"])
    call(capsys, "convert", tmp_path, tmp_path / "a.jaxprune")
    about = metadata(tmp_path / "a.jaxprune")
    assert about["model"] == {"name": "keras_resnet50"}
    assert about["image"] == [224, 224, 3]
    assert about["labels"] == ["tench", "goldfish"]
    same(tmp_path / "a.jaxprune", params)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["inspect", "NO"], "NO: No such file or directory"),
        (["inspect", "FOLDER"], "FOLDER: Is a directory"),
        (["inspect", "TEXT"], "TEXT is no safetensors file, or cut off"),
        (["convert", "FILE", "OUT.txt"], "OUT.txt: name it .jaxprune or .safetensors, or say --to"),
        (["convert", "FOLDER", "OUT.jaxprune"], "FOLDER is no checkpoint that Orbax can read"),
        (["convert", "FILE", "OUT.jaxprune", "--encoding", "zip"], "There is no encoding 'zip'"),
        (
            ["convert", "FILE", "OUT.jaxprune", "--quantize", "int8", "--select", "x"],
            "`select` names 'x', which matches no",
        ),
        (["convert", "FILE", "OUT.jaxprune", "--encoding", "nm2:4@0"], "Leaf 'layers/0/kernel': it cannot be encoded"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2(linear, tmp_path, capsys, words, line):
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "TEXT").write_text("this is text")
    places = {
        "FILE": linear[0],
        **{name: tmp_path / name for name in ("NO", "FOLDER", "TEXT", "OUT.txt", "OUT.jaxprune")},
    }
    said = call(capsys, *(places.get(word, word) for word in words), code=2)
    assert len(said) == 1
    assert said[0].replace(f"{tmp_path}/", "").startswith(f"jaxprune: {line}")
    assert not (tmp_path / "OUT.jaxprune").exists()


def test_kinds():
    kinds = [convert.kind_of(convert.Path(name)) for name in ("a.jaxprune", "b/a.safetensors", "a.orbax")]
    assert kinds == ["jaxprune", "safetensors", "orbax"]
    assert convert.kind_of(convert.Path("folder"), "orbax") == "orbax"
