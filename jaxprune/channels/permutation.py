r"""Permutation: channels in an order in which N:M holds on to more of the scores; the model computes what it did.

    permuted = permute_channels(method, params, couplings(apply_fn, params, x))
    masks = compute_masks(method, permuted.params)

The order of the inputs of a layer is the order of the outputs of the layer before, of its bias, its normalisation, and
of all else that holds these channels (`jaxprune.channels.coupling`); they all change places together. Which order is
best is a search over NumPy arrays (`jaxprune.channels.regrouping`).
"""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxprune import layout as layouts
from jaxprune import tree
from jaxprune.channels.coupling import STAYS, Couplings
from jaxprune.channels.granularity import Channels
from jaxprune.channels.regrouping import regroup
from jaxprune.channels.symmetry import slots
from jaxprune.channels.union_find import Ids
from jaxprune.distributions import NM
from jaxprune.exact.meshes import lying_like, placed
from jaxprune.methods import Method, group_scores
from jaxprune.types import Params

Orders = Mapping[str, Ids]


class Permuted(NamedTuple):
    """A model whose channels have changed places.

    Attributes:
        params: pytree of the structure, shapes and shardings of the params.
        orders: layer, named as in `Channels.layers` -> for each of its places the channel, counted within the layer,
            that comes there.
        gains: selected leaf -> the score that its masks retain before and after, as fractions of its whole score.
    """

    params: Params
    orders: Orders
    gains: Mapping[str, tuple[float, float]]


class _Reader(NamedTuple):
    """A selected leaf that reads channels along an axis of its inputs.

    Attributes:
        name: of the leaf.
        channels: of each input of the leaf's view, along this axis.
        scores: of what each input has, (in, all else).
    """

    name: str
    channels: Ids
    scores: Float[np.ndarray, "n_in rest"]

    def places(self, channels: Ids) -> Int[np.ndarray, "channels places"]:
        """Where these channels are among the inputs; each is there as often as any other."""
        inputs = np.flatnonzero(np.isin(self.channels, channels))
        order = np.argsort(self.channels[inputs], kind="stable")
        rank = np.argsort(np.argsort(channels))
        return inputs[order].reshape(len(channels), -1)[rank]

    def is_within(self, channels: Ids, m: int) -> bool:
        """Whether each run that has any of these channels has one alone, so that no order changes it."""
        runs = self.channels.reshape(-1, m)
        return bool((runs == runs[:, :1])[np.isin(runs, channels).any(1)].all())


def permute_channels(
    method: Method, params: Params, couplings: Couplings, *, leaves: str | Sequence[str] | None = None,
    rounds: int = 100, **evidence: Any,
) -> Permuted:  # fmt: skip
    r"""Puts channels into an order in which N:M retains more of the scores, and leaves the function as it is.

    Maximises $\sum_{l} \sum_{r, j} \mathrm{top}_n \{S^l_{ij} : i \in r\}$ over the leaves $l$ that read a layer, their
    runs $r$ of m inputs and outputs $j$ (window and stacked layers among them). The score retained by all of them
    together never falls. Channels change places only with those that the function treats the same, and only out of
    runs that hold nothing else, and the same channels, in every leaf that reads them.

    Args:
        method: its distribution is `NM` along the inputs; its granularity leaves inputs apart.
        params: any pytree of arrays, not traced.
        couplings: of the model, from `jaxprune.couplings`.
        leaves: names or patterns of the leaves to permute the inputs of, all of which must be able to; other leaves
            that read the same layers count as much. None: all selected leaves that can.
        rounds: of the search, at most; it ends by itself when no exchange between two runs is left that gains.
        **evidence: what the criterion looks at, see `compute_masks`. It belongs to these params: afterwards gather it
            anew, or take it through `reorder` where it has the leaves of the params.

    Raises:
        ValueError: another distribution or granularity, inputs that do not divide into runs, couplings of another
            model, a named leaf whose inputs must keep their order.

    References:
        Pool and Yu 2021, Channel Permutations for N:M Sparsity; Mishra et al. 2021, arXiv:2104.08378. As there all ways
        of parting two runs are tried (m <= 6), pair by pair, until none gains; their random escapes from a local
        optimum are left out. Here all leaves that read a layer count, and what follows is found by tracing.
    """
    n, m = _survivors(method)
    couplings.check(params)
    found, axes, pooled = group_scores(method, params, **evidence)
    dims = {name: layouts.dims(leaf.shape, axes[name]) for name, leaf in found.items()}
    scores = _checked(pooled, dims)
    before = _retained(method, scores, dims)
    readers = [reader for name in found for reader in _readers(name, axes[name], scores[name], couplings)]
    layers = [_runs(channels, readers, m) for channels in _alike(couplings)]
    wanted = _wanted(leaves, list(found))
    for name in () if leaves is None else wanted:
        if not any(reader.name == name for _, read_by in layers for reader in read_by):
            raise ValueError(_refusal(name, axes[name], dims[name][-2], m, readers, couplings))
    source = np.arange(couplings.count)
    for runs, read_by in layers:
        if any(reader.name in wanted for reader in read_by):
            rows = [reader.scores[reader.places(runs.reshape(-1))].reshape(runs.size, -1) for reader in read_by]
            source[runs.reshape(-1)] = runs.reshape(-1)[regroup(np.concatenate(rows, 1), n, m, rounds)]
    moved = {name: _moved_inputs(name, axes[name], score, couplings, source) for name, score in scores.items()}
    after = _retained(method, moved, dims)
    orders = {name: np.searchsorted(layer, source[list(layer)]) for name, layer in Channels(couplings).layers.items()}
    return Permuted(_moved(params, couplings, source), orders, {name: (before[name], after[name]) for name in found})


def reorder(params: Params, couplings: Couplings, orders: Orders) -> Params:
    """A pytree with the leaves of the params, such as gradients or momentum, in the order of permuted params.

    Args:
        params: or what has leaves of the same names and shapes.
        couplings: of the model before.
        orders: see `Permuted`.

    Raises:
        ValueError: couplings of another model.
    """
    couplings.check(params)
    source = np.arange(couplings.count)
    for name, layer in Channels(couplings).layers.items():
        source[list(layer)] = np.asarray(layer)[orders[name]]
    return _moved(params, couplings, source)


@lying_like("params")
def _moved(params: Params, couplings: Couplings, source: Ids) -> Params:
    """With `source[c]` in the places of channel c."""

    def move(name: str, leaf: Any) -> Any:
        found = leaf
        for axis, channels in enumerate(couplings.channels.get(name, ())):
            indices = _indices(channels, source)
            if not np.array_equal(indices, np.arange(len(indices))):
                found = found.take(indices, axis=axis)
        return found if found is leaf else placed(found, leaf)

    return tree.map_named(move, params)


def _indices(channels: Ids, source: Ids) -> Ids:
    """For each index along an axis the one that comes there: of its channel's source the one in the same slot."""
    free = np.flatnonzero(channels != STAYS)
    order = free[np.argsort(channels[free], kind="stable")]
    indices = np.arange(len(channels))
    indices[free] = order[np.searchsorted(channels[order], source[channels[free]]) + slots(channels)[free]]
    return indices


def _moved_inputs(name: str, axes: layouts.Axes, score: Any, couplings: Couplings, source: Ids) -> Any:
    """Scores of a view with its inputs in another order; that of the outputs changes no contest of N:M."""
    indices = [np.zeros(1, np.int64), *(_indices(couplings.channels[name][axis], source) for axis in axes.inputs)]
    sizes = [len(each) for each in indices]
    flat = np.ravel_multi_index(np.ix_(*indices), sizes).reshape(-1)
    return score.take(flat, axis=-2)


def _readers(name: str, axes: layouts.Axes, score: Any, couplings: Couplings) -> list[_Reader]:
    rows = np.moveaxis(score, -2, 0).reshape(score.shape[-2], -1)
    known = [couplings.channels[name][axis] for axis in axes.inputs]
    along = np.meshgrid(*known, indexing="ij")
    return [_Reader(name, channels.reshape(-1), rows) for channels in along if (channels != STAYS).any()]


def _alike(couplings: Couplings) -> list[Ids]:
    """Channels that may change places, kind by kind."""
    order = np.argsort(couplings.alike, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(couplings.alike[order])) + 1)


def _runs(channels: Ids, readers: list[_Reader], m: int) -> tuple[Int[np.ndarray, "runs m"], list[_Reader]]:
    """Those of the channels that share all their runs with m - 1 others, run by run, and who reads them.

    m channels that share a run fill it, so a run whose channels are exchanged has nothing else in it.
    """
    read_by = [reader for reader in readers if np.isin(channels, reader.channels).any()]
    names = [reader.name for reader in read_by]
    read_by = [reader for reader in read_by if not reader.is_within(channels, m)]
    if not read_by or len(set(names)) < len(names):  # a leaf that reads along two axes would have to be scored anew
        return np.zeros((0, m), np.int64), []
    shared = np.concatenate([reader.places(channels) // m for reader in read_by], 1)
    _, group, sizes = np.unique(shared, axis=0, return_inverse=True, return_counts=True)
    full = [channels[group.reshape(-1) == which] for which in np.flatnonzero(sizes == m)]
    return np.asarray(full, np.int64).reshape(-1, m), read_by if full else []


def _retained(method: Method, scores: Mapping[str, Any], dims: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    kept = method.distribution({name: jnp.asarray(score) for name, score in scores.items()}, None, dims=dims)
    whole = {name: score.sum(dtype=float) for name, score in scores.items()}
    alive = {name: score[np.asarray(kept[name])].sum(dtype=float) for name, score in scores.items()}
    return {name: float(alive[name] / whole[name]) if whole[name] else 1.0 for name in scores}


def _wanted(leaves: str | Sequence[str] | None, found: list[str]) -> list[str]:
    if leaves is None:
        return found
    patterns = (leaves,) if isinstance(leaves, str) else leaves
    for pattern in patterns:
        if not fnmatch.filter(found, pattern):
            raise ValueError(f"`leaves` names {pattern!r}, but the method selects {', '.join(map(repr, found))}.")
    return [name for name in found if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _survivors(method: Method) -> tuple[int, int]:
    """The n and m of a method that this is for."""
    if not isinstance(method.distribution, NM) or method.distribution.along != "inputs":
        raise ValueError(
            f"Channels are permuted for `NM(n, m)` along the inputs, the distribution is {method.distribution}."
        )
    if isinstance(method.granularity, Channels):
        raise ValueError("Channels are permuted for masks of single weights, the granularity is `Channels`.")
    return method.distribution.n, method.distribution.m


def _checked(pooled: Mapping[str, Any], dims: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    for name, score in pooled.items():
        if score.shape[-2] != dims[name][-2]:
            raise ValueError(
                f"The order of inputs is found from a score of each, but the granularity makes {score.shape[-2]} "
                f"groups of the {dims[name][-2]} inputs of {name!r}. Use `Element`, `Kernel` or `Input`."
            )
    return {name: np.asarray(score) for name, score in pooled.items()}


def _refusal(name: str, axes: layouts.Axes, inputs: int, m: int, readers: list[_Reader], couplings: Couplings) -> str:
    """Why the inputs of a leaf keep their order."""
    free = [reader for reader in readers if reader.name == name]
    if free:
        channels = np.unique(np.concatenate([reader.channels for reader in free]))
        others = dict.fromkeys(repr(r.name) for r in readers if np.isin(channels[channels != STAYS], r.channels).any())
        why = (
            f"no {m} channels that the function treats the same fill the same runs of {m}, and nothing but these, in "
            f"all leaves that read them, {', '.join(others)}"
        )
    else:
        reasons = (couplings.reasons[name, axis] for axis in axes.inputs if (name, axis) in couplings.reasons)
        why = next(reasons, "it has no axis of inputs")
        if couplings.barriers:
            why += f" (operations that could not be followed: {', '.join(couplings.barriers)})"
    return (
        f"The {inputs} inputs of {name!r} must keep their order: {why}. Leave it out of `leaves`; without `leaves` "
        "all leaves are permuted that can be."
    )
