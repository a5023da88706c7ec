"""One pass over memory: bits and non-zeros as NumPy has them, in C++ and without, in parts and whole."""

import ml_dtypes
import numpy as np
import pytest

from jaxprune import native
from jaxprune.storage import passes
from jaxprune.storage.container import Problem
from jaxprune.storage.encodings import pattern_of

SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 1000)
DTYPES = ("bool", "int8", "float16", ml_dtypes.bfloat16, "float32", "int32", "float64")


@pytest.fixture(params=["C++", "NumPy"], autouse=True)
def means(request, monkeypatch):
    if request.param == "NumPy":
        monkeypatch.setattr(native, "why_not_loaded", lambda: "not built")
    elif native.why_not_loaded():
        pytest.skip("the kernels were not built")


@pytest.fixture(params=[64, 2**22])
def part(request, monkeypatch):
    monkeypatch.setattr(passes, "_PART", request.param)


def weights(count, dtype, sparsity, seed=0):
    rng = np.random.default_rng(seed)
    found = rng.integers(1, 2 if dtype == "bool" else 100, count).astype(dtype)
    found[rng.random(count) < sparsity] = 0
    return found


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("sparsity", [0.5, 0.97])
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(dtype, sparsity):
    for count in SIZES:
        dense = weights(count, dtype, sparsity, count)
        bits, values = passes.gather(dense)
        np.testing.assert_array_equal(bits, np.packbits(dense != 0))
        assert (values.dtype, values.tobytes()) == (dense.dtype, dense[dense != 0].tobytes())
        back = passes.spread(bits, values, count)
        assert back is not None
        assert (back.dtype, back.tobytes()) == (dense.dtype, dense.tobytes())


@pytest.mark.parametrize("sparsity", [0, 1])
def test_all_and_none(sparsity):
    dense = weights(130, "float32", sparsity)
    bits, values = passes.gather(dense)
    assert (len(values), np.bitwise_count(bits).sum()) == (130 * (1 - sparsity), 130 * (1 - sparsity))
    back = passes.spread(bits, values, 130)
    assert back is not None
    np.testing.assert_array_equal(back, dense)


def test_a_negative_zero_and_nan_are_weights():
    dense = np.asarray([0.0, -0.0, np.nan, 0.0, 5e-324, 1.0], np.float64)
    bits, values = passes.gather(dense)
    assert bits.tolist() == [0b01101100]
    assert passes.spread(bits, values, 6).tobytes() == dense.tobytes()


@pytest.mark.parametrize("dtype", ["uint16", "float32", "float64"])
def test_values_may_begin_anywhere(dtype):
    dense = weights(1000, dtype, 0.5)
    bits, values = passes.gather(dense)
    shifted = np.frombuffer(b"x" + values.tobytes(), np.uint8)[1:].view(dtype)
    assert not shifted.flags.aligned
    assert passes.spread(bits, shifted, 1000).tobytes() == dense.tobytes()
    odd = np.frombuffer(b"x" + dense.tobytes(), np.uint8)[1:].view(dtype)
    assert passes.gather(odd)[1].tobytes() == values.tobytes()
    assert passes.gather(np.stack([dense, dense], 1)[:, 0])[1].tobytes() == values.tobytes()


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("count", [1, 8, 63, 64, 65, 200])
def test_other_numbers_of_bits_than_values_are_refused(count):
    bits, values = np.packbits(np.ones(count, bool)), np.ones(count, np.float32)
    for wrong in (values[:-1], np.ones(count + 1, np.float32), values[:0]):
        assert passes.spread(bits, wrong, count) is None
    if count % 8:  # what fills the last byte does not count
        bits[-1] |= 1
        assert passes.spread(bits, values, count).tolist() == [1] * count


POSITIONS = ("csr16", "csr32", "gaps2", "gaps3", "gaps5", "gaps8", "gaps9", "gaps13", "gaps16")
SHAPES = ((0, 3), (1, 1), (3, 5), (8, 8), (2, 3, 4), (5, 131), (40, 70))


@pytest.mark.parametrize("name", POSITIONS)
def test_bits_become_streams_and_bits_again(name, monkeypatch):
    pattern = pattern_of(name)
    for shape in SHAPES:
        for sparsity in (0, 0.5, 0.99, 1):
            alive = weights(int(np.prod(shape)), "bool", sparsity).reshape(shape)
            made = pattern.encode(np.packbits(alive), shape)
            with monkeypatch.context() as patch:
                patch.setattr(native, "why_not_loaded", lambda: "asked for NumPy")
                expected = pattern.encode(np.packbits(alive), shape)
            assert {key: one.tobytes() for key, one in made.items()} == {
                k: one.tobytes() for k, one in expected.items()
            }
            raw = {key: np.frombuffer(one.tobytes(), np.uint8) for key, one in made.items()}
            np.testing.assert_array_equal(pattern.bits(raw, shape, int(alive.sum())), np.packbits(alive))


@pytest.mark.parametrize("name", POSITIONS)
def test_damaged_streams_are_refused_where_positions_are(name):
    """Bits mean just what the positions mean that NumPy finds, one run after the other."""
    pattern, rng, refused = pattern_of(name), np.random.default_rng(0), 0
    for _ in range(200):
        alive = weights(15 * 20, "bool", rng.choice([0.3, 0.9])).reshape(15, 20)
        streams = {
            key: one.view(np.uint8).copy() for key, one in pattern.encode(np.packbits(alive), alive.shape).items()
        }
        one = streams[rng.choice(list(streams))]
        one[rng.integers(len(one))] ^= 1 << rng.integers(8)
        slots = int(np.count_nonzero(alive))
        try:
            found = list(pattern.places(streams, alive.shape, slots))
        except Problem:
            refused += 1
            with pytest.raises(Problem):
                pattern.bits(streams, alive.shape, slots)
            continue
        stored = np.zeros(alive.size, bool)
        stored[np.concatenate(found)] = True
        np.testing.assert_array_equal(pattern.bits(streams, alive.shape, slots), np.packbits(stored))
    assert 0 < refused < 200
