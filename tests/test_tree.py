"""Leaves by name, in every framework's trees, and what is refused by name."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

from jaxprune import tree

PARAMS = {"layers": [{"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}], "head": (jnp.ones((3, 2)), jnp.ones(2))}
NAMES = ["head/0", "head/1", "layers/0/bias", "layers/0/kernel"]


class Scanned(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1))])


def test_names_follow_the_tree():
    assert list(tree.named_leaves(PARAMS)) == NAMES
    assert tree.named_leaves(PARAMS)["head/1"] is PARAMS["head"][1]


def test_a_bare_array_is_named_nothing():
    assert list(tree.named_leaves(jnp.ones(2))) == [""]


def test_nnx_names_are_those_of_its_plain_arrays():
    """`tx.init` is handed Variables, `tx.update` arrays: both must mean the same leaf."""
    state = nnx.state(Scanned(), nnx.Param)
    want = ["layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel"]
    assert list(tree.named_leaves(state)) == want
    assert list(tree.named_leaves(nnx.as_pure(state))) == want
    assert list(tree.named_leaves(nnx.to_pure_dict(state))) == want


def test_linen_names():
    params = linen.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    assert list(tree.named_leaves(params)) == ["params/bias", "params/kernel"]


def test_equinox_names():
    model = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
    names = list(tree.named_leaves(eqx.filter(model, eqx.is_array)))
    assert names == ["layers/0/weight", "layers/0/bias", "layers/1/weight", "layers/1/bias"]


def test_haiku_names():
    params = hk.transform(lambda x: hk.nets.MLP([3, 2])(x)).init(jax.random.key(0), jnp.ones((1, 4)))
    assert list(tree.named_leaves(params))[:2] == ["mlp/~/linear_0/b", "mlp/~/linear_0/w"]


def test_a_name_used_twice_is_refused():
    with pytest.raises(ValueError, match="Two leaves are named 'a/b'"):
        tree.named_leaves({"a": {"b": 1}, "a/b": 2})


def test_map_named():
    names = tree.map_named(lambda name, leaf, other: (name, leaf + other), {"a": 1, "b": [2]}, {"a": 10, "b": [20]})
    assert names == {"a": ("a", 11), "b": [("b/0", 22)]}


@pytest.mark.parametrize(
    ("rules", "name", "want"),
    [
        ([("a*", 1), ("*", 2)], "a/b/c", 1),  # a star crosses slashes
        ([("*", 2), ("a*", 1)], "a/b/c", 2),  # first match wins
        ([("A*", 1)], "a", None),
        ([("layers/[01]/*", 1)], "layers/1/kernel", 1),
        ([("kernel", 1)], "layers/kernel", None),  # the whole name
        ([], "a", None),
    ],
)
def test_first_match(rules, name, want):
    assert tree.first_match(rules, name) == want


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "want"),
    [
        ("layers/0/kernel", (4, 3), "float32", True),
        ("conv/w", (3, 3, 4, 8), "bfloat16", True),
        ("", (4, 3), "float32", True),
        ("kernel", (4,), "float32", False),
        ("layers/bias", (2, 3), "float32", False),
        ("norm/Scale", (2, 3), "float32", False),
        ("embed/embedding", (10, 4), "float32", False),
        ("embedding/kernel", (10, 4), "float32", True),  # only the last word counts
        ("kernel", (4, 3), "int8", False),
        ("kernel", (4, 3), "bool", True),  # a mask of a weight
    ],
)
def test_weights(name, shape, dtype, want):
    assert tree.weights(name, jnp.ones(shape, dtype)) is want


@pytest.mark.parametrize(
    ("select", "want"),
    [
        (tree.weights, ["head/0", "layers/0/kernel"]),
        ("layers/*", ["layers/0/bias", "layers/0/kernel"]),
        (["*/kernel", "head/1"], ["head/1", "layers/0/kernel"]),
        ({"*/bias": False, "layers/*": True}, ["layers/0/kernel"]),
        ({"head/1": False, "*": True}, ["head/0", "layers/0/bias", "layers/0/kernel"]),
        (lambda name, leaf: leaf.shape == (2,), ["head/1"]),
    ],
)
def test_selected_leaves(select, want):
    assert list(tree.selected_leaves(select, PARAMS)) == want


@pytest.mark.parametrize(
    ("select", "params", "error", "message"),
    [
        ("layer/*", PARAMS, ValueError, "`select` names 'layer/*', which matches no leaf. There are: 'head/0',"),
        (["*", "x"], PARAMS, ValueError, "`select` names 'x', which matches no leaf"),
        ({"*": False}, PARAMS, ValueError, "`select` chooses no leaf to prune. There are: 'head/0'"),
        (tree.weights, {"b": jnp.ones(3)}, ValueError, "`select` chooses no leaf to prune. There are: 'b'."),
        (tree.weights, {}, ValueError, "`select` chooses no leaf to prune"),
        ("*", {"n": jnp.ones((2, 2), int)}, TypeError, "'n' is int32, only floating leaves are pruned. Leave it out"),
        (
            tree.weights,
            {"a": jnp.ones((2, 2)), "f": "relu"},
            TypeError,
            "'f' is a str, an array was expected.*eqx.filt",
        ),
        (tree.weights, {"a": 0.5}, TypeError, "'a' is a float, an array was expected"),
    ],
)
def test_selections_refused(select, params, error, message):
    with pytest.raises(error, match=message.replace("*.", "\\*.").replace("'layer/*'", "'layer/[*]'")):
        tree.selected_leaves(select, params)


def test_the_list_of_names_is_cut():
    with pytest.raises(ValueError, match="'p07' and 12 more"):
        tree.selected_leaves({"*": False}, {f"p{i:02}": jnp.ones((2, 2)) for i in range(20)})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": jnp.ones(2)}, "The masks have no leaf 'b', the params do. They have: 'a'."),
        ({"a": jnp.ones(2), "b": jnp.ones(4)}, r"The masks have shape \(4,\) at 'b', the params \(3,\)."),
        ({"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(1)}, "The masks have a leaf 'c', the params do not."),
        (None, "The masks have no leaf 'a'"),
        (jnp.ones(2), "The masks have no leaf 'a', the params do. They have: ''."),
    ],
)
def test_check_like_names_the_first_difference(other, message):
    with pytest.raises(ValueError, match=message):
        tree.check_like("The masks", other, {"a": jnp.ones(2), "b": jnp.ones(3)})


def test_match_goes_by_name_not_by_type():
    state = nnx.state(Scanned(), nnx.Param)
    plain = jax.tree.map(lambda leaf: leaf + 1, nnx.to_pure_dict(state))
    matched = tree.match(plain, state)
    assert jax.tree.structure(matched) == jax.tree.structure(state)
    assert jax.tree.leaves(matched)[0] is plain["layers"][0]["bias"]


def test_leaves_taken_out_by_optax_are_no_difference():
    params = {"a": jnp.ones(2), "b": optax.MaskedNode()}
    assert tree.has_masked_nodes(params)
    assert not tree.has_masked_nodes(PARAMS)
    tree.check_like("The masks", {"a": jnp.ones(2), "b": jnp.ones(2)}, params)
