"""Zeros in a file: dead whatever their sign, as small as +0.0, and with their sign where that is asked for."""

import npreader
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_helpers import FLOATING, NAMED, bits_of, filled, structured

import jaxprune as jp
from jaxprune.sparse import decompress
from jaxprune.storage import Artifact, container
from jaxprune.storage.values import DTYPES

STRUCTURED = ("nm2:4@0", "nm1:4@1", "block2x2", "block1x4")
ENCODINGS = ("auto", *NAMED, *STRUCTURED)


@np.errstate(invalid="ignore")  # of NaNs that are compared, says ml_dtypes
def masked(seed, dtype, encoding="auto", shape=(8, 12)):
    """(w * mask as NumPy and PyTorch compute it, the mask); no living weight is zero, about half of the others -0.0."""
    rng = np.random.default_rng(seed)
    mask = structured(rng, encoding, shape) if encoding in STRUCTURED else rng.random(shape) < 0.4
    weights = filled(rng, dtype, shape)
    weights = np.where(weights == 0, np.ones((), weights.dtype), weights)
    zeros = np.where(
        rng.random(shape) < 0.5, np.zeros((), weights.dtype), np.zeros((), weights.dtype) * np.float32(-1).astype(dtype)
    )
    return np.where(mask, weights, zeros), np.asarray(mask)


@np.errstate(invalid="ignore")
def clean(weights):
    return np.where(weights == 0, np.zeros((), weights.dtype), weights)


@given(st.integers(0, 2**32 - 1), st.sampled_from(FLOATING), st.sampled_from(ENCODINGS), st.booleans(), st.booleans())
def test_they_take_no_room_and_come_back_positive(tmp_path_factory, seed, dtype, encoding, deflate, give_masks):
    folder = tmp_path_factory.getbasetemp()
    leaf, mask = masked(seed, dtype, encoding)
    assert bits_of(leaf) != bits_of(clean(leaf))
    how = {"encoding": encoding, "deflate": deflate, "masks": {"kernel": mask} if give_masks else None}
    jp.save(folder / "file", {"kernel": leaf}, **how)
    jp.save(folder / "clean", {"kernel": clean(leaf)}, **how)
    data = (folder / "file").read_bytes()
    assert data == (folder / "clean").read_bytes()
    assert bits_of(jp.load(folder / "file")["kernel"]) == bits_of(clean(leaf))
    assert bits_of(jp.load(folder / "file", to="masks")["kernel"]) == bits_of(mask)
    assert [*map(bits_of, npreader.read(data)["kernel"][1:])] == [bits_of(clean(leaf)), bits_of(mask)]


@given(st.integers(0, 2**32 - 1), st.sampled_from(FLOATING), st.sampled_from(ENCODINGS), st.booleans(), st.booleans())
def test_signs_are_kept_on_request_and_zeros_are_as_dead(tmp_path_factory, seed, dtype, encoding, deflate, give_masks):
    folder = tmp_path_factory.getbasetemp()
    leaf, mask = masked(seed, dtype, "auto" if encoding in STRUCTURED else encoding)
    encoding = "auto" if encoding in STRUCTURED else encoding
    how = {"encoding": encoding, "deflate": deflate, "masks": {"kernel": mask} if give_masks else None}
    jp.save(folder / "file", {"kernel": leaf}, signed_zeros=True, **how)
    assert bits_of(jp.load(folder / "file")["kernel"]) == bits_of(leaf)
    assert bits_of(jp.load(folder / "file", to="masks")["kernel"]) == bits_of(mask)
    found = npreader.read((folder / "file").read_bytes())["kernel"][1:]
    assert [*map(bits_of, found)] == [bits_of(leaf), bits_of(mask)]


@pytest.mark.parametrize("signed_zeros", [False, True])
@pytest.mark.parametrize("encoding", ["auto", "bitmask", "csr16", "gaps3"])
def test_a_living_zero_of_either_sign_stays_alive(tmp_path, encoding, signed_zeros):
    leaf = np.float32([[0, -0.0, 1], [2, -0.0, 0]])
    masks = {"kernel": np.array([[True, True, True], [True, False, False]])}
    leaf[1, 1] = 0
    jp.save(tmp_path / "file", {"kernel": leaf}, masks=masks, encoding=encoding, signed_zeros=signed_zeros)
    assert bits_of(jp.load(tmp_path / "file", to="masks")["kernel"]) == bits_of(masks["kernel"])
    expected = leaf if signed_zeros else clean(leaf)
    assert bits_of(jp.load(tmp_path / "file")["kernel"]) == bits_of(expected)


def test_a_dead_negative_zero_beside_a_living_zero(tmp_path):
    leaf, masks = np.float32([0, -0.0, 1]), {"w": np.array([True, False, True])}
    with pytest.raises(ValueError, match=r"Leaf 'w': a zero is alive and a -0.0 is dead.*Leave out `signed_zeros`"):
        jp.save(tmp_path / "file", {"w": leaf}, masks=masks, signed_zeros=True)
    jp.save(tmp_path / "file", {"w": leaf}, masks=masks)
    assert bits_of(jp.load(tmp_path / "file", to="masks")["w"]) == bits_of(masks["w"])


@pytest.mark.parametrize("format", ["bcoo", "bcsr", "native"])
def test_no_sparse_format_stores_them(tmp_path, format):
    leaf, mask = masked(0, "float32", shape=(16, 12))
    leaf = np.where(np.isfinite(leaf), leaf, np.float32(1))
    for signed_zeros in (False, True):
        jp.save(tmp_path / "file", {"kernel": leaf}, signed_zeros=signed_zeros)
        weight = jp.load(tmp_path / "file", to=format)["kernel"]
        assert weight.values.size == mask.sum()
        assert bits_of(decompress({"kernel": weight})["kernel"]) == bits_of(clean(leaf))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_masks_of_plain_safetensors(tmp_path, dtype):
    """As PyTorch writes them after `w * mask`."""
    leaf, mask = masked(1, dtype)
    container.write(tmp_path / "file", {"layer.weight": container.blob_of(leaf)}, {"format": "pt"})
    assert bits_of(jp.load(tmp_path / "file")["layer.weight"]) == bits_of(leaf)
    assert bits_of(jp.load(tmp_path / "file", to="masks")["layer.weight"]) == bits_of(mask)


def test_real_and_imaginary_parts(tmp_path):
    weights = (np.random.default_rng(0).normal(size=(8, 6)) * (1 + 1j)).astype(np.complex64)
    mask = np.arange(48).reshape(8, 6) % 3 == 0
    parts = {"real": (weights * mask).real, "imag": (weights * mask).imag}
    jp.save(tmp_path / "file", parts)
    for part in parts:
        assert bits_of(jp.load(tmp_path / "file", to="masks")[part]) == bits_of(mask)
        assert not np.signbit(np.asarray(jp.load(tmp_path / "file")[part])[~mask]).any()


def test_large_leaves_in_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxprune.storage.passes._LOOK", 16)
    leaf = np.ones(100, np.float32)
    leaf[77] = -0.0
    jp.save(tmp_path / "file", {"w": leaf})
    with Artifact(tmp_path / "file") as file:
        assert not file.read("w").mask()[77]
    assert bits_of(jp.load(tmp_path / "file")["w"]) == bits_of(clean(leaf))
    assert leaf[77:78].view(np.uint32) == 2**31  # what was handed in is not written to


def test_whole_numbers_have_no_sign_to_lose(tmp_path):
    params = {name: np.array([-128 if name.startswith("int") else 0, 0, 1]).astype(DTYPES[name]) for name in DTYPES}
    params["int8"], params["uint8"] = np.array([-128, 0, 1], np.int8), np.array([128, 0, 255], np.uint8)
    jp.save(tmp_path / "file", params)
    for name, leaf in params.items():
        assert bits_of(jp.load(tmp_path / "file")[name]) == bits_of(leaf)
        assert bits_of(jp.load(tmp_path / "file", to="masks")[name]) == bits_of(leaf != 0)
