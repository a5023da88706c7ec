"""A reader in NumPy, written from jaxprune/storage/FORMAT.md alone: bytes -> {name: (path, dense weight, mask)}."""

import json
import math
import re
import zlib

import ml_dtypes  # NumPy itself has no bfloat16
import numpy as np


def read(data):
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    texts = header.pop("__metadata__")
    crc = zlib.crc32((texts["jaxprune.tensors"] + texts["jaxprune.user"]).encode())
    assert (texts["jaxprune"], int(texts["jaxprune.crc32"], 16)) == ("1", crc)
    body = {name: data[slice(*(start + at for at in entry["data_offsets"]))] for name, entry in header.items()}
    return {name: tensor(name, record, body[name]) for name, record in json.loads(texts["jaxprune.tensors"]).items()}


def tensor(name, record, body):
    kind, count, shape = record.get("values", "raw"), record["count"], tuple(record["shape"])
    dtype, streams = np.dtype(getattr(ml_dtypes, record["dtype"], record["dtype"])), {}
    assert int(record["crc32"], 16) == zlib.crc32(body)
    for part, coder, stored, size in record["parts"]:
        found, body = body[:stored] if coder == "raw" else zlib.decompress(body[:stored], -15), body[stored:]
        planes = int(coder[6:]) if coder.startswith("planes") else 1
        streams[part] = np.frombuffer(found, np.uint8).reshape(planes, size // planes).T.tobytes()
        if part == "codes":
            codes = unpacked(streams[part], int(kind[-1]) if coder == "raw" else 8, count)
    places = positions(record["encoding"], streams, shape, count)
    values = np.frombuffer(streams.get("values", b""), dtype)
    if kind.startswith("codebook"):
        values = np.frombuffer(streams["table"], dtype)[codes]
    elif kind.startswith("int"):
        scale = np.frombuffer(streams["scale"], "<f4").reshape(record.get("scale_shape", ()))
        zero = np.frombuffer(streams.get("zero", bytes(scale.size)), np.int8).reshape(scale.shape)
        scale, zero = (np.broadcast_to(one, shape).reshape(-1)[places] for one in (scale, zero))
        values = (np.float32(codes - 2 ** (int(kind[-1]) - 1) - zero) * scale).astype(dtype)
    weight, mask = np.zeros(math.prod(shape), dtype), np.zeros(math.prod(shape), bool)
    alive = np.array([bool(value) for value in values], bool) | (record.get("alive", "stored") == "stored")
    weight[places], mask[places] = values, alive
    return record.get("path", name.split("/")), weight.reshape(shape), mask.reshape(shape)


def unpacked(data, width, count):
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=width * count)
    return bits.reshape(-1, width) @ (1 << np.arange(width)[::-1])


def positions(encoding, streams, shape, count):
    grid, numbers = np.arange(math.prod(shape)), [int(number) for number in re.findall("[0-9]+", encoding)]
    if encoding == "bitmask":
        return np.flatnonzero(unpacked(streams["mask"], 1, grid.size))
    if encoding.startswith("csr"):
        ends, columns = np.frombuffer(streams["ends"], "<u4"), np.frombuffer(streams["columns"], f"<u{numbers[0] // 8}")
        return np.repeat(np.arange(len(ends)) * shape[-1], np.diff(ends, prepend=np.uint32(0))) + columns
    if encoding.startswith("gaps"):
        codes = unpacked(streams["gaps"], numbers[0], 8 * len(streams["gaps"]) // numbers[0])
        stored = codes < 2 ** numbers[0] - 1
        return (np.cumsum(codes + stored) - 1)[stored][:count]
    if encoding.startswith("nm"):
        runs = np.moveaxis(grid.reshape(shape), numbers[2], -1).reshape(-1, numbers[1])
        places = unpacked(streams["places"], (numbers[1] - 1).bit_length(), count).reshape(-1, numbers[0])
        return np.take_along_axis(runs, places, 1).reshape(-1)
    if encoding.startswith("block"):
        down, right = math.prod(shape[:-1]) // numbers[0], shape[-1] // numbers[1]
        tiles = grid.reshape(down, numbers[0], right, numbers[1]).swapaxes(1, 2).reshape(down * right, *numbers)
        return tiles[unpacked(streams["tiles"], 1, len(tiles)) > 0].reshape(-1)
    return grid
