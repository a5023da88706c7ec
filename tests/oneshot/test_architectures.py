"""The same one-shot call on decoders that are scanned, a BERT, a ViT and ResNets, of four ways to write models."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oneshot_models
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxprune as jp
from jaxprune import evidence, tree
from jaxprune.layout import from_view, to_view
from jaxprune.oneshot import SparseGPT, prune

pytestmark = pytest.mark.usefixtures("quick", "relaxed")

each_model = pytest.mark.parametrize("model", oneshot_models.MODELS)
case_of = functools.cache(lambda model: oneshot_models.MODELS[model]())
slow = lambda *args: pytest.param(*args, marks=pytest.mark.slow)  # noqa: E731
FITS = {"products": "dense", "blocks": "own", "layers": "own"}
each_order = pytest.mark.parametrize("order", ["products", slow("blocks"), slow("layers")])
SOLVER = SparseGPT(refit=True)


@functools.cache
def seen_by(model):
    case = case_of(model)
    return evidence.of_activations(case.apply, case.params, case.batches, moments=True).leaves


@functools.cache
def pruned(model, order):
    case = case_of(model)
    return prune(case.apply, case.params, case.batches, SOLVER, 0.5, order=order, fit=FITS[order])


def by_magnitude(model):
    """Half of each layer of the leaves that are in products."""

    def one(name, leaf):
        if name not in seen_by(model):
            return leaf
        axes = seen_by(model)[name].axes
        view = np.array(to_view(leaf, axes))
        for matrix in view.reshape(-1, math.prod(view.shape[-3:])):
            matrix[np.argsort(np.abs(matrix))[: round(matrix.size / 2)]] = 0
        return from_view(jnp.asarray(view), axes, leaf.shape)

    return tree.map_named(one, case_of(model).params)


def error(case, apply, params):
    return sum(float(jnp.sum((apply(params, x) - apply(case.params, x)) ** 2)) for x in case.batches)


@each_order
@each_model
def test_counts_are_exact_and_outputs_closer_than_by_magnitude(model, order):
    case, seen = case_of(model), seen_by(model)
    params, masks = (tree.named_leaves(one) for one in pruned(model, order))
    for name, leaf in tree.named_leaves(case.params).items():
        if name not in seen:
            np.testing.assert_array_equal(params[name], leaf)
            assert masks[name].all()
            continue
        layers = len(seen[name].tokens)
        dead = ~np.asarray(to_view(masks[name], seen[name].axes)).reshape(layers, -1)
        np.testing.assert_array_equal(dead.sum(axis=1), round(leaf.size / layers * 0.5))
        np.testing.assert_array_equal(np.asarray(params[name]) == 0, ~np.asarray(masks[name]))
    apply = jax.jit(case.apply)
    assert error(case, apply, pruned(model, order)[0]) < 0.9 * error(case, apply, by_magnitude(model))


def matrices_of(done):
    """Inputs (batch, tokens, features) and weights (batch, features, outputs), the two operands in either order."""
    if done.name == "dot_general":
        (left, right), (left_batch, right_batch) = done.params["dimension_numbers"]
        for x, w, summed, batch, summed_w, batch_w in (
            (done.left, done.right, left, left_batch, right, right_batch),
            (done.right, done.left, right, right_batch, left, left_batch),
        ):
            rest, rest_w = ([a for a in range(one.ndim) if a not in axes] for one, axes in
                            ((x, (*batch, *summed)), (w, (*batch_w, *summed_w))))  # fmt: skip
            size, features = (math.prod(x.shape[a] for a in axes) for axes in (batch, summed))
            yield (
                x.transpose(*batch, *rest, *summed).reshape(size, -1, features),
                w.transpose(*batch_w, *summed_w, *rest_w).reshape(size, features, -1),
            )
        return
    lhs, rhs, _ = done.params["dimension_numbers"]
    x, w = np.moveaxis(done.left, lhs, (0, 3, 1, 2)), np.moveaxis(done.right, rhs, (3, 2, 0, 1))
    assert done.params["feature_group_count"] == 1
    x = np.pad(x, [(0, 0), *done.params["padding"], (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[:2], (1, 2))  # (batch, places, places, in, h, w)
    down, across = done.params["window_strides"]
    rows = windows[:, ::down, ::across].transpose(0, 1, 2, 4, 5, 3)
    yield rows.reshape(1, -1, math.prod(w.shape[:3])), w.reshape(1, -1, w.shape[3])


def moments64(case, leaves):
    """Of every leaf, (layers, features, features): operands are known as layers of a leaf by their values."""
    views = {}
    for name, one in leaves.items():
        view = np.asarray(to_view(tree.named_leaves(case.params)[name], one.axes), np.float64)
        views[name] = view.reshape(-1, view.shape[-3] * view.shape[-2], view.shape[-1])
    rows = {  # values of a feature's weights, sorted -> where it is
        np.sort(row).tobytes(): (name, layer, i)
        for name, view in views.items()
        for layer, matrix in enumerate(view)
        for i, row in enumerate(matrix)
    }
    moments = {name: np.zeros((*view.shape[:2], view.shape[1])) for name, view in views.items()}
    for batch in case.batches:
        for done in oneshot_models.products(case.apply, case.params, batch):
            for xs, ws in matrices_of(done):
                for x, w in zip(xs, ws, strict=True):
                    places = [rows.get(np.sort(row).tobytes()) for row in w]
                    if None in places:
                        continue
                    name, layer, order = places[0][0], places[0][1], [i for _, _, i in places]
                    assert {place[:2] for place in places} == {(name, layer)}
                    moments[name][layer][np.ix_(order, order)] += x.T @ x
    return moments


@each_model
def test_moments_of_every_product_are_those_of_float64(model):
    seen, case = seen_by(model), case_of(model)
    assert set(seen) == {name for name, leaf in tree.named_leaves(case.params).items() if jp.weights(name, leaf)}
    for name, expected in moments64(case, seen).items():
        scale = np.sqrt(np.einsum("lii->li", expected))
        assert scale.any()
        off = np.abs(seen[name].moments - expected) / np.maximum(scale[:, :, None] * scale[:, None], 1e-9)
        assert off.max() < 1e-5, name


@pytest.mark.parametrize("model", ["Equinox BERT", *map(slow, sorted(set(oneshot_models.MODELS) - {"Equinox BERT"}))])
def test_data_on_eight_devices_give_the_same(model):
    case = case_of(model)
    lying = NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), PartitionSpec("data"))
    eight = prune(case.apply, case.params, jax.device_put(case.batches, lying), SOLVER, 0.5)
    same(eight, pruned(model, "products"))


def same(found, expected):
    """Masks to the bit, weights but for rounding."""
    (params, masks), (others, other_masks) = (map(tree.named_leaves, pair) for pair in (found, expected))
    assert set(params) == set(others)
    for name, leaf in params.items():
        np.testing.assert_array_equal(masks[name], other_masks[name], err_msg=name)
        np.testing.assert_allclose(leaf, others[name], rtol=1e-3, atol=1e-4, err_msg=name)


@each_order
@pytest.mark.parametrize("model", ["Linen scanned decoder", slow("NNX scanned decoder")])
def test_a_scanned_model_is_pruned_as_the_same_with_its_layers_in_a_list(model, order):
    case = case_of(model)
    x = case.batches[0]
    np.testing.assert_allclose(case.apply(case.params, x), case.unrolled(case.apart, x), rtol=1e-4, atol=1e-4)
    apart = prune(case.unrolled, case.apart, case.batches, SOLVER, 0.5, order=order, fit=FITS[order])
    same(pruned(model, order), tuple(map(case.together, apart)))
