"""The experiments that come along: each can be run, results are of the files as they are, recipes keep their word."""

import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from data_helpers import write_sheets
from lab_helpers import metrics_of, results_of
from test_streams import root as imagenet_root  # noqa: F401  (a fixture)

from jaxprune.lab import models
from jaxprune.lab.bench import sparsify
from jaxprune.lab.data import importing, sets
from jaxprune.lab.recipe import build
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.runs import run

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = sorted(path for path in FOLDER.glob("**/*.toml"))
OF_MNIST = [path for path in FILES if "mnist" in path.read_text()]
MNIST = Path(os.environ.get("JAXPRUNE_DATA", "nowhere")) / "mnist"
PROFILES = FOLDER / "benchmarks/profiles/resnet50.csv"


@pytest.mark.usefixtures("unchecked")  # shapes stand for arrays
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_experiment_fits_its_network_and_can_be_taken_up_again(path, tmp_path):
    for point in cfg.load_sweep(path).points:
        name = point.config.data.name
        network = models.shapes(point.config.model, sets.IMAGES[name], sets.classes(name))
        build.check(point.config.prune, network.params)
        (tmp_path / "config.toml").write_text(cfg.dump(point.config))
        assert cfg.load(tmp_path / "config.toml") == point.config


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("*.json")), ids=lambda path: path.stem)
def test_results_are_of_the_experiment_as_it_stands(path):
    found = json.loads(path.read_text())
    if "rows" in found:
        pytest.skip("of a benchmark")
    [file] = [file for file in FILES if cfg.load_sweep(file).name == found["name"]]
    hashes = [cfg.config_hash(point.config) for point in cfg.load_sweep(file).points]
    assert [point["hash"] for point in found.get("points", [found])] == hashes


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("place", "column"), [*enumerate(["pruned_70", "pruned_83", "pruned_85"])])
def test_the_recipes_of_resnet50_come_to_the_published_profiles(place, column):
    """A weight more or less in a layer: a fraction is rounded here, and was cut off there."""
    config = cfg.load_sweep(FOLDER / "s3_resnet50_imagenet.toml").points[place].config
    params = models.shapes(config.model, sets.IMAGES["imagenet2012"], 1000).params
    theirs = sparsify.profile_counts(params, sparsify.read_profile(f"{PROFILES}:{column}"))
    rules = build.method(config.prune).distribution.rules
    for name, left in theirs.items():
        size = int(np.prod(params[name.removesuffix("/kernel")]["kernel"].shape))
        share = next(share for pattern, share in rules if fnmatch(name, pattern))
        assert abs(size - round(size * share) - left) <= 1, name
    assert config.prune.sparsity == max(share for _, share in rules)


@pytest.mark.slow
@pytest.mark.usefixtures("relaxed", "quick")
@pytest.mark.parametrize("name", ["s3_resnet50_imagenet", "s3_resnet20_cifar10", "s4_vgg19_cifar10"])
def test_what_was_not_run_yet_runs_small(name, tmp_path, request):
    """Every stage of it for a step or two, on a few random images."""
    short = ["--seeds", "[0]", "--prune.duration", "2 steps", "--finetune.duration", "1 steps"]
    short += ["--train.duration", "1 steps", "--train.batch_size", "2", "--data.validation", "0.3"]
    if "imagenet" in name:
        folder = request.getfixturevalue("imagenet_root")
    else:
        write_sheets(tmp_path / "files")
        importing.import_folder("cifar10", tmp_path / "files", folder := tmp_path / "data")
    short += ["--finetune.batch_size", "2", "--data.data_dir", str(folder)]
    short += ["--prune.rounds", "2"] if "vgg" in name else []
    point = cfg.load_sweep(FOLDER / f"{name}.toml", short).points[-1]
    found = run.run(point.config, tmp_path / "run", "a command")
    assert found["sparsity"]["mean"] > 0.3


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A data directory with MNIST in it."""
    if not MNIST.is_dir():
        pytest.skip("JAXPRUNE_DATA names no folder with mnist/ in it")
    importing.import_folder("mnist", MNIST, folder := tmp_path_factory.mktemp("data"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", OF_MNIST, ids=lambda path: path.stem)
def test_two_processes_come_to_the_same_digits(path, tmp_path, mnist):
    """Every value of a sweep's first axis, one seed, every stage a few steps long: metrics and results to the digit."""
    short = re.sub(r'duration = "(?!0 )[^"]*"', 'duration = "5 steps"', path.read_text())
    (tmp_path / "short.toml").write_text(short)
    points = cfg.load_sweep(tmp_path / "short.toml", ["--seeds", "[0]", "--data.data_dir", str(mnist)]).points
    for number, point in enumerate({repr([*point.values.values()][:1]): point for point in points}.values()):
        text = re.sub(r"update_every = .*", 'update_every = "1 steps"', cfg.dump(point.config))
        (file := tmp_path / f"{number}.toml").write_text(text)
        folders = [tmp_path / f"{number}{name}" for name in "ab"]
        command = [sys.executable, "-m", "jaxprune.lab.commands.main", "run", file, "--quiet", "--out"]
        both = [
            subprocess.Popen([*command, out], env=os.environ | {"XLA_FLAGS": ""}, stderr=subprocess.PIPE, text=True)
            for out in folders
        ]
        said = [one.communicate()[1] for one in both]
        assert [one.returncode for one in both] == [0, 0], said
        first, second = [(metrics_of(out), results_of(out)) for out in folders]
        assert first == second
