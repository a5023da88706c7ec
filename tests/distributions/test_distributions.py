"""Who competes with whom, and how many win: counts, ties, traced sparsities, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune.distributions import ERK, NM, OWL, ByRule, Global, PerOutput, SigmaThreshold, Threshold, Uniform

# Leaf name -> groups (*layers, spatial, in, out), and the sizes (*spatial, in, out) of its leaf.
SHAPES = {"conv": (4, 8, 6), "stack": (3, 1, 8, 4), "wide": (1, 8, 2)}
DIMS = {"conv": (2, 2, 8, 6), "stack": (8, 4), "wide": (8, 2)}
SPARSITIES = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.999]), st.floats(0, 0.999))


def make(seed=0, ties=True):
    rng = np.random.default_rng(seed)
    draw = (lambda shape: rng.integers(0, 4, shape)) if ties else rng.random
    return {name: draw(shape).astype(np.float32) for name, shape in SHAPES.items()}


def put(groups):
    return {name: jax.device_put(leaf) for name, leaf in groups.items()}


def removed(n, sparsity):
    return round(n * sparsity)


@given(seed=st.integers(0, 3), sparsity=SPARSITIES)
def test_uniform(seed, sparsity):
    groups = make(seed)
    kept = Uniform()(put(groups), sparsity, dims=DIMS)
    for name, scores in groups.items():
        n = int(np.prod(scores.shape[-3:]))
        want = oracle.contests(scores, (-3, -2, -1), n - removed(n, sparsity))
        np.testing.assert_array_equal(kept[name], want)


@given(seed=st.integers(0, 3), sparsity=SPARSITIES)
def test_global(seed, sparsity):
    groups = make(seed)
    kept = Global()(put(groups), sparsity, dims=DIMS)
    flat = np.concatenate([scores.ravel() for scores in groups.values()])
    want = oracle.top_k(flat, flat.size - removed(flat.size, sparsity))
    np.testing.assert_array_equal(np.concatenate([np.asarray(k).ravel() for k in kept.values()]), want)


@pytest.mark.parametrize("floor", [0.05, 0.3])
@given(seed=st.integers(0, 3), sparsity=st.floats(0, 0.65))
def test_global_with_a_floor(floor, seed, sparsity):
    """One leaf is worthless: the floor keeps its best, and the total is what was asked for."""
    groups = make(seed)
    groups["wide"] = groups["wide"] * np.float32(1e-6)
    kept = Global(floor=floor)(put(groups), sparsity, dims=DIMS)
    total = sum(scores.size for scores in groups.values())
    assert sum(int(np.asarray(k).sum()) for k in kept.values()) == total - removed(total, sparsity)
    best = []
    for name, scores in groups.items():
        n = int(np.prod(scores.shape[-3:]))
        safe = oracle.contests(scores, (-3, -2, -1), int(np.ceil(floor * n)))
        assert (np.asarray(kept[name]) | ~safe).all()  # layer by layer, where layers are stacked
        best.append(np.where(safe, np.inf, scores).ravel())
    want = oracle.top_k(np.concatenate(best), total - removed(total, sparsity))
    np.testing.assert_array_equal(np.concatenate([np.asarray(k).ravel() for k in kept.values()]), want)


def test_floors_that_leave_too_little():
    groups = put(make())
    with pytest.raises(
        ValueError, match=r"`Global\(floor=0.5\)` keeps 152 groups of 304, but sparsity 0.9 leaves 30. Lo"
    ):
        Global(floor=0.5)(groups, 0.9, dims=DIMS)
    # Under jit nobody can be told; the floors win.
    kept = jax.device_get(jax.jit(lambda s: Global(floor=0.5)(groups, s, dims=DIMS))(jnp.float32(0.9)))
    assert sum(int(k.sum()) for k in kept.values()) == 152
    assert int(kept["wide"].sum()) == 8


@jax.jit
def traced_erk(sparsity):
    return ERK().sparsities(put(make()), sparsity, DIMS)


@given(sparsity=st.floats(0, 0.99))
def test_erk_densities_are_the_formulas(sparsity):
    groups = make()
    sizes = [scores.size for scores in groups.values()]
    want = oracle.erk(DIMS.values(), sizes, sparsity)
    shares = ERK().sparsities(put(groups), sparsity, DIMS)
    np.testing.assert_allclose([1 - shares[name] for name in groups], want, atol=1e-9)
    np.testing.assert_allclose(np.dot(want, sizes), (1 - sparsity) * sum(sizes), rtol=1e-9)
    traced = traced_erk(jnp.float32(sparsity))
    np.testing.assert_allclose([1 - float(traced[name]) for name in groups], want, atol=1e-6)


def test_erk_fills_small_leaves_first():
    """Where eps * raw would be above 1 the leaf stays dense, and the others give what it does not."""
    shares = ERK().sparsities(put(make()), 0.3, DIMS)
    assert shares["wide"] == 0
    assert shares["stack"] < shares["conv"]


@given(seed=st.integers(0, 3), sparsity=SPARSITIES)
def test_erk(seed, sparsity):
    groups = make(seed)
    kept = ERK()(put(groups), sparsity, dims=DIMS)
    shares = ERK().sparsities(put(groups), sparsity, DIMS)
    layers = {name: int(np.prod(scores.shape[:-3])) for name, scores in groups.items()}
    for name, scores in groups.items():
        n = int(np.prod(scores.shape[-3:]))
        want = oracle.contests(scores, (-3, -2, -1), n - removed(n, shares[name]))
        np.testing.assert_array_equal(kept[name], want)
    total = sum(scores.size for scores in groups.values())
    off = sum(int((~np.asarray(k)).sum()) for k in kept.values()) - total * sparsity
    assert abs(off) <= sum(layers.values()) / 2 + 1e-6


@given(seed=st.integers(0, 3), sparsity=SPARSITIES)
def test_per_output(seed, sparsity):
    groups = make(seed)
    kept = PerOutput()(put(groups), sparsity, dims=DIMS)
    for name, scores in groups.items():
        n = int(np.prod(scores.shape[-3:-1]))
        want = oracle.contests(scores, (-3, -2), n - removed(n, sparsity))
        np.testing.assert_array_equal(kept[name], want)


@given(seed=st.integers(0, 3), sparsity=SPARSITIES)
def test_global_with_normalized_scores(seed, sparsity):
    """Scores over the norm of their layer's: leaves of any scale compete alike."""
    groups = {name: leaf + np.float32(1) for name, leaf in make(seed, ties=False).items()}
    norms = {name: np.sqrt((g.astype(np.float64) ** 2).sum((-3, -2, -1), keepdims=True)) for name, g in groups.items()}
    flat = np.concatenate([(g / norms[name]).ravel() for name, g in groups.items()])
    k = flat.size - removed(flat.size, sparsity)
    scaled = {name: leaf * np.float32(10.0**i) for i, (name, leaf) in enumerate(groups.items())}
    kept = Global(normalized=True)(put(scaled), sparsity, dims=DIMS)
    got = np.concatenate([np.asarray(one).ravel() for one in kept.values()])
    assert got.sum() == k
    edge = np.sort(flat)[-k] if k else np.inf  # of what lies at the threshold the last digit decides
    np.testing.assert_array_equal(got[np.abs(flat / edge - 1) > 1e-5], (flat > edge)[np.abs(flat / edge - 1) > 1e-5])


def heavy(seed=0):
    """Some layers have many outliers, some few."""
    rng = np.random.default_rng(seed)
    return {name: np.exp(rng.normal(size=shape) * (1 + i)).astype(np.float32) for i, (name, shape) in
            enumerate(SHAPES.items())}  # fmt: skip


@pytest.mark.parametrize("per_output", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.99])
def test_owl(sparsity, per_output):
    groups = heavy()
    rule = OWL(m=3.0, lam=0.08, per_output=per_output)
    shares = rule.sparsities(put(groups), sparsity)
    want = oracle.owl(groups, sparsity, 3.0, 0.08)
    for name, share in shares.items():
        np.testing.assert_allclose(np.ravel(share), want[name], atol=1e-6)
    kept, axes = rule(put(groups), sparsity, dims=DIMS), (-3, -2) if per_output else (-3, -2, -1)
    for name, scores in groups.items():
        layers = zip(
            scores.reshape(-1, *scores.shape[-3:]), np.reshape(kept[name], (-1, *scores.shape[-3:])),
            np.ravel(shares[name]), strict=True,
        )  # fmt: skip
        n = int(np.prod([scores.shape[axis] for axis in axes]))
        for layer, verdict, share in layers:
            np.testing.assert_array_equal(verdict, oracle.contests(layer, axes, n - removed(n, float(share))))
    if 0.2 < sparsity < 0.8:
        total = sum(scores.size for scores in groups.values())
        assert sum(int(one.sum()) for one in kept.values()) == pytest.approx(total * (1 - sparsity), abs=8 * 12)


@pytest.mark.parametrize(("along", "axis"), [("inputs", -2), ("outputs", -1), ("window", -3)])
def test_nm_along_any_axis(along, axis):
    scores = make()["conv"]
    scores = np.concatenate([scores, scores[..., :2]], axis=-1)  # (4, 8, 8)
    kept = NM(2, 4, along)(put({"a": scores}), None, dims={})["a"]
    turned = np.moveaxis(scores, axis, -1)
    runs = oracle.contests(turned.reshape(*turned.shape[:-1], -1, 4), (-1,), 2).reshape(turned.shape)
    np.testing.assert_array_equal(kept, np.moveaxis(runs, -1, axis))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (4, 8), (3, 3)])
def test_nm(n, m):
    groups = {name: scores for name, scores in make().items() if scores.shape[-2] % m == 0}
    if not groups:
        groups = {"a": make()["conv"].reshape(4, 12, 4)}
    kept = NM(n, m)(put(groups), None, dims={})
    for name, scores in groups.items():
        *lead, n_in, n_out = scores.shape
        runs = np.asarray(kept[name]).reshape(*lead, n_in // m, m, n_out)
        assert (runs.sum(-2) == n).all()
        np.testing.assert_array_equal(runs, oracle.contests(scores.reshape(runs.shape), (-2,), n))


def nm_4_8(sparsity):
    return NM(4, 8)(put({"a": make()["conv"]}), sparsity, dims={})["a"]


traced_nm_4_8 = jax.jit(nm_4_8)


@pytest.mark.parametrize(("sparsity", "alive"), [(0.0, 8), (0.2, 6), (0.25, 6), (0.4, 5), (0.5, 4)])
def test_nm_on_its_way(sparsity, alive):
    """With a schedule max(n, m - round(m s)) of every run survive, traced or not."""
    for kept in (nm_4_8(sparsity), nm_4_8(jnp.float32(sparsity)), traced_nm_4_8(jnp.float32(sparsity))):
        assert np.asarray(kept).sum() == alive * 4 * 6


def test_nm_traced_beyond_its_end_stays_there():
    assert np.asarray(traced_nm_4_8(jnp.float32(0.9))).sum() == 4 * 4 * 6


@pytest.mark.parametrize("t", [0.0, 1.0, 1.5, 100.0])
def test_threshold(t):
    groups = make()
    kept = Threshold(t)(put(groups), None, dims=DIMS)
    for name, scores in groups.items():
        np.testing.assert_array_equal(kept[name], scores >= t)  # at the threshold alive


@pytest.mark.parametrize("k", [0.0, 0.7, 1.3])
def test_sigma_threshold(k):
    groups = make(ties=False)
    kept = SigmaThreshold(k)(put(groups), None, dims=DIMS)
    for name, scores in groups.items():
        sigma = np.sqrt((scores.astype(np.float64) ** 2).mean((-3, -2, -1), keepdims=True))
        np.testing.assert_array_equal(kept[name], scores >= k * sigma)


@pytest.mark.parametrize("k", [0.0, 0.7, 1.3])
def test_sigma_threshold_of_all_leaves_together(k):
    groups = {name: scores * size for size, (name, scores) in enumerate(make(ties=False).items(), 1)}
    kept = SigmaThreshold(k, pooled=True)(put(groups), None, dims=DIMS)
    alone = SigmaThreshold(k)(put(groups), None, dims=DIMS)
    sigma = np.sqrt((np.concatenate([scores.ravel() for scores in groups.values()]).astype(np.float64) ** 2).mean())
    for name, scores in groups.items():
        np.testing.assert_array_equal(kept[name], scores >= k * sigma)
    assert k == 0 or any((kept[name] != alone[name]).any() for name in groups)


def test_sigma_threshold_is_the_same_under_jit():
    """Product and sum rounded at once would move a threshold by a bit; here scores stand on every bit near it."""
    scores = np.random.default_rng(0).random((200, 1, 24, 10)).astype(np.float32)
    sigma = np.sqrt((scores[:, :, 1:].astype(np.float64) ** 2).mean((1, 2, 3))).astype(np.float32)
    around = sigma.view(np.int32)[:, None, None] + np.arange(-5, 5, dtype=np.int32)
    scores[:, :, 0] = around.view(np.float32)  # the mean square stays as it was, up to rounding
    groups = put({"a": scores})

    def keep(groups):
        return SigmaThreshold(1.0)(groups, None, dims={})["a"]

    eager = np.asarray(keep(groups))
    assert 0 < eager[:, :, 0].mean() < 1
    np.testing.assert_array_equal(jax.jit(keep)(groups), eager)


def test_by_rule():
    groups = make()
    rules = ByRule({"conv": 0.5, "s*": PerOutput(), "*": Global()})
    kept = rules(put(groups), 0.25, dims=DIMS)
    assert list(kept) == list(groups)
    alone = {name: {name: jnp.asarray(scores)} for name, scores in groups.items()}
    np.testing.assert_array_equal(kept["stack"], PerOutput()(alone["stack"], 0.25, dims=DIMS)["stack"])
    np.testing.assert_array_equal(kept["wide"], Global()(alone["wide"], 0.25, dims=DIMS)["wide"])
    # 0.5 is the largest number: it is reached when the sparsity reaches it.
    np.testing.assert_array_equal(kept["conv"], Uniform()(alone["conv"], 0.25, dims=DIMS)["conv"])


def numbers(sparsity):
    return ByRule((("conv", 0.5), ("stack", 0.25), ("*", 0.0)))(put(make()), sparsity, dims=DIMS)


traced_numbers = jax.jit(numbers)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize(
    ("sparsity", "want"),
    [(None, {"conv": 0.5, "stack": 0.25, "wide": 0.0}), (0.5, {"conv": 0.5, "stack": 0.25}), (0.25, {"conv": 0.25})],
)
def test_by_rule_numbers_are_where_leaves_end(sparsity, want, trace):
    kept = traced_numbers(jnp.float32(sparsity)) if trace and sparsity is not None else numbers(sparsity)
    for name, share in want.items():
        assert 1 - np.asarray(kept[name]).mean() == pytest.approx(share)


def test_by_rule_first_match_wins_and_members_compete_together():
    groups = {"a": np.ones((1, 4, 4), np.float32), "b": np.zeros((1, 4, 4), np.float32)}
    kept = ByRule({"[ab]": Global(), "*": 0.0})(put(groups), 0.5, dims={})
    assert np.asarray(kept["a"]).all()
    assert not np.asarray(kept["b"]).any()


DECIDE = {"uniform": Uniform(), "global": Global(), "floor": Global(floor=0.1), "erk": ERK(), "output": PerOutput()}
DECIDE |= {"normalized": Global(normalized=True), "owl": OWL(m=2.0), "outputs": NM(1, 2, "outputs")}
DECIDE |= {"nm": NM(2, 4), "rule": ByRule({"conv": 0.9, "*": Global()})}


@pytest.mark.parametrize("name", DECIDE)
def test_a_traced_sparsity_is_the_known_one_and_traced_once(name):
    distribution, groups, traces = DECIDE[name], put(make()), []

    @jax.jit
    def run(groups, sparsity):
        traces.append(sparsity)
        return distribution(groups, sparsity, dims=DIMS)

    for sparsity in (0.0, 0.45, np.float32(0.4999)):
        traced, known = run(groups, jnp.float32(sparsity)), distribution(groups, jnp.float32(sparsity), dims=DIMS)
        for leaf in groups:
            np.testing.assert_array_equal(traced[leaf], known[leaf])
    assert len(traces) == 1


def test_vmap_over_sparsities():
    groups, sparsities = put(make()), np.float32([0.0, 0.3, 0.9])
    for distribution in (Global(), PerOutput()):
        mapped = jax.vmap(lambda s, d=distribution: d(groups, s, dims=DIMS))
        kept = jax.device_get(jax.jit(mapped)(sparsities))
        for i, sparsity in enumerate(sparsities):
            for name, want in distribution(groups, jnp.float32(sparsity), dims=DIMS).items():
                np.testing.assert_array_equal(kept[name][i], want)


def refusals():
    fits = put(make())
    ten = {"a/kernel": jnp.ones((1, 10, 4))}
    one = {"a/kernel": jnp.ones((1, 1, 4))}
    hint = r"`sparsity` is the fraction removed, in \[0, 1\); got 90. Did you mean 0.9\?"
    for distribution in (*DECIDE.values(), ByRule({"*": 0.5})):
        yield distribution, fits, 90, hint
        yield distribution, fits, float("nan"), "got nan"
        yield distribution, fits, 1.0, r"got 1\.$"
        yield distribution, fits, jnp.ones(3) / 2, r"`sparsity` is one number, got an array of shape \(3,\)"
    for distribution in (Uniform(), Global(), ERK(), PerOutput(), OWL()):
        yield distribution, fits, None, f"`{type(distribution).__name__}` needs a sparsity: the fraction to remove"
    for distribution in (Threshold(1.0), SigmaThreshold(1.0)):
        yield (
            distribution,
            fits,
            0.5,
            f"`{type(distribution).__name__}` decides by itself how many weights go: leave `sp",
        )
    message = (
        r"`NM\(2, 4\)` needs runs of 4 along the input axis, but 'a/kernel' has 10 inputs. Leave it out with `select`"
    )
    yield NM(2, 4), ten, None, message
    yield NM(2, 3, "outputs"), ten, None, r"runs of 3 along the output axis, but 'a/kernel' has 4 outputs"
    yield NM(2, 3, "window"), ten, None, r"runs of 3 along the window's axis, but 'a/kernel' has 1 taps"
    yield OWL(per_output=True), one, 0.5, r"`OWL\(per_output=True\)` needs several groups for every output, 'a/kernel'"
    yield NM(2, 4), fits, 0.9, r"`NM\(2, 4\)` removes at most 0.5; sparsity 0.9 is more"
    yield PerOutput(), one, 0.5, "`PerOutput` needs several groups for every output, 'a/kernel' has one"
    yield ByRule({"conv": 0.5}), fits, None, r"No rule of `ByRule` matches 'stack'. There are: \['conv'\]. Add one"
    yield ByRule({"cnov": 0.5, "*": 0.1}), fits, None, "The rule 'cnov' of `ByRule` matches no pruned leaf. There are"


@pytest.mark.parametrize(("distribution", "groups", "sparsity", "message"), list(refusals()))
def test_refusals(distribution, groups, sparsity, message):
    with pytest.raises(ValueError, match=message):
        distribution(groups, sparsity, dims=DIMS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NM(0, 4), r"keeps n of m, with 0 < n <= m; got NM\(0, 4\)"),
        (lambda: NM(5, 4), r"got NM\(5, 4\)"),
        (lambda: NM(2, 4, "rows"), r"`NM\(along=...\)` is one of inputs, outputs, window, got 'rows'"),
        (lambda: OWL(m=0.0), r"`OWL` needs m > 0 and lam >= 0, got 0.0 and 0.08"),
        (lambda: OWL(lam=-1.0), "got 5.0 and -1.0"),
        (lambda: Global(floor=-0.1), r"`Global\(floor=...\)` is a density in \[0, 1\], got -0.1"),
        (lambda: Global(floor=5.0), "got 5.0"),
        (lambda: Threshold(-1.0), r"`Threshold\(t\)` needs t >= 0, got -1.0"),
        (lambda: Threshold(float("nan")), "got nan"),
        (lambda: SigmaThreshold(-1.0), r"`SigmaThreshold\(k\)` needs k >= 0, got -1.0"),
        (lambda: ByRule({"*": 90}), r"`ByRule: \*` is the fraction removed, in \[0, 1\); got 90. Did you mean 0.9\?"),
    ],
)
def test_bad_arguments_are_refused(unchecked, make, message):
    with pytest.raises(ValueError, match=message):
        make()
