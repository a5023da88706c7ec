"""Tune: measure every use of every leaf on this machine, and compress only what pays.

    sites of the traced model, by leaf
    for each leaf    dense against every format, at the shapes of its sites       -> the best, if it clearly wins
    for the model    all winners together against dense; if it is not faster, half of them, ... -> or none

Measured alone, an operation is a promise; the model as a whole is what counts, since XLA fuses around a dense
operation and not around a kernel. So the last word is a measurement of the whole, and what is returned has either won
it or is the dense model itself.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from jaxprune import tree
from jaxprune.layout import Axes, Layout
from jaxprune.sparse.compression import compress
from jaxprune.sparse.formats import FORMATS, SparseWeight, check_format
from jaxprune.sparse.tuning import cache as files
from jaxprune.sparse.tuning import machine, timing
from jaxprune.sparse.tuning.plan import LeafPlan, Plan, SiteTimings
from jaxprune.sparse.tuning.race import REFUSALS, contest
from jaxprune.sparse.tuning.records import from_plain, to_plain
from jaxprune.sparse.tuning.whole import Model, settle
from jaxprune.tracing import Site, layout_of, weights_of
from jaxprune.tracing.finder import jaxpr_of, sites_of
from jaxprune.tracing.sites import PRODUCTS
from jaxprune.types import Params

MARGIN = 0.03
"""A format must be this fraction faster than dense at the sites of a leaf, or the leaf stays dense."""

T = TypeVar("T")
Progress = Callable[[int, int, str], Any]


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What is the same for all leaves of one call."""

    names: list[str]
    layout: Layout
    folder: Path | None
    repeats: int | None
    seconds: float
    machine: Mapping[str, Any]

    def key(self, **parts: Any) -> str:
        """Name of the file for what depends on these parts, and on all of this."""
        settings = (self.repeats, self.seconds, MARGIN)
        same = {"machine": dict(self.machine), "kernels": files.kernels(), "formats": self.names, "settings": settings}
        return files.key(**same, **parts)

    def kept(self, key: str, read: Callable[[str], T]) -> T | None:
        """What is in a file; None if there is none, or none that can be read."""
        text = files.read(self.folder, key)
        try:
            return None if text is None else read(text)
        except ValueError:
            return None


def tune(
    apply_fn: Callable[..., Any],
    params: Params,
    x: Any,
    *more_args: Any,
    formats: Iterable[str] | None = None,
    select: tree.Select | None = None,
    layout: Layout | None = None,
    cache: str | os.PathLike[str] | bool | None = True,
    repeats: int | None = None,
    seconds: float = 0.1,
    progress: Progress | None = None,
) -> Plan:
    """The format of every leaf that makes this model fastest here, at these shapes; dense where dense is.

    Runs the model and its operations many times, on the device of the params. A format must beat dense by more than
    `MARGIN` at the sites of its leaf, and the whole planned model the whole dense model by more than `whole.MARGIN`,
    both beyond the noise of the medians; otherwise dense stays. So an unpruned model gets an all-dense plan.

    What was measured is kept in files, by operation, shapes, dtypes, number and rough pattern of the non-zeros, batch,
    formats, machine and versions; a second call on the same model runs and compiles nothing.

    Args:
        apply_fn: the model, (params, x, *more_args) -> arrays.
        params: the pruned params, any pytree of arrays.
        x: input of the shape that will be served: an array or a `jax.ShapeDtypeStruct`, in any pytree.
        more_args: further arguments; what is no array is handed over as it is.
        formats: names in `FORMATS`; all that do not round the weights, if None.
        select: which leaves, as a function (name, leaf) -> bool or name rules; None: those that the model uses in
            products and convolutions, `weights_of(sites)`.
        layout: which axes of a leaf are summed over; None: those of its first product, `layout_of(sites)`, whatever
            its name.
        cache: the folder of those files, at most 32 MiB of them; True: the user's, `sparse.user_cache()`, or none where
            that cannot be written; None keeps nothing.
        repeats: runs of each contestant; as many as fill `seconds`, from 5 to 50, if None.
        seconds: aim for all runs of one contestant at one site; the whole model is given ten times that.
        progress: called as (done, total, name) before each leaf, and before the whole model under the name "model".

    Returns:
        The plan, for `compress(params, plan)`. All leaves "dense" with the `reason`, where that is best.

    Raises:
        ValueError: an unknown format, or one that needs ranges of activations; nothing is selected; too few `repeats`;
            the cache cannot be written.
        TypeError: a leaf is compressed already, traced, no array or not floating.

    Example:
        >>> plan = jp.sparse.tune(model.apply, params, x)
        >>> predict = jax.jit(jp.sparse.apply(model.apply))
        >>> y = predict(jp.sparse.compress(params, plan), x)
    """
    names = _names(formats)
    if repeats is not None and repeats < timing.LEAST:
        raise ValueError(f"`repeats` is {timing.LEAST} or more, so that medians have a spread; {repeats} arrived.")
    _check(params)
    folder = files.prepare(cache)
    params, args = _resident(params), _resident((x, *more_args))
    jaxpr = jaxpr_of(apply_fn, params, *args)
    sites = sites_of(jaxpr, params)
    selected = tree.selected_leaves(weights_of(sites) if select is None else select, params)
    if layout is None:  # a leaf whose axes cannot be told is refused by every format at its sites
        layout = layout_of([site for site in sites if site.axes is not None])
    setting = _Setting(names, layout, folder, repeats, seconds, machine.describe(_device(selected)))
    axes = {name: layout.axes(name, leaf.shape) for name, leaf in selected.items()}
    patterns = {name: files.pattern(_matrix(leaf, axes[name])) for name, leaf in selected.items()}
    key = setting.key(model=files.text_of(jaxpr), patterns=patterns, axes=axes)
    if (plan := setting.kept(key, Plan.from_json)) is not None:
        return plan
    report = progress or (lambda *_: None)
    leaves = []
    for done, (name, leaf) in enumerate(selected.items()):
        report(done, len(selected) + 1, name)
        uses = [site for site in sites if site.name == name and site.kind in PRODUCTS]
        leaves.append(_tune_leaf(name, leaf, uses, patterns[name], setting))
    report(len(selected), len(selected) + 1, "model")
    leaves, attempts, reason = settle(leaves, Model(apply_fn, params, args, repeats, 10 * seconds))
    plan = Plan(tuple(leaves), tuple(attempts), reason, setting.machine)
    files.write(folder, key, plan.to_json())
    files.trim(folder)
    report(len(selected) + 1, len(selected) + 1, "model")
    return plan


def _names(formats: Iterable[str] | None) -> list[str]:
    if formats is None:
        return [name for name, format in FORMATS.items() if not format.lossy]
    names = [formats] if isinstance(formats, str) else list(dict.fromkeys(formats))
    for name in names:
        check_format(name)
        if name != "dense" and FORMATS[name].calibrated:
            raise ValueError(
                f'`tune` draws its activations, and has no ranges for the format "{name}". Compress with it, and '
                "measure the model."
            )
    return [name for name in names if name != "dense"]


def _check(params: Params) -> None:
    for name, leaf in tree.named_leaves(params).items():
        if isinstance(leaf, Tracer):
            raise TypeError(f"Leaf {name!r} is traced. `tune` measures, so it runs outside `jit`, `grad` and `vmap`.")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"Leaf {name!r} is a `ShapeDtypeStruct`: how fast its zeros make it depends on its values.")
    for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, SparseWeight)):
        if isinstance(leaf, SparseWeight):
            raise TypeError(f"Leaf {leaf.name!r} is compressed already. Call `decompress(params)` first.")


def _resident(values: Any) -> Any:
    """The same arrays in the device's memory, so that no run copies them; shapes alone become arrays of ones."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.numpy.ones(leaf.shape, leaf.dtype)
        return jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf

    return jax.tree.map(one, values)


def _device(selected: Mapping[str, Any]) -> Any:
    return next(iter(next(iter(selected.values())).devices()))


def _matrix(leaf: Any, axes: Axes) -> np.ndarray:
    """All inputs by all outputs, in host memory."""
    ordered = np.transpose(np.asarray(leaf), (*axes.layers, *axes.spatial, *axes.inputs, *axes.outputs))
    return ordered.reshape(-1, max(1, math.prod(leaf.shape[axis] for axis in axes.outputs)))


def _tune_leaf(name: str, leaf: Any, sites: list[Site], pattern: dict[str, Any], setting: _Setting) -> LeafPlan:
    """The leaf's contests at all of its sites, and the best format of them."""
    axes = setting.layout.axes(name, leaf.shape)
    rivals = functools.cache(lambda: _rivals(name, leaf, setting))  # made only where something is measured
    plan = LeafPlan(
        name=name,
        shape=tuple(leaf.shape),
        dtype=leaf.dtype.name,
        **axes._asdict(),
        nse=pattern["nse"],
        sparsity=1 - pattern["nse"] / max(1, leaf.size),
        format="dense",
        why="",
        sites=tuple(_timings(site, leaf, rivals, setting, pattern=pattern, axes=axes) for site in sites),
    )
    format, why = choose(plan, setting.names)
    return dataclasses.replace(plan, format=format, why=why)


def choose(leaf: LeafPlan, names: Iterable[str]) -> tuple[str, str]:
    """The fastest format over all sites of the leaf if it clearly beats dense, else dense; and why.

    Clearly: by more than `MARGIN`, and with 95 % intervals of the medians that do not meet.

    Args:
        leaf: with its timings.
        names: the formats that competed.
    """
    if not leaf.sites:
        return "dense", "No matrix product or convolution uses it directly."
    times = {name: ms for name in names if (ms := leaf.milliseconds(name)) is not None}
    dense = leaf.milliseconds("dense")
    if dense is None or not times:
        return "dense", "No format runs here: " + _refusals(leaf)
    best = min(times, key=lambda name: times[name])
    gain = f"{best} takes {times[best]:.3f} ms, dense {dense:.3f} ms"
    noise = (leaf.notch(best) or 0.0) + (leaf.notch("dense") or 0.0)
    if times[best] >= (1 - MARGIN) * dense:
        return "dense", f"Dense is fastest, or as fast: {gain}."
    if times[best] + noise >= dense:
        return "dense", f"Too close to tell: {gain}, with a noise of {noise:.3f} ms."
    return best, f"Faster: {gain}."


def _refusals(leaf: LeafPlan) -> str:
    reasons = {timing.refused: None for site in leaf.sites for timing in site.timings if timing.refused}
    return " ".join(reasons) or "none was to be tried."


def _rivals(name: str, leaf: Any, setting: _Setting) -> dict[str, SparseWeight | str]:
    """Format -> the compressed leaf, or why it cannot be."""
    if len(leaf.devices()) > 1:
        reason = f"Leaf {name!r} lies on {len(leaf.devices())} devices, compressed ones on one."
        return dict.fromkeys(setting.names, reason)
    rivals: dict[str, SparseWeight | str] = {}
    for format in setting.names:
        try:
            rivals[format] = compress({name: leaf}, format, select=lambda *_: True, layout=setting.layout)[name]
        except REFUSALS as error:
            rivals[format] = str(error)
    return rivals


def _timings(
    site: Site, leaf: Any, rivals: Callable[[], Mapping[str, SparseWeight | str]], setting: _Setting, **parts: Any
) -> SiteTimings:
    """The contest at a site, from the file of any leaf of these `parts`, or measured now and kept there."""
    # Any leaf of these shapes and zeros takes as long, whatever its name and however often it is used.
    what = dataclasses.replace(site, name="", index=0, count=1, macs=0)
    key = setting.key(site=to_plain(what), **parts)
    found = setting.kept(key, lambda text: from_plain(SiteTimings, json.loads(text)))
    if found is None:
        timings = contest(site, leaf, rivals(), repeats=setting.repeats, seconds=setting.seconds)
        found = SiteTimings(site.op, site.x_shape, site.x_dtype, site.count, timings)
        files.write(setting.folder, key, json.dumps(to_plain(found), allow_nan=False))
    return dataclasses.replace(found, count=site.count)
