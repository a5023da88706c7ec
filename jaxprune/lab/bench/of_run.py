"""The models a finished run came to, read back from its folder: `jaxprune bench model --run FOLDER`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxprune as jp
from jaxprune.lab.checkpoints import checkpoint
from jaxprune.lab.data import sets
from jaxprune.lab.models.zoo import Network, of_config
from jaxprune.lab.recipe import build
from jaxprune.lab.recipe import config as cfg
from jaxprune.lab.report.results import read_run
from jaxprune.lab.runs import train


def of_run(folder: Path) -> Network:
    """The fine-tuned model of the run's first seed, with its zeros.

    Args:
        folder: of `jaxprune run`, finished.

    Raises:
        ValueError: it is no run folder, or not finished.
        CheckpointError: its last checkpoint is damaged.
    """
    read_run(folder)
    config = cfg.load(folder / "config.toml")
    key = jax.random.key(config.seeds[0])
    network = of_config(config.name, config.model, *sets.facts(config.data), key)
    found, _ = checkpoint.restore_latest(
        folder / f"seed_{config.seeds[0]}" / "finetune", _template(config, network.params)
    )
    if found is None:
        raise ValueError(f"{folder} has no checkpoint of its fine-tuning any more. Run its command again.")
    return network._replace(params=jax.tree.map(jnp.asarray, found.state.params))


def rounds_of(folder: Path, like: Any) -> dict[float, Callable[[], Any]]:
    """Of a run in rounds: sparsity of the pruned leaves -> what reads the params that the first seed had there.

    Rounds that a stop rule took back are among them; a run without rounds has none.

    Args:
        folder: of `jaxprune run`, finished.
        like: params of the network, for their structure.
    """
    results = read_run(folder)
    rounds = folder / f"seed_{results['seeds'][0]}" / "rounds"
    return {
        round(one["removed"], 6): lambda number=number: jp.load(rounds / f"{number}.jaxprune", like=like)
        for number, one in enumerate(results.get("rounds", [[]])[0], 1)
    }


def _template(config: cfg.Config, params: Any) -> Any:
    """What the last stage saves, as far as shapes go; the number of steps decides no shape."""
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    tx = optax.chain(build.optimizer(config.finetune, 1), jp.keep_params_sparse(masks))
    return train.start(params, tx)
