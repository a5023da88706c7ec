"""What `trace` refuses, and what its sites say of the leaves: selection and layout; a model too large to compute."""

import json
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from framework_models import MODELS
from jax import lax
from trace_helpers import kinds, like, normal

import jaxprune as jp
from jaxprune import tree
from jaxprune.layout import Axes

pytestmark = pytest.mark.usefixtures("quick")

N, IN, OUT, ROWS = 5, 6, 8, 11


INDICES = like(N, dtype=jnp.int32)
CHANNELS = Axes(outputs=(0,))


def call_back(w):
    return jax.pure_callback(np.asarray, w, w)


BARRIERS = {
    "pure_callback": lambda w, x: x @ call_back(w),
    "sort": lambda w, x: x @ jnp.sort(w),
    "concatenate": lambda w, x: jnp.concatenate([w, x @ w]),
    "mul": lambda w, x: x @ (2 * w).T @ w,
    "reduce_sum": lambda w, x: x @ w + jnp.sum(w),
}


@pytest.mark.parametrize("case", BARRIERS)
def test_strict_names_leaf_operation_and_line(case):
    fn = jax.jit(BARRIERS[case])
    line = BARRIERS[case].__code__.co_firstlineno
    jp.trace(lambda p, x: fn(p["w"], x), {"w": normal(IN, IN)}, normal(N, IN))
    with pytest.raises(
        ValueError, match=rf"'w'.*`{case}`.* at .*test_selection\.py:({line}|\d+).*called at .*test_selection\.py"
    ):
        jp.trace(lambda p, x: fn(p["w"], x), {"w": normal(IN, IN)}, normal(N, IN), strict=True)


W = normal(IN, OUT)
TREE = {"w": W, "head": W}
REFUSED = {
    "closes over its weights": (lambda p, x: x @ W, {"w": W}, r"arrays of its own, of shapes \(6, 8\).*'w'.*arguments"),
    "under jit": (lambda p, x: jax.jit(lambda x: x @ W)(x), {"w": W}, "holds arrays of its own"),
    "in a scan": (
        lambda p, x: lax.scan(lambda c, _: (c, x @ W), 0.0, length=2)[1],
        {"w": W},
        "holds arrays of its own",
    ),
    "params of another model": (lambda p, x: x @ W, {"v": W[:2]}, "holds arrays of its own.*'v'"),
    "transposed before": (lambda p, x: x @ W + p["b"].sum(), {"w": W.T, "b": W[0]}, "does not consume 'w'"),
    "consumes none": (lambda p, x: x + 1, TREE, "consumes no leaf of the params, which are 'head', 'w'"),
    "one dead": (lambda p, x: (x @ p["w"], p["head"] * 2)[0], TREE, "does not consume 'head'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_params_that_are_not_consumed(case):
    fn, params, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        jp.trace(fn, params, normal(N, IN), strict=case == "one dead")


def test_a_leaf_left_aside_is_no_error():
    """Nor is a constant of another size, such as a mask or a table of angles."""
    angles = jnp.ones((IN, IN))
    params = {"w": W, "head": W, "vector": normal(IN * IN), "key": jax.random.key(0)}
    sites = jp.trace(lambda p, x: x @ angles @ p["w"], params, normal(N, IN))
    assert kinds(sites) == [("w", "product")]


def tied(p, tokens):
    return (p["table"][tokens] * p["norm"][None] + p["bias"][None]) @ p["table"].T


def test_a_tied_embedding_follows_its_product_and_is_no_weight():
    params = {"table": like(ROWS, OUT), "norm": like(OUT), "bias": like(OUT)}
    sites = jp.trace(tied, params, INDICES, strict=True)
    layout = jp.layout_of(sites)
    assert layout.axes("table", (ROWS, OUT)) == Axes(inputs=(1,), outputs=(0,))
    assert layout.axes("norm", (OUT,)) == layout.axes("bias", (OUT,)) == CHANNELS
    assert jp.weights_of(sites).names == frozenset()
    assert jp.weights_of(sites, embeddings=True).names == {"table"}


def test_a_quantized_matrix_is_no_weight():
    sites = jp.trace(lambda w, x: x @ w.astype(jnp.float32), like(IN, OUT, dtype=jnp.int8), like(N, IN))
    assert kinds(sites) == [("", "product")]
    assert jp.weights_of(sites).names == frozenset()


def test_layout_found_is_the_layout_declared():
    """Masks per output of a model of Equinox, found and declared, are the same; vectors and biases are not selected."""
    model = drawn(eqx.filter_eval_shape(eqx.nn.MLP, IN, 3, OUT, 1, key=jax.random.key(0)))
    arrays, rest = eqx.partition(model, eqx.is_array)
    sites = jp.trace(lambda p, x: jax.vmap(eqx.combine(p, rest))(x), arrays, like(N, IN), strict=True)
    found, layout = jp.weights_of(sites), jp.layout_of(sites)
    declared = jp.Method(granularity=jp.Output(), layout=jp.TORCH)
    method = jp.Method(granularity=jp.Output(), select=found, layout=layout)
    same = jax.tree.map(np.array_equal, jp.compute_masks(method, arrays, 0.5), jp.compute_masks(declared, arrays, 0.5))
    assert all(jax.tree.leaves(same))
    assert hash(method) == hash(jp.Method(granularity=jp.Output(), select=jp.weights_of(sites), layout=layout))


@pytest.mark.parametrize("name", MODELS)
def test_names_and_sites_agree_on_what_is_a_weight(name, relaxed):
    params, fn, x = MODELS[name].tiny()
    leaves = tree.named_leaves(params)
    by_name = {leaf for leaf, value in leaves.items() if tree.weights(leaf, value)}
    assert by_name == jp.weights_of(jp.trace(fn, params, x)).names


def test_names_with_signs_that_mean_something_to_patterns():
    sites = jp.trace(lambda p, x: x @ p["[a]*"].T @ p["a"], {"[a]*": like(OUT, IN), "a": like(OUT, OUT)}, like(N, IN))
    layout = jp.layout_of(sites)
    assert layout.axes("[a]*", (OUT, IN)) == Axes(inputs=(1,), outputs=(0,))
    assert layout.axes("a", (OUT, OUT)) == Axes(inputs=(0,), outputs=(1,))


def test_heads_stacks_and_windows_are_found():
    def fn(p, x):
        x = lax.scan(lambda x, w: (jnp.einsum("bi,iod->bod", x, w).reshape(x.shape), None), x, p["heads"])[0]
        return lax.conv_general_dilated(x[:, None], p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    sites = jp.trace(fn, {"heads": like(3, IN, 2, IN // 2), "conv": like(3, IN, OUT)}, like(N, IN), strict=True)
    layout = jp.layout_of(sites)
    assert layout.axes("heads", (3, IN, 2, 3)) == Axes(layers=(0,), inputs=(1,), outputs=(2, 3))
    assert layout.axes("conv", (3, IN, OUT)) == Axes(spatial=(0,), inputs=(1,), outputs=(2,))


def test_a_layout_that_cannot_be_told_names_the_leaf():
    sites = jp.trace(lambda p, x: x @ p["flat"].reshape(IN, OUT), {"flat": like(IN * OUT)}, like(N, IN))
    with pytest.raises(ValueError, match=r"axes of 'flat' \(48,\) cannot be told.*`dot_general`"):
        jp.layout_of(sites)


@pytest.mark.parametrize("how", ["unrolled", "scan"])
def test_a_decoder_of_seven_billion_parameters_is_traced_in_seconds(how):
    program = Path(__file__).parents[1] / "helpers/decoder_7b.py"
    done = subprocess.run([sys.executable, program, how], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    assert found["seconds"] < 20
    assert found["bytes"] < 2 * 2**30
    assert found["parameters"] == 7_241_732_096
    assert found["kinds"] == {"product": 32 * 7 + 1, "scale": 2 * 32 + 1, "embedding": 1}
    multiplied = found["parameters"] - 32000 * 4096 - 65 * 4096
    assert found["macs"] == 2048 * multiplied
    assert (found["weights"], found["rules"]) == ((161, 227) if how == "unrolled" else (6, 10))
