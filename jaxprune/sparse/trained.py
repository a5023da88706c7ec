"""Training on compressed params: every product of a step is sparse, and optimizers see the values alone.

    values, rest = trainable(compress(params, "native"))   # rest: where the values belong, and whatever is no float
    grads = jax.grad(lambda values: loss(join(values, rest), batch))(values)
    updates, opt_state = tx.update(grads, opt_state, values)
    values = optax.apply_updates(values, updates)

Both trees have the structure of the params, with None for what is in the other, as `equinox.partition` has it; so
Adam takes 8 bytes of state a non-zero, and an array of indices is nobody's to train. `join(values, rest)` is a tree of
compressed params like any other: `apply` runs it, `decompress` brings it back.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped, UInt8, UInt16

from jaxprune.sparse.exports import register
from jaxprune.sparse.formats import Indices, Stored
from jaxprune.sparse.tiles import NativeWeight, coordinates
from jaxprune.types import Params


class TrainableWeight(NativeWeight):
    """A matrix of the format "native" that has the transposed pattern too, so that its derivatives are sparse products.

    5 bytes a non-zero more (6 at high sparsity). Values are stored once.

    Attributes:
        index_across: as `index`, of W.T: output of every value, counted from its tile's first.
        bounds_across: as `bounds`, of W.T.
        order: where among `values` each value of W.T is.
        tile_across: outputs of a tile of W.T.
    """

    index_across: UInt8[Array, " nse"] | UInt16[Array, " nse"] = eqx.field(converter=jnp.asarray)
    bounds_across: Int32[Array, " tiles_times_inputs_plus_1"] = eqx.field(converter=jnp.asarray)
    order: Int32[Array, " nse"] = eqx.field(converter=jnp.asarray)
    tile_across: int = eqx.field(static=True, kw_only=True)

    @classmethod
    def parts(cls, values: Stored, rows: Indices, cols: Indices, sizes: tuple[int, int]) -> dict[str, Any]:
        """See `SparseWeight.parts`."""
        own = NativeWeight.parts(values, rows, cols, sizes)
        return own | _across(own["index"], own["bounds"], own["tile"], sizes)

    @classmethod
    def of(cls, weight: NativeWeight) -> "TrainableWeight":
        """The same weight, where its parts lie already."""
        index, bounds = np.asarray(weight.index), np.asarray(weight.bounds)
        across = _across(index, bounds, weight.tile, weight.sizes)
        if weight.values.committed:
            across |= jax.device_put({k: v for k, v in across.items() if k != "tile_across"}, weight.values.sharding)
        same = ("values", "index", "bounds", "tile", "leaf_shape", "outputs_last", "name", "unsupported")
        return cls(**{name: getattr(weight, name) for name in same}, **across)

    def check_parts(self) -> None:
        """See `SparseWeight.check_parts`.

        Raises:
            ValueError: the transposed pattern is that of another weight.
        """
        super().check_parts()
        n_out, n_in = self.sizes
        index, bounds, order = (np.asarray(part) for part in (self.index_across, self.bounds_across, self.order))
        self.check_bounds(bounds, n_in, index.size, "outputs", -(-n_out // self.tile_across))
        if order.shape == index.shape == (self.nse,) and np.array_equal(np.sort(order), np.arange(self.nse)):
            rows, cols = self.coordinates(np)
            ins, outs = coordinates(index, bounds, n_out=n_in, tile=self.tile_across, group=1, xp=np)
            if np.array_equal(rows[order], outs) and np.array_equal(cols[order], ins):
                return
        raise ValueError(f"{self._who} has a transposed pattern that is not that of its values.")


def trainable(params: Params) -> tuple[Params, Params]:
    """Compressed params as what is trained and the rest, for `join`.

    Matrices in the format "native" become `TrainableWeight`s: from then on x W.T, and its derivatives in x and in W,
    are products with the non-zeros alone, at every batch, without memory of the dense leaf's size. Compressed leaves
    of other formats, and convolutions, stay what they are; gradients of those go through a dense copy.

    Args:
        params: any pytree, as `compress` leaves it, outside of `jit`.

    Returns:
        Two trees of that structure: all arrays of floats, and everything else; None for what is in the other.

    Raises:
        ValueError: there is no matrix in the format "native".
    """
    weights = [leaf for leaf in jax.tree.leaves(params, is_leaf=_is_native) if _is_native(leaf)]
    if not weights:
        raise ValueError(
            "`params` has no matrix in the format \"native\". Compress it before: `compress(params, 'native')`."
        )
    with_transposed = jax.tree.map(
        lambda leaf: TrainableWeight.of(leaf) if _is_native(leaf) else leaf, params, is_leaf=_is_native
    )
    return take_apart(with_transposed)


def take_apart(params: Params) -> tuple[Params, Params]:
    """All arrays of floats, and everything else, None for what is in the other, as `join` puts them together."""
    return eqx.partition(params, eqx.is_inexact_array)


def join(values: Params, rest: Params) -> Params:
    """The params that `trainable` took apart, under any transformation: with other values, or updates, or averages."""
    return eqx.combine(values, rest)


def _is_native(leaf: Any) -> bool:
    return type(leaf) in (NativeWeight, TrainableWeight) and len(leaf.leaf_shape) == 2


def _across(
    index: Shaped[np.ndarray, " nse"], bounds: Shaped[np.ndarray, " _"], tile: int, sizes: tuple[int, int]
) -> dict[str, Any]:
    """The fields of the transposed pattern, in host memory."""
    n_out, n_in = sizes
    rows, cols = coordinates(index, bounds, n_out=n_out, tile=tile, group=1, xp=np)
    order = np.lexsort((rows, cols))
    own = NativeWeight.parts(order.astype(np.int32), cols[order], rows[order], (n_in, n_out))
    names = {"index": "index_across", "bounds": "bounds_across", "values": "order", "tile": "tile_across"}
    return {names[name]: part for name, part in own.items()}


register(TrainableWeight)
