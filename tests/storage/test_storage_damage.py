"""Damage: a file with anything wrong in it is refused with the tensor's name, before memory is taken for it."""

import contextlib
import json
import math
import os
import pathlib
import re
import tempfile
import tracemalloc
import zlib

import numpy as np
import pytest
from storage_helpers import (
    affine,
    bits_of,
    codebook,
    encode,
    everything,
    everything_file,
    pruned,
    rewritten,
    structured,
)

import jaxprune as jp
from jaxprune.storage import Artifact, FileError, tensors
from jaxprune.storage.encodings import pattern_of
from jaxprune.storage.tensors import Stored

MIB = 2**20


@contextlib.contextmanager
def taking_at_most(limit):
    """Of memory, in bytes."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] <= limit
    finally:
        tracemalloc.stop()


def small_file(path):
    """A file of a few thousand bytes with every encoding, kind of values and coder."""
    rng = np.random.default_rng(0)
    weights, alive = pruned(rng, "float32", (2, 4), 0.5)
    runs = np.where(structured(rng, "nm1:2@1", (2, 4)), np.float32(1.5), np.float32(0))
    leaves = {name: (weights, name) for name in ("dense", "bitmask", "csr16", "csr32", "gaps3")}
    leaves |= {"nm": (runs, "nm1:2@1"), "block": (weights, "block1x2"), "empty": (weights[:0], "bitmask")}
    leaves |= {"int": (affine(rng, (2, 4), alive, bits=4, per_output=True, zeros=True), "bitmask")}
    leaves |= {"book": (codebook(rng, (8, 6), np.ones((8, 6), bool) & (np.arange(6) < 2), bits=1), "bitmask")}
    leaves |= {
        "planes": (np.arange(1, 17, dtype=np.float32), "dense"),
        "bytes": (np.repeat(weights[0, :1], 40), "dense"),
    }
    params, rules = ({name: pair[i] for name, pair in leaves.items()} for i in (0, 1))
    jp.save(path, params, encoding=rules, metadata={"a": 1})
    with Artifact(path) as file:
        parts = [(part.name, part.coder) for record in file.records.values() for part in record.parts]
    assert {coder for _, coder in parts} >= {"raw", "deflate", "planes4"}
    assert ("codes", "raw") in parts
    return path.read_bytes()


def content(path):
    """Everything a file says, bit for bit."""
    with Artifact(path) as file:
        found = {name: file.read(name) for name in file.records}
        paths = {name: file.records[name].path for name in found}
        return file.metadata, paths, {name: (bits_of(one.array()), bits_of(one.mask())) for name, one in found.items()}


def refused_or_the_same(data, expected):
    """Whether a file of these bytes was refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pathlib.Path, "open", lambda *_: in_memory(data))
        try:
            found = content(pathlib.Path("file"))
        except FileError:
            return True
    assert found == expected
    return False


def in_memory(data):
    """An open file of these bytes, without a name."""
    file = tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)  # noqa: SIM115
    file.write(data)
    file.seek(0)
    return file


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_flipped_byte(tmp_path, unchecked, flip):
    data = small_file(tmp_path / "file")
    expected = content(tmp_path / "file")
    refused = 0
    for i in range(len(data)):
        refused += refused_or_the_same(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :], expected)
    assert refused >= len(data) - 2


def test_every_truncation_and_addition(tmp_path, unchecked):
    data = small_file(tmp_path / "file")
    expected = content(tmp_path / "file")
    assert all(refused_or_the_same(data[:i], expected) for i in range(len(data)))
    assert all(refused_or_the_same(data + more, expected) for more in (b"\0", b" ", data))


# ---- descriptions that lie, with a checksum that is right


@pytest.fixture(scope="module")
def everything_data(tmp_path_factory):
    """The bytes of a file with everything."""
    path = tmp_path_factory.mktemp("everything") / "file"
    everything_file(path)
    return path.read_bytes()


@pytest.mark.slow
def test_every_flip_of_a_file_with_everything(tmp_path, unchecked, everything_data):
    (tmp_path / "file").write_bytes(everything_data)
    expected = content(tmp_path / "file")
    for i, byte in enumerate(everything_data):
        for flip in (1 << bit for bit in range(8)):
            refused_or_the_same(everything_data[:i] + bytes([byte ^ flip]) + everything_data[i + 1 :], expected)


@pytest.fixture
def lying(tmp_path, everything_data):
    """A function that changes the record of a tensor of `everything`, and expects `load` to refuse it by name."""

    def lie(name, match, **changes):
        def change(records, _):
            record = records[name]
            records[name] = {
                **record,
                **{key: one(record.get(key)) if callable(one) else one for key, one in changes.items()},
            }

        (tmp_path / "file").write_bytes(rewritten(everything_data, change))
        with taking_at_most(3 * MIB), pytest.raises(FileError, match=rf"tensor '{re.escape(name)}': .*{match}"):
            jp.load(tmp_path / "file")

    return lie


def part(at, **changes):
    """A change of the part with this number: name, coder, stored or size."""
    order = ("name", "coder", "stored", "size")

    def change(parts):
        new = [changes.get(key, value) for key, value in zip(order, parts[at], strict=True)]
        return [*parts[:at], new, *parts[at + 1 :]]

    return change


HUGE = [2**40, 2**10]
LIES = [
    ("raw_bitmask", "its dtype 'float31' is none of bool, ", {"dtype": "float31"}),
    ("raw_bitmask", "its dtype 'O' is none of", {"dtype": "O"}),
    ("raw_bitmask", "its record has not the keys", {"more": 1}),
    ("raw_bitmask", "its shape is no list", {"shape": 12}),
    ("raw_bitmask", "its numbers are not whole", {"shape": [4, True]}),
    ("raw_bitmask", "its numbers are not whole", {"shape": [4, 3.0]}),
    ("raw_bitmask", "its numbers are not whole", {"shape": [-4, -3]}),
    ("raw_bitmask", "its numbers are not whole", {"count": -1}),
    ("raw_bitmask", "its count is no int", {"count": True}),
    ("raw_bitmask", "its numbers are not whole", {"shape": [10**4000]}),
    ("raw_bitmask", "its shape .* is absurd", {"shape": [2**61, 12]}),
    ("raw_bitmask", "its shape .* is absurd", {"shape": [1] * 33}),
    ("empty", "its shape .* is absurd", {"shape": [0, 2**40, 2**40]}),
    ("raw_bitmask", "its mask are 2 bytes, .* were expected", {"shape": HUGE}),
    ("raw_bitmask", "its mask are 2 bytes, 4 were expected", {"shape": [8, 4]}),
    ("raw_bitmask", "its values are", {"dtype": "float64"}),
    ("raw_bitmask", "it stores 13 weights of 12", {"count": 13}),
    ("raw_bitmask", "its values are", {"count": 1}),
    ("raw_bitmask", "it stores .*'living' alive", {"alive": "living"}),
    ("raw_bitmask", "There is no encoding 'zip'", {"encoding": "zip"}),
    ("raw_bitmask", "There is no encoding 'nm1", {"encoding": "nm1:" + "9" * 40 + "@0"}),
    ("raw_bitmask", "its parts are .'mask', 'values'., .'ends'", {"encoding": "csr16"}),
    ("raw_bitmask", "weights are stored of 12", {"encoding": "dense"}),
    ("raw_bitmask", "its parts are .* were expected", {"parts": lambda parts: parts[::-1]}),
    ("raw_bitmask", "its parts are not", {"parts": [["mask", "raw", 2]]}),
    ("raw_bitmask", "its parts are not", {"parts": ["mask"]}),
    ("raw_bitmask", "its parts is no list", {"parts": "mask"}),
    ("raw_bitmask", "there is no coder 'zip'", {"parts": part(0, coder="zip")}),
    ("raw_bitmask", "2 bytes of raw cannot become 3", {"parts": part(0, size=3)}),
    ("raw_bitmask", "2 bytes of deflate cannot become 9999", {"parts": part(0, coder="deflate", size=9999)}),
    ("raw_bitmask", "no items of 4", {"parts": part(0, coder="planes4")}),
    ("raw_bitmask", "deflated bytes", {"parts": part(0, coder="deflate")}),
    ("raw_bitmask", "its parts are .* bytes, the file has", {"parts": part(0, stored=1, coder="deflate", size=2)}),
    ("raw_bitmask", "there are no values of kind 'int5'", {"values": "int5"}),
    ("raw_bitmask", "there are no values of kind 'codebook9'", {"values": "codebook9"}),
    ("raw_bitmask", "there are no values of kind 'int8' for int8", {"values": "int8"}),
    ("raw_bitmask", "its crc32 is not of eight", {"crc32": "0x12"}),
    ("raw_bitmask", "the checksum differs", {"crc32": "00000000"}),
    ("raw_bitmask", "its path .* is not its name", {"path": ["other"]}),
    ("raw_bitmask", "its path has the key 1.5", {"path": [1.5]}),
    ("raw_bitmask", "its path has the key", {"path": [["tuple", "raw_bitmask"]]}),
    ("raw_bitmask", "its path has the key", {"path": [["set", 3]]}),
    ("raw_bitmask", "its path has the key", {"path": [["tuple", [1]]]}),
    ("raw_bitmask", "its path has the key -1", {"path": [-1]}),
    ("raw_bitmask", "its path has the key True", {"path": [True]}),
    ("raw_bitmask", "its path has 101 keys", {"path": ["x"] * 101}),
    ("raw_bitmask", "its path is no list", {"path": "raw_bitmask"}),
    ("raw_csr16", "it cannot be encoded as 'csr16': it has no rows", {"shape": [12]}),
    ("raw_csr16", "it cannot be encoded as 'csr16': it has no rows", {"shape": [], "count": 1}),
    ("raw_csr16", "rows of 65537", {"shape": [4, 65537]}),
    ("raw_csr16", "its ends are 16 bytes, 24 were expected", {"shape": [6, 2]}),
    ("raw_csr16", "its columns are", {"parts": part(1, size=1, stored=1)}),
    ("raw_nm2:4@0", "runs of 4 do not fit its axis 2", {"encoding": "nm2:4@2"}),
    ("raw_nm2:4@0", "runs of 5 do not fit its axis 0", {"encoding": "nm2:5@0"}),
    ("raw_nm2:4@0", "8 weights are stored, 1 of every 4 are 4", {"encoding": "nm1:4@0"}),
    ("raw_block2x2", "tiles of 3 x 2 do not fit", {"encoding": "block3x2"}),
    ("raw_block2x2", "no whole tiles of 16", {"encoding": "block4x4"}),
    ("raw_gaps2", "a position is outside 12 weights", {"encoding": "gaps16"}),
    ("int4_bitmask", "its scales .* do not lie along its axes", {"scale_shape": [4]}),
    ("int4_bitmask", "its scales .* do not lie along its axes", {"scale_shape": [4, 1]}),
    ("int4_bitmask", "its scale are 16 bytes, 4 were expected", {"scale_shape": []}),
    ("int4_bitmask", "its codes 'int4' do not tell", {"alive": "nonzero"}),
    ("int4_bitmask", "its codes are", {"values": "int8"}),
    ("int4_bitmask", "there are no values of kind 'int4' for int32", {"dtype": "int32"}),
    ("codebook_bitmask", "its table are 16 bytes, 32 were expected", {"dtype": "float32"}),
    ("codebook_bitmask", "its codes are|its table are", {"values": "codebook4"}),
    ("scalar", "it is stored as float32 .., int32", {"dtype": "int32"}),
    ("scalar", "it is stored as float32", {"shape": [1]}),
]


@pytest.mark.parametrize(("name", "match", "changes"), LIES)
def test_records_that_lie(lying, name, match, changes):
    lying(name, match, **changes)


@pytest.fixture
def changed(tmp_path):
    """A function that changes records and header of a small file and expects it to be refused."""
    jp.save(
        tmp_path / "file",
        {"a": [np.arange(4.0, dtype=np.float32), np.float32(1)]},
        encoding={"*": "dense"},
        deflate=False,
    )
    data = (tmp_path / "file").read_bytes()

    def change(match, how):
        (tmp_path / "file").write_bytes(rewritten(data, how))
        with pytest.raises(FileError, match=match):
            jp.load(tmp_path / "file")

    return change


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("does not describe the 2 tensors", lambda records, _: records.pop("a/0")),
        ("does not describe the 2 tensors", lambda records, _: records.update(more={})),
        ("tensor 'a/0': its record has not the keys", lambda records, _: records.update({"a/0": 3})),
        (
            "two tensors have one path",
            lambda records, _: [records[f"a/{i}"].update(path=["a", "value"]) for i in (0, 1)],
        ),
        (
            "has version '2', this library reads 1. Update it",
            lambda _, header: header["__metadata__"].update(jaxprune="2"),
        ),
        ("has version '', this", lambda _, header: header["__metadata__"].pop("jaxprune")),
        ("metadata are no texts", lambda _, header: header["__metadata__"].update(more=1)),
        ("metadata are no texts", lambda _, header: header.update(__metadata__=[])),
        ("begins at byte", lambda _, header: header["a/0"].update(data_offsets=[4, 20])),
        ("tensor 'a/0' is damaged", lambda _, header: header["a/0"].update(data_offsets=[0, 2**70])),
        ("tensor 'a/0' is damaged", lambda _, header: header["a/0"].update(data_offsets=[False, 16])),
        ("tensor 'a/0' is damaged", lambda _, header: header["a/0"].update(data_offsets=[16, 0])),
        ("tensor 'a/0' is damaged", lambda _, header: header["a/0"].update(shape=[2**60, 2**60])),
        ("tensor 'a/0' is damaged", lambda _, header: header["a/0"].update(shape=[4.0])),
        ("tensor 'a/0' is damaged or not supported.*'F4'", lambda _, header: header["a/0"].update(dtype="F4")),
        ("tensor 'a/0': it is stored as int32", lambda _, header: header["a/0"].update(dtype="I32")),
        ("tensor 'a/0' is damaged", lambda _, header: header.update({"a/0": []})),
    ],
)
def test_headers_that_lie(changed, match, change):
    def how(records, header):
        if match == "two tensors have one path":
            header["a"], header["a/value"] = header.pop("a/0"), header.pop("a/1")
            records["a"], records["a/value"] = ({**records.pop(f"a/{i}"), "path": ["a", "value"]} for i in (0, 1))
        else:
            change(records, header)

    changed(match, how)


@pytest.mark.parametrize(
    ("paths", "match"),
    [
        ([[], [0]], "a leaf stands where others have a branch"),
        ([["a"], ["a", 0]], "a leaf stands where others have a branch"),
        ([["a", 0], ["a", ["tuple", 1]]], "leaves of list and a tuple stand in one place"),
        ([["a", 0], ["a", "1"]], "leaves of dict and a list stand in one place"),
    ],
)
def test_paths_of_no_tree(changed, paths, match):
    def how(records, header):
        for i, path in enumerate(paths):
            name = "/".join(str(key[1] if isinstance(key, list) else key) for key in path)
            header[name], records[name] = header.pop(f"a/{i}"), {**records.pop(f"a/{i}"), "path": path}

    changed(match, how)


@pytest.mark.parametrize(
    ("key", "text", "match"),
    [
        ("tensors", "[]", "does not describe"),
        ("tensors", "{", "damaged description"),
        ("tensors", '{"a": {}, "a": {}}', "a name stands there twice"),
        ("tensors", "[" * 100_000, "nested too deep|damaged description"),
        ("tensors", '{"a": ' + "9" * 5000 + "}", "damaged description"),
        ("user", "[]", "does not describe"),
        ("user", "", "damaged description"),
    ],
)
def test_descriptions_that_are_none(tmp_path, key, text, match):
    texts = {"jaxprune.tensors": "{}", "jaxprune.user": "{}"} | {f"jaxprune.{key}": text}
    crc = zlib.crc32((texts["jaxprune.tensors"] + texts["jaxprune.user"]).encode())
    header = json.dumps({"__metadata__": {"jaxprune": "1", "jaxprune.crc32": f"{crc:08x}", **texts}}).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FileError, match=match):
        jp.load(tmp_path / "file")


@pytest.mark.parametrize(
    "header", [b"[]", b"3", b'{"a":{},"a":{}}', b"\xff", b"[" * 100_000, b'{"__metadata__":3}', b"{}x"]
)
def test_headers_that_are_none(tmp_path, header):
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FileError, match=r"file has a damaged header"):
        jp.load(tmp_path / "file")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 3])
def test_lengths_of_headers_that_lie(tmp_path, length):
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + b"{}")
    with taking_at_most(MIB), pytest.raises(FileError, match="no safetensors file, or cut off"):
        jp.load(tmp_path / "file")


def test_plain_files_that_lie(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FileError, match=r"tensor 'w': its shape .* is absurd"):
        jp.load(tmp_path / "file")


def test_a_file_that_is_cut_off_while_it_is_open(tmp_path):
    jp.save(tmp_path / "file", {"w": np.ones(100_000, np.float32)}, deflate=False)
    with Artifact(tmp_path / "file") as file:
        (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:200_000])
        with pytest.raises(FileError, match=r"tensor 'w': .* bytes were read of its 400000"):
            file.read("w")


# ---- bytes that lie, with checksums that are right


def stored(leaf, encoding, change):
    """The tensor after a change of its streams as they are, name -> bytes."""
    record, blob = encode(("w",), leaf, None, encoding, deflate=False)
    streams, at = {}, 0
    for one in record.parts:
        streams[one.name] = bytearray(blob[at : at + one.stored])
        at += one.stored
    change(streams)
    parts = tuple(one._replace(stored=len(streams[one.name]), size=len(streams[one.name])) for one in record.parts)
    blob = b"".join(streams.values())
    record = record._replace(parts=parts, crc32=zlib.crc32(blob))
    tensors.records.check(record, len(blob))
    return Stored(record, blob)


def put(name, at, *new):
    """A change that sets bytes of a stream from a place on."""

    def change(streams):
        streams[name][at : at + len(new)] = bytes(new)

    return change


FOUR = np.array([[0, 1, 0, 2], [3, 0, 4, 0]], np.float32)


@pytest.mark.parametrize(
    ("encoding", "change", "match"),
    [
        ("bitmask", put("mask", 0, 0b11011010), "not as many places as weights, which are 4"),
        ("bitmask", put("mask", 0, 0b01010010), "not as many places as weights, which are 4"),
        ("csr16", put("ends", 0, 3), "indices in a row do not ascend"),
        ("csr16", put("ends", 0, 5), "the rows do not end where the weights do"),
        ("csr16", put("ends", 4, 3), "the rows do not end where the weights do"),
        ("csr16", put("ends", 7, 255), "the rows do not end where the weights do"),
        ("csr16", put("columns", 0, 4), "an index is outside rows of 4"),
        ("csr16", put("columns", 0, 3, 0, 1), "indices in a row do not ascend"),
        ("csr16", put("columns", 0, 3), "indices in a row do not ascend"),
        ("csr32", put("columns", 3, 255), "an index is outside rows of 4"),
        ("gaps3", put("gaps", 0, 0b00100100, 0b01011000), "outside 8 weights"),
        ("gaps3", put("gaps", 0, 0b11111111, 0b11111111), "more codes than weights"),
        ("gaps3", put("gaps", 0, 0b11100100, 0b10000010), "outside 8 weights|as many places"),
        ("nm2:4@1", put("places", 0, 0b11010010), "places in a run do not ascend"),
        ("nm2:4@1", put("places", 0, 0b01010010), "places in a run do not ascend"),
        ("block1x2", put("tiles", 0, 0b11100000), "not as many places as weights"),
    ],
)
def test_positions_that_lie(encoding, change, match):
    back = stored(FOUR, encoding, change)
    for ask in (back.array, back.mask, back.leaf, back.nonzeros):
        with pytest.raises(ValueError, match=match):
            ask()


def test_places_outside_of_a_run():
    back = stored(np.array([0, 1, 0, 0, 0, 2], np.float32), "nm1:3@0", put("places", 0, 0b11100000))
    with pytest.raises(ValueError, match="a place is outside its run of 3"):
        back.array()


def test_gaps_with_bytes_behind():
    alive = np.arange(40) == 0
    leaf = np.where(alive, np.float32(1), np.float32(0))
    with pytest.raises(ValueError, match="more codes than weights"):
        stored(leaf, "gaps4", lambda streams: streams["gaps"].append(0)).array()


@pytest.mark.parametrize(
    ("leaf", "change", "match"),
    [
        (lambda rng, alive: codebook(rng, alive.shape, alive, bits=3), "codes", "the code 255 has more than 3 bits"),
        (lambda rng, alive: affine(rng, alive.shape, alive, bits=4), "codes", "the code 255 has more than 4 bits"),
        (lambda rng, alive: affine(rng, alive.shape, alive), "scale", "its scales are not all positive"),
        (lambda rng, alive: alive, "values", "a bool is neither 0 nor 1"),
    ],
)
def test_values_that_lie(leaf, change, match):
    alive = np.ones((20, 20), bool)
    made = leaf(np.random.default_rng(0), alive)
    record, blob = encode(("w",), made, None, "dense", deflate=False)
    assert record.parts[0].coder == "raw"
    streams = {"codes": bytes([255]) * 400, "values": bytes([255]) * 400, "scale": bytes([255]) * 4}
    parts, blobs, at = [], [], 0
    for one in record.parts:
        data = blob[at : at + one.stored]
        if one.name == change:
            packer = zlib.compressobj(wbits=-15)
            data = packer.compress(streams[one.name]) + packer.flush()
            one = one._replace(coder="deflate", stored=len(data), size=len(streams[one.name]))
        parts, blobs, at = [*parts, one], [*blobs, data], at + record.parts[len(parts)].stored
    blob = b"".join(blobs)
    record = record._replace(parts=tuple(parts), crc32=zlib.crc32(blob))
    tensors.records.check(record, len(blob))
    with pytest.raises(ValueError, match=match):
        Stored(record, blob)


def test_what_is_too_large_for_the_dtype_becomes_infinite():
    leaf = affine(np.random.default_rng(0), (4, 4), np.ones((4, 4), bool), dtype="float16")
    back = stored(leaf, "dense", lambda streams: streams.update(scale=np.array([3e38], "<f4").tobytes()))
    assert set(np.abs(back.array()).ravel().tolist()) <= {0.0, np.inf}


# ---- bombs: small files of large tensors


def bombs(count):
    """Leaves of one or two bytes a weight that deflate to next to nothing, each with an encoding."""
    rng, ones = np.random.default_rng(0), np.ones((count // 4096, 4096), np.int8)
    yield from ((ones, name) for name in ("dense", "bitmask", "csr16", "gaps2", "block1x1", "nm2:2@0"))
    alive = np.zeros(ones.shape, bool)
    alive[:, ::4] = True
    shared = codebook(rng, ones.shape, alive, bits=1, dtype="float8_e4m3fn")
    counted = affine(rng, ones.shape, alive, dtype="float16", per_output=True, zeros=True)
    counted.codes[:] = np.where(alive, np.int8(3), counted.codes[:1])
    yield from ((leaf, name) for leaf in (shared, counted) for name in ("bitmask", "gaps8"))


def test_bombs_take_at_most_twice_what_they_declare(tmp_path):
    for leaf, encoding in bombs(2**22):
        jp.save(tmp_path / "file", {"w": leaf}, encoding={"*": encoding})
        size, weights = (tmp_path / "file").stat().st_size, math.prod(leaf.shape)
        for to in ("array", "mask", "leaf"):
            # Codes beside their mask are more than a dense weight of one byte.
            declared = weights * max(leaf.dtype.itemsize, 2 if to == "leaf" else 1) + size + MIB
            with taking_at_most(2 * declared), Artifact(tmp_path / "file") as file:
                getattr(file.read("w"), to)()


def test_all_zeros_of_any_size_are_bounded_by_max_bytes(tmp_path):
    assert encode(("w",), np.zeros((4, 4), np.float32), None, "gaps2", deflate=False)[1] == b""
    jp.save(tmp_path / "file", {"w": np.zeros((4, 4), np.float32)}, encoding="gaps2")
    lie = rewritten((tmp_path / "file").read_bytes(), lambda records, _: records["w"].update(shape=[2**40, 2**10]))
    (tmp_path / "file").write_bytes(lie)
    with pytest.raises(FileError, match=r"tensor 'w' \(1099511627776, 1024\).* 4,503,599,627,370,496 bytes"):
        jp.load(tmp_path / "file")
    with pytest.raises(FileError, match="1,000,000 are allowed"):
        jp.load(tmp_path / "file", max_bytes=10**6)


def test_everything_has_everything():
    params, rules = everything()
    assert {"bitmask", "csr16", "csr32", "dense", "gaps3", "nm2:4@0", "block2x2"} <= set(rules.values())
    assert len(params) == len(rules)
    assert all(rule == "auto" or pattern_of(rule) for rule in rules.values())
