"""The k largest, exactly: against a stable sort, for every float that can be a score."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprune.exact.ranking import kth_largest, top_k_mask, top_k_masks

DTYPES = ["float32", "bfloat16", "float16"]
TINY = {"float32": 1e-45, "bfloat16": 1e-40, "float16": 6e-8}
# Few shapes, since each compiles: a prime, one run and a rest of the packed count, more than one axis.
SHAPES = [(1,), (7,), (1031,), (2, 1, 6, 5)]
KINDS = ["distinct", "ties", "equal", "zeros", "edges"]


def make(shape, dtype, kind, seed=0):
    """Scores of a kind, in NumPy."""
    rng = np.random.default_rng(seed)
    n = int(np.prod(shape))
    edges = [0.0, -0.0, TINY[dtype], 2 * TINY[dtype], np.inf, 1.0, float(np.nextafter(np.float32(1), np.float32(2)))]
    values = {
        "distinct": lambda: rng.permutation(n) / 8,
        "ties": lambda: rng.integers(0, 3, n) / 2,
        "equal": lambda: np.full(n, 0.1),
        "zeros": lambda: np.zeros(n),
        "edges": lambda: rng.choice(edges, n),
    }[kind]()
    return values.astype(np.float32).astype(np.dtype(dtype)).reshape(shape)


@functools.cache
def on_device(shape, dtype, kind, seed):
    host = make(shape, dtype, kind, seed)
    return host, jnp.asarray(host)


CASES = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(KINDS), st.integers(0, 3))
PARTS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


@settings(max_examples=100)
@given(case=CASES, part=PARTS)
@example(case=((1031,), "float32", "equal", 0), part=0.5)
@example(case=((1031,), "bfloat16", "edges", 0), part=0.9)
def test_top_k_mask_is_a_stable_sort(case, part):
    host, scores = on_device(*case)
    k = round(part * host.size)
    mask = np.asarray(top_k_mask(scores, k))
    assert mask.dtype == bool
    assert mask.sum() == k
    np.testing.assert_array_equal(mask, oracle.top_k(host, k))


@settings(max_examples=100)
@given(case=CASES, part=PARTS)
def test_kth_largest_is_the_sorts(case, part):
    host, scores = on_device(*case)
    k = max(1, round(part * host.size))
    got = kth_largest(scores, k)
    assert got.dtype == host.dtype
    assert got.shape == ()
    assert float(got) == np.sort(np.abs(host.astype(np.float64)), axis=None)[-k]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_neighbour_is_told_apart(dtype):
    """All non-negative 16-bit floats, denormals and infinity included, in one contest; float32 around its borders."""
    if dtype == "float32":
        borders = np.array([0, 2**23 - 20, 2**23, 2**30, 0x7F800000 - 40], np.uint32)
        host = (borders[:, None] + np.arange(41, dtype=np.uint32)).ravel()
        host = np.unique(host[host <= 0x7F800000]).view(np.float32)
    else:
        last = {"bfloat16": 0x7F80, "float16": 0x7C00}[dtype]
        host = np.arange(last + 1, dtype=np.uint16).view(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    host = np.random.default_rng(0).permutation(host)
    scores = jnp.asarray(host)
    ordered = np.sort(host.astype(np.float64))
    for k in (1, 2, 20, host.size // 2, host.size - 1, host.size):
        assert float(kth_largest(scores, k)) == ordered[-k]
        np.testing.assert_array_equal(top_k_mask(scores, k), oracle.top_k(host, k))


def test_minus_zero_is_zero():
    mask = top_k_mask(jnp.asarray([-0.0, 0.0, -0.0, 0.0]), 2)
    np.testing.assert_array_equal(mask, [True, True, False, False])
    assert not np.signbit(kth_largest(jnp.asarray([-0.0, -0.0]), 1))


def test_nan_counts_as_largest():
    scores = jnp.asarray([jnp.inf, 1.0, jnp.nan, 0.0])
    np.testing.assert_array_equal(top_k_mask(scores, 1), [False, False, True, False])
    assert np.isnan(kth_largest(scores, 1))
    assert kth_largest(scores, 2) == np.inf


def test_k_of_nothing():
    assert kth_largest(jnp.ones(3), 0) == np.inf
    assert top_k_mask(jnp.ones((0, 4)), 0).shape == (0, 4)
    assert top_k_mask(jnp.ones((2, 0)), 0, (-1,)).shape == (2, 0)


@pytest.mark.parametrize("k", [0, 1])
def test_a_single_score(k):
    assert bool(top_k_mask(jnp.float32(3), k)) is bool(k)


@settings(max_examples=40)
@given(
    axes=st.sampled_from([(-1,), (-2,), (-3, -2), (-3, -2, -1)]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 3),
    part=PARTS,
)
def test_contests_of_their_own(axes, kind, seed, part):
    host, scores = on_device((2, 3, 4, 5), "float32", kind, seed)
    n = int(np.prod([host.shape[a] for a in axes]))
    k = round(part * n)
    mask = np.asarray(top_k_mask(scores, k, axes))
    assert (mask.sum(axes) == k).all()
    np.testing.assert_array_equal(mask, oracle.contests(host, axes, k))


@settings(max_examples=40)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 3), part=PARTS, floor=st.integers(0, 5))
def test_several_arrays_are_one_contest(kind, seed, part, floor):
    shapes = [(2, 1, 3, 4), (1, 6, 5), (1, 1, 7)]
    hosts = [make(shape, "float32", kind, seed) for shape in shapes]
    scores = [jnp.asarray(host) for host in hosts]
    total = sum(host.size for host in hosts)
    # One compiled function for all floors: no score is safe where the floor is 0.
    safe = [oracle.top_k(host, floor) for host in hosts]
    k = max(round(part * total), sum(s.sum() for s in safe))
    masks = top_k_masks(scores, int(k), [jnp.asarray(s) for s in safe])
    flat = np.concatenate([host.astype(np.float64).ravel() for host in hosts])
    flat[np.concatenate([s.ravel() for s in safe])] = np.inf
    if kind == "edges":  # a safe score goes before an infinite one
        flat[np.concatenate([(host == np.inf) & ~s for host, s in zip(hosts, safe, strict=True)], axis=None)] = 1e300
    want = oracle.top_k(flat, int(k))
    np.testing.assert_array_equal(np.concatenate([np.asarray(m).ravel() for m in masks]), want)


def test_one_trace_for_every_k():
    traces = 0

    @jax.jit
    def both(scores, k):
        nonlocal traces
        traces += 1
        return top_k_mask(scores, k), kth_largest(scores, k)

    host = make((97,), "float32", "ties")
    for k in (0, 1, 31, 97):
        mask, value = both(jnp.asarray(host), jnp.int32(k))
        np.testing.assert_array_equal(mask, oracle.top_k(host, k))
        assert value == (np.sort(host)[-k] if k else np.inf)
    assert traces == 1


def test_vmap():
    hosts = np.stack([make((97,), "float32", kind) for kind in ("distinct", "ties", "equal")])
    ks = np.array([5, 40, 97])
    masks = jax.vmap(top_k_mask)(jnp.asarray(hosts), jnp.asarray(ks))
    for host, k, mask in zip(hosts, ks, masks, strict=True):
        np.testing.assert_array_equal(mask, oracle.top_k(host, int(k)))


@pytest.mark.parametrize("n", [1_000_003, 2_097_152])
def test_large_contests(n):
    """A large prime, which no run of packed counts divides, and a power of two."""
    host = np.random.default_rng(0).integers(0, 1000, n).astype(np.float32)
    for k in (n // 3, n - 1):
        mask = np.asarray(top_k_mask(jnp.asarray(host), k))
        np.testing.assert_array_equal(mask, oracle.top_k(host, k))


@pytest.mark.parametrize("spec", [("d",), (None, "d"), ("d", None), ()])
def test_eight_devices_see_the_same_order(spec):
    host = make((16, 24), "float32", "ties")
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    scores = jax.device_put(jnp.asarray(host), sharding)
    for k in (1, 100, 383):
        np.testing.assert_array_equal(top_k_mask(scores, k), oracle.top_k(host, k))


@pytest.mark.parametrize("k", [-1, 5])
@pytest.mark.parametrize("function", [kth_largest, top_k_mask])
def test_k_out_of_range_is_refused(function, k):
    with pytest.raises(ValueError, match=rf"k = {k} of 4 scores was asked for; 0 <= k <= 4"):
        function(jnp.ones(4), k)


@pytest.mark.parametrize("dtype", ["int32", "bool"])
@pytest.mark.parametrize("function", [kth_largest, top_k_mask])
def test_other_dtypes_are_refused(function, dtype, unchecked):
    with pytest.raises(TypeError, match=f"float32, bfloat16 or float16; got {dtype}"):
        function(jnp.ones(4, dtype), 1)


def test_double_precision_is_refused():
    with jax.enable_x64(True), pytest.raises(TypeError, match="got float64"):
        top_k_mask(jnp.ones(4, "float64"), 1)


def test_a_contest_too_large_to_count_is_refused():
    shape = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)
    with pytest.raises(ValueError, match="at most 4294967295 groups, this one 4294967296"):
        jax.eval_shape(lambda scores: top_k_mask(scores, 1), shape)


@pytest.mark.parametrize(("shape", "spec"), [((64, 11008), ("x", "y")), ((512, 1000), ("y", "x"))])
def test_counts_move_nothing_of_a_sharded_array(shape, spec):
    """11008 is 2^8 x 43: runs of 256 would leave 43 of them to four devices, and the array would be gathered."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    one = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    for contest in (lambda a: top_k_masks([a], 5), lambda a: top_k_mask(a, 5)):
        text = jax.jit(contest).lower(one).compile().as_text()
        assert not re.findall(r" (?:all-gather|all-to-all|collective-permute)\(", text)
