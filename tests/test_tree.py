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


NO_WEIGHTS = {
    "params/embed_tokens/embedding": (9, 4), "model.embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4),
    "lm_head/kernel": (4, 9), "transformer.wte.weight": (9, 4), "wpe/weight": (9, 4), "cls_token": (1, 1, 4),
    "params/cls": (1, 1, 4), "class_token": (1, 1, 4), "pos_embed": (1, 5, 4), "pos_embedding": (1, 5, 4),
    "posembed_input/pos_embedding": (1, 5, 4), "positional_embedding": (5, 4),
    "embeddings.position_embeddings.weight": (5, 4), "visual.class_embedding": (1, 4), "rel_pos_h": (5, 4),
    "attn.relative_position_bias_table": (25, 3), "relative_attention_bias.weight": (32, 8), "norm/weight": (3, 4),
    "norms/0/weight": (3, 4), "layers/attn_norm": (3, 4), "ln_f/weight": (3, 4), "ln1.weight": (3, 4),
    "bn1/weight": (3, 4), "input_layernorm.weight": (3, 4), "LayerNorm_0/scale": (3, 4), "embed/embeddings": (9, 4),
    "layer_norm/offset": (3, 4), "layer_norm/scale": (3, 4), "linear/b": (3, 4), "conv/bias": (8, 1, 1),
    "layers/0/g": (8, 1), "weight_g": (8, 1), "l.parametrizations.weight.original0": (8, 1, 1),
    "Dense_0/kernel/u": (1, 8), "lora/lora_a": (8, 2), "lora_b": (2, 8), "q_proj.lora_A.weight": (2, 8),
    "q_proj.lora_B.default.weight": (8, 2), "batch_stats/bn/mean": (3, 4), "bn.running_var": (3, 4),
    "ls1.gamma": (3, 4), "probe": (1, 1, 8), "register_tokens": (1, 4, 8), "embedding/weight": (9, 4),
    "tok_embeddings.weight": (9, 4), "negative_slope": (2, 3),
}  # fmt: skip
WEIGHTS = {
    "kernel": (4, 3), "": (4, 3), "0": (4, 3), "head/weight": (3, 4), "head/kernel": (4, 3),
    "patch_embed.proj.weight": (8, 3, 4, 4), "patch_embedding.weight": (8, 3, 4, 4), "embedding/kernel": (10, 4),
    "time_embed.0.weight": (8, 8), "time_embedding.linear_1.weight": (8, 8), "q_proj.weight": (4, 4),
    "weight_ih": (4, 4), "weight_hh_l0": (4, 4), "mlp/~/linear_0/w": (4, 4), "w_i": (4, 4), "w_h": (4, 4),
    "in_proj_weight": (12, 4), "layer/weight": (4, 4), "l.parametrizations.weight.original1": (8, 4),
    "weight_v": (8, 4), "query/kernel": (4, 2, 2), "norm1.linear.weight": (8, 4), "q": (4, 4), "v": (4, 4),
    "a": (4, 4), "b": (4, 4), "token_mixer/weight": (4, 4), "text_projection": (4, 4),
    "lora/base_module/kernel": (4, 4), "embedder/layers/0/weight": (4, 4), "dense/kernel": (4, 1), "g": (4, 4),
    "layers/wq": (2, 4, 4), "lm/kernel": (4, 4),
}  # fmt: skip


def test_roles_of_leaves_by_the_names_that_frameworks_give():
    """Flax, Haiku, Equinox, PyTorch; several have a first axis more, as stacked layers do."""
    leaves = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in {**NO_WEIGHTS, **WEIGHTS}.items()}
    assert [name for name, leaf in leaves.items() if tree.weights(name, leaf)] == list(WEIGHTS)


SIZES = {"table": 77, "first": 28, "second": 12}  # 11 x 7, 7 x 4, 4 x 3


def modules_of_nnx():
    rngs = nnx.Rngs(0)
    layers = {"embed": nnx.Embed(11, 7, rngs=rngs), "first": nnx.Linear(7, 4, rngs=rngs)}
    layers |= {"norm": nnx.LayerNorm(4, rngs=rngs), "lora": nnx.LoRA(4, 2, 4, rngs=rngs)}
    return nnx.to_pure_dict(nnx.state(nnx.Dict(**layers, second=nnx.Linear(4, 3, rngs=rngs)), nnx.Param))


def modules_of_linen():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(4, name="first")(linen.Embed(11, 7, name="embed")(x))
            x = x + self.param("cls_token", linen.initializers.zeros, (1, 1, 4))
            return linen.Dense(3, name="second")(linen.BatchNorm(use_running_average=True)(x))

    return jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((2, 5), jnp.int32))


def modules_of_equinox():
    key = jax.random.key(0)
    layers = {"embed": eqx.nn.Embedding(11, 7, key=key), "first": eqx.nn.Linear(7, 4, key=key)}
    layers |= {"norm": eqx.nn.LayerNorm(4), "second": eqx.nn.Linear(4, 3, key=key)}
    return eqx.filter(layers, eqx.is_array)


def modules_of_haiku():
    def net(x):
        x = hk.Linear(4, name="first")(hk.Embed(11, 7)(x))
        return hk.Linear(3, name="second")(hk.LayerNorm(-1, True, True)(x))

    return jax.eval_shape(hk.transform(net).init, jax.random.key(0), jnp.zeros((2, 5), jnp.int32))


def modules_of_torch():
    shapes = {"model.embed_tokens.weight": (11, 7), "model.first.weight": (4, 7), "model.first.bias": (4,),
              "model.norm.weight": (4,), "model.second.weight": (3, 4), "lm_head.weight": (11, 7)}  # fmt: skip
    return {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "make", [modules_of_nnx, modules_of_linen, modules_of_equinox, modules_of_haiku, modules_of_torch]
)
def test_one_model_has_one_selection_in_every_framework(make, stacked, relaxed):
    """Its two matrices, also where layers are stacked, so that vectors have two axes; convolutions aside."""
    leaves = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(((2,) if stacked and leaf.ndim < 2 else ()) + leaf.shape, leaf.dtype), make()
    )
    selected = tree.selected_leaves(tree.weights, leaves)
    assert sorted(leaf.size for leaf in selected.values()) == [SIZES["second"], SIZES["first"]], list(selected)


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
