"""The models that are measured are the published ones, and their zeros are counted exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_helpers import PROFILES, nonzeros, pruned_resnet

from jaxprune import sparse, tracing, tree
from jaxprune.lab.bench import sparsify
from jaxprune.lab.data.files import SHAPES
from jaxprune.lab.models import parts, zoo
from jaxprune.lab.models.resnet import ResNet50

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def small_resnet():
    return pruned_resnet()


def folded_shapes():
    """ResNet-50 as it is measured."""
    return jax.eval_shape(lambda params: parts.fold_batch_norms(params, 1e-5), ResNet50().shapes())


def macs_per_leaf(apply, params, image):
    x = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    return {site.name: site.macs for site in tracing.trace(apply, params, x) if site.macs}


@pytest.mark.usefixtures("unchecked")  # shapes stand for arrays
def test_resnet50_has_the_multiply_adds_of_the_published_models():
    params = folded_shapes()
    macs = macs_per_leaf(ResNet50().apply, params, (224, 224, 3))
    assert len(macs) == 54
    assert sum(macs.values()) / 1e9 == pytest.approx(4.089, abs=5e-4)
    sizes = {name: np.prod(leaf.shape) for name, leaf in tree.named_leaves(params).items()}
    assert sum(sizes[name] for name in macs) == 25_502_912
    for column, expected in (("pruned_83", 1.143), ("pruned_85", 0.714), ("pruned_70", 1.8485)):
        kept = sparsify.profile_counts(params, sparsify.read_profile(f"{PROFILES}:{column}"))
        assert sum(macs[n] // sizes[n] * kept[n] for n in macs) / 1e9 == pytest.approx(expected, abs=5e-4), column


def test_resnet50_runs_and_compressed_equals_dense(small_resnet):
    network, params, _ = small_resnet
    x = jax.random.uniform(jax.random.key(2), (2, 32, 32, 3))
    expected = jax.jit(network.apply)(params, x)
    assert expected.shape == (2, 1000)
    assert np.isfinite(expected).all()
    assert np.std(expected) > 1e-3
    stored = sparse.compress(params, "bcsr", unsupported="dense")
    assert isinstance(stored["fc"]["kernel"], sparse.SparseWeight)
    answer = jax.jit(sparse.apply(network.apply))(stored, x)
    np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.usefixtures("unchecked")  # shapes stand for arrays
def test_the_epilogue_is_add_add_relu():
    """What fusion looks for: convolution, bias, residual, ReLU, in this order, with nothing between."""
    params = folded_shapes()
    block = {k: v for k, v in params.items() if k.startswith("layer1.1")}
    x = jax.ShapeDtypeStruct((1, 8, 8, 256), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda p, x: ResNet50().bottleneck(p, "layer1.1", x, 1))(block, x)
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    conv = ["conv_general_dilated", "broadcast_in_dim", "add"]
    relu = names[3]
    assert names == [*conv, relu, *conv, relu, *conv, "add", relu]


@pytest.mark.usefixtures("relaxed")
@pytest.mark.parametrize("name", zoo.MNIST)
def test_the_mnist_models_run(name):
    def logits(key, images):
        network = zoo.deployed(name, key)
        assert network.sample.shape == SHAPES["mnist"]
        return network.apply(network.params, images)

    x = jax.ShapeDtypeStruct((2, *SHAPES["mnist"]), jnp.float32)
    assert jax.eval_shape(logits, jax.random.key(0), x).shape == (2, 10)


# ---------------------------------------------------------------- zeros


def test_profiles_leave_exact_counts_at_random_positions(small_resnet):
    network, params, counts = small_resnet
    assert nonzeros(params) == counts
    assert counts["layer4.2.conv2/kernel"] == 353_895
    assert all(np.array_equal(params[k]["bias"], network.params[k]["bias"]) for k in params)
    rows_of_fc = np.count_nonzero(np.asarray(params["fc"]["kernel"]), axis=0)  # 409,600 over 1,000 outputs
    assert rows_of_fc.min() > 250
    assert rows_of_fc.max() < 600


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999])
def test_uniform_counts_are_exact_and_seeded(sparsity):
    params = parts.random_params({"a": parts.layer(3, 3, 5, 7), "b": parts.layer(11, 13)}, jax.random.key(0))
    counts = sparsify.uniform_counts(params, sparsity)
    assert counts == {f"{k}/kernel": n - round(n * sparsity) for k, n in (("a", 315), ("b", 143))}
    once, again = (sparsify.prune_to(params, counts, jax.random.key(3)) for _ in range(2))
    other = sparsify.prune_to(params, counts, jax.random.key(4))
    assert nonzeros(once) == counts
    assert np.array_equal(once["a"]["kernel"], again["a"]["kernel"])
    assert sparsity in (0.0, 0.999) or not np.array_equal(once["a"]["kernel"], other["a"]["kernel"])


def test_pruned_layers_keep_the_variance_of_dense_ones():
    params = parts.random_params({"a": parts.layer(400, 300)}, jax.random.key(0))
    pruned = sparsify.prune_to(params, {"a/kernel": 12_000}, jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (64, 400))
    dense, sparse_ = (float(jnp.std(x @ p["a"]["kernel"])) for p in (params, pruned))
    assert sparse_ == pytest.approx(dense, rel=0.1)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nowhere.csv:a", "nowhere.csv cannot be read: No such file"),
        ("profile.csv", "A profile is FILE:COLUMN"),
        ("profile.csv:b", "holds no profile 'b'. Columns of non-zeros there: a."),
        ("torn.csv:a", "layer 'x' needs a shape such as 64x3x7x7"),
    ],
)
def test_bad_profiles_are_refused(tmp_path, monkeypatch, place, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profile.csv").write_text("# a source\nlayer,shape_oihw,weights,nonzero_a\nx,5x4,20,3\n")
    (tmp_path / "torn.csv").write_text("layer,shape_oihw,nonzero_a\nx,5 by 4,3\n")
    with pytest.raises(ValueError, match=r".") as raised:
        sparsify.read_profile(place)
    assert words in str(raised.value)
    assert sparsify.read_profile("profile.csv:a") == sparsify.read_profile("profile.csv:nonzero_a")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ({}, "lacks the model's layer 'x'"),
        ({"x": ((5, 4), 3), "y": ((1, 1), 1)}, "has a layer 'y', the model has not"),
        ({"x": ((4, 5), 3)}, "is (4, 5) in the profile, (5, 4) in the model"),
        ({"x": ((5, 4), 21)}, "has 20 weights, the profile keeps 21"),
    ],
)
def test_profiles_of_another_model_are_refused(lines, words):
    params = {"x": {"kernel": jnp.ones((4, 5))}}
    with pytest.raises(ValueError, match=r".") as raised:
        sparsify.profile_counts(params, {k: sparsify.ProfileLine(*v) for k, v in lines.items()})
    assert words in str(raised.value)
