"""Blocks: weights that live or die together, stored as small dense matrices.

    W (out, in) = blocks of r inputs x c outputs that hold a non-zero, sorted by output block, then input block;
    values = block after block, each (c, r);   index = input block of each;   bounds = runs of each output block

    W @ X = sum over the blocks of an output block of  block (c, r) @ X[inputs of the block] (r, n)

An index costs 4 bytes a block instead of a weight, and a block is a dense product: a gather, a batched product and a
sum over runs, plain XLA on every platform. A leaf pruned by `Block(r, c)` stores no zeros; any other leaf is right too,
but stores the zeros inside of living blocks. A stored zero meets an infinity or NaN in x as a dense zero would.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact, Int, Int32

from jaxprune.sparse.formats import FORMATS, Indices, SparseWeight, Stored
from jaxprune.sparse.portable import run_numbers
from jaxprune.sparse.primitives import columns_product
from jaxprune.sparse.products import times, times_transposed

# Numbers that a product makes at a time. Larger temporaries fall out of caches, and cost a CPU fresh pages every time:
# two to fifteen times slower at large batches.
_AT_A_TIME = 2**22
# Sums over runs may read this many times the blocks there are, so as not to be a scatter.
_PADDING = 2


class BlockWeight(SparseWeight):
    """Dense blocks of one shape, the one of `shapes` in which this leaf takes the fewest bytes.

    Attributes:
        index: input block of every block.
        bounds: where the run of each output block begins and ends.
        block: inputs and outputs of a block, as in `Block(rows, cols)`; they divide those of the leaf.
        slots: blocks that every run has room for; see `_slots`.
    """

    by_output: ClassVar[bool] = False
    shapes: ClassVar[tuple[tuple[int, int], ...]] = (
        *((side, side) for side in (64, 32, 16, 8, 4)),
        *((16, 1), (1, 16)),
        (1, 1),  # divides any leaf
    )

    index: Int32[Array, " n_blocks"] = eqx.field(converter=jnp.asarray)
    bounds: Int32[Array, " n_out_blocks_plus_1"] = eqx.field(converter=jnp.asarray)
    block: tuple[int, int] = eqx.field(static=True, kw_only=True)
    slots: int = eqx.field(static=True, kw_only=True)

    @classmethod
    def parts(cls, values: Stored, rows: Indices, cols: Indices, sizes: tuple[int, int]) -> dict[str, Any]:
        """See `SparseWeight.parts`; the zeros inside of living blocks are stored as well."""
        n_out, n_in = sizes
        dividing = [(tall, wide) for tall, wide in cls.shapes if n_in % tall == 0 and n_out % wide == 0]
        living = {block: _living(rows, cols, sizes, block) for block in dividing}
        block = min(living, key=lambda block: _stored_bytes(living[block], block, values.itemsize))
        tall, wide = block
        outputs, inputs = np.nonzero(living[block])
        place = np.zeros(living[block].shape, np.int64)
        place[outputs, inputs] = np.arange(outputs.size)
        blocks = np.zeros((outputs.size, wide, tall), values.dtype)
        blocks[place[rows // wide, cols // tall], rows % wide, cols % tall] = values
        runs = living[block].sum(axis=1)
        bounds = np.concatenate([[0], np.cumsum(runs)]).astype(np.int32)
        pattern = {"index": inputs.astype(np.int32), "bounds": bounds, "block": block, "slots": _slots(runs)}
        return {"values": blocks.ravel(), **pattern}

    def check_parts(self) -> None:
        """See `SparseWeight.check_parts`.

        Raises:
            ValueError: blocks that do not divide the matrix, or overlap, or lie outside of it.
            TypeError: indices or bounds of another dtype.
        """
        (n_out, n_in), (tall, wide) = self.sizes, self.block
        if min(self.block) < 1 or n_in % tall or n_out % wide:
            raise ValueError(f"{self._who} has blocks of {tall} x {wide}, which do not divide {n_in} x {n_out}.")
        index, bounds = np.asarray(self.index), np.asarray(self.bounds)
        if index.dtype != np.int32 or bounds.dtype != np.int32 or index.ndim != 1:
            raise TypeError(
                f"{self._who} needs indices (n_blocks,) and bounds in int32, not {index.dtype} {index.shape} and "
                f"{bounds.dtype}."
            )
        self.check_bounds(bounds, n_out // wide, index.size, "blocks")
        if self.slots < np.diff(bounds).max(initial=0):
            raise ValueError(f"{self._who} has a run of {np.diff(bounds).max()} blocks, but {self.slots} slots.")
        if index.size and not (index.min() >= 0 and index.max() < n_in // tall):
            raise ValueError(f"{self._who} has indices outside its {n_in // tall} blocks of inputs.")

    def coordinates(self, xp: Any = jnp) -> tuple[Indices, Indices]:
        """See `SparseWeight.coordinates`; block by block."""
        tall, wide = self.block
        return _coordinates(xp.asarray(self.index), xp.asarray(self.bounds), tall=tall, wide=wide, xp=xp)


def _living(rows: Any, cols: Any, sizes: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    tall, wide = block
    living = np.zeros((sizes[0] // wide, sizes[1] // tall), bool)
    living[rows // wide, cols // tall] = True
    return living


def _stored_bytes(living: np.ndarray, block: tuple[int, int], itemsize: int) -> int:
    tall, wide = block
    return int(living.sum()) * (tall * wide * itemsize + 4) + 4 * (living.shape[0] + 1)


def _slots(runs: Int[np.ndarray, " n_out_blocks"]) -> int:
    """Blocks of the longest run, up to a quarter more if not all are as long, so that few other patterns recompile."""
    longest = int(runs.max(initial=0))
    step = 1 if np.all(runs == longest) else 2 ** max(longest.bit_length() - 3, 0)
    return -(-longest // step) * step


def _coordinates(index: Any, bounds: Any, *, tall: int, wide: int, xp: Any = jnp, **_: int) -> tuple[Any, Any]:
    shape = (index.shape[0], wide, tall)
    rows = (run_numbers(bounds, index.shape[0], xp) * wide)[:, None] + xp.arange(wide, dtype=xp.int32)[None]
    cols = (index * tall)[:, None] + xp.arange(tall, dtype=xp.int32)[None]
    return xp.broadcast_to(rows[:, :, None], shape).ravel(), xp.broadcast_to(cols[:, None], shape).ravel()


def block_product(
    values: Float[Array, " nse"],
    index: Int32[Array, " n_blocks"],
    bounds: Int32[Array, " n_out_blocks_plus_1"],
    x: Float[Array, "n_in n"],
    *,
    n_out: int,
    tall: int,
    wide: int,
    slots: int,
) -> Float[Array, "n_out n"]:
    """W @ x: the inputs of every block, its product, and the sum over each output block's run.

    Differentiated and batched by JAX's own rules. 16-bit sums are kept in float32.

    Args:
        values: blocks one after the other, each (outputs, inputs).
        index: input block of every block.
        bounds: where the run of each output block begins and ends.
        x: activations, of the dtype of the values.
        n_out: outputs.
        tall: inputs of a block.
        wide: outputs of a block.
        slots: blocks that every run has room for; see `_slots`.
    """
    blocks = values.reshape(-1, wide, tall)
    sums, read = _sum_over_runs(bounds, index.shape[0], slots)

    def product(x: Array) -> Array:
        panels = x.reshape(-1, tall, x.shape[1])[index]
        return sums(_batched("kcr,krn->kcn", blocks, panels)).reshape(n_out, x.shape[1]).astype(x.dtype)

    return _in_parts(product, x, index.shape[0] * (tall + wide) + read * wide)


def _sum_over_runs(bounds: Array, n_blocks: int, slots: int) -> tuple[Callable[[Array], Array], int]:
    """(blocks, ...) -> (output blocks, ...), and how many blocks it reads beforehand.

    On a GPU a scatter adds atomically, in any order; it is left to runs of very different lengths.
    """
    runs = bounds.shape[0] - 1
    if n_blocks == runs * slots:
        return lambda products: products.reshape(runs, slots, *products.shape[1:]).sum(1), 0
    if runs * slots <= _PADDING * n_blocks:
        places = bounds[:-1, None] + jnp.arange(slots, dtype=jnp.int32)[None]
        places = jnp.where(places < bounds[1:, None], places, n_blocks)
        return lambda products: products.at[places].get(mode="fill", fill_value=0).sum(1), runs * slots
    outputs = run_numbers(bounds, n_blocks)
    return lambda products: jax.ops.segment_sum(products, outputs, runs, indices_are_sorted=True), 0


def _in_parts(product: Callable[[Array], Array], x: Array, numbers: int) -> Array:
    """product(x), made of as many columns at a time as need at most `_AT_A_TIME` numbers, but 16 at least.

    Args:
        product: of columns, independent of each other.
        x: columns, (.., n).
        numbers: that a column needs.
    """
    n = x.shape[1]
    parts = -(-n // max(_AT_A_TIME // numbers, 16))
    if parts == 1:
        return product(x)
    # Every part has columns of everywhere, so that columns that are sharded stay where they are.
    x = jnp.pad(x, ((0, 0), (0, -n % parts))).reshape(x.shape[0], -1, parts)
    y = lax.map(product, jnp.moveaxis(x, 2, 0))
    return jnp.moveaxis(y, 0, 2).reshape(y.shape[1], -1)[:, :n]


def _batched(equation: str, values: Array, panels: Array) -> Array:
    total = jnp.float32 if values.dtype.itemsize < 4 else values.dtype
    return jnp.einsum(equation, values, panels, preferred_element_type=total)


blocks_times = columns_product("blocks_times", block_product, _coordinates)


@times.register(BlockWeight)
def _times_block(weight: BlockWeight, x: Inexact[Array, "n_in n"]) -> Inexact[Array, "n_out n"]:
    n_out, (tall, wide) = weight.sizes[0], weight.block
    parts = weight.values, weight.index, weight.bounds
    return blocks_times(*parts, x, n_out=n_out, tall=tall, wide=wide, slots=weight.slots)


@times_transposed.register(BlockWeight)
def _times_transposed_block(weight: BlockWeight, y: Inexact[Array, "n_out n"]) -> Inexact[Array, "n_in n"]:
    (_, n_in), (tall, wide) = weight.sizes, weight.block
    blocks, outputs = weight.values.reshape(-1, wide, tall), run_numbers(weight.bounds, weight.index.shape[0])

    def product(y: Array) -> Array:
        panels = y.reshape(-1, wide, y.shape[1])[outputs]
        products = _batched("kcr,kcn->krn", blocks, panels)
        return jax.ops.segment_sum(products, weight.index, n_in // tall).reshape(n_in, y.shape[1]).astype(y.dtype)

    return _in_parts(product, y, weight.index.shape[0] * (tall + wide))


FORMATS["block"] = BlockWeight
