"""Costs: published counts to the digit, multiply-adds counted one by one, and what the command prints."""

import csv
import functools
import itertools
import json
import math
import re
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax import lax

import jaxprune as jp
from jaxprune.lab.commands import costs as lab_costs
from jaxprune.lab.commands import main as cli
from jaxprune.lab.models import zoo
from jaxprune.lab.report import cost_figures, figures
from jaxprune.tracing.cost_model import Cost, Costs

pytestmark = pytest.mark.usefixtures("quick")

PROFILE = "experiments/benchmarks/profiles/resnet50.csv"
shapes_for_arrays = pytest.mark.usefixtures("unchecked")


def shaped(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def random_masks(params, seed=0, alive=0.4):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape) < alive), params)


# ---------------------------------------------------------------- published counts


@functools.cache
def of_model(name, profile="", batch=1):
    return lab_costs.of_model(name, profile, batch=batch)


@shapes_for_arrays
@pytest.mark.parametrize(
    ("column", "weights", "gmacs"),
    [
        ("dense", 25_502_912, 4.0892),
        ("pruned_70", 7_481_351, 1.8485),
        ("pruned_83", 4_240_764, 1.1428),
        ("pruned_85", 3_935_859, 0.7138),
    ],
)
def test_resnet50_under_the_published_profiles(column, weights, gmacs):
    resnet50 = of_model("resnet50", PROFILE)
    total = {"dense": resnet50.dense, **resnet50.profiles}[column].total
    assert (total.weights, total.nnz) == (25_502_912, weights)
    assert round(total.macs / 1e9, 4) == 4.0892
    assert round(total.macs_left / 1e9, 4) == gmacs
    assert total.reduction == 25_502_912 / weights


@shapes_for_arrays
def test_a_profile_counts_what_its_own_lines_say():
    lines = [line for line in Path(PROFILE).read_text().splitlines() if not line.startswith("#")]
    leaves = {
        leaf.name.removesuffix("/kernel"): leaf for leaf in of_model("resnet50", PROFILE).profiles["pruned_83"].leaves
    }
    assert len(leaves) == 54
    for line in csv.DictReader(lines):
        leaf = leaves[line["layer"]]
        assert (leaf.weights, leaf.nnz) == (int(line["weights"]), int(line["nonzero_pruned_83"]))
        assert leaf.macs_left == leaf.macs * leaf.nnz // leaf.weights


@shapes_for_arrays
@pytest.mark.parametrize(
    ("model", "weights", "parameters", "macs"),
    [
        ("lenet_300_100", 266_200, 266_610, 266_200),
        ("lenet_5", 430_500, 431_080, 20 * 24 * 24 * 25 + 50 * 8 * 8 * 500 + 400_000 + 5_000),
        ("vgg19", 143_652_544, 143_667_240, 19_632_062_464),
        ("resnet50", 25_502_912, 25_557_032 + 53_120, 4_089_184_256),  # means and variances of the batch norms
    ],
)
def test_networks_of_the_literature(model, weights, parameters, macs):
    found = of_model(model)
    assert (found.dense.total.weights, found.parameters, found.dense.total.macs) == (weights, parameters, macs)


def test_the_worked_example_of_two_strided_convolutions():
    def apply(params, x):
        for name in ("first", "second"):
            numbers = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(x, params[name], (2, 2), [(1, 1)] * 2, dimension_numbers=numbers)
        return x

    params = {"first": shaped(3, 3, 64, 256), "second": shaped(3, 3, 256, 256)}
    first, second = jp.costs(jp.trace(apply, params, shaped(1, 56, 56, 64))).leaves
    assert (first.weights, first.macs) == (147_456, 115_605_504)
    assert (second.weights, second.macs) == (589_824, 115_605_504)


@shapes_for_arrays
@pytest.mark.parametrize("model", zoo.MODELS)
def test_every_model_of_the_list_has_costs(model):
    found = of_model(model, batch=2)
    assert found.dense.total.macs == 2 * of_model(model).dense.total.macs
    assert found.activation_bytes >= 2 * 4 * math.prod(found.sample)


# ---------------------------------------------------------------- counted one by one


def conv_macs(mask, batch, size, stride, pad, dilation, groups):
    """Multiply-adds with living weights of a convolution over square images, each position and weight visited."""
    kernel, _, n_in, n_out = mask.shape
    starts = range(0, size + 2 * pad - dilation * (kernel - 1), stride)
    count = 0
    for _, _ in itertools.product(starts, starts):
        for out in range(n_out):
            for i, j, c in itertools.product(range(kernel), range(kernel), range(n_in)):
                channel = out // (n_out // groups) * n_in + c  # the input that this weight meets
                assert channel < n_in * groups
                count += batch if mask[i, j, c, out] else 0
    return count


@pytest.mark.parametrize(
    ("kernel", "size", "stride", "pad", "dilation", "groups"),
    [(3, 6, 1, 1, 1, 1), (3, 7, 2, 1, 1, 1), (2, 6, 3, 0, 1, 1), (3, 8, 1, 2, 2, 1), (3, 6, 1, 1, 1, 2),
     (1, 5, 2, 0, 1, 1), (3, 9, 2, 1, 2, 4)],
)  # fmt: skip
def test_convolutions(kernel, size, stride, pad, dilation, groups):
    def apply(params, x):
        return lax.conv_general_dilated(
            x, params["w"], (stride, stride), [(pad, pad)] * 2, rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    params = {"w": shaped(kernel, kernel, 4 // groups, 8)}
    masks = random_masks(params)
    total = jp.costs(jp.trace(apply, params, shaped(2, size, size, 4)), masks).total
    assert total.nnz == np.asarray(masks["w"]).sum()
    assert total.macs_left == conv_macs(np.asarray(masks["w"]), 2, size, stride, pad, dilation, groups)
    assert total.macs == conv_macs(np.ones(params["w"].shape), 2, size, stride, pad, dilation, groups)


def product_macs(mask, positions):
    return sum(positions for alive in mask.reshape(-1) if alive)


B, IN, OUT, L = 5, 6, 4, 3


def scanned(params, x):
    return lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, params["w"])[0]


def scanned_transposed(params, x):
    return lax.scan(lambda h, w: (h @ w.T.astype(jnp.bfloat16).astype(jnp.float32), None), x, params["w"])[0]


# (function, shape of w, times that each weight is multiplied)
PRODUCTS = {
    "dense": (lambda p, x: x @ p["w"], (IN, OUT), B),
    "the weight first": (lambda p, x: p["w"] @ x.T, (OUT, IN), B),
    "through a reshape and a transpose": (lambda p, x: x @ p["w"].reshape(OUT, IN).T, (IN, OUT), B),
    "heads": (lambda p, x: jnp.einsum("bi,hio->bho", x, p["w"]), (2, IN, OUT), B),
    "experts": (lambda p, x: jnp.einsum("ebi,eio->ebo", jnp.stack([x, x]), p["w"]), (2, IN, OUT), B),
    "tied": (lambda p, x: (x @ p["w"]) @ p["w"].T, (IN, OUT), 2 * B),
    "a constant of a scan": (
        lambda p, x: lax.scan(lambda h, _: (h @ p["w"], None), x, length=L)[0], (IN, IN), L * B,
    ),
    "stacked layers": (scanned, (L, IN, IN), B),
    "stacked layers, transposed and cast": (scanned_transposed, (L, IN, IN), B),
    "stacks of stacks": (
        lambda p, x: lax.scan(lambda h, w: (scanned({"w": w}, h), None), x, p["w"])[0], (2, L, IN, IN), B,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PRODUCTS)
def test_products(case):
    fn, shape, positions = PRODUCTS[case]
    params = {"w": shaped(*shape), "b": shaped(OUT)}
    masks = random_masks(params, seed=1)
    sites = jp.trace(lambda p, x: fn(p, x) + jnp.sum(p["b"]), params, shaped(B, IN))
    found = jp.costs(sites, masks)
    w, b = found.leaves
    assert (w.name, w.shape, w.weights, w.nnz) == ("w", shape, math.prod(shape), np.asarray(masks["w"]).sum())
    assert w.macs == product_macs(np.ones(shape), positions)
    assert w.macs_left == product_macs(np.asarray(masks["w"]), positions)
    assert (b.name, b.weights, b.nnz, b.macs, b.macs_left) == ("b", OUT, np.asarray(masks["b"]).sum(), 0, 0)


def sliced(p, x):
    queries, keys, values = jnp.split(x @ p["w"][:, :6], 3, 1)  # six of seven columns
    return (queries @ keys.T) @ values


def split(p, x):
    gate, up = jnp.split(p["w"], 2, axis=1)
    return (x @ gate) * (x[:1] @ up)


def scanned_split(p, x):
    return lax.scan(lambda h, w: (split({"w": w}, h), None), x, p["w"])[0]


# name -> (function, shape of w, for each weight how often it is multiplied)
PARTS = {
    "some columns": (sliced, (IN, 7), lambda i, o: B if o < 6 else 0),
    "halves used differently": (split, (IN, 2 * IN), lambda i, o: B if o < IN else 1),
    "halves of stacked layers": (scanned_split, (L, IN, 2 * IN), lambda _, i, o: B if o < IN else 1),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_of_a_leaf(case):
    fn, shape, times = PARTS[case]
    params = {"w": shaped(*shape)}
    mask = random_masks(params, seed=2)["w"].at[..., -1].set(True)  # so that no part is like the whole
    total = jp.costs(jp.trace(fn, params, shaped(B, IN)), {"w": mask}).total
    counts = np.asarray([times(*index) for index in np.ndindex(shape)]).reshape(shape)
    assert (total.weights, total.nnz) == (math.prod(shape), np.asarray(mask).sum())
    assert (total.macs, total.macs_left) == (counts.sum(), counts[np.asarray(mask)].sum())


def test_one_layer_of_a_stack_may_be_empty():
    params = {"w": shaped(2, IN, IN)}
    masks = {"w": jnp.stack([jnp.zeros((IN, IN), bool), jnp.ones((IN, IN), bool)])}
    total = jp.costs(jp.trace(scanned, params, shaped(B, IN)), masks).total
    assert (total.reduction, total.macs_reduction, total.macs_left) == (2.0, 2.0, B * IN * IN)


@given(alive=st.floats(0, 1), seed=st.integers(0, 99), case=st.sampled_from(sorted(PRODUCTS)))
def test_left_is_never_more_than_dense(alive, seed, case):
    fn, shape, _ = PRODUCTS[case]
    params = {"w": shaped(*shape)}
    sites = jp.trace(fn, params, shaped(B, IN))
    dense, masked = jp.costs(sites), jp.costs(sites, random_masks(params, seed, alive))
    assert jp.costs(sites, {"w": jnp.ones(shape, bool)}) == dense
    assert dense.total.macs == dense.total.macs_left == masked.total.macs
    assert 0 <= masked.total.macs_left <= masked.total.macs
    assert (masked.total.macs_left == 0) == (masked.total.nnz == 0)
    assert masked.with_nonzeros({"w": masked.total.nnz}) == masked


# ---------------------------------------------------------------- the table


def apply(params, x):
    return jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"][None]) @ params["down"]["kernel"]


PARAMS = {
    "up": {"kernel": shaped(3, 8), "bias": shaped(8)},
    "down": {"kernel": shaped(8, 2)},
    "unused": shaped(5, dtype=jnp.bfloat16),
}
SITES = jp.trace(apply, PARAMS, shaped(10, 3))
MASKS = {
    "up": {"kernel": jnp.arange(24).reshape(3, 8) >= 18, "bias": jnp.ones(8, bool)},
    "down": {"kernel": jnp.zeros((8, 2), bool)},
    "unused": jnp.ones(5, bool),
}


def test_rows_of_the_leaves_that_are_known():
    used = ["up/kernel", "up/bias", "down/kernel"]  # in the order they run
    assert [leaf.name for leaf in jp.costs(SITES).leaves] == used
    masked = jp.costs(SITES, MASKS)
    assert [leaf.name for leaf in masked.leaves] == [*used, "unused"]
    assert [leaf.bytes for leaf in masked.leaves] == [96, 32, 64, None]  # a mask does not tell its weights' dtype
    assert masked.total.bytes is None
    found = jp.costs(SITES, MASKS, params=PARAMS)
    counts = [(leaf.nnz, leaf.macs_left, leaf.bytes) for leaf in found.leaves]
    assert counts == [(6, 60, 96), (8, 0, 32), (0, 0, 64), (5, 0, 10)]
    assert found.total == Cost("total", (), 53, 19, 400, 60, 202)


def test_text():
    assert str(jp.costs(SITES, MASKS)).splitlines() == [
        "leaf         shape  weights  left  reduction  MACs  left  reduction  bytes",
        "-----------  -----  -------  ----  ---------  ----  ----  ---------  -----",
        "up/kernel    3x8         24     6      4.00x   240    60      4.00x     96",
        "up/bias      8            8     8      1.00x     0     0      1.00x     32",
        "down/kernel  8x2         16     0       infx   160     0       infx     64",
        "unused       5            5     5      1.00x     0     0      1.00x      ?",
        "total                    53    19      2.79x   400    60      6.67x      ?",
    ]


def test_markdown_and_data():
    found = jp.costs(SITES, MASKS)
    assert found.to_markdown().splitlines()[1:3] == [
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| up/kernel | 3x8 | 24 | 6 | 4.00x | 240 | 60 | 4.00x | 96 |",
    ]
    data = found.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["leaves"][2]["macs_reduction"] is None
    assert (data["total"]["macs_reduction"], data["leaves"][3]["bytes"]) == (400 / 60, None)


# ---------------------------------------------------------------- refusals


def without(name):
    return {key: value for key, value in MASKS.items() if key != name}


@pytest.mark.usefixtures("unchecked")  # the package itself refuses
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jp.costs(()), "no sites.*closes over its weights.*first argument"),
        (lambda: jp.costs(SITES, without("down")), "'down/kernel' of shape \\(8, 2\\).*masks it is not there.*Trace"),
        (lambda: jp.costs(SITES, params={"up": PARAMS["up"]}), "'down/kernel'.*in the params it is not there"),
        (
            lambda: jp.costs(SITES, {**MASKS, "down": {"kernel": jnp.ones((2, 8), bool)}}),
            "'down/kernel' of shape \\(8, 2\\), in the masks it is \\(2, 8\\)",
        ),
        (lambda: jp.costs(SITES, without("up"), params=PARAMS), "The masks have no leaf 'up/bias'"),
        (
            lambda: jp.costs(SITES, {**MASKS, "down": {"kernel": jnp.ones((8, 2))}}),
            "mask of 'down/kernel' is float32, bool was expected.*nonzero_masks",
        ),
        (lambda: jp.costs(SITES).with_nonzeros({"up": 1}), "'up' is no leaf.*up/kernel, up/bias, down/kernel"),
        (lambda: jp.costs(SITES).with_nonzeros({"up/kernel": 25}), "'up/kernel' has 24 weights, 25 of them"),
        (lambda: jp.costs(SITES).with_nonzeros({"up/kernel": -1}), "'up/kernel' has 24 weights, -1 of them"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- activations


def residual(params, x):
    return jax.nn.relu(x @ params["w"]) @ params["w"] + x


def looped(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(jnp.sin(h) @ w), None), x, params["stack"])[0]


X = 4 * B * IN  # bytes of x and of everything shaped like it
# name -> (function, bytes at the worst moment)
ACTIVATIONS = {
    "nothing happens": (lambda p, x: x, X),
    "one product": (lambda p, x: x @ p["w"], 2 * X),
    "a chain frees as it goes": (lambda p, x: jnp.sin(jnp.sin(jnp.sin(x))), 2 * X),
    "a residual keeps its input": (residual, 3 * X),
    "a call is entered": (lambda p, x: jax.jit(lambda y: jnp.sin(jnp.sin(jnp.sin(y))))(x), 2 * X),
    "a result nobody reads": (lambda p, x: (jnp.tan(x), jnp.sin(jnp.cos(jnp.tan(x))))[0], 2 * X),
    "all results stay": (lambda p, x: (jnp.sin(x), jnp.cos(x), jnp.tan(x)), 4 * X),
    "weights are no activations": (lambda p, x: x @ (p["w"] + p["w"].T), 2 * X),
    "casts to half": (lambda p, x: x.astype(jnp.float16).astype(jnp.float32), X + X // 2),
    # x and the result are alive around it, the body makes sin and the product
    "a loop's body, once": (looped, 4 * X),
    "the largest branch": (
        lambda p, x: lax.cond(p["w"][0, 0] > 0, lambda y: y, lambda y: jnp.sin(jnp.sin(y)), x), 4 * X,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_peak_activations(case):
    fn, expected = ACTIVATIONS[case]
    params = {"w": shaped(IN, IN), "stack": shaped(9, IN, IN)}
    assert jp.tracing.peak_activations(fn, params, shaped(B, IN)) == expected


@shapes_for_arrays
def test_peak_activations_of_vgg19_are_two_of_its_largest_maps():
    assert of_model("vgg19").activation_bytes == 2 * 4 * 64 * 224 * 224


# ---------------------------------------------------------------- the command


def said(capsys, *words, code=0):
    assert cli.main(["costs", *map(str, words)]) == code
    out, err = capsys.readouterr()
    return out if code == 0 else err


def test_help_shows_the_command_for_the_published_profiles(capsys):
    with pytest.raises(SystemExit):
        cli.main(["costs", "--help"])
    text = capsys.readouterr().out
    assert f"jaxprune costs resnet50 --profile {PROFILE}\n" in text
    assert "--markdown" in text


@shapes_for_arrays
def test_the_command_prints_layers_and_totals_of_all_columns(capsys):
    lines = said(capsys, "resnet50", "--profile", PROFILE).splitlines()
    assert lines[0] == "resnet50, batch 1, inputs 224 x 224 x 3"
    assert [line for line in lines if line.startswith("pruned")][:3] == ["pruned_70", "pruned_83", "pruned_85"]
    assert sum(line.startswith("layer4.2.conv3/kernel") for line in lines) == 3
    totals = [line.split() for line in lines[-6:-2]]
    assert totals == [
        ["dense", "25,502,912", "1.00x", "4.0892", "1.00x"],
        ["pruned_70", "7,481,351", "3.41x", "1.8485", "2.21x"],
        ["pruned_83", "4,240,764", "6.01x", "1.1428", "3.58x"],
        ["pruned_85", "3,935,859", "6.48x", "0.7138", "5.73x"],
    ]
    assert "parameters with biases" in lines[-1]


@shapes_for_arrays
@pytest.mark.parametrize("column", ["pruned_83", "nonzero_pruned_83"])
def test_one_column_as_markdown(capsys, column):
    text = said(capsys, "resnet50", "--profile", f"{PROFILE}:{column}", "--markdown")
    assert "## pruned_83\n\n| leaf |" in text
    assert "pruned_70" not in text
    assert "| pruned_83 | 4,240,764 | 6.01x | 1.1428 | 3.58x |" in text


@shapes_for_arrays
def test_without_a_profile_the_dense_model_as_data(capsys):
    data = json.loads(said(capsys, "lenet_5", "--batch", 8, "--json"))
    assert (data["model"], data["batch"], data["sample"], data["profiles"]) == ("lenet_5", 8, [28, 28, 1], {})
    assert (data["parameters"], data["parameter_bytes"]) == (431_080, 4 * 431_080)
    assert data["dense"]["total"]["macs"] == 8 * 2_293_000


@shapes_for_arrays
def test_figures_are_drawn_where_asked(tmp_path, capsys):
    said(capsys, "resnet50", "--image", 64, "--profile", f"{PROFILE}:pruned_85", "--out", tmp_path / "new")
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == "costs_resnet50_pruned_85.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def profile(folder, *lines):
    path = folder / "profile.csv"
    path.write_text("\n".join(["layer,shape_oihw,weights,nonzero_a", *lines]))
    return path


@shapes_for_arrays
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["up,1x1,1,1"], "The profile has a layer 'up', the model has not"),
        (["layers/0,300x784,235200,235201"], "'layers/0' has 235200 weights, the profile keeps 235201"),
    ],
)
def test_profiles_that_do_not_fit_are_refused(tmp_path, capsys, lines, message):
    rest = ["layers/1,100x300,30000,1", "layers/2,10x100,1000,1"]
    rest = rest if lines[0].startswith("layers") else ["layers/0,300x784,235200,1", *rest]
    err = said(capsys, "lenet_300_100", "--profile", profile(tmp_path, *lines, *rest), code=2)
    assert message in err


@shapes_for_arrays
def test_words_that_cannot_be_meant(tmp_path, capsys):
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    for words, message in [
        (["mobilenet"], "no model 'mobilenet'.*Did you mean 'mobilenet_v1'"),
        (["lenet_5", "--batch", "0"], "one input or more, 0 arrived"),
        (["lenet_5", "--profile", "nowhere.csv"], "no profile 'nowhere.csv'"),
        (["lenet_5", "--profile", str(tmp_path / "no.csv")], "names no column nonzero_"),
        (["decoder", "--image", "8"], "decoder takes no images"),
        (["resnet50", "--profile", f"{PROFILE}:pruned_99"], "holds no profile 'pruned_99'.*pruned_70"),
    ]:
        err = said(capsys, *words, code=2)
        assert len(err.splitlines()) == 1
        assert re.search(message, err), err


# ---------------------------------------------------------------- the figure


@shapes_for_arrays
def test_bars_hold_the_numbers_in_the_order_of_the_layers():
    found = of_model("resnet50", PROFILE).profiles["pruned_83"]
    figure = cost_figures.layer_costs(found, "resnet50 $5")
    for axes, dense, left in zip(figure.axes, ("weights", "macs"), ("nnz", "macs_left"), strict=True):
        widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
        assert widths == [[getattr(leaf, word) for leaf in found.leaves] for word in (dense, left)]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[:2] == ["conv1", "layer1.0.conv1"]
    assert "4.24 M left: 6.01x fewer" in figure.axes[0].get_title(loc="left")
    assert figures.png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [0, 1, 100])
def test_few_and_many_leaves_draw(count):
    leaf = jp.costs(SITES, MASKS).leaves[0]
    figure = cost_figures.layer_costs(Costs((leaf,) * count))
    assert len(figure.axes[0].get_yticks()) == min(count, 80)
    assert figures.png(figure)
