"""From a file straight to a sparse format: what `sparse.compress` makes of the dense leaves, without making those."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from storage_helpers import affine, bits_of, codebook, pruned

import jaxprune as jp
from jaxprune.layout import FLAX, TORCH
from jaxprune.sparse import FORMATS
from jaxprune.storage import tensors

pytestmark = pytest.mark.usefixtures("quick")

RNG = np.random.default_rng(0)


def finite(shape, sparsity=0.8, dtype="float32"):
    leaf = np.where(RNG.random(shape) >= sparsity, RNG.normal(size=shape), 0).astype(np.float32)
    return leaf.astype(jnp.dtype(dtype))


def compare(path, format, **kwargs):
    """The loaded tree against the compressed one; whether either refuses, by the same word."""
    dense = jp.load(path)
    try:
        expected = jp.sparse.compress(dense, format, **kwargs)
    except ValueError as error:
        with pytest.raises(ValueError, match=r"has no such form|is a convolution kernel|stacked|NaN"):
            jp.load(path, to=format, **kwargs)
        return str(error)
    found = jp.load(path, to=format, **kwargs)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert list(map(bits_of, jax.tree.leaves(found))) == list(map(bits_of, jax.tree.leaves(expected)))
    return ""


@pytest.mark.parametrize("format", [name for name, one in FORMATS.items() if not one.calibrated])
@pytest.mark.parametrize("layout", [FLAX, TORCH], ids=["flax", "torch"])
def test_it_is_what_compress_makes(tmp_path, format, layout):
    conv = (3, 2, 8, 64) if layout is FLAX else (64, 8, 3, 2)
    params = {
        "matrix": {"kernel": finite((64, 32)), "bias": finite((32,))},
        "conv": {"kernel": finite(conv), "bias": finite((64,))},
        "tall": finite((96, 4)),
        "zeros": np.zeros((32, 4), np.float32),
        "embedding": finite((32, 4)),
        "steps": np.arange(6, dtype=np.int32).reshape(2, 3),
    }
    jp.save(tmp_path / "file", params)
    assert compare(tmp_path / "file", format, layout=layout, unsupported="dense") == ""
    matrices = {"matrix/kernel": True, "tall": True}
    compare(tmp_path / "file", format, layout=layout, select=matrices)
    compare(tmp_path / "file", format, layout=layout)  # which most refuse because of the convolution


@pytest.mark.parametrize("encoding", ["dense", "bitmask", "csr16", "csr32", "gaps3", "block2x4", "nm2:4@0", "nm2:4@1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_every_encoding(tmp_path, encoding, dtype):
    leaf = finite((16, 24), dtype=dtype)
    if encoding.startswith("nm"):
        axis = int(encoding[-1])
        leaf = np.where(np.indices(leaf.shape)[axis] % 4 < 2, leaf, np.zeros((), leaf.dtype))
    params = {"w": leaf}
    jp.save(tmp_path / "file", params, encoding=encoding)
    for format in ("bcoo", "bcsr", "native"):
        for layout in (FLAX, TORCH):
            assert compare(tmp_path / "file", format, layout=layout) == ""


def test_of_codes(tmp_path):
    alive = RNG.random((16, 24)) < 0.3
    zero_inside = codebook(RNG, (16, 24), alive)
    zero_inside.values[:] = np.linspace(-1, 0, 16)
    params = {"shared": zero_inside, "counted": affine(RNG, (16, 24), alive, per_output=True, zeros=True)}
    jp.save(tmp_path / "file", params)
    assert compare(tmp_path / "file", "bcsr", layout=FLAX) == ""


def test_negative_zeros_are_no_weights(tmp_path):
    leaf = finite((8, 8))
    leaf[0] = -0.0
    jp.save(tmp_path / "file", {"w": leaf})
    assert compare(tmp_path / "file", "bcsr") == ""


def test_nan_is_refused(tmp_path):
    leaf, _ = pruned(RNG, "float32", (8, 8), 0.5)
    leaf[0, 0] = np.nan
    jp.save(tmp_path / "file", {"w": leaf})
    assert "NaN" in compare(tmp_path / "file", "bcsr")


def test_too_many_in_a_run(tmp_path):
    params = {"w": finite((64, 8), 0.1), "w2": finite((64, 8), 0.9)}
    jp.save(tmp_path / "file", params)
    assert "16 non-zeros" in compare(tmp_path / "file", "native_nm")
    assert compare(tmp_path / "file", "native_nm", unsupported="dense") == ""
    assert isinstance(jp.load(tmp_path / "file", to="native_nm", unsupported="dense")["w"], jax.Array)


@pytest.mark.parametrize(
    ("select", "error", "match"),
    [
        ("nothing/*", ValueError, r"names 'nothing/\*', which matches no leaf"),
        (lambda *_: False, ValueError, "chooses no leaf"),
        ("steps", TypeError, "'steps' is int32, only floating"),
    ],
)
def test_selections_that_do_not_fit(tmp_path, select, error, match):
    jp.save(tmp_path / "file", {"w": finite((4, 4)), "steps": np.zeros((2, 2), np.int32)})
    with pytest.raises(error, match=match):
        jp.load(tmp_path / "file", to="bcsr", select=select)


def test_it_goes_through_like(tmp_path):
    params = {"a": [finite((8, 8)), (finite((4,)),)]}
    jp.save(tmp_path / "file", params)
    found = jp.load(tmp_path / "file", to="bcsr", like=params, layout=FLAX)
    assert isinstance(found["a"], list)
    assert isinstance(found["a"][1], tuple)
    assert bits_of(found["a"][0].decompress()) == bits_of(params["a"][0])


@pytest.mark.parametrize("format", ["bcoo", "bcsr", "native"])
@pytest.mark.parametrize("layout", [FLAX, TORCH], ids=["flax", "torch"])
@pytest.mark.parametrize("shape", [(4096, 1024), (3, 3, 512, 1024)])
def test_nothing_dense_is_made(tmp_path, monkeypatch, unchecked, format, layout, shape):
    if len(shape) > 2 and not FORMATS[format].convolves:
        return
    shape = shape if layout is FLAX else shape[::-1]
    leaf = np.zeros(shape, np.float32)
    leaf.reshape(-1)[RNG.choice(leaf.size, leaf.size // 500, replace=False)] = 1.5
    jp.save(tmp_path / "file", {"w": leaf}, encoding="gaps8")
    for made in ("array", "mask", "leaf"):
        monkeypatch.setattr(tensors.Stored, made, lambda *_: pytest.fail("something dense was made"))
    tracemalloc.start()
    try:
        found = jp.load(tmp_path / "file", to=format, layout=layout)["w"]
        assert tracemalloc.get_traced_memory()[1] < leaf.nbytes / 4
    finally:
        tracemalloc.stop()
    assert found.nse >= leaf.size // 500
