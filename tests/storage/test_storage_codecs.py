"""Codecs: every bit and every mask comes back, and bytes are counted before they are made."""

import collections
import json
import math
import re
from typing import Any, NamedTuple

import equinox as eqx
import flax
import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from storage_helpers import (
    FLOATING,
    NAMED,
    affine,
    bits_of,
    codebook,
    encode,
    filled,
    pruned,
    shapes,
    structured,
)

import jaxprune as jp
from jaxprune.storage import bits, encodings, records, streams
from jaxprune.storage.container import Problem
from jaxprune.storage.encodings import pattern_of, stored_bytes
from jaxprune.storage.passes import nonzero
from jaxprune.storage.tensors import Stored
from jaxprune.storage.values import DTYPES
from jaxprune.storage.values import bits_of as bits_of_values

SEEDS = st.integers(0, 2**32 - 1)
SPARSITIES = st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]) | st.floats(0, 1)
RUNS = ("nm1:2@0", "nm2:4@1", "nm3:7@2", "nm1:256@0", "nm5:5@1")
TILES = ("block1x1", "block2x2", "block4x4", "block1x8", "block3x5", "block64x512")


def fitting(alive):
    """Encodings that a mask has, of all of them."""
    return [name for name in (*NAMED, *RUNS, *TILES, "auto") if name == "auto" or not pattern_of(name).why_not(alive)]


def stored(leaf, mask, encoding, deflate):
    """What comes back of a leaf; its record checked as that of a foreign file is."""
    record, blob = encode(("w",), leaf, mask, encoding, deflate=deflate)
    record = records.from_json(json.loads(json.dumps(record.to_json("w"))), "w")
    records.check(record, len(blob))
    return Stored(record, blob)


def check_back(back, leaf, mask):
    """Array, mask and non-zeros, bit for bit."""
    array = leaf if isinstance(leaf, np.ndarray) else leaf.dequantize()
    assert bits_of(back.array()) == bits_of(array)
    assert bits_of(back.mask()) == bits_of(mask)
    places, values = back.nonzeros()
    flat, kept = array.reshape(-1), nonzero(array).reshape(-1)
    assert places.tolist() == np.flatnonzero(kept).tolist()
    assert bits_of(values) == bits_of(flat[kept])


@settings(max_examples=150)
@given(SEEDS, st.sampled_from(list(DTYPES)), shapes(), SPARSITIES, st.data(), st.booleans())
def test_every_bit_comes_back(seed, dtype, shape, sparsity, data, deflate):
    leaf, mask = pruned(np.random.default_rng(seed), dtype, shape, sparsity)
    encoding = data.draw(st.sampled_from(fitting(mask)))
    back = stored(leaf, None, encoding, deflate)
    check_back(back, leaf, nonzero(leaf))
    assert bits_of(back.leaf()) == bits_of(leaf)


@settings(max_examples=60)
@given(SEEDS, st.sampled_from(list(DTYPES)), st.sampled_from(RUNS + TILES), st.booleans())
def test_every_bit_comes_back_of_runs_and_tiles(seed, dtype, encoding, deflate):
    rng = np.random.default_rng(seed)
    shape = {"nm1:256@0": (512, 3), "nm3:7@2": (2, 3, 14, 2), "block64x512": (4, 32, 512)}.get(encoding, (6, 20, 40))
    mask = structured(rng, encoding, shape) & (rng.random(shape) < rng.choice([0.7, 1.0]))
    leaf = np.where(mask, filled(rng, dtype, shape), np.zeros((), DTYPES[dtype]))
    check_back(stored(leaf, None, encoding, deflate), leaf, nonzero(leaf))


@settings(max_examples=60)
@given(SEEDS, st.sampled_from(FLOATING), shapes(least=1), SPARSITIES, st.data(), st.booleans())
def test_every_code_comes_back(seed, dtype, shape, sparsity, data, deflate):
    rng = np.random.default_rng(seed)
    mask = np.asarray(rng.random(shape) >= sparsity)
    if data.draw(st.booleans()):
        leaf = codebook(rng, shape, mask, bits=data.draw(st.integers(1, 8)), dtype=dtype)
    else:
        kind = {"bits": data.draw(st.sampled_from([4, 8])), "per_output": data.draw(st.booleans())}
        leaf = affine(rng, shape, mask, dtype=dtype, zeros=data.draw(st.booleans()), **kind)
    exact = [name for name in fitting(mask) if name == "auto" or encodings.stores_just(pattern_of(name), mask)]
    back = stored(leaf, data.draw(st.sampled_from([None, mask])), data.draw(st.sampled_from(exact)), deflate)
    check_back(back, leaf, mask)
    found = back.leaf()
    for field, value in vars(leaf).items():
        assert bits_of(getattr(found, field)) == bits_of(value) if field != "dtype" else found.dtype == leaf.dtype


@settings(max_examples=60)
@given(SEEDS, st.sampled_from(["float32", "bfloat16", "int8"]), shapes(), SPARSITIES, st.data(), st.booleans())
def test_living_zeros_stay_alive(seed, dtype, shape, sparsity, data, deflate):
    rng = np.random.default_rng(seed)
    leaf, mask = pruned(rng, dtype, shape, sparsity)
    leaf = np.where(rng.random(shape) < 0.5, leaf, np.zeros((), leaf.dtype))
    encoding = data.draw(st.sampled_from(fitting(mask)))
    loses = encoding != "auto" and not encodings.stores_just(pattern_of(encoding), mask)
    if loses and not np.array_equal(nonzero(leaf), mask):
        with pytest.raises(Problem, match=r"would lose the mask.*Choose \"auto\""):
            stored(leaf, mask, encoding, deflate)
    else:
        check_back(stored(leaf, mask, encoding, deflate), leaf, mask)


def test_codes_of_dead_weights_that_are_not_zero_mean_nothing():
    rng = np.random.default_rng(0)
    mask = rng.random((8, 8)) < 0.5
    leaf = codebook(rng, (8, 8), np.ones((8, 8), bool))
    leaf = type(leaf)(leaf.codes, leaf.values, leaf.bits, mask)
    back = stored(leaf, None, "bitmask", True)
    check_back(back, leaf, mask)
    assert not back.leaf().codes[~mask].any()


def test_a_quantized_leaf_has_its_own_mask_only():
    rng = np.random.default_rng(0)
    mask = rng.random((8, 8)) < 0.5
    for leaf in (codebook(rng, (8, 8), mask), affine(rng, (8, 8), mask)):
        for other in (np.ones((8, 8), bool), mask & (np.arange(8) > 3)):
            with pytest.raises(Problem, match="another mask"):
                encode(("w",), leaf, other, "auto", deflate=True)


@pytest.mark.parametrize("change", [{"codes": 16}, {"bits": 9}, {"values": 15}])
def test_codebooks_that_mean_nothing(change):
    rng, alive = np.random.default_rng(0), np.ones((4, 4), bool)
    leaf = codebook(rng, (4, 4), alive)
    codes = leaf.codes + np.uint8(change.get("codes", 0))
    with pytest.raises(Problem):
        encode(
            ("w",),
            type(leaf)(codes, leaf.values[: change.get("values")], change.get("bits", 4), alive),
            None,
            "auto",
            deflate=False,
        )


@pytest.mark.parametrize(
    "change",
    [{"codes": 8}, {"bits": 5}, {"scale": np.nan}, {"scale": 0.0}, {"scale": -1.0}, {"shape": (4,)}, {"dtype": "bool"}],
)
def test_integers_that_mean_nothing(change):
    scale = np.full(change.get("shape", ()), change.get("scale", 1.0), np.float32)
    codes, alive = np.full((4, 4), change.get("codes", 0), np.int8), np.ones((4, 4), bool)
    dtype = np.dtype(change.get("dtype", "float32"))
    leaf = type(affine(np.random.default_rng(0), (), np.bool_(True)))(
        codes, scale, np.zeros(scale.shape, np.int8), change.get("bits", 4), alive, dtype
    )
    with pytest.raises(Problem):
        encode(("w",), leaf, None, "auto", deflate=False)


# ---- bytes


def oracle_bytes(encoding, alive, width):
    """Of a tensor whose values have `width` bits, weight by weight, from the page of the format."""
    flat, numbers = alive.reshape(-1).tolist(), [int(number) for number in re.findall("[0-9]+", encoding)]
    living, rows = sum(flat), math.prod(alive.shape[:-1])
    if encoding == "dense":
        return math.ceil(len(flat) * width / 8)
    if encoding == "bitmask":
        return math.ceil(len(flat) / 8) + math.ceil(living * width / 8)
    if encoding.startswith("csr"):
        return 4 * rows + numbers[0] // 8 * living + math.ceil(living * width / 8)
    if encoding.startswith("gaps"):
        skip = 2 ** numbers[0] - 1
        codes = sum(gap // skip + 1 for gap in gaps(flat))
        return math.ceil(codes * numbers[0] / 8) + math.ceil(living * width / 8)
    if encoding.startswith("nm"):
        slots = len(flat) // numbers[1] * numbers[0]
        return math.ceil(slots * math.ceil(math.log2(numbers[1])) / 8) + math.ceil(slots * width / 8)
    matrix, tiles = alive.reshape(rows, alive.shape[-1]), [0, 0]
    for i in range(0, rows, numbers[0]):
        for j in range(0, alive.shape[-1], numbers[1]):
            tiles[int(matrix[i : i + numbers[0], j : j + numbers[1]].any())] += 1
    return math.ceil(sum(tiles) / 8) + math.ceil(tiles[1] * numbers[0] * numbers[1] * width / 8)


def gaps(flat):
    gap = 0
    for one in flat:
        if one:
            yield gap
        gap = 0 if one else gap + 1


@settings(max_examples=40)
@given(SEEDS, st.sampled_from(["float32", "bfloat16", "int8"]), shapes(), SPARSITIES)
@example(0, "int8", (7, 7, 64), 0.6)
def test_bytes_are_those_of_the_formula(seed, dtype, shape, sparsity):
    leaf, mask = pruned(np.random.default_rng(seed), dtype, shape, sparsity)
    written = {}
    for encoding in fitting(mask):
        _, blob = encode(("w",), leaf, None, encoding, deflate=False)
        written[encoding] = len(blob)
        if encoding != "auto":
            assert len(blob) == stored_bytes(pattern_of(encoding), mask, bits_of_values(leaf)), encoding
            assert len(blob) == oracle_bytes(encoding, mask, 8 * leaf.dtype.itemsize), encoding
    assert len(encode(("w",), leaf, None, "auto", deflate=True)[1]) <= written["auto"]
    for encoding in candidates(mask):
        if not pattern_of(encoding).why_not(mask):
            assert written["auto"] <= oracle_bytes(encoding, mask, 8 * leaf.dtype.itemsize), encoding


def candidates(mask):
    """What "auto" is held against besides: every width of gaps, usual runs along every axis, usual tiles."""
    runs = [f"nm{n}:{m}@{axis}" for axis in range(mask.ndim) for n, m in ((1, 4), (2, 4), (2, 8), (4, 8))]
    tiles = [f"block{rows}x{cols}" for rows, cols in ((4, 4), (8, 8), (16, 16), (1, 8), (8, 1), (1, 16), (16, 1))]
    return [*(f"gaps{width}" for width in range(2, 17)), *runs, *tiles]


@pytest.mark.parametrize("encoding", ["nm1:4@0", "nm2:8@1", "block4x4", "block1x8", "block8x8"])
def test_auto_finds_structure(encoding):
    mask = structured(np.random.default_rng(0), encoding, (64, 64))
    leaf = np.where(mask, np.float32(1.5), np.float32(0))
    assert encode(("w",), leaf, None, "auto", deflate=False)[0].encoding == encoding


@settings(max_examples=40)
@given(SEEDS, shapes(least=1), SPARSITIES, st.integers(1, 8))
def test_bytes_of_codes_are_those_of_the_formula(seed, shape, sparsity, width):
    rng = np.random.default_rng(seed)
    mask = np.asarray(rng.random(shape) >= sparsity)
    leaf = codebook(rng, shape, mask, bits=width)
    for encoding in ("bitmask", "gaps3", "auto"):
        record, blob = encode(("w",), leaf, mask, encoding, deflate=False)
        assert len(blob) == oracle_bytes(record.encoding, mask, width) + 4 * 2**width


SIZES = {"conv": (3, 3, 8, 16), "dense": (128, 40), "out": (40, 10), "bias": (40,), "scale": (16,), "step": ()}


@pytest.mark.parametrize("sparsity", [0, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_file_is_never_larger_than_dense_and_4_kib(tmp_path, dtype, sparsity):
    rng = np.random.default_rng(0)
    params = {name: pruned(rng, dtype, shape, sparsity)[0] for name, shape in SIZES.items()}
    for deflate in (True, False):
        jp.save(tmp_path / "file", params, deflate=deflate)
        dense = sum(leaf.nbytes for leaf in params.values())
        assert (tmp_path / "file").stat().st_size <= dense + 4096


# The page of the format says from which sparsity on an encoding takes fewer bytes than dense, in float32.
PAYS = {
    "bitmask": 1 / 32,
    "csr16": 1 / 3 + 2 / (3 * 512),
    "csr32": 1 / 2 + 1 / (2 * 512),
    "gaps2": 0.059,
    "gaps3": 0.086,
}
PAYS |= {"gaps4": 0.111, "gaps5": 0.135, "gaps6": 0.158, "gaps8": 0.2, "gaps12": 0.273, "gaps16": 0.333}
BEATS_BITMASK = {"gaps2": 0.618, "gaps3": 0.692, "gaps4": 0.754, "gaps5": 0.8, "gaps8": 0.875, "gaps16": 0.938}


@pytest.mark.parametrize(("encoding", "sparsity"), PAYS.items())
def test_where_an_encoding_begins_to_pay(encoding, sparsity):
    order = np.random.default_rng(0).permutation(512 * 512)
    below, above = ((order >= round((sparsity + change) * order.size)).reshape(512, 512) for change in (-0.003, 0.003))
    assert (
        stored_bytes(pattern_of(encoding), below, 32) > 4 * order.size > stored_bytes(pattern_of(encoding), above, 32)
    )


@pytest.mark.parametrize(("encoding", "sparsity"), BEATS_BITMASK.items())
def test_where_gaps_begin_to_beat_bits(encoding, sparsity):
    order, bitmask = np.random.default_rng(0).permutation(512 * 512), pattern_of("bitmask")
    below, above = ((order >= round((sparsity + change) * order.size)).reshape(512, 512) for change in (-0.01, 0.01))
    assert stored_bytes(pattern_of(encoding), below, 32) > stored_bytes(bitmask, below, 32)
    assert stored_bytes(pattern_of(encoding), above, 32) < stored_bytes(bitmask, above, 32)


# ---- bits and streams


@given(SEEDS, st.integers(1, 16), st.integers(0, 70), st.data())
def test_codes_side_by_side(seed, width, count, data):
    codes = np.random.default_rng(seed).integers(0, 2**width, count).astype(np.uint16)
    packed = bits.pack(codes, width)
    text = "".join(f"{code:0{width}b}" for code in codes)
    assert "".join(f"{byte:08b}" for byte in packed) == text + "0" * (-len(text) % 8)
    assert len(packed) == bits.packed_size(count, width)
    first = data.draw(st.integers(0, count))
    last = data.draw(st.integers(first, count))
    assert bits.unpack(packed, width, first, last).tolist() == codes[first:last].tolist()


def test_many_codes_side_by_side():
    codes = np.random.default_rng(0).integers(0, 8, 2**20 + 5).astype(np.uint8)  # more than are packed at a time
    assert np.array_equal(bits.unpack(bits.pack(codes, 3), 3, 0, len(codes)), codes)


@pytest.mark.parametrize("count", [0, 1, 2**15, 2**16, 2**16 + 1])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64"])
def test_streams_of_any_length(dtype, count):
    items = np.random.default_rng(0).integers(0, 200, count).astype(dtype)
    for code in (streams.as_it_is, streams.shortest, streams.deflated):
        made = code(items)
        streams.check_size(made.coder, len(made.data), made.size)
        assert bits_of(streams.decoded(made)) == bits_of(items.view(np.uint8))
    planes = items.view(np.uint8).reshape(-1, items.itemsize).T.tobytes()
    made = streams.deflated(np.frombuffer(planes, np.uint8))._replace(coder=f"planes{items.itemsize}")
    if items.itemsize > 1:
        assert bits_of(streams.decoded(made)) == bits_of(items.view(np.uint8))


@pytest.mark.parametrize("size", [0, 100, 2**16, 100_000, 2**18])
@pytest.mark.parametrize("more", [1, 50, 2**17])
def test_bytes_behind_a_deflated_stream(size, more):
    made = streams.deflated(np.zeros(size, np.uint8))
    with pytest.raises(Problem, match="something stands behind"):
        streams.decoded(made._replace(data=made.data + bytes(more)))


@pytest.mark.parametrize("size", [1, 2**16, 2**18])
def test_deflated_streams_of_another_length(size):
    made = streams.deflated(np.arange(size).astype(np.uint8))
    for data, declared, match in (
        (made.data[:-1], size, "cut off"),
        (made.data, size - 1, "more than|not"),
        (made.data, size + 1, "not"),
        (b"\xff" + made.data, size, "damaged"),
    ):
        with pytest.raises(Problem, match=match):
            streams.decoded(made._replace(data=data, size=declared))


def test_entropy_is_that_of_shannon():
    assert streams.entropy(np.array([0, 0, 1, 1])) == 4
    assert streams.entropy(np.zeros(9)) == streams.entropy(np.zeros(0)) == 0
    counts = np.array([5, 3, 1])
    assert streams.entropy(np.repeat([1, 2, 3], counts)) == pytest.approx(-(counts * np.log2(counts / 9)).sum())


@pytest.mark.parametrize(
    "name", ["gaps1", "gaps17", "nm0:4@0", "nm5:4@0", "nm1:1@0", "nm2:257@0", "block0x1", "block256x256"]
)
def test_encodings_that_there_are_not(name):
    with pytest.raises(Problem, match="There is no encoding"):
        pattern_of(name)


# ---- trees


class Pair(NamedTuple):
    first: Any
    second: Any


class Value(NamedTuple):
    value: Any
    rest: Any


class Linear(eqx.Module):
    weight: Any
    bias: Any
    name: str = eqx.field(static=True)


def leaves(*shapes):
    rng = np.random.default_rng(0)
    return [jax.numpy.asarray(pruned(rng, "float32", shape, 0.5)[0]) for shape in shapes]


W, B, V = leaves((4, 6), (6,), (3,))
# Name -> (a tree, the one that is loaded without `like`, or None if it is the same).
TREES = {
    "array": (W, None),
    "empty": ({}, None),
    "dict": ({"layers": {"0": {"kernel": W, "bias": B}}, "head/x": V}, None),
    "odd names": ({"": W, "a b": B, "ü\n\"'\ud800": V}, None),
    "list": ([W, [B, [V]]], None),
    "tuple": ((W, ((B,), V)), None),
    "both": ({"a": [W, (B, {"c": V})]}, None),
    "long": ([V] * 12, None),
    "numbers": ({0: W, 10: {-3: B}}, None),
    "ordered": (collections.OrderedDict(b=W, a=B), {"a": B, "b": W}),
    "named": (Pair(W, [B, V]), {"first": W, "second": [B, V]}),
    "gaps": ([None, W, B], {1: W, 2: B}),
    "frozen": (flax.core.freeze({"params": {"kernel": W}}), {"params": {"kernel": W}}),
    "state": (
        nnx.State({"first": {"kernel": nnx.Param(W), "bias": nnx.Param(B)}, "layers": {0: {"scale": nnx.Param(V)}}}),
        {"first": {"kernel": W, "bias": B}, "layers": {0: {"scale": V}}},
    ),
    "variable": (nnx.Param(W), W),
    "value": ({"value": W, "a": {"value": V}}, None),
    "value of a tuple": ([Value(W, B), Value(V, None)], [{"value": W, "rest": B}, {"value": V}]),
    "module": ([Linear(W, B, "one"), Linear(V, None, "two")], [{"weight": W, "bias": B}, {"weight": V}]),
}


@pytest.mark.parametrize("kind", TREES)
def test_trees_come_back(tmp_path, kind):
    tree, plain = TREES[kind]
    jp.save(tmp_path / "file", tree, signed_zeros=True)
    alone, alike = jp.load(tmp_path / "file"), jp.load(tmp_path / "file", like=tree)
    assert jax.tree.structure(alone) == jax.tree.structure(tree if plain is None else plain)
    assert jax.tree.structure(alike) == jax.tree.structure(tree)
    for found, expected in ((alone, tree if plain is None else plain), (alike, tree)):
        assert list(map(bits_of, jax.tree.leaves(found))) == list(map(bits_of, jax.tree.leaves(expected)))
    masks = jp.load(tmp_path / "file", to="masks", like=tree)
    alive = [bits_of(nonzero(np.asarray(leaf))) for leaf in jax.tree.leaves(tree)]
    assert list(map(bits_of, jax.tree.leaves(masks))) == alive


def test_shapes_are_enough_for_like(tmp_path):
    tree = {"a": [W, (B,)]}
    jp.save(tmp_path / "file", tree)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    assert jax.tree.structure(jp.load(tmp_path / "file", like=like)) == jax.tree.structure(tree)


def test_arrays_in_any_order_of_memory(tmp_path):
    rng = np.random.default_rng(0)
    leaf = filled(rng, "float32", (6, 5, 4))
    for other in (
        np.asfortranarray(leaf),
        leaf.swapaxes(0, 2).copy().swapaxes(0, 2),
        leaf[::1, ::-1][:, ::-1],
        leaf.astype(">f4"),
    ):
        jp.save(tmp_path / "file", {"w": other}, encoding="bitmask", signed_zeros=True)
        assert bits_of(jp.load(tmp_path / "file")["w"]) == bits_of(leaf)


def test_64_bits_are_not_cut_off(tmp_path):
    params = {name: filled(np.random.default_rng(0), name, (3, 4)) for name in ("int64", "uint64", "float64")}
    jp.save(tmp_path / "file", params, signed_zeros=True)
    assert {name: bits_of(leaf) for name, leaf in jp.load(tmp_path / "file").items()} == {
        name: bits_of(leaf) for name, leaf in params.items()
    }
