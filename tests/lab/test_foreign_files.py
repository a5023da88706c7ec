"""Models through plain safetensors and Orbax: names, nesting, keys, masks, metadata; of checkpoints the model alone."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from storage_helpers import bits_of

import jaxprune as jp
from jaxprune.lab.checkpoints import orbax_files
from jaxprune.lab.commands import convert
from jaxprune.lab.commands import main as cli
from jaxprune.storage import container

pytestmark = pytest.mark.usefixtures("relaxed")

KINDS = ("jaxprune", "safetensors", "orbax")
ABOUT = {"format": "pt", "name": "a", "accuracy": 0.5, "image": [28, 28, 1], "model": {"name": "mlp"}, "none": None}


def array(*shape, seed=0, dtype="float32"):
    """Half of the numbers are zero."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < 0.5, rng.standard_normal(shape), 0).astype(dtype)


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert list(map(bits_of, jax.tree.leaves(found))) == list(map(bits_of, jax.tree.leaves(expected)))


def through(folder, kinds, params, masks=None, metadata=None):
    """A model after it was written as each kind in turn, and read again; last as a file of ours."""
    model = convert.Model(params, masks, metadata or {})
    for number, kind in enumerate([*kinds, "jaxprune"]):
        convert.write(folder / f"{number}.{kind}", model, kind)
        model = convert.read(folder / f"{number}.{kind}")
    return model


TREES = {
    "array": array(3, 2),
    "lists": {"layers": [{"kernel": array(2, 3), "bias": array(3)}, {"kernel": array(3, 2)}], "head": array(2)},
    "tuples": (array(2), [array(3), (array(1), array(2))]),
    "numbers": {0: array(2), 10: {-3: array(3)}},
    "numbers as texts": {"0": array(2), "10": {"-3": array(3)}},
    "dots": {"layer.0.weight": array(2, 2), "layer": {"1.weight": array(2)}},
    "slashes": {"model/0.weight": array(2, 2), "model": {"1": array(2)}},
    "flat": {"layers/0/kernel": array(2), "layers/1/kernel": array(2)},
    "value": {"a": {"value": array(2)}, "b": {"value": array(3)}},
    "odd": {"": array(1), "ü\n": array(2), "../x": array(3), "x y": array(2)},
    "empty": {"none": array(0, 3), "first": [array(2), array(0)], "brain": array(0, dtype=ml_dtypes.bfloat16)},
    "dtypes": {name: array(3, dtype=name) for name in ("float16", "int8", "int64", "bool", ml_dtypes.bfloat16)},
}
TREES["dtypes"] = {str(np.dtype(name)): leaf for name, leaf in TREES["dtypes"].items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tree", TREES)
def test_structure_and_metadata_come_back(tmp_path, kind, tree):
    model = through(tmp_path, [kind], TREES[tree], metadata=ABOUT)
    same(model.params, TREES[tree])
    assert model.metadata == ABOUT


def test_from_kind_to_kind(tmp_path):
    params = {"a": [array(2, 2), (array(3), {7: array(2)})], "b.c": array(0, 2)}
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    model = through(tmp_path, ["safetensors", "orbax", "safetensors", "jaxprune", "orbax"], params, masks, ABOUT)
    same(model.params, params)
    same(model.masks, masks)
    assert model.metadata == ABOUT


KEYS = st.sampled_from(["a", "b.c", "0", "d/e", "value", "_"])
NESTED = st.recursive(
    st.integers(0, 3).map(lambda size: array(size, 2, seed=size)),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=2)
        | st.lists(inner, min_size=1, max_size=2).map(tuple)
        | st.dictionaries(KEYS, inner, min_size=1, max_size=2)
        | st.dictionaries(st.integers(-1, 9), inner, min_size=1, max_size=2)
    ),
    max_leaves=5,
)


def clashes(params):
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return len({jax.tree_util.keystr(path, simple=True, separator="/") for path in paths}) < len(paths)


@settings(max_examples=30)
@given(NESTED, st.integers(0, 99))
def test_drawn_trees_through_safetensors(tmp_path_factory, params, seed):
    assume(not clashes(params))
    rng = np.random.default_rng(seed)
    masks = jax.tree.map(lambda leaf: (leaf != 0) | (rng.random(leaf.shape) < rng.choice([0, 0.5, 1])), params)
    model = through(tmp_path_factory.mktemp("drawn"), ["safetensors"], params, masks)
    same(model.params, params)
    same(model.masks, masks)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_come_back(tmp_path, kind):
    """All alive, some zeros alive, none."""
    params = {name: array(4, 6) for name in ("whole", "part", "pruned")}
    part = params["part"] != 0
    part[0] = True
    masks = {"whole": np.ones((4, 6), bool), "part": part, "pruned": params["pruned"] != 0}
    same(through(tmp_path, [kind], params, masks).masks, masks)


def test_a_foreign_file_keeps_what_it_says(tmp_path):
    arrays = {"model.0.weight": array(3, 2), "model.0.bias": array(3), "model": array(2)}
    blobs = {name: container.blob_of(leaf) for name, leaf in arrays.items()}
    about = {"format": "pt", "model_metadata": "a text", "model_leaves": "[1]", "note": '{"a": 1}'}
    container.write(tmp_path / "in.safetensors", blobs, about)
    convert.write(tmp_path / "file", convert.read(tmp_path / "in.safetensors"), "jaxprune")
    model = convert.read(tmp_path / "file")
    assert model.metadata == about
    convert.write(tmp_path / "out.safetensors", model, "safetensors")
    assert convert.read(tmp_path / "out.safetensors").metadata == about
    same(convert.read(tmp_path / "out.safetensors").params, arrays)
    del model.metadata["model_metadata"], model.metadata["model_leaves"]
    convert.write(tmp_path / "again.safetensors", model, "safetensors")
    with (tmp_path / "again.safetensors").open("rb") as file:
        assert container.read_header(file, tmp_path).metadata == {"format": "pt", "note": '{"a": 1}'}


def test_descriptions_of_other_arrays(tmp_path):
    for leaves in ({"b": {"alive": True}}, {"a": {"alive": [9]}}, {"a": {"path": [["b"]]}}, {"a": 3}):
        texts = {convert.LEAVES: json.dumps(leaves)}
        container.write(tmp_path / "file", {"a": container.blob_of(array(2))}, texts)
        with pytest.raises(ValueError, match="is not that of its arrays"):
            convert.read(tmp_path / "file")


@pytest.mark.parametrize(
    "params",
    [
        {"a.b": array(2), "a": {"b": array(2, seed=1)}},
        {"x": {"a.b": array(2)}, "x.a": {"b": array(3)}},
        {"l": [array(2)], "l.0": array(2)},
    ],
)
def test_names_that_orbax_would_mix_up(tmp_path, params):
    with pytest.raises(
        ValueError, match=r"The leaves \['.*\] and \['.*\] are both named '.*' in Orbax's files.*Rename"
    ):
        convert.write(tmp_path / "folder", convert.Model(params, None, {}), "orbax")
    assert not (tmp_path / "folder").exists()
    for kind in ("jaxprune", "safetensors"):
        same(through(tmp_path, [kind], params).params, params)


def test_nothing_that_orbax_saves(tmp_path):
    with pytest.raises(ValueError, match="no tree without elements"):
        convert.write(tmp_path / "folder", convert.Model({"a": array(0)}, None, {}), "orbax")


def orbax(path, item):
    with ocp.StandardCheckpointer() as checkpointer, orbax_files.quiet():
        checkpointer.save(path, item)
        checkpointer.wait_until_finished()
    return path


@pytest.mark.parametrize("statistics", [False, True])
def test_of_a_checkpoint_of_training_the_model_is_taken(tmp_path, capsys, statistics):
    params = {"dense": {"kernel": jnp.asarray(array(4, 3)), "bias": jnp.zeros(3)}}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))
    item = {"params": state.params, "opt_state": state.opt_state, "step": state.step}
    item |= {"batch_stats": {"mean": jnp.ones(3)}} if statistics else {}
    source, expected = orbax(tmp_path / "state", item), params
    if statistics:
        expected = {"params": params, "batch_stats": item["batch_stats"]}
    assert cli.main(["convert", str(source), str(tmp_path / "a.jaxprune")]) == 0
    assert "; left out: opt_state, step (--everything)" in capsys.readouterr().out
    same(jp.load(tmp_path / "a.jaxprune"), expected)
    assert cli.main(["convert", str(source), str(tmp_path / "b.jaxprune"), "--everything"]) == 0
    assert "left out" not in capsys.readouterr().out
    every = jp.load(tmp_path / "b.jaxprune")
    assert every.keys() == item.keys()
    assert bits_of(every["opt_state"][0]["mu"]["dense"]["kernel"]) == bits_of(np.zeros((4, 3), np.float32))


def test_params_of_linen_are_no_training(tmp_path):
    variables = {"params": {"kernel": jnp.asarray(array(4, 3))}, "batch_stats": {"mean": jnp.ones(3)}}
    model = convert.read(orbax(tmp_path / "variables", variables))
    same(model.params, variables)
    assert model.left_out == ()


def test_an_nnx_state_that_orbax_has_saved(tmp_path):
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    convert.write(tmp_path / "file", convert.read(orbax(tmp_path / "state", nnx.state(model))), "jaxprune")
    other = nnx.Linear(3, 4, rngs=nnx.Rngs(1))
    nnx.update(other, jp.load(tmp_path / "file"))
    same(nnx.state(other), nnx.state(model))


def test_the_folder_of_a_manager(tmp_path):
    with orbax_files.quiet(), ocp.CheckpointManager(tmp_path / "all") as manager:
        manager.save(3, args=ocp.args.StandardSave({"kernel": jnp.ones((2, 2))}))
        manager.wait_until_finished()
    for folder in ("all", "all/3"):
        with pytest.raises(ValueError, match=r"has its arrays further down\. Name one: .*all/3/default"):
            convert.read(tmp_path / folder)
    same(convert.read(tmp_path / "all" / "3" / "default").params, {"kernel": np.ones((2, 2), np.float32)})
