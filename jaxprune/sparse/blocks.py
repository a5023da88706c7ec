"""Blocks: weights that live or die together, stored as small dense matrices.

    W (out, in) = blocks of r inputs x c outputs that hold a non-zero, sorted by output block, then input block;
    values = block after block, each (c, r);   index = input block of each;   bounds = runs of each output block

    W @ X = sum over the blocks of an output block of  block (c, r) @ X[inputs of the block] (r, n)

An index costs 4 bytes a block instead of a weight, and a block is a dense product, which is what GPUs are good at
(`jaxprune.sparse.gpu`); elsewhere the same sum is a gather, a batched product and a sum over runs, plain XLA. A leaf
pruned by `Block(r, c)` stores no zeros; any other leaf is right too, but stores the zeros inside of living blocks.
A stored zero meets an infinity or NaN in x as a dense zero would.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO
from jaxtyping import Array, Float, Inexact, Int, Int32

from jaxprune.sparse import gpu
from jaxprune.sparse.formats import FORMATS, SparseWeight
from jaxprune.sparse.matmul import times, times_transposed
from jaxprune.sparse.primitives import columns_product


class BlockWeight(SparseWeight):
    """Dense blocks of one shape, the one of `shapes` in which this leaf takes the fewest bytes.

    Attributes:
        index: input block of every block.
        bounds: where the run of each output block begins and ends.
        block: inputs and outputs of a block, as in `Block(rows, cols)`; they divide those of the leaf.
    """

    shapes: ClassVar[tuple[tuple[int, int], ...]] = (
        *((side, side) for side in (64, 32, 16, 8, 4)),
        *((16, 1), (1, 16)),
        (1, 1),  # divides any leaf
    )

    index: Int32[Array, " n_blocks"] = eqx.field(converter=jnp.asarray)
    bounds: Int32[Array, " n_out_blocks_plus_1"] = eqx.field(converter=jnp.asarray)
    block: tuple[int, int] = eqx.field(static=True, kw_only=True)

    @classmethod
    def pack(
        cls,
        values: Any,
        rows: Int[np.ndarray, " nse"],
        cols: Int[np.ndarray, " nse"],
        leaf_shape: tuple[int, int],
        **fields: Any,
    ) -> "BlockWeight":
        """See `SparseWeight.pack`; the zeros inside of living blocks are stored as well."""
        values = np.asarray(values)
        n_out, n_in = leaf_shape[::-1] if fields.get("outputs_last", True) else leaf_shape
        dividing = [(tall, wide) for tall, wide in cls.shapes if n_in % tall == 0 and n_out % wide == 0]
        living = {block: _living(rows, cols, (n_out, n_in), block) for block in dividing}
        block = min(living, key=lambda block: _stored_bytes(living[block], block, values.itemsize))
        tall, wide = block
        outputs, inputs = np.nonzero(living[block])
        place = np.zeros(living[block].shape, np.int64)
        place[outputs, inputs] = np.arange(outputs.size)
        blocks = np.zeros((outputs.size, wide, tall), values.dtype)
        blocks[place[rows // wide, cols // tall], rows % wide, cols % tall] = values
        bounds = np.concatenate([[0], np.cumsum(living[block].sum(axis=1))])
        parts = (blocks.ravel(), inputs.astype(np.int32), bounds.astype(np.int32))
        return cls(*parts, leaf_shape=leaf_shape, block=block, **fields)

    def _host_coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        (n_out, n_in), (tall, wide) = self.sizes, self.block
        if min(self.block) < 1 or n_in % tall or n_out % wide:
            raise ValueError(f"{self._who} has blocks of {tall} x {wide}, which do not divide {n_in} x {n_out}.")
        index, bounds = np.asarray(self.index), np.asarray(self.bounds)
        if index.dtype != np.int32 or bounds.dtype != np.int32:
            raise TypeError(f"{self._who} needs indices and bounds in int32, not {index.dtype} and {bounds.dtype}.")
        if index.ndim != 1 or index.size * tall * wide != self.nse or bounds.shape != (n_out // wide + 1,):
            raise ValueError(f"{self._who} has {bounds.size} bounds and {index.size} blocks, which do not fit.")
        if bounds[0] != 0 or bounds[-1] != index.size or np.any(np.diff(bounds) < 0):
            raise ValueError(f"{self._who} needs run bounds that climb from 0 to its {index.size} blocks.")
        if index.size and not (index.min() >= 0 and index.max() < n_in // tall):
            raise ValueError(f"{self._who} has indices outside its {n_in // tall} blocks of inputs.")
        rows, cols = _coordinates(index, bounds, n_out=n_out, tall=tall, wide=wide, xp=np)
        # In the order of outputs; a stable sort leaves the inputs as they lie, so that the base class can check them.
        order = np.argsort(rows, kind="stable")
        return rows[order], cols[order]

    def coordinates(self) -> tuple[Int32[Array, " nse"], Int32[Array, " nse"]]:
        """See `SparseWeight.coordinates`; block by block."""
        tall, wide = self.block
        return _coordinates(self.index, self.bounds, n_out=self.sizes[0], tall=tall, wide=wide)

    @property
    def stored(self) -> BCOO:
        """W (out, in) as a `jax.experimental.sparse.BCOO`, stored zeros included."""
        return BCOO((self.values, jnp.stack(self.coordinates(), axis=-1)), shape=self.sizes, unique_indices=True)


def _living(rows: np.ndarray, cols: np.ndarray, sizes: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    tall, wide = block
    living = np.zeros((sizes[0] // wide, sizes[1] // tall), bool)
    living[rows // wide, cols // tall] = True
    return living


def _stored_bytes(living: np.ndarray, block: tuple[int, int], itemsize: int) -> int:
    tall, wide = block
    return int(living.sum()) * (tall * wide * itemsize + 4) + 4 * (living.shape[0] + 1)


def _output_blocks(index: Any, bounds: Any, xp: Any = jnp) -> Any:
    numbers = xp.arange(bounds.shape[0] - 1, dtype=xp.int32)
    static = {"total_repeat_length": index.shape[0]} if xp is jnp else {}
    return xp.repeat(numbers, xp.diff(bounds), **static)


def _coordinates(index: Any, bounds: Any, *, n_out: int, tall: int, wide: int, xp: Any = jnp) -> tuple[Any, Any]:
    """`xp` is jax.numpy, or numpy for arrays in host memory: outside jit every step would be a program to compile."""
    shape = (index.shape[0], wide, tall)
    rows = (_output_blocks(index, bounds, xp) * wide)[:, None] + xp.arange(wide, dtype=xp.int32)[None]
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
) -> Float[Array, "n_out n"]:
    """W @ x in plain XLA: the inputs of every block, its product, and the sum over each output block's run.

    Right on every platform, and differentiated and batched by JAX's own rules. 16-bit sums are kept in float32.

    Args:
        values: blocks one after the other, each (outputs, inputs).
        index: input block of every block.
        bounds: where the run of each output block begins and ends.
        x: activations, of the dtype of the values.
        n_out: outputs.
        tall: inputs of a block.
        wide: outputs of a block.
    """
    panels = x.reshape(-1, tall, x.shape[1])[index]
    products = _batched("kcr,krn->kcn", values.reshape(-1, wide, tall), panels)
    sums = jax.ops.segment_sum(products, _output_blocks(index, bounds), n_out // wide, indices_are_sorted=True)
    return sums.reshape(n_out, x.shape[1]).astype(x.dtype)


def _batched(equation: str, values: Array, panels: Array) -> Array:
    total = jnp.float32 if values.dtype.itemsize < 4 else values.dtype
    return jnp.einsum(equation, values, panels, preferred_element_type=total)


def _on_cuda(*arrays: Array, n_out: int, tall: int, wide: int) -> Array:
    x = arrays[-1]
    if gpu.block_suits((tall, wide), (n_out, x.shape[0], x.shape[1]), x.dtype):
        return gpu.block_times(*arrays, n_out=n_out, block=(tall, wide))
    return block_product(*arrays, n_out=n_out, tall=tall, wide=wide)


blocks_times = columns_product("blocks_times", gpu.on_cuda("blocks_product", _on_cuda, block_product), _coordinates)


@times.register(BlockWeight)
def _times_block(weight: BlockWeight, x: Inexact[Array, "n_in n"]) -> Inexact[Array, "n_out n"]:
    tall, wide = weight.block
    return blocks_times(weight.values, weight.index, weight.bounds, x, n_out=weight.sizes[0], tall=tall, wide=wide)


@times_transposed.register(BlockWeight)
def _times_transposed_block(weight: BlockWeight, y: Inexact[Array, "n_out n"]) -> Inexact[Array, "n_in n"]:
    (_, n_in), (tall, wide) = weight.sizes, weight.block
    panels = y.reshape(-1, wide, y.shape[1])[_output_blocks(weight.index, weight.bounds)]
    products = _batched("kcr,kcn->krn", weight.values.reshape(-1, wide, tall), panels)
    return jax.ops.segment_sum(products, weight.index, n_in // tall).reshape(n_in, y.shape[1]).astype(y.dtype)


FORMATS["block"] = BlockWeight
