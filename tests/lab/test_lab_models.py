"""The models of the zoo: published sizes to the digit, layers against NumPy, one function in each of its forms."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import SMALL, TEXT, TINY
from quick import quick_jit
from trace_helpers import normal

import jaxprune as jp
from jaxprune import tree
from jaxprune.lab.models import parts, zoo
from jaxprune.lab.models.decoder import Decoder, rotary
from jaxprune.lab.models.mobilenet import MobileNetV1
from jaxprune.lab.models.resnet import CifarResNet, ResNet50
from jaxprune.lab.models.vgg import VGG
from jaxprune.lab.models.vit import ViT
from jaxprune.lab.recipe.config import Model

pytestmark = pytest.mark.usefixtures("quick")

KEY = jax.random.key(0)
STATISTICS = ("/mean", "/var")


def tiny(name):
    """The model, its params and an input."""
    model = TINY[name]
    shape = (2, *model.sample.shape)
    x = normal(*shape) if model.sample.dtype == jnp.float32 else jnp.asarray(np.arange(12).reshape(shape) * 7 % 11)
    return model, parts.random_params(model.shapes(), KEY), x


@functools.cache
def logits_of(name):
    """Of the tiny model, for all who look at them: it is compiled once."""
    model, params, x = tiny(name)
    return np.asarray(quick_jit(model.apply)(params, x))


def sizes(leaves):
    return {name: math.prod(leaf.shape) for name, leaf in tree.named_leaves(leaves).items()}


# ---------------------------------------------------------------- sizes

# Trained parameters; weights of products and convolutions, and their multiply-adds for one sample.
# VGG: Simonyan and Zisserman 2014, table 2. ResNet: He et al. 2015; torchvision's ResNet-50. MobileNet: Howard et al.
# 2017, table 8. ViT: DeiT-Ti. decoder_7b: Llama 2. LeNet: Han et al. 2015, tables 3 and 4.
PUBLISHED = {
    "vgg16": (138_357_544, 138_344_128, 15_470_264_320),
    "vgg19": (143_667_240, 143_652_544, 19_632_062_464),
    "cifar_vgg16": (15_245_130, 15_239_872, 313_725_952),
    "cifar_vgg19": (20_554_826, 20_548_288, 398_660_608),
    "resnet20": (269_722, 268_336, 40_551_040),
    "resnet32": (464_154, 461_872, 68_862_592),
    "resnet56": (853_018, 848_944, 125_485_696),
    "resnet50": (25_557_032, 25_502_912, 4_089_184_256),
    "mobilenet_v1": (4_231_976, 4_209_088, 568_740_352),
    "vit": (5_717_416, 5_647_872, 196 * 768 * 192 + 12 * 197 * 12 * 192 * 192 + 192_000),
    "decoder_7b": (6_738_415_616, 6_607_077_376, 256 * 6_607_077_376),
    "lenet_300_100": (266_610, 266_200, 266_200),
    "lenet_5": (431_080, 430_500, 24 * 24 * 500 + 8 * 8 * 25_000 + 400_000 + 5_000),
}


@pytest.mark.usefixtures("unchecked")  # shapes stand for arrays
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    network = zoo.shapes(name)
    x = jax.ShapeDtypeStruct((1, *network.sample.shape), network.sample.dtype)
    leaves = sizes(network.params)
    products = [site for site in jp.trace(network.apply, network.params, x) if site.macs]
    counted = (
        sum(size for leaf, size in leaves.items() if not leaf.endswith(STATISTICS)),
        sum(leaves[leaf] for leaf in {site.name for site in products}),
        sum(site.macs for site in products),
    )
    assert counted == PUBLISHED[name]
    logits = jax.eval_shape(network.apply, network.params, x)
    assert logits.shape[0] == 1
    assert logits.dtype == jnp.float32


@pytest.mark.usefixtures("unchecked")
def test_the_first_resnet50_has_fewer_multiply_adds():
    """The stride comes one convolution earlier: 3.86 instead of 4.09 billion."""
    model = ResNet50(stride_first=True)
    sites = jp.trace(model.apply, model.shapes(), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    assert sum(site.macs for site in sites) == 3_857_973_248


def test_groups_make_keys_and_values_smaller():
    """Llama 3 8B: 8,030,261,248 parameters."""
    model = Decoder(vocabulary=128_256, dim=4096, layers=32, heads=32, kv_heads=8, hidden=14_336, scan=True)
    assert sum(sizes(model.shapes()).values()) == 8_030_261_248


@pytest.mark.parametrize("name", zoo.MODELS)
def test_names_of_leaves_say_what_is_pruned(name):
    leaves = tree.named_leaves(zoo.MODELS[name].shapes())
    kernels = {leaf for leaf in leaves if leaf.endswith("/kernel")}
    assert {leaf for leaf, shape in leaves.items() if tree.weights(leaf, shape)} == kernels


# ---------------------------------------------------------------- running


@pytest.mark.parametrize("name", TINY)
def test_every_model_runs_and_uses_every_leaf(name):
    model, params, x = tiny(name)
    logits = logits_of(name)
    assert logits.shape == (2, *((6, 11) if name.startswith("decoder") else (5,)))
    assert np.isfinite(logits).all()
    assert np.std(logits) > 1e-3
    jaxpr = jax.make_jaxpr(model.apply)(params, x).jaxpr
    used = {id(atom) for eqn in jaxpr.eqns for atom in eqn.invars}
    assert [
        leaf for leaf, var in zip(tree.named_leaves(params), jaxpr.invars, strict=False) if id(var) not in used
    ] == []


def test_random_weights_by_fan_in():
    shapes = {"a": parts.layer(3, 3, 20, 400), "b": parts.layer(300, 200), "c": parts.layer(4, 300, 200, bias=False)}
    shapes["c"]["kernel"] = shapes["c"]["kernel"].update(shape=(4, 300, 200))
    shapes["n"] = parts.norm(5000, "scale", "mean", "var")
    params = parts.random_params(shapes, KEY)
    for name, fan_in in (("a", 180), ("b", 300)):
        assert float(jnp.std(params[name]["kernel"])) == pytest.approx(math.sqrt(2 / fan_in), rel=0.02), name
    assert [round(float(jnp.mean(params["n"][kind])), 1) for kind in ("scale", "mean", "var")] == [1, 0, 1]
    assert float(jnp.min(params["n"]["var"])) > 0
    assert all(
        jnp.array_equal(a, b) for a, b in zip(*(parts.random_params(shapes, KEY)["a"].values(),) * 2, strict=True)
    )
    other = parts.random_params(shapes, jax.random.key(1))
    assert not jnp.array_equal(other["a"]["kernel"], params["a"]["kernel"])


# ---------------------------------------------------------------- layers against NumPy


def by_hand_norm(layer, x, epsilon, *, centred):
    x = x - x.mean(-1, keepdims=True) if centred else x
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * layer["scale"]
    return y + layer["bias"] if "bias" in layer else y


def by_hand_attention(queries, keys, values, group, *, causal):
    """Head by head and position by position; queries (length, heads, n)."""
    out = np.zeros_like(queries)
    for head in range(queries.shape[1]):
        for t in range(len(queries)):
            seen = t + 1 if causal else len(keys)
            scores = keys[:seen, head // group] @ queries[t, head] / np.sqrt(queries.shape[-1])
            scores = np.exp(scores - scores.max())
            out[t, head] = scores / scores.sum() @ values[:seen, head // group]
    return out.reshape(len(queries), -1)


def by_hand_rotary(x, theta):
    """Pairs as complex numbers, turned."""
    pairs = x[..., ::2] + 1j * x[..., 1::2]
    n = x.shape[-1]
    for p in range(len(x)):
        for i in range(n // 2):
            pairs[p, ..., i] *= np.exp(1j * p * theta ** (-2 * i / n))
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def in_float64(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def by_hand_decoder(model, params, tokens):
    p = in_float64(params)
    x = p["embed"]["embedding"][tokens]
    for block in p["layers"]:
        y = by_hand_norm(block["norm1"], x, model.epsilon, centred=False)
        q, k, v = (
            (y @ block[name]["kernel"]).reshape(len(x), -1, model.head_dim) for name in ("query", "key", "value")
        )
        q, k = by_hand_rotary(q, model.theta), by_hand_rotary(k, model.theta)
        x = x + by_hand_attention(q, k, v, q.shape[1] // k.shape[1], causal=True) @ block["out"]["kernel"]
        y = by_hand_norm(block["norm2"], x, model.epsilon, centred=False)
        gate = y @ block["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ block["up"]["kernel"])) @ block["down"]["kernel"]
    x = by_hand_norm(p["norm"], x, model.epsilon, centred=False)
    return x @ (p["embed"]["embedding"].T if model.tied else p["output"]["kernel"])


@pytest.mark.parametrize("name", ["decoder", "decoder with groups", "decoder with tied output"])
def test_decoder_by_hand(name):
    model, params, tokens = tiny(name)
    for row, text in zip(logits_of(name), np.asarray(tokens), strict=True):
        np.testing.assert_allclose(row, by_hand_decoder(model, params, text), rtol=1e-4, atol=1e-4)


def test_stacked_layers_are_the_same_decoder():
    model, params, tokens = tiny("decoder with groups")
    stacked = params | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])}
    scanned = dataclasses.replace(model, scan=True)
    assert sizes(stacked) == sizes(scanned.shapes())
    got = quick_jit(scanned.apply)(stacked, tokens)
    np.testing.assert_allclose(got, logits_of("decoder with groups"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [(3,), (2, 3), ()])
def test_rotary_by_hand(heads):
    x = normal(2, 5, *heads, 8)
    turned = rotary(x, 100.0)
    for row, original in zip(turned, np.asarray(x, np.float64), strict=True):
        np.testing.assert_allclose(row, by_hand_rotary(original, 100.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (1, 4), (4, 1), (2, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_hand(groups, heads, causal):
    queries, keys, values = (
        normal(1, 5, groups, heads, 4),
        normal(1, 5, groups, 4, seed=1),
        normal(1, 5, groups, 4, seed=2),
    )
    (got,) = parts.attend(queries, keys, values, causal=causal)
    q, k, v = (np.asarray(a[0], np.float64) for a in (queries.reshape(1, 5, -1, 4), keys, values))
    np.testing.assert_allclose(got, by_hand_attention(q, k, v, heads, causal=causal), rtol=1e-5, atol=1e-5)


def by_hand_vit(model, params, image):
    p = in_float64(params)
    side, n = model.patch, model.dim // model.heads
    corners = [(i, j) for i in range(0, image.shape[0], side) for j in range(0, image.shape[1], side)]
    x = np.stack([np.tensordot(image[i : i + side, j : j + side], p["patch"]["kernel"], 3) for i, j in corners])
    x = x + p["patch"]["bias"]
    x = np.concatenate([p["token"]["embedding"], x]) if model.class_token else x
    x = x + p["position"]["embedding"]
    for block in p["blocks"]:
        y = by_hand_norm(block["norm1"], x, 1e-6, centred=True)
        qkv = (y @ block["qkv"]["kernel"] + block["qkv"]["bias"]).reshape(len(x), 3, model.heads, n)
        mixed = by_hand_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2], 1, causal=False)
        x = x + mixed @ block["out"]["kernel"] + block["out"]["bias"]
        y = by_hand_norm(block["norm2"], x, 1e-6, centred=True) @ block["fc1"]["kernel"] + block["fc1"]["bias"]
        y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
        x = x + y @ block["fc2"]["kernel"] + block["fc2"]["bias"]
    x = by_hand_norm(p["norm"], x, 1e-6, centred=True)
    return (x[0] if model.class_token else x.mean(0)) @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize("name", ["vit", "vit without token"])
def test_vit_by_hand(name):
    model, params, images = tiny(name)
    for row, image in zip(logits_of(name), np.asarray(images, np.float64), strict=True):
        np.testing.assert_allclose(row, by_hand_vit(model, params, image), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- convolutional networks


def test_batch_norm_by_hand():
    layer = parts.random_params(parts.norm(6, "scale", "bias", "mean", "var"), KEY)
    p, x = in_float64(layer), normal(2, 3, 3, 6)
    expected = p["scale"] * (np.asarray(x, np.float64) - p["mean"]) / np.sqrt(p["var"] + 0.1) + p["bias"]
    np.testing.assert_allclose(parts.batch_norm(layer, x, 0.1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "biased"),
    [("resnet50", True), ("resnet50 v1", False), ("resnet for cifar", False), ("mobilenet", True)],
)
def test_folded_equals_unfolded(name, biased):
    model, params, images = tiny(name)
    if biased:  # as some published models have it
        for i, layer in enumerate(layer for layer in params.values() if "kernel" in layer):
            layer["bias"] = normal(layer["kernel"].shape[-1], seed=i)
    folded = parts.fold_batch_norms(params, model.epsilon)
    assert set(folded) == {layer for layer in params if "kernel" in params[layer]}
    assert all(sorted(layer) == ["bias", "kernel"] for layer in folded.values())
    got, expected = quick_jit(lambda *both: [model.apply(one, images) for one in both])(folded, params)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_shortcuts_without_weights():
    """With the last batch norm of every block silenced, what is left is every second pixel and zeros around."""
    model = CifarResNet(1, width=2, classes=8, image=(8, 8, 2))
    params = parts.random_params(model.shapes(), KEY)
    for stage in (1, 2, 3):
        params[f"layer{stage}.0.bn2"] |= {"scale": jnp.zeros(2**stage), "bias": jnp.zeros(2**stage)}
    params["fc"] = {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}
    images = normal(1, 8, 8, 2)
    first = jax.nn.relu(parts.conv_norm(params, "conv1", images, model.epsilon))
    expected = np.pad(np.asarray(first)[0, ::4, ::4].mean((0, 1)), 3)
    np.testing.assert_allclose(model.apply(params, images)[0], expected, rtol=1e-5, atol=1e-6)


def test_depthwise_channels_do_not_mix():
    layer, x = {"kernel": normal(3, 3, 1, 4)}, normal(1, 6, 6, 4, seed=1)
    y = parts.conv(layer, x, depthwise=True)
    for channel in range(4):
        one = {"kernel": layer["kernel"][..., channel : channel + 1]}
        alone = parts.conv(one, x[..., channel : channel + 1])
        np.testing.assert_allclose(y[..., channel], alone[..., 0], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- names and refusals


def test_networks_by_name():
    network = zoo.build("resnet20", KEY)
    logits = jax.jit(network.apply)(network.params, jnp.ones((2, *network.sample.shape)))
    assert logits.shape == (2, 10)
    assert zoo.shapes("vgg19", 32).sample.shape == (32, 32, 3)
    assert zoo.shapes("vgg19", 32).params["fc6"]["kernel"].shape == (512, 4096)
    assert zoo.shapes("mlp", 8).params["layers"][0]["kernel"].shape == (64, 300)


def test_networks_of_a_config():
    network = zoo.shapes(Model(name="resnet20"), (16, 24, 3), 7)
    assert network.sample.shape == (16, 24, 3)
    assert network.params["fc"]["kernel"].shape == (64, 7)
    assert zoo.shapes(Model(name="lenet_5")).sample.shape == (28, 28, 1)
    begun, measured = (zoo.build(model, KEY).params for model in (Model(name="resnet20"), "resnet20"))
    assert np.array_equal(begun["conv1"]["kernel"], measured["conv1"]["kernel"])
    assert np.array_equal(begun["bn1"]["scale"], np.ones(16))
    assert not np.array_equal(measured["bn1"]["scale"], np.ones(16))


REFUSALS = {
    "unknown": (
        lambda: zoo.shapes("resnet5"),
        "There is no model 'resnet5'. There are: vgg16, .* Did you mean 'resnet56'",
    ),
    "no images": (lambda: zoo.shapes("decoder", 224), "decoder takes no images"),
    "vgg": (lambda: VGG((1, 1), (4, 4), image=(3, 8, 3)), "halves its images 2 times: it needs 4 x 4 .* 3 arrived"),
    "resnet": (lambda: ResNet50(image=(32, 16, 3)), "it needs 32 x 32 pixels or more, 16 arrived"),
    "mobilenet": (lambda: MobileNetV1(image=(16, 16, 3)), "it needs 32 x 32 pixels or more, 16 arrived"),
    "patches": (lambda: ViT(patch=3, image=SMALL), "Patches of 3 x 3 pixels do not fill images of 8 x 8"),
    "heads": (lambda: ViT(dim=10, heads=4), "4 heads do not share a width of 10"),
    "pairs": (lambda: Decoder(**TEXT | {"dim": 12}, kv_heads=4), "has to be a multiple of 8"),
    "groups": (lambda: Decoder(**TEXT, kv_heads=3), "3 heads of keys cannot serve 4 heads of queries evenly"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    make, words = REFUSALS[case]
    with pytest.raises(ValueError, match=words):
        make()
