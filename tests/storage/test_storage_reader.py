"""The page of the format is enough: a reader and a writer made from it alone, and its examples to the byte."""

import json
import zlib
from pathlib import Path

import npreader
import numpy as np
import pytest
from storage_helpers import (
    FLOATING,
    NAMED,
    affine,
    bits_of,
    codebook,
    dense_of,
    everything_file,
    filled,
    pruned,
    structured,
)

import jaxprune as jp
from jaxprune import storage
from jaxprune.quantize.codes import Affine, Codebook
from jaxprune.storage.values import DTYPES

PAGE = Path(storage.__file__).with_name("FORMAT.md").read_text()
EXAMPLE = np.array([[0, 0, 1.5, 0], [0, 2, 0, -1]], np.float32)
LIVING = EXAMPLE != 0
# Encoding -> the pattern's bytes and the weights stored, as the page has them.
EXAMPLES = {
    "bitmask": ("25", (1.5, 2, -1)),
    "csr16": ("01000000 03000000 0200 0100 0300", (1.5, 2, -1)),
    "gaps2": ("a4", (1.5, 2, -1)),
    "nm2:4@1": ("27", (0, 1.5, 2, -1)),
    "block1x2": ("70", (1.5, 0, 0, 2, 0, -1)),
}


def test_the_reader_is_short_and_knows_no_jaxprune():
    lines = Path(npreader.__file__).read_text().splitlines()
    assert len([line for line in lines if line.strip() and not line.startswith('"""')]) <= 60
    assert not any("jaxprune" in line for line in lines if "import" in line)


def mask_of(leaf):
    """Of a quantized leaf its own, else what is not zero."""
    return leaf.alive if hasattr(leaf, "alive") else np.asarray(leaf) != 0


def compare(data, params, masks=None):
    found = npreader.read(data)
    assert set(found) == set(params)
    for name, leaf in params.items():
        path, weight, mask = found[name]
        assert path == name.split("/")
        assert bits_of(weight) == bits_of(dense_of(leaf)), name
        assert bits_of(mask) == bits_of(masks[name] if masks else mask_of(leaf)), name


def test_it_reads_a_file_with_everything(tmp_path):
    params = everything_file(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    compare(data, params)
    with storage.Artifact(tmp_path / "file") as file:
        parts = [part for record in file.records.values() for part in record.parts]
    assert {part.coder for part in parts} == {"raw", "deflate", "planes4"}
    assert {part.name for part in parts} >= {
        "mask",
        "ends",
        "columns",
        "gaps",
        "places",
        "tiles",
        "codes",
        "table",
        "zero",
    }


@pytest.mark.parametrize("deflate", [True, False])
@pytest.mark.parametrize("encoding", NAMED)
def test_it_reads_every_encoding_of_every_dtype(tmp_path, encoding, deflate):
    rng = np.random.default_rng(0)
    params = {dtype: pruned(rng, dtype, (13, 3, 9), 0.7)[0] for dtype in DTYPES}
    jp.save(tmp_path / "file", {"a": params}, encoding={"*": encoding}, deflate=deflate, signed_zeros=True)
    compare((tmp_path / "file").read_bytes(), {f"a/{name}": leaf for name, leaf in params.items()})


@pytest.mark.parametrize(
    "encoding", ["nm1:2@0", "nm2:4@1", "nm3:5@2", "nm7:7@2", "nm1:60@0", "block1x1", "block3x5", "block60x2"]
)
def test_it_reads_runs_and_tiles(tmp_path, encoding):
    rng = np.random.default_rng(0)
    mask = structured(rng, encoding, (60, 4, 35) if encoding.startswith("nm") else (6, 20, 10))
    leaf = np.where(mask, filled(rng, "float32", mask.shape), np.float32(0))
    jp.save(tmp_path / "file", {"w": leaf}, encoding=encoding, signed_zeros=True)
    compare((tmp_path / "file").read_bytes(), {"w": leaf})


@pytest.mark.parametrize("deflate", [True, False])
@pytest.mark.parametrize("encoding", ["auto", "bitmask", "csr32", "gaps4"])
def test_it_reads_codes(tmp_path, encoding, deflate):
    rng = np.random.default_rng(0)
    alive = rng.random((6, 5, 4)) < 0.4
    params = {"scalar": affine(rng, (), np.ones((), bool))}
    for dtype in FLOATING:
        params |= {f"codebook{n}_{dtype}": codebook(rng, alive.shape, alive, bits=n, dtype=dtype) for n in range(1, 9)}
        for bits, apart in ((4, False), (4, True), (8, False), (8, True)):
            leaf = affine(rng, alive.shape, alive, bits=bits, dtype=dtype, per_output=apart, zeros=apart)
            params[f"int{bits}_{apart}_{dtype}"] = leaf
    jp.save(tmp_path / "file", params, encoding=encoding, deflate=deflate)
    compare((tmp_path / "file").read_bytes(), params)


def test_it_reads_living_zeros(tmp_path):
    weights = {"w": np.where(LIVING, EXAMPLE, np.float32(0)) * np.array([1, 1, 0, 1], np.float32)}
    for encoding in ("bitmask", "csr16", "gaps2", "auto"):
        jp.save(tmp_path / "file", weights, masks={"w": LIVING}, encoding=encoding)
        compare((tmp_path / "file").read_bytes(), weights, {"w": LIVING})


@pytest.mark.parametrize("encoding", EXAMPLES)
def test_examples_of_patterns(tmp_path, encoding):
    pattern, stored = EXAMPLES[encoding]
    for text in pattern.split(" ") if " " not in pattern else ("01000000 03000000", "0200 0100 0300"):
        assert f"`{text}`" in PAGE
    jp.save(tmp_path / "file", {"w": EXAMPLE}, encoding=encoding, deflate=False)
    expected = bytes.fromhex(pattern) + np.array(stored, "<f4").tobytes()
    assert (tmp_path / "file").read_bytes().endswith(b" " + expected) or (tmp_path / "file").read_bytes().endswith(
        expected
    )


def test_examples_of_codes(tmp_path):
    assert "`60`" in PAGE
    assert "`bc 60`" in PAGE
    codes = np.array([[0, 0, 1, 0], [0, 2, 0, 0]])
    shared = Codebook(codes.astype(np.uint8), np.array([-1, 1.5, 2, 2], np.float32), 2, LIVING)
    integers = np.array([[0, 0, 3, 0], [0, 4, 0, -2]], np.int8)
    counted = Affine(integers, np.array(0.5, np.float32), np.array(0, np.int8), 4, LIVING, np.dtype(np.float32))
    for leaf, expected in ((shared, "2560"), (counted, "25bc60")):
        jp.save(tmp_path / "file", {"w": leaf}, encoding="bitmask", deflate=False)
        data, table = (tmp_path / "file").read_bytes(), 16 if leaf is shared else 4
        assert data[-table - len(expected) // 2 : -table].hex() == expected
        assert bits_of(npreader.read(data)["w"][1]) == bits_of(EXAMPLE)


def test_gaps_of_the_page():
    assert npreader.positions("gaps2", {"gaps": bytes([0b10100100])}, (8,), 3).tolist() == [2, 5, 7]
    assert npreader.positions("gaps2", {"gaps": bytes([0b11110100])}, (8,), 1).tolist() == [7]
    assert "`11 11 01`" in PAGE


def test_a_file_of_a_foreign_writer(tmp_path):
    body = bytes([0b00100101]) + np.array([1.5, 2, -1], "<f4").tobytes()
    record = {
        "shape": [2, 4],
        "dtype": "float32",
        "encoding": "bitmask",
        "count": 3,
        "crc32": f"{zlib.crc32(body):08x}",
    }
    record["parts"] = [["mask", "raw", 1, 1], ["values", "raw", 12, 12]]
    texts = {"jaxprune.tensors": json.dumps({"a/w": record}), "jaxprune.user": '{"by": "hand"}'}
    crc = zlib.crc32("".join(texts.values()).encode())
    entry = {"dtype": "U8", "shape": [13], "data_offsets": [0, 13]}
    header = {"a/w": entry, "__metadata__": {"jaxprune": "1", "jaxprune.crc32": f"{crc:08x}", **texts}}
    text = json.dumps(header, indent=1).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + body)
    assert bits_of(jp.load(tmp_path / "file")["a"]["w"]) == bits_of(EXAMPLE)
    assert bits_of(jp.load(tmp_path / "file", to="masks")["a"]["w"]) == bits_of(LIVING)
    with storage.Artifact(tmp_path / "file") as file:
        assert file.metadata == {"by": "hand"}
