"""The table of a file: every byte counted, entropies as Shannon has them, plain data."""

import json

import numpy as np
import pytest

import jaxprune as jp
from jaxprune.quantize.codes import to_codebooks, to_integers
from jaxprune.storage import Artifact, FileError
from jaxprune.storage.contents import contents


def params():
    rng = np.random.default_rng(0)
    kernel = np.where(rng.random((40, 30)) < 0.2, rng.normal(size=(40, 30)), 0).astype(np.float32)
    return {
        "a": {"kernel": kernel, "bias": np.ones(30, np.float32)},
        "half": np.float16([1, 2, 3]),
        "none": np.zeros((0, 2)),
    }


def table(path, tree, **options):
    jp.save(path, tree, **options)
    with Artifact(path) as file:
        return contents(file)


def shannon(symbols):
    """Bits of all of them, written out."""
    counts = {}
    for symbol in symbols:
        counts[symbol] = counts.get(symbol, 0) + 1
    return sum(-count * np.log2(count / len(symbols)) for count in counts.values())


def test_every_byte_of_the_file_is_counted(tmp_path):
    found = table(tmp_path / "a.jaxprune", params(), metadata={"name": "x"})
    size = (tmp_path / "a.jaxprune").stat().st_size
    rows = {tensor.name: tensor for tensor in found.tensors}
    assert found.total.bytes == size == sum(tensor.bytes for tensor in found.tensors) + found.header.bytes
    assert found.total.weights == 40 * 30 + 30 + 3
    assert found.total.dense_bytes == 4 * (40 * 30 + 30) + 6
    kernel = rows["a/kernel"]
    assert (kernel.shape, kernel.dtype, kernel.values) == ((40, 30), "float32", "raw")
    assert kernel.nnz == np.count_nonzero(params()["a"]["kernel"])
    assert kernel.sparsity == 1 - kernel.nnz / 1200
    assert kernel.bits_per_weight == 8 * kernel.bytes / 1200
    assert kernel.ratio == 4800 / kernel.bytes
    assert rows["half"].dtype == "float16"
    assert (rows["none"].sparsity, rows["none"].bits_per_weight, rows["none"].ratio) == (0, 0, None)
    assert (found.version, found.metadata) == (1, {"name": "x"})


@pytest.mark.parametrize("quantize", [to_codebooks, to_integers])
def test_entropy_of_codes(tmp_path, quantize):
    quantized = quantize(params(), select=("a/kernel",))
    leaf = quantized["a"]["kernel"]
    kernel = next(one for one in table(tmp_path / "a.jaxprune", quantized).tensors if one.name == "a/kernel")
    expected = shannon(leaf.alive.ravel().tolist()) + shannon(leaf.codes[leaf.alive].tolist())
    assert kernel.entropy_bits == pytest.approx(expected)
    assert kernel.entropy_per_weight == pytest.approx(expected / 1200)


def test_entropy_of_numbers_is_that_of_their_bytes(tmp_path):
    kernel = next(one for one in table(tmp_path / "a.jaxprune", params()).tensors if one.name == "a/kernel")
    dense = params()["a"]["kernel"]
    data = dense[dense != 0].tobytes()
    expected = shannon((dense != 0).ravel().tolist()) + sum(shannon(data[i::4]) for i in range(4))
    assert kernel.entropy_bits == pytest.approx(expected)


def test_deflating_comes_near_the_entropy(tmp_path):
    rng = np.random.default_rng(1)
    large = {"kernel": np.where(rng.random((500, 400)) < 0.05, rng.normal(size=(500, 400)), 0).astype(np.float32)}
    found = table(tmp_path / "a.jaxprune", to_codebooks(large)).tensors[0]
    assert found.entropy_per_weight < found.bits_per_weight < 1.05 * found.entropy_per_weight


def test_text_markdown_and_data(tmp_path):
    found = table(tmp_path / "a.jaxprune", params())
    lines = str(found).splitlines()
    assert lines[0].split()[:2] == ["tensor", "shape"]
    assert [line.split()[0] for line in lines[2:]] == ["a/bias", "a/kernel", "half", "none", "header", "file"]
    assert len({line.count("|") for line in found.to_markdown().splitlines()}) == 1
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain == found.to_dict()
    assert plain["header_bytes"] + sum(row["bytes"] for row in plain["tensors"]) == plain["total"]["bytes"]


def test_a_damaged_tensor_is_named(tmp_path):
    path = tmp_path / "a.jaxprune"
    jp.save(path, {"a": np.ones(50, np.float32), "b": np.arange(50, dtype=np.float32)}, deflate=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with Artifact(path) as file, pytest.raises(FileError, match="'b'"):
        contents(file)
