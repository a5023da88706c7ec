r"""Weights and activations in 8 bits, and products of integers that really run.

    sparse_params = compress(params, "int8", ranges=calibrate(apply_fn, params, batches))
    predict = jax.jit(apply(apply_fn))                     equals jax.jit(int8(apply_fn, ranges)) of `params` to the bit

What `jaxprune.quantize.int8` simulates, a kernel computes on the codes that are not 0,

    y = s_x s_w (\sum q_x q_w - z_x \sum q_w)        w = s_w q_w for each output,   x = s_x (q_x - z_x) for the tensor

with sums in 32 bits that nothing rounds. Activations arrive in floating point and are rounded then; results leave in
floating point, but as codes where another product reads them (`encoded`). A bias that the function itself makes by a
product may differ in its last bit: in one of the programs XLA joins that product with the addition.

Processors multiply four bytes by four and add them up in one instruction, so weights are stored four inputs of one
output at a time, where one of the four is alive. `Block(4, 1)` masks lose nothing; of unstructured masks at 83 % half
of the runs are stored. The channels of each tap of a convolution make whole runs: what is beyond the last is 0.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Shaped, UInt8

from jaxprune.quantize.int8 import MOST_TERMS, Ranges
from jaxprune.quantize.scales import TINY, asymmetric_grid, symmetric_scale, to_codes
from jaxprune.sparse.eight_bits import EightBits
from jaxprune.sparse.formats import FORMATS, Indices, SparseWeight, Stored, out_in
from jaxprune.sparse.tiles import NativeWeight, coordinates

RUN = 4
"""Inputs of a run."""
TILE = 128
"""Runs of a tile; 64 columns of a panel take 32 KiB, a first-level cache."""
NAME = "int8"


class Int8Weight(EightBits, NativeWeight):
    """Codes of weights in runs of four inputs, for C++ kernels on CPU that round activations to codes too.

    Only used when named, with the ranges of the activations. It has products over its inputs and convolutions, and no
    derivative. In a cast the codes stay those of the leaf.

    Attributes:
        values: codes, run by run.
        index: run of inputs, counted from its tile's first.
        tile: runs of a tile.
        totals: sum of the codes of every output.
        grid: scale of the activations' codes, and which of them, from -128 to 127, is 0. Other ranges are another
            program.
    """

    calibrated: ClassVar[bool] = True

    totals: Int32[Array, " n_out"] = eqx.field(converter=jnp.asarray)
    grid: tuple[float, ...] = eqx.field(static=True, kw_only=True)

    @staticmethod
    def choose_tile(density: float) -> int:
        """Runs of a tile, whatever the density."""
        return TILE

    @classmethod
    def why_not(cls, matrix: Shaped[np.ndarray, "n_out n_in"]) -> str:
        """See `SparseWeight.why_not`."""
        n_in = matrix.shape[1]
        return f"32 bits surely hold the sum over {MOST_TERMS} inputs, here are {n_in}." if n_in > MOST_TERMS else ""

    @classmethod
    def pack(
        cls, values: Any, rows: Indices, cols: Indices, leaf_shape: tuple[int, ...], **fields: Any
    ) -> SparseWeight:
        """See `SparseWeight.pack`; `fields` has the `grid` of the activations."""
        outputs_last = fields.get("outputs_last", True)
        n_out, n_in = out_in(leaf_shape, outputs_last)
        channels = max(_channels(leaf_shape, outputs_last), 1)
        taps, padded = n_in // channels, _runs(channels) * RUN
        sizes = n_out, taps * padded
        own = cls.parts(np.asarray(values), rows, cols // channels * padded + cols % channels, sizes)
        return cls(**own, leaf_shape=leaf_shape, **fields)

    @classmethod
    def parts(cls, values: Stored, rows: Indices, cols: Indices, sizes: tuple[int, int]) -> dict[str, Any]:
        """See `SparseWeight.parts`; inputs are those of whole runs."""
        n_out, n_runs = sizes[0], sizes[1] // RUN
        exact = values.astype(np.float32)
        exact[np.abs(exact) < TINY] = 0  # for which processors take it
        largest = np.zeros(n_out, np.float32)
        np.maximum.at(largest, rows, np.abs(exact))
        scale = symmetric_scale(largest, 8)
        codes = to_codes(exact, scale[rows], 0, 8).astype(np.int8)
        rows, cols, codes = (part[codes != 0] for part in (rows, cols, codes))
        totals = np.zeros(n_out, np.int32)
        np.add.at(totals, rows, codes)
        keys, slots = np.unique(rows * n_runs + cols // RUN, return_inverse=True)
        runs = np.zeros((keys.size, RUN), np.int8)
        runs[slots, cols % RUN] = codes
        own = super(EightBits, cls).parts(np.arange(keys.size), *np.divmod(keys, max(n_runs, 1)), (n_out, n_runs))
        known = {"scale": scale, "totals": totals, "leaf_dtype": values.dtype.name}
        return own | known | {"values": runs[own["values"]].ravel()}

    @property
    def indexed(self) -> int:
        """How many there are of what an index counts, runs of inputs."""
        channels = max(_channels(self.leaf_shape, self.outputs_last), 1)
        return self.sizes[1] // channels * _runs(channels)

    def of_activations(self) -> tuple[Shaped[Array, "..."], ...]:
        """See `NativeWeight.of_activations`."""
        return (self.totals,)

    def grid_of_activations(self) -> tuple[float, ...]:
        """See `NativeWeight.grid_of_activations`."""
        return self.grid

    def coordinates(self, xp: Any = jnp) -> tuple[Indices, Indices]:
        """See `SparseWeight.coordinates`; the input of what is beyond the channels is one beyond the last."""
        index, bounds = xp.asarray(self.index), xp.asarray(self.bounds)
        rows, runs = coordinates(index, bounds, n_out=self.sizes[0], tile=self.tile, group=1, xp=xp)
        channels = max(_channels(self.leaf_shape, self.outputs_last), 1)
        taps, runs = runs // _runs(channels), runs % _runs(channels)
        within = runs[:, None] * RUN + xp.arange(RUN, dtype=xp.int32)[None, :]
        cols = xp.where(within < channels, taps[:, None] * channels + within, self.sizes[1])
        return xp.repeat(rows, RUN), cols.ravel()

    def check_parts(self) -> None:
        """See `SparseWeight.check_parts`.

        Raises:
            ValueError: numbers of other shapes, or totals that are not those of the codes.
        """
        super().check_parts()
        n_out = self.sizes[0]
        shapes = {"scale": (n_out,), "totals": (n_out,), "grid": (2,), "values": (RUN * self.index.size,)}
        for part, shape in shapes.items():
            if np.shape(getattr(self, part)) != shape:
                raise ValueError(f"{self._who} needs `{part}` {shape}, {np.shape(getattr(self, part))} arrived.")
        totals = np.zeros(n_out, np.int64)
        np.add.at(totals, self.coordinates(np)[0], np.asarray(self.values))
        if not np.array_equal(totals, self.totals):
            raise ValueError(f"{self._who} has `totals` that are not the sums of its codes.")

    def check_coordinates(self, rows: Int[np.ndarray, " _"], cols: Int[np.ndarray, " _"]) -> None:
        """See `SparseWeight.check_coordinates`.

        Raises:
            ValueError: likewise; and a code beyond the channels that is not 0.
        """
        nothing = cols == self.sizes[1]
        if np.asarray(self.values)[nothing].any():
            raise ValueError(f"{self._who} has codes beyond the last channel.")
        super().check_coordinates(rows[~nothing], cols[~nothing])


def check_ranges(format: str | None, ranges: Ranges | None) -> None:
    """Refuse ranges that are missing, or that the format does not look at.

    Args:
        format: a name in `FORMATS`, or "dense"; None for the default.
        ranges: of activations, or none.

    Raises:
        ValueError: they are.
    """
    calibrated = format in FORMATS and FORMATS[format].calibrated
    if calibrated and ranges is None:
        raise ValueError(
            f'The format "{format}" rounds activations too, so it needs their `ranges`, such as '
            "`jaxprune.storage.calibrate(apply_fn, params, batches)`."
        )
    if ranges is not None and not calibrated:
        other = "the default" if format is None else f'"{format}"'
        raise ValueError(f'`ranges` are for the format "{NAME}"; {other} leaves activations as they are.')


def grid_of(name: str, ranges: Ranges | None) -> tuple[float, float]:
    """Scale of the codes of the activations that meet a leaf, and which of them is 0.

    Args:
        name: of the leaf.
        ranges: see `compress`.

    Raises:
        ValueError: they have no range for it, or several, or one that does not fit.
    """
    uses = (ranges or {}).get(name)
    if uses is None:
        raise ValueError(f"Leaf {name!r} is not in `ranges`. Calibrate with it, or leave it out with `select`.")
    if len(uses) != 1:
        raise ValueError(
            f'Leaf {name!r} is in {len(uses)} products by `ranges`. The format "{NAME}" holds the range of one: leave '
            "it out with `select`."
        )
    low, high = np.asarray(uses[0], np.float32)
    if not (np.isfinite([low, high]).all() and low <= 0 <= high):
        raise ValueError(f"The range of the activations that meet {name!r} has 0 inside, not ({low:g}, {high:g}).")
    scale, zero = asymmetric_grid(low, high, 8)
    return float(scale), float(zero)


def codes_of(y: Float[Array, "*batch channels"], grid: tuple[float, ...]) -> UInt8[Array, "*batch padded"]:
    """Codes of activations as the kernel has them, counted from 0 on, with channels in whole runs."""
    scale, zero = np.float32(grid[0]), np.float32(grid[1])
    signed = to_codes(y.astype(jnp.float32), scale, zero, 8).astype(jnp.int8)
    beyond = [(0, 0)] * (y.ndim - 1) + [(0, _runs(y.shape[-1]) * RUN - y.shape[-1])]
    return (jnp.pad(signed, beyond, constant_values=np.int8(zero)).astype(jnp.int32) + 128).astype(jnp.uint8)


def _channels(leaf_shape: tuple[int, ...], outputs_last: bool) -> int:
    return leaf_shape[-2 if outputs_last else 1]


def _runs(channels: int) -> int:
    return -(-channels // RUN)


FORMATS[NAME] = Int8Weight
