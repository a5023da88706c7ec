"""What no file can say, and a run finds out: couplings of channels, and what each leaf can bear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab_helpers import STAGES, StopAt, Stopped, arrays_of, assert_same_run, checkpoints, params_and_masks, tiny

import jaxprune as jp
from jaxprune.lab.recipe import build
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.runs import run

pytestmark = pytest.mark.usefixtures("relaxed", "quick")

CURVES = "{name='by_sensitivity', curves={'*'=[[0.5, 0.01], [0.9, 0.2]]}}"


def masks_of(folder):
    return params_and_masks(arrays_of(checkpoints(folder / "seed_0/finetune")[-1]))[1]


def test_a_run_with_channels_traces_the_model(tmp_path):
    """A hidden unit goes with its bias, with all that it reads and all that reads it."""
    config = tiny(tmp_path, "--prune.granularity", "channels", "--prune.sparsity", "0.5")
    results = run.run(config, tmp_path / "run", "", StopAt())
    assert results["sparsity"]["values"] == [0.5]
    masks = masks_of(tmp_path / "run")
    by_shape = {mask.shape: mask for mask in masks.values()}
    alive = by_shape[16,]
    assert alive.sum() == 8
    assert np.array_equal(by_shape[64, 16], np.broadcast_to(alive, (64, 16)))
    assert np.array_equal(by_shape[16, 10], np.broadcast_to(alive[:, None], (16, 10)))


def test_a_run_by_sensitivity_measures_the_leaves(tmp_path):
    """Leaves of their own sparsities, which together are what was asked for; the same after a stop."""
    config = tiny(tmp_path, "--prune.distribution", "by_sensitivity", "--prune.sparsity", "0.7")
    results = run.run(config, tmp_path / "run", "", StopAt())
    masks = {name: mask for name, mask in masks_of(tmp_path / "run").items() if mask.ndim == 2}
    gone = {name: 1 - mask.mean() for name, mask in masks.items()}
    total = sum(mask.size for mask in masks.values())
    assert abs(sum((~mask).sum() for mask in masks.values()) - 0.7 * total) <= len(masks) / 2
    assert max(gone.values()) - min(gone.values()) > 0.02
    assert results["sparsity"]["values"] == [pytest.approx(0.7, abs=1e-3)]
    with pytest.raises(Stopped):
        run.run(config, tmp_path / "again", "", StopAt("prune", STAGES["prune"] - 3))
    run.run(config, tmp_path / "again", "", StopAt())
    assert_same_run(tmp_path / "again", tmp_path / "run")


def test_curves_may_stand_in_the_file(tmp_path):
    config = tiny(tmp_path, "--prune.distribution", CURVES)
    assert build.method(config.prune).distribution == jp.distributions.BySensitivity({"*": ((0.5, 0.01), (0.9, 0.2))})
    assert config.prune.distribution.left_to_the_run == set()
    (tmp_path / "again.toml").write_text(cfg.dump(config))
    assert cfg.load(tmp_path / "again.toml") == config
    with pytest.raises(cfg.ConfigError, match=r"--prune.distribution: `BySensitivity`: '\*' has the point"):
        tiny(tmp_path, "--prune.distribution", CURVES.replace("0.9", "1.9"))
    with pytest.raises(cfg.ConfigError, match=r"curves.\"\*\".0.0: expected a valid number, arrived \"a\""):
        tiny(tmp_path, "--prune.distribution", CURVES.replace("0.5", "'a'"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.validation", "0"], "by_sensitivity is measured on held-out samples"),
        (["--prune.granularity", "channels"], "measured leaf by leaf, and channels reach across leaves"),
        (["--prune.criterion", "movement"], "'movement' looks at statistics"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(tmp_path, words, message):
    config, watcher = tiny(tmp_path, "--prune.distribution", "by_sensitivity", *words), StopAt()
    with pytest.raises(cfg.ConfigError, match=message):
        run.run(config, tmp_path / "run", "", watcher)
    assert watcher.stages == []


def test_a_sparsity_is_asked_for_where_the_distribution_needs_one():
    for name, takes in (("by_sensitivity", True), ("erk", True), ("budget", True), ("uniform", True)):
        assert cfg.Distribution(name=name).takes_sparsity() is takes
    for table in ({"name": "threshold", "t": 0.1}, {"name": "sigma_threshold", "k": 1.0, "pooled": True}):
        assert cfg.Distribution(**table).takes_sparsity() is False
    for table in ({"name": "nm", "n": 1, "m": 2}, {"name": "by_rule", "rules": {"*": 0.5}}):
        assert cfg.Distribution(**table).takes_sparsity() is None


def test_a_format_of_the_library_can_be_named(tmp_path):
    for name in {*jp.sparse.FORMATS, "dense"} - {"int8"}:
        assert tiny(tmp_path, "--sparse.format", name).sparse.format == name
    with pytest.raises(cfg.ConfigError, match='arrived "native_mn", did you mean "native_nm"'):
        tiny(tmp_path, "--sparse.format", "native_mn")
    weight = jax.random.normal(jax.random.key(0), (32, 16))
    params = {"kernel": jnp.where(jnp.arange(32)[:, None] % 4 < 2, weight, 0)}
    small = jp.sparse.compress(params, format=tiny(tmp_path, "--sparse.format", "native_nm").sparse.format)
    np.testing.assert_array_equal(jp.sparse.decompress(small)["kernel"], params["kernel"])
