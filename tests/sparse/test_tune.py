"""The measured choice: what wins, what stays dense and why. Times are mostly faked."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_helpers import make_leaf, make_x, needs_kernels
from tune_helpers import PARAMS, X, install_clock, mlp, timings_of, tune

import jaxprune as jp
from jaxprune import sparse
from jaxprune.sparse.tuning import plan, race, timing, whole


@pytest.fixture
def clock(monkeypatch):
    return functools.partial(install_clock, monkeypatch)


# ---------------------------------------------------------------- decisions


def test_the_fastest_format_wins(clock):
    fake = clock(dense=0.5, bcsr=0.1, bcoo=0.3, planned=0.25)
    chosen = tune()
    assert chosen.formats == {"a/kernel": "bcsr", "b/kernel": "bcsr"}
    assert not chosen.is_dense
    assert (chosen.dense_ms, chosen.planned_ms, chosen.speedup) == (500, 250, 2)
    assert "2.00 times faster" in chosen.reason
    assert "bcsr takes 100.000 ms, dense 500.000 ms" in chosen.leaves[0].why
    assert fake.races == [["dense", "bcoo", "bcsr"]] * 2 + [["dense", "planned"]]


def test_where_dense_is_fastest_it_stays_and_the_model_is_not_measured(clock):
    fake = clock(dense=0.1, bcsr=0.2)
    chosen = tune()
    assert set(chosen.formats.values()) == {"dense"}
    assert (chosen.speedup, chosen.attempts, chosen.dense_ms) == (1.0, (), None)
    assert "no format is faster" in chosen.reason
    assert "Dense is fastest" in chosen.leaves[0].why
    assert len(fake.races) == 2


@pytest.mark.parametrize(("ratio", "format"), [(0.98, "dense"), (0.96, "bcsr")])
def test_a_format_must_win_by_a_margin(clock, ratio, format):
    clock(dense=1.0, bcsr=ratio, bcoo=2.0, planned=0.5)
    assert set(tune().formats.values()) == {format}


@pytest.mark.parametrize(("ratio", "is_dense"), [(1.1, True), (1.0, True), (0.96, True), (0.94, False)])
def test_the_whole_model_must_win_by_a_margin(clock, ratio, is_dense):
    clock(dense=1.0, bcsr=0.5, planned=ratio)
    chosen = tune()
    assert chosen.is_dense is is_dense
    if is_dense:
        assert "not faster" in chosen.reason
        assert "But in the model: The whole model is not faster" in chosen.leaves[0].why
        assert chosen.speedup == 1.0
        assert [len(attempt.formats) for attempt in chosen.attempts] == [2, 1]
        assert chosen.attempts[0].planned.median == 1e3 * ratio


def test_noise_is_no_win(monkeypatch):
    noisy = {"dense": [1.0, 1.0, 2.0, 2.0], "bcsr": [0.9, 0.9, 1.9, 1.9]}
    monkeypatch.setattr(timing, "interleaved", lambda contestants, **_: {name: noisy[name] for name in contestants})
    chosen = tune(formats=["bcsr"])
    assert chosen.is_dense
    assert "Too close to tell" in chosen.leaves[0].why
    dense, close = plan.Timing("dense", 10, 9, 11, 9), plan.Timing("planned", 9.5, 8.5, 10.5, 9)
    assert "too close" in whole.verdict(dense, close)
    sure = [dataclasses.replace(one, runs=900) for one in (dense, close)]
    assert whole.verdict(*sure) == ""
    assert "not faster" in whole.verdict(dense, dataclasses.replace(dense, format="planned"))


def test_the_half_that_gains_least_goes_first(monkeypatch):
    """Four winners lose together, and the best one alone wins."""
    params = {str(i): make_leaf((16, 16), 0.3, "float32", i) for i in range(4)}

    def fn(params, x):
        for leaf in params.values():
            x = jnp.tanh(x @ leaf)
        return x

    alone, together = iter([0.4, 0.1, 0.3, 0.2]), iter([1.5, 1.2, 0.5])

    def fake(contestants, **_):
        slower = next(together) if "planned" in contestants else next(alone)
        return {name: [1.0 if name == "dense" else slower] * 9 for name in contestants}

    monkeypatch.setattr(timing, "interleaved", fake)
    chosen = tune(fn, params, make_x((3, 16)), formats=["bcsr"])
    assert [sorted(attempt.formats) for attempt in chosen.attempts] == [["0", "1", "2", "3"], ["1", "3"], ["1"]]
    assert chosen.formats == {"0": "dense", "1": "bcsr", "2": "dense", "3": "dense"}
    assert chosen.speedup == 2


def test_products_are_tried_without_the_convolution_that_looks_better_alone(monkeypatch):
    params = {"conv": make_leaf((3, 3, 1, 2), 0.5, "float32", 0), "fc": make_leaf((2, 4), 0.5, "float32", 1)}

    def fn(params, x):
        y = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.mean(y, (1, 2)) @ params["fc"]

    alone, together = iter([0.1, 0.5]), iter([1.5, 1.2, 0.8])

    def fake(contestants, **_):
        slower = next(together) if "planned" in contestants else next(alone)
        return {name: [1.0 if name == "dense" else slower] * 9 for name in contestants}

    monkeypatch.setattr(timing, "interleaved", fake)
    chosen = tune(fn, params, make_x((2, 5, 5, 1)), formats=["native"])
    assert [sorted(attempt.formats) for attempt in chosen.attempts] == [["conv", "fc"], ["conv"], ["fc"]]
    assert chosen.formats == {"conv": "dense", "fc": "native"}
    assert "not faster: 1200.000 ms planned" in chosen.leaves[0].why
    assert chosen.speedup == 1.25


def test_uses_of_a_tied_leaf_are_added_up(clock):
    clock(dense=1.0, bcsr=0.1, planned=0.5)
    tied = lambda params, x: jnp.tanh(x @ params["w"]) @ params["w"].T  # noqa: E731
    chosen = tune(tied, {"w": PARAMS["a"]["kernel"]})
    (leaf,) = chosen.leaves
    assert len(leaf.sites) == 2
    assert (leaf.milliseconds("dense"), leaf.milliseconds("bcsr")) == (2000, 200)


def test_a_scan_counts_every_step(clock):
    clock(dense=1.0, bcsr=0.1, planned=0.5)
    fn = lambda w, x: jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=7)[0]  # noqa: E731
    (leaf,) = tune(fn, make_leaf((8, 8), 0.3, "float32"), make_x((3, 8))).leaves
    assert (leaf.sites[0].count, leaf.milliseconds("dense"), leaf.format) == (7, 7000, "bcsr")


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_compressed_is_recorded(clock):
    fake = clock()
    stack = jnp.stack([make_leaf((8, 8), 0.3, "float32", seed) for seed in range(3)])
    stacked = jp.FLAX.with_rules({"layers": jp.layout.Axes(layers=(0,), inputs=(1,), outputs=(2,))})
    fn = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]  # noqa: E731
    chosen = tune(fn, {"layers": stack}, make_x((3, 8)), layout=stacked)
    assert chosen.is_dense
    assert fake.races == []
    assert "stacked layers" in timings_of(chosen.leaves[0])["bcsr"].refused
    assert chosen.leaves[0].why.startswith("No format runs here: ")


@pytest.mark.parametrize("error", [ValueError, TypeError, sparse.SparseUseError])
def test_a_format_that_refuses_is_recorded_and_the_others_go_on(clock, monkeypatch, error):
    def refuse(*_, **__):
        raise error("Not on this platform.")

    monkeypatch.setitem(sparse.FORMATS, "broken", type("Broken", (sparse.BCOOWeight,), {"pack": refuse}))
    clock(bcsr=0.1, planned=0.5)
    leaf = tune(formats=None).leaves[0]
    assert timings_of(leaf)["broken"].refused == "Not on this platform."
    assert leaf.format == "bcsr"


def test_a_fault_is_no_refusal(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setitem(sparse.FORMATS, "broken", type("Broken", (sparse.BCOOWeight,), {"pack": fail}))
    with pytest.raises(ZeroDivisionError):
        tune(formats=["broken"])


class Wrong(sparse.BCSRWeight):
    """Stores something else."""

    @classmethod
    def pack(cls, values, rows, cols, leaf_shape, **fields):
        """Doubles everything."""
        return super().pack(2 * values, rows, cols, leaf_shape, **fields)


def test_a_format_with_another_answer_is_refused(clock, monkeypatch):
    monkeypatch.setitem(sparse.FORMATS, "wrong", Wrong)
    fake = clock(compiling=True, wrong=1e-6)
    leaf = tune(formats=["wrong", "bcsr"]).leaves[0]
    assert leaf.format == "dense"
    assert "off by 1.0e+00 of the largest value" in timings_of(leaf)["wrong"].refused
    assert fake.races[0] == ["dense", "bcsr"]


def test_lossy_formats_are_tried_only_by_name(clock, monkeypatch):
    lossy = type("Lossy", (sparse.BCSRWeight,), {"lossy": True})
    monkeypatch.setitem(sparse.FORMATS, "lossy", lossy)
    fake = clock(lossy=0.1, planned=0.5)
    tune(formats=None)
    assert not any("lossy" in race for race in fake.races)
    assert tune(formats=["lossy"]).formats["a/kernel"] == "lossy"


def test_a_leaf_that_the_model_also_uses_otherwise_stays_dense(clock):
    clock(bcsr=0.1, planned=0.5)

    def fn(params, x):
        return mlp(params, x) + jnp.sum(params["a"]["kernel"])

    chosen = tune(fn)
    assert chosen.formats == {"a/kernel": "dense", "b/kernel": "bcsr"}
    assert "`reduce_sum`" in chosen.leaves[0].why


def test_a_model_that_cannot_run_compressed_stays_dense(clock):
    clock(bcsr=0.1)
    double = jax.custom_vjp(lambda x: 2 * x)
    double.defvjp(lambda x: (2 * x, None), lambda _, ct: (2 * ct,))
    chosen = tune(lambda params, x: double(mlp(params, x)))
    assert chosen.is_dense
    assert "custom_vjp" in chosen.leaves[0].why
    assert chosen.attempts == ()


def test_unused_leaves_and_unselected_leaves(clock):
    clock(bcsr=0.1, planned=0.5)
    params = PARAMS | {"c": {"kernel": make_leaf((8, 8), 0.5, "float32")}}
    chosen = tune(params=params, select=["a/kernel", "c/kernel"])
    assert chosen.formats == {"a/kernel": "bcsr", "c/kernel": "dense"}
    assert "No matrix product or convolution" in chosen.leaves[1].why


def test_bad_arguments_are_refused(tmp_path, unchecked):
    with pytest.raises(ValueError, match=r"no format 'csc'.*'bcoo'"):
        tune(formats=["csc"])
    with pytest.raises(ValueError, match=r"`repeats` is 5 or more.*1 arrived"):
        tune(repeats=1)
    with pytest.raises(TypeError, match=r"'a/kernel' is compressed already"):
        tune(params=sparse.compress(PARAMS, "bcsr"))
    with pytest.raises(TypeError, match=r"traced"):
        jax.jit(lambda params: tune(params=params) and 0)(PARAMS)
    with pytest.raises(TypeError, match=r"'a/kernel' is a `ShapeDtypeStruct`"):
        tune(params=jax.eval_shape(lambda: PARAMS))
    with pytest.raises(ValueError, match="chooses no leaf"):
        tune(select=lambda *_: False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`cache`.*cannot be made.*None"):
        tune(cache=tmp_path / "file")


# ---------------------------------------------------------------- with the real clock


def test_an_unpruned_model_stays_dense_and_a_real_plan_computes_the_same(tmp_path):
    full = jax.tree.map(lambda leaf: jnp.where(leaf == 0, 0.5, leaf), PARAMS)
    assert sparse.tune(mlp, full, X, cache=tmp_path, formats=["bcoo"], seconds=0.01).is_dense
    chosen = tune(seconds=0.01)
    got = jax.jit(sparse.apply(mlp))(sparse.compress(PARAMS, chosen), X)
    np.testing.assert_allclose(got, mlp(PARAMS, X), rtol=1e-4, atol=1e-5)


@needs_kernels
def test_a_pruned_layer_wins_for_real():
    leaf = make_leaf((2048, 2048), 0.02, "float32")
    chosen = tune(lambda w, x: x @ w, leaf, make_x((64, 2048)), formats=["native"], seconds=0.05)
    assert chosen.formats == {"": "native"}
    assert chosen.speedup > 1


# ---------------------------------------------------------------- never slower than dense


def draw_model(seed):
    """A random chain of layers, its zeros and its batch; the first is the digits MLP, where dense should win."""
    rng = np.random.default_rng(seed)
    sizes = [64, 300, 100, 10] if seed == 0 else [int(size) for size in rng.choice([64, 200, 512, 1024, 1500], 4)]
    sparsity = 0.9 if seed == 0 else float(rng.choice([0, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99]))
    batch = 32 if seed == 0 else int(rng.choice([1, 3, 16, 33, 64, 128]))
    params = {
        str(i): {
            "kernel": make_leaf((a, b), 1 - sparsity, "float32", seed + i) / np.float32(np.sqrt(a * (1.01 - sparsity))),
            "bias": jnp.zeros((1, b), jnp.float32),
        }
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }

    def fn(params, x):
        for layer in params.values():
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x

    return fn, params, make_x((batch, sizes[0]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_nothing_tuned_is_slower_than_dense(seed):
    """At most 2 % slower, by the median of many rounds in which both take turns; for an idle machine.

    An all-dense plan runs the dense program itself, so its two medians differ by chance alone.
    """
    fn, params, x = draw_model(seed)
    chosen = sparse.tune(fn, params, x, cache=None)
    planned = sparse.compress(params, chosen)
    calls = {
        "dense": race.compiled(fn, params, x).call,
        "planned": race.compiled(sparse.apply(fn) if not chosen.is_dense else fn, planned, x).call,
    }
    runs = timing.interleaved(calls, seconds=6, most=2000)
    ratio = float(np.median(runs["planned"]) / np.median(runs["dense"]))
    print(f"\nseed {seed}: batch {x.shape[0]}, {chosen.formats}, planned / dense {ratio:.3f}")
    assert ratio <= 1.02, chosen
