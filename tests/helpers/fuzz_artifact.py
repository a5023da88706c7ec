"""Coverage-guided fuzzing of everything that reads a file, with atheris; by hand, or by test_storage_fuzz.py.

    python tests/helpers/fuzz_artifact.py CORPUS -runs=1000000 [other options of libFuzzer]

Every input is a file. It must be refused with `FileError`, or be read exactly as the reader in NumPy reads it; in at
most a second of processor time; with at most twice the memory that it declares: the bytes of its dense tensors, its own
bytes and one MiB. Memory is what tracemalloc counts, NumPy's arrays included. Counting makes everything five times
slower, so it is for files that declare 64 KiB or more, and for one in 16 others. Four of five mutations take a file
apart and put it together again with checksums and offsets that are right, so that what lies behind them is reached.
"""

import json
import math
import os
import pathlib
import random
import re
import sys
import time
import tracemalloc
import zlib
from collections import Counter

import atheris

with atheris.instrument_imports(include=["jaxprune.storage"]):
    import jaxprune as jp
    from jaxprune.storage import Artifact, FileError, container, paths
    from jaxprune.storage.container import Problem

import npreader
import numpy as np
from storage_helpers import affine, bits_of, codebook, everything, pruned

MIB = 2**20
MOST = 8 * MIB  # bytes of dense tensors that are read at all
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 255, 256, 4096, 65537, 2**20, 2**31, 2**32, 2**40, 2**62, -1, True, None, 1.5, "1", [])
RUNS_AND_TILES = ("nm2:4@0", "nm1:4@1", "nm256:256@0", "nm9:4@0", "block1x1", "block2x2", "block1x32768")
WORDS = {
    "encoding": ("dense", "bitmask", "csr16", "csr32", "gaps2", "gaps5", "gaps16", *RUNS_AND_TILES, "zip"),
    "values": ("raw", "codebook1", "codebook4", "codebook8", "int4", "int8", "int5"),
    "dtype": ("bool", "int8", "uint64", "float16", "float32", "float64", "bfloat16", "float8_e5m2", "complex64"),
    "alive": ("stored", "nonzero", "neither"),
}
CODERS = ("raw", "deflate", "planes2", "planes4", "planes8")
KEYS = ("a", "", "value", 0, 1, -1, 2**31, ["tuple", 0], ["tuple", 1], ["key", 3], ["key", "a"], [], None, 1.5)
OPEN = pathlib.Path.open
counts, refusals = Counter(), Counter()


# ---- what every input must hold


def memory_file(data):
    """An open file of these bytes."""
    descriptor = os.memfd_create("file")
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return open(descriptor, "rb")


def with_file(data):
    """From now on the file named "file" has these bytes."""
    pathlib.Path.open = lambda path, *args, **kwargs: (
        memory_file(data) if path.name == "file" else OPEN(path, *args, **kwargs)
    )


def test_one(data):
    """What libFuzzer calls."""
    with_file(data)
    began = time.process_time()
    try:
        found = read(data)
    except FileError as error:
        found = None
        refusals[re.sub("'[^']*'|[0-9]+|[({].*|file", "..", str(error).partition("tensor ")[2] or str(error))[:60]] += 1
    assert time.process_time() - began < 1, "it took more than a second"
    if found is not None:
        compare(data, found)
    counts["inputs"] += 1
    counts["accepted"] += found is not None
    if counts["inputs"] % 10_000 == 0:
        print(dict(counts), flush=True)
    if counts["inputs"] % 250_000 == 0:
        print(dict(refusals.most_common(100)), flush=True)


def read(data):
    """Name -> (path, dense, mask), having looked at the rest and at the memory that it took."""
    arrays, masks, leaves = {}, {}, {}
    with Measured(data) as file:
        file.check_memory(file.records, MOST)
        try:
            paths.nested({record.path: None for record in file.records.values()})
        except Problem as error:
            raise FileError(str(error)) from None
        file.declare(sum(record.dense_bytes for record in file.records.values()))
        try:
            arrays = {name: file.read(name).array() for name in file.records}
        except Problem as error:
            raise FileError(f"tensor : {error}") from None
    with Measured(data) as file:
        file.declare(sum(record.dense_bytes for record in file.records.values()))
        masks = {name: file.read(name).mask() for name in file.records}
    with Measured(data) as file:
        # A quantized leaf is a byte of code and one of mask for each weight.
        file.declare(sum(max(one.dense_bytes, 2 * math.prod(one.shape)) for one in file.records.values()))
        leaves = {name: file.read(name).leaf() for name in file.records}
    for name, leaf in leaves.items():
        with np.errstate(all="ignore"):
            array = leaf.dequantize() if hasattr(leaf, "dequantize") else leaf
        assert bits_of(array) == bits_of(arrays[name]), "the quantized leaf is another"
    if counts["inputs"] % 64 == 0:
        for to in ("dense", "masks", "quantized"):
            jp.load("file", to=to, max_bytes=MOST)
        load_sparse()
    return {name: (file.records[name].path, arrays[name], masks[name]) for name in arrays}


class Measured(Artifact):
    """The file, open; what was taken while it was open is held against what it declared."""

    def __init__(self, data):
        self.declared, self.traced = len(data) + MIB, counts["inputs"] % 16 == 0
        if self.traced:
            tracemalloc.start()
        try:
            super().__init__("file")
        except FileError:
            self.check()
            raise

    def declare(self, dense):
        """Bytes of the arrays."""
        self.declared += dense
        if dense >= 2**16 and not self.traced:
            self.traced = True
            tracemalloc.start()

    def check(self):
        """Against all that was declared."""
        if self.traced:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            counts["measured"] += 1
            counts["measured, 64 KiB or more"] += self.declared >= MIB + 2**16
            assert peak <= 2 * self.declared, f"{peak} bytes were taken, {self.declared} declared"

    def __exit__(self, kind, error, at):
        super().__exit__(kind, error, at)
        self.check()


def load_sparse():
    """To compressed leaves; refused for what the formats themselves refuse, too."""
    try:
        jp.load("file", to="bcsr", unsupported="dense", max_bytes=MOST)
    except FileError:
        pass
    except (TypeError, ValueError) as error:
        if not any(words in str(error) for words in ("NaN", "chooses no leaf", "only floating")):
            raise


def compare(data, found):
    """With the reader in NumPy, or, for plain safetensors, with the bytes themselves."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    texts = header.pop("__metadata__", {})
    assert list(found) == list(header)
    if "jaxprune" not in texts:
        counts["plain"] += 1
        for name, (path, dense, mask) in found.items():
            first, last = header[name]["data_offsets"]
            assert (dense.tobytes(), path) == (data[start + first : start + last], (name,))
            assert mask.shape == dense.shape == tuple(header[name]["shape"])
        return
    if sum(math.prod(dense.shape) for _, dense, _ in found.values()) > 2**18:
        counts["too large to compare"] += 1
        return
    with np.errstate(all="ignore"):
        expected = npreader.read(data)
    for name, (path, dense, mask) in found.items():
        other = expected[name]
        assert json.loads(json.dumps(path)) == other[0], "the path is another"
        assert bits_of(dense) == bits_of(other[1]), "the tensor is another"
        assert bits_of(mask) == bits_of(other[2]), "the mask is another"


# ---- mutations


def taken_apart(data):
    """(header without tensors, [(name, entry, record, bytes)], user)."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    texts = header.pop("__metadata__")
    records = json.loads(texts["jaxprune.tensors"])
    tensors = []
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors.append((name, dict(entry), records[name], data[start + first : start + last]))
    return tensors, texts["jaxprune.user"]


def put_together(tensors, user):
    """A file with offsets, sizes and checksums that are right, whatever else is not."""
    header, records, body = {}, {}, b""
    for name, entry, record, blob in tensors:
        entry = {**entry, "data_offsets": [len(body), len(body) + len(blob)]}
        if entry.get("dtype") == "U8":
            entry["shape"] = [len(blob)]
        header[name], body = entry, body + blob
        records[name] = {**record, "crc32": f"{zlib.crc32(blob):08x}"}
    texts = {"jaxprune": "1", "jaxprune.tensors": json.dumps(records), "jaxprune.user": user}
    crc = zlib.crc32((texts["jaxprune.tensors"] + user).encode("utf-8", "surrogatepass"))
    header["__metadata__"] = {**texts, "jaxprune.crc32": f"{crc:08x}"}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def mutate(data, max_size, seed):
    """What libFuzzer calls for a new input."""
    rng = random.Random(seed)
    try:
        if rng.random() < 0.2:
            raise ValueError("as libFuzzer does it")
        tensors, user = taken_apart(data)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            at = rng.randrange(len(tensors))
            change = rng.choice(
                (change_bytes, change_bytes, change_stream, change_stream, change_record, change_tensors)
            )
            change(rng, tensors, at)
        made = put_together(tensors, user)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, zlib.error, RecursionError, OverflowError):
        made = atheris.Mutate(data, max_size)
    return made[:max_size]


def change_bytes(rng, tensors, at):
    """Of the tensor as it is stored."""
    name, entry, record, blob = tensors[at]
    tensors[at] = name, entry, record, atheris.Mutate(blob, max(len(blob), 1))[: len(blob)].ljust(len(blob), b"\0")


def change_stream(rng, tensors, at):
    """Of a stream before it was deflated, or its length, or its coder."""
    name, entry, record, blob = tensors[at]
    number, place, blobs = rng.randrange(len(record["parts"])), 0, []
    for part in record["parts"]:
        blobs.append(blob[place : place + part[2]])
        place += part[2]
    parts = [list(part) for part in record["parts"]]
    part = parts[number]
    plain = blobs[number] if part[1] == "raw" else zlib.decompress(blobs[number], -15, 2**16)
    way = rng.randrange(4)
    if way == 0:
        plain = atheris.Mutate(plain, len(plain) + 16)
    elif way == 1:
        plain = bytes([rng.choice((0, 1, 255, rng.randrange(256)))]) * len(plain)
    elif way == 2:
        plain = plain * rng.choice((2, 16, 1024)) if len(plain) < 2**10 else plain[: rng.randrange(len(plain))]
    coder = rng.choice(CODERS) if rng.random() < 0.3 else part[1]
    packer = zlib.compressobj(wbits=-15)
    blobs[number] = plain if coder == "raw" else packer.compress(plain) + packer.flush()
    part[1:] = [coder, len(blobs[number]), len(plain)]
    if rng.random() < 0.5 and part[0] in ("values", "codes"):
        record = {**record, "count": len(plain)}
    if rng.random() < 0.3:
        record = {**record, "shape": rng.choice(([len(plain)], [1, len(plain)], [2, 2, len(plain)], [8 * len(plain)]))}
    entry = {**entry, "dtype": "U8"} if coder != "raw" else entry
    tensors[at] = name, entry, {**record, "parts": parts}, b"".join(blobs)


def change_record(rng, tensors, at):
    """A field of a record, by something that often means something."""
    name, entry, record, blob = tensors[at]
    record = json.loads(json.dumps(record))
    key = rng.choice(("shape", "count", "parts", "scale_shape", "path", *WORDS, *WORDS))
    if key in WORDS:
        record[key] = rng.choice(WORDS[key])
    elif key == "parts":
        part = rng.choice(record["parts"])
        field = rng.randrange(4)
        part[field] = (rng.choice(("mask", "values", "zero", "gaps")), rng.choice(CODERS), *[rng.choice(NUMBERS)] * 2)[
            field
        ]
    elif key == "path":
        record[key] = [rng.choice(KEYS) for _ in range(rng.randrange(4))]
        name = "/".join(str(one[-1] if isinstance(one, list) and one else one) for one in record[key])
    elif key == "count":
        record[key] = rng.choice((*NUMBERS, record[key] + 1, record[key] * 2))
    else:
        shape = record.get(key, [])
        place = rng.randrange(len(shape) + 1)
        shape[place : place + rng.randrange(2)] = [rng.choice(NUMBERS) for _ in range(rng.randrange(3))]
        record[key] = shape
    tensors[at] = name, entry, record, blob


def change_tensors(rng, tensors, at):
    """Which there are: one less, one again, one of another file, or one described in another way."""
    name, entry, record, blob = tensors[at]
    way = rng.randrange(4)
    if way == 0 and len(tensors) > 1:
        del tensors[at]
    elif way == 1:
        tensors.append((name + rng.choice(("", "2", "/0", "/value")), entry, {**record, "path": [name, 0]}, blob))
    elif way == 2:
        tensors.extend(taken_apart(rng.choice(SEEDS))[0][: 3 - len(tensors)])
    else:
        entry = {**entry, rng.choice(("dtype", "shape", "more")): rng.choice(("U8", "F32", [], [1], [len(blob)]))}
        tensors[at] = name, entry, record, blob


def seeds():
    """Files of a tensor or two: each encoding, kind of values and coder, and a plain one."""
    rng = np.random.default_rng(0)
    params, rules = everything(rng)
    trees = [({name: leaf}, {name: rules[name]}) for name, leaf in params.items()]
    large = np.repeat(pruned(rng, "int8", (64, 64), 0.7)[0], 8, axis=1)
    trees += [({"w": large}, {"*": one}) for one in ("bitmask", "gaps3", "csr16", "nm2:2@0", "block1x8", "dense")]
    half = np.ones((16, 16), bool) & (np.arange(16) % 2 == 0)
    trees += [
        ({"w": codebook(rng, (16, 16), half, bits=2)}, {"*": "gaps2"}),
        ({"w": affine(rng, (), np.ones((), bool))}, {}),
    ]
    leaf = pruned(rng, "float32", (4,), 0.5)[0]
    trees += [({"a": [leaf, (leaf, {3: leaf})]}, {"*": "bitmask"}), ({}, {}), (leaf, {})]
    for tree, rule in trees:
        written = []
        container.files.write = lambda _, pieces, written=written: written.append(b"".join(pieces))
        jp.save("file", tree, encoding=rule or "auto", metadata={"a": 1})
        yield written[0]
    arrays = {"x": leaf, "y": np.zeros((0, 2), np.int8)}
    container.write(pathlib.Path("file"), {n: container.blob_of(one) for n, one in arrays.items()}, {"format": "np"})
    yield written[1]


SEEDS = list(seeds())


def main():
    """Write the seeds, and begin."""
    corpus = pathlib.Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(SEEDS):
        (corpus / f"seed_{number:02}").write_bytes(data)
    with_file(SEEDS[0])
    load_sparse()  # JAX takes its time once
    jp.load("file")
    for data in SEEDS:
        test_one(data)
    assert counts["accepted"] == counts["inputs"] == len(SEEDS)
    atheris.Setup(
        [sys.argv[0], "-max_len=4096", "-mutate_depth=2", "-timeout=60", *sys.argv[1:]], test_one, custom_mutator=mutate
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
