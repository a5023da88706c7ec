"""Views: there and back for every layout, against NumPy's transpose."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.layout import BY_NAME, FLAX, TORCH, Axes, dims, from_view, to_view, view_shape

STACKED = Axes(layers=(0,), inputs=(1,), outputs=(2,))
HEADS = Axes(inputs=(0,), outputs=(1, 2))


@pytest.mark.parametrize(
    ("layout", "shape", "want", "view"),
    [
        (FLAX, (4, 3), Axes((), (), (0,), (1,)), (1, 4, 3)),
        (FLAX, (2, 5, 4, 3), Axes((), (0, 1), (2,), (3,)), (10, 4, 3)),
        (FLAX, (7, 4, 3), Axes((), (0,), (1,), (2,)), (7, 4, 3)),
        (FLAX, (3,), Axes((), (), (), (0,)), (1, 1, 3)),
        (FLAX, (), Axes(), (1, 1, 1)),
        (TORCH, (3, 4), Axes((), (), (1,), (0,)), (1, 4, 3)),
        (TORCH, (3, 4, 2, 5), Axes((), (2, 3), (1,), (0,)), (10, 4, 3)),
        (TORCH, (3,), Axes((), (), (), (0,)), (1, 1, 3)),
    ],
)
def test_axes(layout, shape, want, view):
    assert layout.axes("w", shape) == want
    assert view_shape(shape, want) == view


@pytest.mark.parametrize(
    ("axes", "shape", "want"),
    [
        (STACKED, (6, 4, 3), (4, 3)),
        (HEADS, (4, 2, 3), (4, 6)),
        (FLAX.axes("w", (2, 5, 4, 3)), (2, 5, 4, 3), (2, 5, 4, 3)),
        (TORCH.axes("w", (3, 4, 2, 5)), (3, 4, 2, 5), (2, 5, 4, 3)),
    ],
)
def test_dims_are_those_of_one_layer(axes, shape, want):
    assert dims(shape, axes) == want


@given(st.data())
def test_there_and_back(data):
    """Any assignment of axes to meanings, in any order."""
    shape = data.draw(st.sampled_from([(2, 3, 4), (2, 3), (2, 1, 3, 2)]))
    order = data.draw(st.permutations(range(len(shape))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(shape)), min_size=3, max_size=3)))
    axes = Axes(*(tuple(order[a:b]) for a, b in zip([0, *cuts], [*cuts, len(shape)], strict=True)))
    leaf = np.arange(np.prod(shape)).reshape(shape)
    view = to_view(jnp.asarray(leaf), axes)
    np.testing.assert_array_equal(view, oracle.view(leaf, *axes))
    assert view.shape == view_shape(shape, axes)
    np.testing.assert_array_equal(from_view(view, axes, shape), leaf)


def test_the_two_layouts_see_the_same_weight():
    leaf = np.random.default_rng(0).random((3, 2, 4, 5)).astype(np.float32)  # HWIO
    oihw = leaf.transpose(3, 2, 0, 1)
    flax = to_view(jnp.asarray(leaf), FLAX.axes("w", leaf.shape))
    torch = to_view(jnp.asarray(oihw), TORCH.axes("w", oihw.shape))
    np.testing.assert_array_equal(flax, torch)


def test_rules_go_first_and_the_newest_first_of_all():
    layout = FLAX.with_rules({"blocks/*": STACKED})
    assert layout.axes("blocks/kernel", (6, 4, 3)) == STACKED
    assert layout.axes("head/kernel", (4, 3)) == FLAX.axes("", (4, 3))
    assert layout.with_rules({"*": HEADS}).axes("blocks/kernel", (4, 2, 3)) == HEADS
    assert FLAX.rules == ()


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        (STACKED, (4, 3)),  # more axes than the leaf has
        (Axes(inputs=(0,), outputs=(1,)), (6, 4, 3)),  # one left out
        (Axes(inputs=(0,), outputs=(0,)), (4, 3)),  # one twice
        (Axes(inputs=(-2,), outputs=(-1,)), (4, 3)),  # counted from the end
    ],
)
def test_a_rule_that_does_not_fit_is_refused(axes, shape):
    layout = FLAX.with_rules({"*": axes})
    with pytest.raises(ValueError, match=rf"rule for 'a/w' must name each of its {len(shape)} axes once, it says Axes"):
        layout.axes("a/w", shape)


NAMES = {
    FLAX: ["kernel", "a/kernel", "w", "W", "w1", "wq", "w_up", "q_kernel"],
    TORCH: ["weight", "layers/0/weight", "weight_ih", "in_proj_weight"],
    None: ["0", "a", "encoder", "weights", "kernels", "scale", "weight/0"],
}


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout, names in NAMES.items() for name in names])
def test_names_tell_the_layout(layout, name):
    shape = (5, 2, 4, 3)
    assert BY_NAME.axes(name, shape) == (layout or FLAX).axes(name, shape)
    for method in BY_AXES.values():
        if layout is None:
            with pytest.raises(ValueError, match=re.escape(repr(name)) + r".*jp\.FLAX.*jp\.TORCH.*layout_of"):
                jax.eval_shape(lambda params, m=method: jp.compute_masks(m, params, 0.5), nested(name, (4, 4)))
        else:
            jax.eval_shape(lambda params, m=method: jp.compute_masks(m, params, 0.5), nested(name, (4, 4)))
    jax.eval_shape(lambda params: jp.compute_masks(jp.Method(select="*"), params, 0.5), nested(name, (4, 4)))


BY_AXES = {
    "Output": jp.Method(granularity=jp.Output(), select="*"),
    "Block": jp.Method(granularity=jp.Block(2, 2), select="*"),
    "by rule": jp.Method(granularity=jp.granularity.ByRule({"*": jp.Input()}), select="*"),
    "NM": jp.Method(distribution=jp.NM(2, 4), select="*"),
    "PerOutput": jp.Method(distribution=jp.PerOutput(), select="*"),
    "OWL": jp.Method(distribution=jp.OWL(per_output=True), select="*"),
    "a rule of a distribution": jp.Method(distribution=jp.distributions.ByRule({"*": jp.NM(1, 2)}), select="*"),
    "geometric_median": jp.Method(criterion=jp.criteria.geometric_median, select="*"),
}


def nested(name, shape):
    """A tree with one leaf of this name."""
    tree = jax.ShapeDtypeStruct(shape, jnp.float32)
    for key in reversed(name.split("/")):
        tree = {key: tree}
    return tree


def test_outputs_of_an_equinox_model_are_its_outputs():
    """Not its inputs, as they were where (in, out) was the default."""
    model = eqx.nn.Linear(6, 4, key=jax.random.key(0))
    masks = jp.compute_masks(jp.Method(granularity=jp.Output()), eqx.filter(model, eqx.is_array), 0.5)
    alive = np.asarray(masks.weight)
    assert sorted(alive.sum(1)) == [0, 0, 6, 6]


def test_an_equinox_weight_is_compressed_the_way_it_is_used():
    model = eqx.filter(eqx.nn.Linear(6, 4, key=jax.random.key(0)), eqx.is_array)
    by_name, said = (jp.sparse.compress(model, "bcsr", **known) for known in ({}, {"layout": TORCH}))
    assert jax.tree.structure(by_name) == jax.tree.structure(said)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(by_name), jax.tree.leaves(said), strict=True))
