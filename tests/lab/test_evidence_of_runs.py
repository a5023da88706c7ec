"""Statistics of activations in runs: presets that look at them prune what NumPy would; what has none is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab_helpers import tiny

import jaxprune as jp
from jaxprune.lab import models
from jaxprune.lab.data.samples import samples_of
from jaxprune.lab.recipe import build
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.runs import evidence, found, run, train

pytestmark = pytest.mark.usefixtures("relaxed", "quick")

IMAGE, CLASSES = (4, 4, 1), 5
NORMED = "jaxprune.lab.models.small:NormedMLP"
HIDDEN = ("layers/0/kernel",)


def network(name):
    options = {"widths": [7]}
    table = {"name": name, "options": options} if ":" in name else {"name": name, **options}
    made = models.build(cfg.Model.model_validate(table), jax.random.key(0), IMAGE, CLASSES)
    rng = np.random.default_rng(0)
    return made._replace(params=jp.tree.map_named(lambda _, leaf: leaf + rng.normal(0, 0.1, leaf.shape), made.params))


def samples(count):
    rng = np.random.default_rng(1)
    return samples_of(rng.integers(0, 256, (count, *IMAGE), np.uint8), rng.integers(0, CLASSES, count), 255.0)


def masks_of(prune, made, seen):
    method, key = build.method(prune), jax.random.key(0)
    known = jax.jit(lambda params: evidence.of(method, made.apply, params, seen, key))(made.params)
    return jp.tree.named_leaves(jp.compute_masks(method, made.params, prune.sparsity, **known))


def test_wanda_and_apoz_of_two_chunks(monkeypatch):
    """Of 2,048 of the samples, in calls of a thousand: kept are those of the largest scores."""
    monkeypatch.setattr(train, "CHUNK", 200)
    made, seen = network("mlp"), samples(450)
    leaves = {name: np.asarray(leaf, np.float64) for name, leaf in jp.tree.named_leaves(made.params).items()}
    x = np.asarray(seen.images, np.float64).reshape(450, -1) / 255
    a = np.maximum(x @ leaves["layers/0/kernel"] + leaves["layers/0/bias"], 0)
    masks = masks_of(cfg.Prune.model_validate({"preset": "wanda", "sparsity": 0.5}), made, seen)
    for name, met in (("layers/0/kernel", x), ("layers/1/kernel", a)):
        scores = np.abs(leaves[name]) * np.sqrt((met**2).sum(0))[:, None]
        kept = len(scores) - round(len(scores) / 2)
        assert np.array_equal(masks[name], scores >= np.sort(scores, 0)[-kept])
    masks = masks_of(cfg.Prune.model_validate({"preset": "apoz", "sparsity": 0.3, "select": HIDDEN}), made, seen)
    kept = (a != 0).mean(0) >= np.sort((a != 0).mean(0))[2]
    assert np.array_equal(masks["layers/0/kernel"], np.broadcast_to(kept, (16, 7)))


@pytest.mark.parametrize("preset", ["wanda", "owl", "apoz", "activation_mean", "slimming"])
def test_presets_fit_before_training_and_find_their_evidence(preset):
    select = {} if preset in ("wanda", "owl") else {"select": HIDDEN}
    prune, made = cfg.Prune.model_validate({"preset": preset, "sparsity": 0.5, **select}), network(NORMED)
    build.check(prune, made.params)
    found.check_activations(prune, made, IMAGE, {})
    masks = masks_of(prune, made, samples(30))
    removed = float(jp.sparsity_of({name: masks[name] for name in build.selected(prune, made.params)}))
    assert removed == pytest.approx(4 / 7 if select else 0.5, abs=0.02)
    if preset == "slimming":
        scales = np.abs(jp.tree.named_leaves(made.params)["norms/0/scale"])
        assert np.array_equal(masks[HIDDEN[0]].all(0), scales > np.sort(scales)[3])


def test_what_nothing_scales_is_refused_before_training(tmp_path):
    config = tiny(tmp_path, "--prune", "{preset = 'slimming', sparsity = 0.5}")
    with pytest.raises(ValueError, match=r"`scales` needs .*'layers/0/kernel'.* with `select`"):
        run.run(config, tmp_path / "run", "a command", None)
    assert not list((tmp_path / "run").glob("seed_0/*/0*"))


def test_a_leaf_that_cannot_be_followed_is_refused_before_training():
    prune = cfg.Prune.model_validate({"preset": "wanda", "sparsity": 0.5})
    made = models.Network({"kernel": jnp.ones((4, 4))}, lambda params, x, key=None: x[..., 0] * params["kernel"])
    with pytest.raises(ValueError, match="'kernel' runs into `mul`"):
        found.check_activations(prune, made, IMAGE, {})
