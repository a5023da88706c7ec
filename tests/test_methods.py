"""Masks of whole trees: every criterion x granularity x distribution against the oracle, jit, vmap, scan, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from quick import quickly

import jaxprune as jp

LAYER = (-3, -2, -1)

# One model in two layouts; both have the same views, so that one compiled contest serves both.
STACK = jp.layout.Axes(layers=(0,), inputs=(1,), outputs=(2,))
KCATS = jp.layout.Axes(layers=(2,), inputs=(0,), outputs=(1,))  # stacked last, for once
LAYOUTS = {"flax": jp.FLAX.with_rules({"stack/*": STACK}), "torch": jp.TORCH.with_rules({"stack/*": KCATS})}
CONV = {"flax": jp.layout.Axes((), (0, 1), (2,), (3,)), "torch": jp.layout.Axes((), (2, 3), (1,), (0,))}
AXES = {
    layout: {"conv/kernel": CONV[layout], "stack/kernel": stack}
    for layout, stack in (("flax", STACK), ("torch", KCATS))
}
SHAPES = {
    "flax": {"conv": {"kernel": (2, 2, 8, 6), "bias": (6,)}, "stack": {"kernel": (2, 8, 4)}},
    "torch": {"conv": {"kernel": (6, 8, 2, 2), "bias": (6,)}, "stack": {"kernel": (8, 4, 2)}},
}
DIMS = {"conv/kernel": (2, 2, 8, 6), "stack/kernel": (8, 4)}

# granularity -> rows and cols of a group (None: the whole axis), and whether it spans the window
GRANULARITIES = {
    jp.Element(): (1, 1, False),
    jp.Block(2, 4): (2, 4, False),  # 4 does not divide 6 outputs
    jp.Input(): (1, None, True),
    jp.Output(): (None, 1, True),
}
FLOOR, SIGMA, CUT = 0.2, 0.7390851, 1.5


def uniform(groups, sparsity):
    return {name: _share(g, LAYER, sparsity) for name, g in groups.items()}


def global_(groups, sparsity, floor=0.0):
    best = {
        name: np.where(
            oracle.contests(g, LAYER, int(np.ceil(floor * g[0].size if g.ndim > 3 else floor * g.size))), np.inf, g
        )
        for name, g in groups.items()
    }
    flat = np.concatenate([g.ravel() for g in best.values()])
    kept = oracle.top_k(flat, flat.size - round(flat.size * sparsity))
    parts = np.split(kept, np.cumsum([g.size for g in groups.values()])[:-1])
    return {name: part.reshape(groups[name].shape) for name, part in zip(groups, parts, strict=True)}


def erk(groups, sparsity):
    density = oracle.erk([DIMS[name] for name in groups], [g.size for g in groups.values()], sparsity)
    return {name: _share(g, LAYER, 1 - d) for (name, g), d in zip(groups.items(), density, strict=True)}


def nm(groups, _):
    runs = {name: g.reshape(*g.shape[:-2], g.shape[-2] // 2, 2, g.shape[-1]) for name, g in groups.items()}
    return {name: oracle.contests(r, (-2,), 1).reshape(groups[name].shape) for name, r in runs.items()}


def sigma(groups, _):
    return {name: g >= SIGMA * np.sqrt((g**2).mean(LAYER, keepdims=True)) for name, g in groups.items()}


def by_rule(groups, sparsity):
    one, two = groups
    return uniform({one: groups[one]}, sparsity) | global_({two: groups[two]}, sparsity)


def _share(scores, axes, sparsity):
    n = int(np.prod([scores.shape[a] for a in axes]))
    return oracle.contests(scores, axes, n - round(n * sparsity))


# name -> distribution at a sparsity, oracle, and the sparsity handed in
TAKES = {
    "uniform": (lambda s: jp.Uniform(), uniform, True),
    "global": (lambda s: jp.Global(), global_, True),
    "floor": (lambda s: jp.Global(floor=FLOOR), lambda g, s: global_(g, s, FLOOR), True),
    "erk": (lambda s: jp.ERK(), erk, True),
    "per_output": (lambda s: jp.PerOutput(), lambda g, s: {n: _share(x, (-3, -2), s) for n, x in g.items()}, True),
    "nm": (lambda s: jp.NM(1, 2), nm, False),
    "sigma": (lambda s: jp.distributions.SigmaThreshold(SIGMA), sigma, False),
    "threshold": (lambda s: jp.distributions.Threshold(CUT), lambda g, s: {n: x >= CUT for n, x in g.items()}, False),
    "by_rule": (lambda s: jp.distributions.ByRule({"conv/*": s, "*": jp.Global()}), by_rule, True),
}
IMPOSSIBLE = {(jp.Output(), "per_output"), (jp.Output(), "nm")}  # one group an output
PRODUCT = [(g, d) for g in GRANULARITIES for d in TAKES if (g, d) not in IMPOSSIBLE]


def draw_tree(shapes, kind, seed):
    """Small integers, whose sums and products are exact, so that the oracle's ties are the library's."""
    rng = np.random.default_rng(seed)
    draw = {
        "ties": lambda shape: rng.integers(-3, 4, shape),
        "equal": lambda shape: np.full(shape, -2),
        "zeros": lambda shape: np.zeros(shape),
        "distinct": lambda shape: rng.permutation(int(np.prod(shape))).reshape(shape) - 20,
    }[kind]
    return jax.tree.map(lambda s: draw(s).astype(np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))


def put(tree):
    return jax.tree.map(jnp.asarray, tree)


def named(tree):
    return {f"{a}/{b}": leaf for a, sub in tree.items() for b, leaf in sub.items() if b != "bias"}


@pytest.mark.parametrize(("granularity", "name"), PRODUCT, ids=str)
@settings(max_examples=12)
@given(
    criterion=st.sampled_from([jp.magnitude, jp.taylor, jp.criteria.random]),
    layout=st.sampled_from(["flax", "torch"]),
    kind=st.sampled_from(["ties", "ties", "equal", "zeros", "distinct"]),
    seed=st.integers(0, 5),
    sparsity=st.one_of(st.sampled_from([0.0, 0.5, 0.75]), st.floats(0, 0.75)),
)
@quickly()  # whole numbers: nothing is rounded, however it is compiled
def test_every_composition(granularity, name, criterion, layout, kind, seed, sparsity):
    """Exact counts, ties to the lower index, and exact zeros: bit for bit the oracle's masks."""
    make, contest, takes = TAKES[name]
    params, grads = (draw_tree(SHAPES[layout], kind, seed + i) for i in (0, 100))
    key = jax.random.key(seed)
    method = jp.Method(criterion, granularity, make(sparsity), layout=LAYOUTS[layout])
    masks = jp.compute_masks(method, put(params), sparsity if takes else None, grads=put(grads), key=key)

    axes, (rows, cols, window) = AXES[layout], GRANULARITIES[granularity]
    views = {leaf: oracle.view(w, *axes[leaf]) for leaf, w in named(params).items()}
    if criterion is jp.criteria.random:
        scores = jp.criteria.random(put(views), key=key)
        groups = {leaf: np.asarray(granularity.pool(score), np.float64) for leaf, score in scores.items()}
    else:
        slopes = {leaf: oracle.view(g, *axes[leaf]) for leaf, g in named(grads).items()}
        factor = slopes if criterion is jp.taylor else dict.fromkeys(views, 1)
        pools = {leaf: oracle.pool(np.abs(views[leaf] * factor[leaf]), rows, cols, window) for leaf in views}
        # As float32 has them, so that means tie here where they tie there.
        groups = {leaf: pool.astype(np.float32).astype(np.float64) for leaf, pool in pools.items()}
        if isinstance(granularity, jp.Block):
            groups = {
                leaf: np.asarray(granularity.pool(jnp.abs(jnp.asarray(views[leaf] * factor[leaf]))), np.float64)
                for leaf in views
            }
            for leaf in views:
                np.testing.assert_allclose(groups[leaf], pools[leaf], rtol=1e-6)
    kept = contest(groups, sparsity)
    assert np.asarray(masks["conv"]["bias"]).all()
    for leaf, mask in named(masks).items():
        want = oracle.expand(kept[leaf], rows, cols, views[leaf].shape)
        np.testing.assert_array_equal(oracle.view(mask, *axes[leaf]), want, err_msg=leaf)

    pruned = jp.apply_masks(put(params), masks)
    for new, old, mask in zip(*map(jax.tree.leaves, (pruned, params, masks)), strict=True):
        assert np.asarray(new).tobytes() == np.where(mask, old, np.float32(0)).tobytes()


def rand(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def test_earlier_masks_stay_dead_until_the_sparsity_falls():
    w = rand(8, 8)
    method = jp.Method()
    first = jp.compute_masks(method, w, 0.5)
    grown = jnp.where(first, w, 100.0)  # the dead ones would win on their values
    second = np.asarray(jp.compute_masks(method, grown, 0.75, masks=first))
    assert second.sum() == 16
    assert not (second & ~np.asarray(first)).any()
    back = np.asarray(jp.compute_masks(method, grown, 0.25, masks=first))
    assert back.sum() == 48
    assert (back | ~np.asarray(first)).all()


# --- Transformations --------------------------------------------------------------------------------------------------

MIXED = {"conv": {"kernel": rand(2, 2, 8, 6), "bias": rand(6)}, "stack": {"kernel": rand(2, 8, 4)}}
GRADS = jax.tree.map(lambda leaf: jnp.asarray(np.sin(leaf)), MIXED)


@pytest.mark.parametrize("granularity", [jp.Element(), jp.Block(2, 4), jp.Output()], ids=str)
def test_one_trace_and_the_eager_masks_to_the_bit(granularity):
    """Scores are products and sums of random floats here: no compiler may round them its own way."""
    method, traces = jp.Method(jp.taylor, granularity, jp.Global(floor=0.1), layout=LAYOUTS["flax"]), []

    @jax.jit
    def run(params, sparsity):
        traces.append(sparsity)
        return jp.compute_masks(method, params, sparsity, grads=GRADS)

    for sparsity in (0.3, 0.7):
        params = jax.tree.map(lambda leaf, s=sparsity: jnp.asarray(np.asarray(leaf) + np.float32(s)), MIXED)
        eager = jp.compute_masks(method, params, jnp.float32(sparsity), grads=GRADS)
        for a, b in zip(*map(jax.tree.leaves, (run(params, jnp.float32(sparsity)), eager)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(traces) == 1


def test_a_weak_and_a_python_sparsity_count_alike():
    for sparsity in (0, 0.5, np.float64(0.5), np.float32(0.5), jnp.float32(0.5)):
        masks = np.asarray(jp.compute_masks(jp.Method(), rand(8, 8), sparsity))
        assert int(masks.sum()) == 64 - 64 * sparsity


def test_vmap_and_scan():
    """Over a stack of models, and over a schedule of sparsities."""
    models = np.random.default_rng(0).normal(size=(3, 8, 6)).astype(np.float32)
    method = jp.Method(granularity=jp.Block(2, 2))
    each = [jp.compute_masks(method, {"w": jnp.asarray(w)}, 0.5)["w"] for w in models]
    many = jax.jit(jax.vmap(lambda w: jp.compute_masks(method, {"w": w}, 0.5)["w"]))(models)
    np.testing.assert_array_equal(many, each)

    def step(masks, sparsity):
        masks = jp.compute_masks(method, {"w": jnp.asarray(models[0])}, sparsity, masks=masks)
        return masks, masks["w"].sum()

    schedule = jnp.asarray([0.25, 0.5, 0.75])
    _, alive = jax.lax.scan(step, {"w": jnp.asarray(np.ones((8, 6), bool))}, schedule)
    np.testing.assert_array_equal(alive, [36, 24, 12])


@pytest.mark.parametrize(
    "distribution", [jp.Uniform(), jp.ERK(), jp.PerOutput(), jp.distributions.SigmaThreshold(0.5)], ids=str
)
@pytest.mark.parametrize("granularity", [jp.Element(), jp.Block(2, 4)], ids=str)
def test_a_scanned_model_is_pruned_like_the_same_model_unrolled(distribution, granularity):
    stacked, head = rand(3, 8, 6), rand(6, 4)
    layers = [jnp.asarray(layer) for layer in np.asarray(stacked)]
    sparsity = None if isinstance(distribution, jp.distributions.SigmaThreshold) else 0.6
    layout = jp.FLAX.with_rules({"blocks": STACK})
    method = jp.Method(granularity=granularity, distribution=distribution, layout=layout)
    scanned = jp.compute_masks(method, {"blocks": stacked, "head": head}, sparsity)
    unrolled = jp.compute_masks(method, {"layers": layers, "head": head}, sparsity)
    np.testing.assert_array_equal(scanned["blocks"], np.stack(unrolled["layers"]))
    np.testing.assert_array_equal(scanned["head"], unrolled["head"])


# --- Eight devices ----------------------------------------------------------------------------------------------------


def twins(n_in, n_out):
    """Columns and tiles of the same numbers in another order: equal sums, except for how they round."""
    rng = np.random.default_rng(0)
    column = rng.random(n_in)
    return np.stack([rng.permutation(column) for _ in range(n_out)], 1).astype(np.float32)


SPECS = [(("x", "y"), None), ("y", "x")]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("granularity", "distribution"),
    [
        (jp.Element(), jp.Global()),
        (jp.Block(4, 2), jp.Uniform()),
        (jp.Output(), jp.Global()),
        (jp.Element(), jp.PerOutput()),
    ],
    ids=str,
)
def test_eight_devices_make_the_masks_of_one(granularity, distribution, jit):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    params = {"a": jnp.asarray(twins(24, 16)), "b": jnp.ones(16)}
    method = jp.Method(granularity=granularity, distribution=distribution, layout=jp.FLAX)

    def compute(params):
        return jp.compute_masks(method, params, jnp.float32(0.4))

    want = compute(params)
    for spec in SPECS if jit else SPECS[:1]:  # outside jit every step is a program to compile for each placement
        shardings = {"a": NamedSharding(mesh, PartitionSpec(*spec)), "b": NamedSharding(mesh, PartitionSpec("x"))}
        sharded = jax.device_put(params, shardings)
        masks = jax.jit(compute)(sharded) if jit else compute(sharded)
        np.testing.assert_array_equal(masks["a"], want["a"], err_msg=str(spec))
        assert np.asarray(masks["b"]).all()
        if not jit:
            assert masks["a"].sharding == sharded["a"].sharding
            assert masks["b"].sharding.is_equivalent_to(sharded["b"].sharding, 1)


def test_a_mask_lies_where_its_leaf_lies():
    second = jax.devices()[2]
    params = jax.device_put({"a": rand(4, 4), "b": rand(4)}, second)
    masks = jp.compute_masks(jp.Method(), params, 0.5)
    assert masks["a"].devices() == masks["b"].devices() == {second}
