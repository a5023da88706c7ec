"""Files to test storage with: leaves of every dtype, masks of every kind, and one file that has everything in it."""

import json
import math
import re
import zlib

import numpy as np
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.quantize.codes import Affine, Codebook
from jaxprune.storage import tensors
from jaxprune.storage.values import DTYPES

FLOATING = [name for name in DTYPES if "float" in name]
NAMED = ("dense", "bitmask", "csr16", "csr32", *(f"gaps{width}" for width in (2, 3, 5, 8, 11, 16)))
"""Encodings that any matrix has."""


def bits_of(array):
    """dtype, shape and every bit, for comparing."""
    array = np.asarray(array)
    return array.dtype.name, array.shape, array.tobytes()


def filled(rng, dtype, shape):
    """Random bits: NaNs of every payload, infinities, denormals, -0.0; no +0."""
    if dtype == "bool":
        return np.ones(shape, bool)
    dtype = DTYPES[dtype]
    raw = np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), f"u{dtype.itemsize}").copy()
    special = [1, 2 ** (8 * dtype.itemsize - 1), 2 ** (8 * dtype.itemsize) - 1]  # smallest denormal, -0.0, a NaN
    raw[: len(special)] = special[: len(raw)]
    raw[raw == 0] = 1
    return raw.view(dtype).reshape(shape)


def pruned(rng, dtype, shape, sparsity):
    """(weights, mask) with dead weights at random places."""
    alive = rng.random(shape) >= sparsity
    leaf = filled(rng, dtype, shape)
    return np.where(alive, leaf, np.zeros((), leaf.dtype)), np.asarray(alive)


def structured(rng, encoding, shape):
    """A mask that an N:M or block encoding has."""
    numbers = [int(number) for number in re.findall("[0-9]+", encoding)]
    if encoding.startswith("nm"):
        n, m, axis = numbers
        before, size, after = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
        runs = rng.permuted(np.broadcast_to(np.arange(m) < n, (before, after, size // m, m)), axis=-1)
        return np.moveaxis(runs.reshape(before, after, size), 1, 2).reshape(shape)
    rows, cols = numbers
    live = rng.random((math.prod(shape[:-1]) // rows, shape[-1] // cols)) < 0.4
    return np.kron(live, np.ones((rows, cols))).astype(bool).reshape(shape)


def affine(rng, shape, alive, *, bits=8, dtype="float32", per_output=False, zeros=False):
    """A quantized leaf with random codes; dead ones are those of 0."""
    scale_shape = (*(1 for _ in shape[:-1]), shape[-1]) if per_output and shape else ()
    half = 2 ** (bits - 1)
    zero = rng.integers(-half, half, scale_shape) if zeros else np.zeros(scale_shape)
    zero = np.asarray(zero, np.int8)
    codes = np.where(alive, rng.integers(-half, half, shape), zero).astype(np.int8)
    scale = np.asarray(rng.uniform(1e-4, 1e-2, scale_shape), np.float32)
    return Affine(codes, scale, zero, bits, np.asarray(alive), DTYPES[dtype])


def codebook(rng, shape, alive, *, bits=4, dtype="float32"):
    """A quantized leaf with random codes; dead ones are 0."""
    codes = np.where(alive, rng.integers(0, 2**bits, shape), 0).astype(np.uint8)
    return Codebook(codes, filled(rng, dtype, (2**bits,)), bits, np.asarray(alive))


@st.composite
def shapes(draw, least=0, most=5):
    """Of scalars to five axes, some empty, with at most a few thousand weights."""
    ndim = draw(st.integers(least, most))
    largest = (1, 40, 12, 8, 5, 4)[ndim]
    return tuple(draw(st.lists(st.integers(0, largest), min_size=ndim, max_size=ndim)))


def everything(rng=None, scale=1):
    """(params, rules of encodings): a leaf of every encoding, kind, and many a dtype."""
    rng = rng or np.random.default_rng(0)
    params, rules = {}, {}

    def add(name, leaf, encoding="auto"):
        params[name], rules[name] = leaf, encoding

    for number, encoding in enumerate(NAMED):
        add(f"raw_{encoding}", pruned(rng, list(DTYPES)[number % len(DTYPES)], (4, 3 * scale), 0.6)[0], encoding)
    for encoding in ("nm2:4@0", "nm1:4@1", "block2x2", "block1x4"):
        mask = structured(rng, encoding, (4, 4 * scale))
        add(f"raw_{encoding}", np.where(mask, filled(rng, "float32", mask.shape), np.float32(0)), encoding)
    for encoding in ("bitmask", "gaps3", "csr16"):
        alive = rng.random((3, 4 * scale)) < 0.5
        add(f"int4_{encoding}", affine(rng, alive.shape, alive, bits=4, per_output=True, zeros=True), encoding)
        add(f"int8_{encoding}", affine(rng, alive.shape, alive), encoding)
        add(f"codebook_{encoding}", codebook(rng, alive.shape, alive, bits=3, dtype="bfloat16"), encoding)
    add("deflated_planes", np.round(rng.normal(size=40 * scale), 1).astype(np.float32), "dense")
    add("deflated_bytes", np.repeat(np.arange(4, dtype=np.uint8), 20 * scale), "dense")
    add("deflated_codes", codebook(rng, (20, 8), np.ones((20, 8), bool) & (np.arange(8) < 2), bits=8), "gaps8")
    add("scalar", np.float32(-0.0))
    add("empty", np.zeros((0, 3), np.float16))
    return params, rules


def everything_file(path, **kwargs):
    """Writes `everything`; hands back the params."""
    params, rules = everything(**kwargs)
    jp.save(path, params, encoding=rules, signed_zeros=True, metadata={"accuracy": 0.5})
    return params


def rewritten(data, change):
    """A file's bytes with another description, whose checksum is right again.

    Args:
        data: of the file.
        change: a function that changes (records, header) in place.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    texts = header["__metadata__"]
    records = json.loads(texts["jaxprune.tensors"])
    change(records, header)
    texts["jaxprune.tensors"] = json.dumps(records)
    texts["jaxprune.crc32"] = f"{zlib.crc32((texts['jaxprune.tensors'] + texts['jaxprune.user']).encode()):08x}"
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[start:]


def encode(*arguments, **options):
    """The record, and its bytes in one piece."""
    record, pieces = tensors.encode(*arguments, **options)
    return record, b"".join(pieces)


def dense_of(leaf):
    """The array that a leaf stands for."""
    return leaf.dequantize() if hasattr(leaf, "dequantize") else np.asarray(leaf)
