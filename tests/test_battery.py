"""The battery: every criterion through everything that a mask must survive. To add a criterion is to add a line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxprune as jp

SHAPES = {"conv": (2, 2, 8, 4), "dense": (24, 16), "stack": (2, 8, 4), "bias": (16,)}
LAYOUT = jp.FLAX.with_rules({"stack": jp.Axes(layers=(0,), inputs=(1,), outputs=(2,))})
OUTPUTS = {"conv": (4,), "dense": (16,), "stack": (2, 4)}
INPUTS = {"conv": (8,), "dense": (24,), "stack": (2, 8)}
LEAVES = ("conv", "dense", "stack")


def drawn(seed, shapes=SHAPES, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def positive(seed, shapes):
    return {name: jnp.abs(one) for name, one in drawn(seed, shapes).items()}


GRADS = {"grads": drawn(1)}
CRITERIA = {
    jp.magnitude: {},
    jp.squared_magnitude: {},
    jp.random: {"key": jax.random.key(0)},
    jp.lamp: {},
    jp.geometric_median: {},
    jp.norm_scale: {"scales": drawn(2, OUTPUTS)},
    jp.gradient: GRADS,
    jp.taylor: GRADS,
    jp.taylor_squared: GRADS,
    jp.joint_taylor(jp.Output()): GRADS,
    jp.snip: GRADS,
    jp.grasp: {"hessian_grads": drawn(3)},
    jp.synflow: {"flow_grads": drawn(4)},
    jp.fisher: {"squared_grads": positive(5, SHAPES)},
    jp.wanda: {"input_norms": positive(6, INPUTS)},
    jp.activation_mean: {"output_means": drawn(7, OUTPUTS)},
    jp.apoz: {"zero_fractions": {name: one % 1 for name, one in positive(8, OUTPUTS).items()}},
    jp.movement: {"statistics": drawn(9)},
    jp.momentum(): {"statistics": drawn(10)},
}
WHOLE = (jp.geometric_median, jp.norm_scale, jp.activation_mean, jp.apoz)  # score outputs, not weights
NAMES = [getattr(criterion, "__name__", f"running_{i}") for i, criterion in enumerate(CRITERIA)]

each = pytest.mark.parametrize("criterion", CRITERIA, ids=NAMES)


def method_of(criterion):
    outputs = criterion in WHOLE or getattr(criterion, "__name__", "") == "joint"
    return jp.Method(criterion, jp.Output() if outputs else jp.Element(), layout=LAYOUT)


def groups_of(masks, method):
    """Alive groups, and all: of outputs, or of weights."""
    kept = [np.asarray(masks[name]) for name in LEAVES]
    if isinstance(method.granularity, jp.Output):
        axes = {"conv": (0, 1, 2), "dense": (0,), "stack": (1,)}
        kept = [mask.any(axes[name]) for name, mask in zip(LEAVES, kept, strict=True)]
    return sum(int(mask.sum()) for mask in kept), sum(mask.size for mask in kept)


@each
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_counts_in_one_trace(criterion, dtype):
    """Structure, round(n s) groups, jit like eager, and a sparsity that moves without another trace."""
    method, params, traces = method_of(criterion), drawn(0, dtype=dtype), []

    @jax.jit
    def run(params, sparsity, evidence):
        traces.append(1)
        return jp.compute_masks(method, params, sparsity, **evidence)

    for sparsity in (0.0, 0.3, 0.9):
        masks = run(params, jnp.float32(sparsity), CRITERIA[criterion])
        for name, leaf in params.items():
            assert (masks[name].shape, masks[name].dtype) == (leaf.shape, bool)
        alive, n = groups_of(masks, method)
        assert n - alive == round(n * sparsity)
        assert masks["bias"].all()
    eager = jp.compute_masks(method, params, sparsity, **CRITERIA[criterion])
    jax.tree.map(np.testing.assert_array_equal, masks, eager)
    assert len(traces) == 1


@each
def test_vmap_and_scan_give_the_masks_of_one_by_one(criterion):
    method = method_of(criterion)
    models = [drawn(seed) for seed in (20, 21, 22)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)

    def run(params):
        return jp.compute_masks(method, params, 0.6, **CRITERIA[criterion])

    mapped = jax.jit(jax.vmap(run))(stacked)
    scanned = jax.jit(lambda all_: jax.lax.scan(lambda _, params: (None, run(params)), None, all_))(stacked)[1]
    for i, params in enumerate(models):
        for name, want in run(params).items():
            np.testing.assert_array_equal(mapped[name][i], want)
            np.testing.assert_array_equal(scanned[name][i], want)


SPECS = (PartitionSpec("x", "y"), PartitionSpec(None, "x"), PartitionSpec("x", None))


@each
def test_eight_devices_make_the_masks_of_one(criterion):
    method, params = method_of(criterion), drawn(0)
    want = jp.compute_masks(method, params, 0.6, **CRITERIA[criterion])
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    spec = SPECS[list(CRITERIA).index(criterion) % len(SPECS)]
    specs = {name: PartitionSpec(*[None] * (len(shape) - 2), *spec) for name, shape in SHAPES.items()}
    specs["bias"] = PartitionSpec("x")
    sharded = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in params.items()}
    masks = jax.jit(lambda p: jp.compute_masks(method, p, jnp.float32(0.6), **CRITERIA[criterion]))(sharded)
    for name in SHAPES:
        np.testing.assert_array_equal(masks[name], want[name], err_msg=f"{name} {spec}")


@each
def test_stacked_layers_score_like_single_ones(criterion):
    """What a criterion says of a stacked leaf is what it says of its layers, the rest of the model being the same."""
    if criterion is jp.random or not hasattr(criterion, "__name__"):
        pytest.skip("random numbers go by leaf; statistics are handed in")
    views = {"stack": drawn(0)["stack"][:, None], "dense": drawn(0)["dense"][None]}
    evidence = {
        key: {"stack": one["stack"][:, None] if one["stack"].ndim == 3 else one["stack"], "dense": one["dense"][None]
              if one["dense"].ndim == 2 else one["dense"]}
        for key, one in CRITERIA[criterion].items()
    }  # fmt: skip
    whole = criterion(views, **evidence)["stack"]
    single = {"0": views["stack"][0], "1": views["stack"][1], "dense": views["dense"]}
    apart = {key: {"0": one["stack"][0], "1": one["stack"][1], "dense": one["dense"]} for key, one in evidence.items()}
    found = criterion(single, **apart)
    np.testing.assert_allclose(whole[0], found["0"], rtol=1e-6)
    np.testing.assert_allclose(whole[1], found["1"], rtol=1e-6)
