"""Flax NNX from end to end: saved, loaded back into a model in one line, and run on compressed weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from storage_helpers import bits_of

import jaxprune as jp
from jaxprune.sparse.formats import FORMATS, SparseUseError, SparseWeight

pytestmark = pytest.mark.usefixtures("relaxed", "quick")

KEPT = nnx.Not(nnx.RngState)
X = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)


class Net(nnx.Module):
    """Layers in a list, statistics of a batch norm, and keys of a dropout."""

    def __init__(self, seed):
        rngs, zeros = nnx.Rngs(seed), nnx.initializers.zeros_init()  # which compiles nothing
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(*sizes, kernel_init=zeros, rngs=rngs) for sizes in ((8, 16), (16, 4))])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](self.dropout(nnx.relu(self.layers[0](self.norm(x)))))


def blank(model):
    """The model with zeros for all that it has learned."""
    other = nnx.clone(model)
    nnx.update(other, jax.tree.map(jnp.zeros_like, nnx.state(other, KEPT)))
    return other


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pruned model with statistics, its file, and its masks."""
    model, path = Net(0), tmp_path_factory.mktemp("nnx") / "model.jaxprune"
    model.eval()
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.1, 1, leaf.shape), leaf.dtype), nnx.state(model, KEPT))
    masks = jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape) < 0.5) | (leaf.ndim < 2), state)
    nnx.update(model, jp.apply_masks(state, masks))
    jp.save(path, nnx.state(model, KEPT), masks=masks)
    return model, path, masks


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert list(map(bits_of, jax.tree.leaves(found))) == list(map(bits_of, jax.tree.leaves(expected)))


LOADS = {
    "like": lambda path, model: jp.load(path, like=nnx.state(model, KEPT)),
    "without": lambda path, model: jp.load(path),
    "like shapes": lambda path, model: jp.load(path, like=nnx.state(nnx.eval_shape(lambda: Net(2)), KEPT)),
    "quantized": lambda path, model: jp.load(path, to="quantized", like=nnx.state(model, KEPT)),
}


@pytest.mark.parametrize("kind", LOADS)
def test_a_file_into_a_model(saved, kind):
    model, path, _ = saved
    other = blank(model)
    nnx.update(other, LOADS[kind](path, other))
    same(nnx.state(other, KEPT), nnx.state(model, KEPT))  # of classes and kinds of Variables, too
    assert bits_of(other(X)) == bits_of(model(X))


def test_what_comes_back_without_like_is_a_pure_dict(saved):
    model, path, masks = saved
    state = nnx.state(model, KEPT)
    same(jp.load(path), nnx.to_pure_dict(state))
    same(jp.load(path, to="masks"), nnx.to_pure_dict(masks))
    same(jp.load(path, to="masks", like=state), masks)
    same(jp.apply_masks(state, jp.load(path, to="masks")), state)
    assert set(jp.load(path)["layers"]) == {0, 1}
    graph, _, rest = nnx.split(model, KEPT, ...)
    assert bits_of(nnx.merge(graph, jp.load(path), rest)(X)) == bits_of(model(X))


def test_a_module_itself(tmp_path):
    jp.save(tmp_path / "file", nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    other = jp.load(tmp_path / "file", like=nnx.Linear(3, 4, rngs=nnx.Rngs(1)))
    assert isinstance(other, nnx.Linear)
    assert bits_of(other(X[:, :3])) == bits_of(nnx.Linear(3, 4, rngs=nnx.Rngs(0))(X[:, :3]))


def test_what_a_file_cannot_hold_and_what_it_has_not(saved, tmp_path):
    model, path, _ = saved
    with pytest.raises(
        TypeError, match=r"'dropout/rngs/key' is key<fry>.*`nnx.state\(model, nnx.Not\(nnx.RngState\)\)`"
    ):
        jp.save(tmp_path / "file", nnx.state(model))
    with pytest.raises(ValueError, match=r"no leaf 'dropout/rngs/.*Hand in as `like`.*`nnx.state\(model\)` with the f"):
        jp.load(path, like=nnx.state(model))
    with pytest.raises(ValueError, match=r"have a leaf 'norm/mean', the params do not.*Hand in as `like`"):
        jp.load(path, like=nnx.state(model, nnx.Param))


@pytest.mark.parametrize("format", ["bcoo", "bcsr", "native"])
def test_compressed_states(saved, format):
    model, path, _ = saved
    graph, state, rest = nnx.split(model, KEPT, ...)
    small = jp.sparse.compress(state, format=format)
    run, expected = jax.jit(jp.sparse.apply(lambda model, x: model(x))), model(X)
    split = jax.jit(jp.sparse.apply(lambda state, x: nnx.merge(graph, state, rest)(x)))
    for found in (small, jp.load(path, to=format), jp.load(path, to=format, like=state)):
        np.testing.assert_allclose(split(found, X), expected, atol=1e-6)
        merged = nnx.merge(graph, found, rest)
        np.testing.assert_allclose(run(merged, X), expected, atol=1e-6)
        held = [w for w in jax.tree.leaves(merged, is_leaf=_is_compressed) if _is_compressed(w)]
        assert [type(weight) for weight in held] == [FORMATS[format]] * 2
    other = blank(model)
    nnx.update(other, jp.load(path, to=format))
    np.testing.assert_allclose(run(other, X), expected, atol=1e-6)
    same(jp.sparse.decompress(nnx.state(other, KEPT)), state)


def _is_compressed(leaf):
    return isinstance(leaf, SparseWeight)


@pytest.mark.parametrize("format", ["bcoo", "native"])
def test_compressed_weights_outside_of_apply(saved, format):
    model, x = blank(saved[0]), jnp.asarray(X)
    nnx.update(model, jp.load(saved[1], to=format))
    weight = jp.load(saved[1], to=format)["layers"][0]["kernel"]
    uses = (lambda: model(x), lambda: jp.sparse.apply(model)(x), lambda: x @ weight, lambda: weight @ x.T)
    for use in uses:
        with pytest.raises(SparseUseError, match=r"'layers/0/kernel' is compressed and was used outside.*Hand it in"):
            use()
