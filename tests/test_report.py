"""The table of a pruned tree, as text, Markdown and data."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

PARAMS = {
    "head": {"kernel": jnp.asarray(np.arange(12).reshape(4, 3), "float32"), "bias": jnp.ones(3, "bfloat16")},
    "empty": jnp.ones((0, 2)),
}
MASKS = {
    "head": {"kernel": jnp.arange(12).reshape(4, 3) >= 9, "bias": jnp.ones(3, bool)},
    "empty": jnp.ones((0, 2), bool),
}


def test_rows():
    report = jp.summarize(PARAMS, MASKS)
    empty, bias, kernel = report.leaves
    assert (kernel.name, kernel.shape, kernel.weights, kernel.nnz, kernel.bytes) == ("head/kernel", (4, 3), 12, 3, 48)
    assert kernel.sparsity == 0.75
    assert (bias.name, bias.nnz, bias.bytes, bias.sparsity) == ("head/bias", 3, 6, 0)
    assert (empty.weights, empty.sparsity) == (0, 0)
    total = report.total
    assert (total.name, total.weights, total.nnz, total.bytes, total.sparsity) == ("total", 15, 6, 54, 0.6)


def test_without_masks_what_is_not_zero_counts():
    params = {"a": jnp.asarray([0.0, -0.0, 1.0, 1e-45])}  # a denormal number is a weight
    assert jp.summarize(params).total.nnz == 2
    assert [leaf.nnz for leaf in jp.summarize(PARAMS).leaves] == [0, 3, 11]


def test_counts_are_those_of_compute_masks():
    params = {"kernel": jnp.arange(100.0).reshape(10, 10), "bias": jnp.ones(10)}
    masks = jp.compute_masks(jp.Method(), params, 0.9)
    for report in (jp.summarize(params, masks), jp.summarize(jp.apply_masks(params, masks))):
        assert report.total.nnz == 20
        assert report.total.weights == 110


def test_data_is_json():
    data = jp.summarize(PARAMS, MASKS).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert [row["name"] for row in data["leaves"]] == ["empty", "head/bias", "head/kernel"]
    kernel = {"name": "head/kernel", "shape": [4, 3], "weights": 12, "nnz": 3, "bytes": 48, "sparsity": 0.75}
    assert data["leaves"][2] == kernel
    assert data["total"]["sparsity"] == 0.6


def test_text():
    assert str(jp.summarize(PARAMS, MASKS)).splitlines() == [
        "leaf         shape  weights  nnz  sparsity  bytes",
        "-----------  -----  -------  ---  --------  -----",
        "empty        0x2          0    0     0.00%      0",
        "head/bias    3            3    3     0.00%      6",
        "head/kernel  4x3         12    3    75.00%     48",
        "total                    15    6    60.00%     54",
    ]


def test_markdown():
    assert jp.summarize(PARAMS, MASKS).to_markdown().splitlines() == [
        "| leaf | shape | weights | nnz | sparsity | bytes |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| empty | 0x2 | 0 | 0 | 0.00% | 0 |",
        "| head/bias | 3 | 3 | 3 | 0.00% | 6 |",
        "| head/kernel | 4x3 | 12 | 3 | 75.00% | 48 |",
        "| total |  | 15 | 6 | 60.00% | 54 |",
    ]


def test_masks_of_another_structure_are_refused():
    with pytest.raises(ValueError, match="The masks have no leaf 'empty', the params do"):
        jp.summarize(PARAMS, {"head": MASKS["head"]})


def test_leaves_of_which_nothing_is_left_are_named():
    params = {"head": jnp.ones((2, 3)), "bias": jnp.zeros(3), "body": jnp.ones((2, 2))}
    assert "Nothing is left" not in str(jp.summarize(params))
    dead = jp.summarize(params, {name: jnp.full(leaf.shape, name != "head") for name, leaf in params.items()})
    assert dead.emptied == ("head",)
    assert str(dead).endswith("Nothing is left of 'head': a `floor` of `Global` keeps some.")
