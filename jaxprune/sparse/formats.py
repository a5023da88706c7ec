"""Formats: how the non-zeros of one weight lie in memory.

A weight is stored as the matrix W (out, in) of its non-zeros, sorted by output and then by input, each once,

    W = {(row, col, value)},   leaf = W (out, in)   or   leaf = W.T (in, out), as the framework lays it out,

for a convolution with in = (*window, channels), flattened in this order whatever the leaf's: y = W times the window's
activations. It stands in the tree where its leaf stood: an array-ish value with the leaf's shape and dtype, itself a
pytree of arrays, so an argument of jit and never a constant of it. A format is a class that packs (row, col, value) and
gives them back; everything else follows.

BCOO and BCSR are in `jaxprune.sparse.portable`, the native formats in `tiles`, blocks in `blocks`. A further one is one
class, a line in `FORMATS`, and a registration with `products.times` or `products.project`.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax import lax
from jax.core import ShapedArray, Tracer
from jax.experimental.sparse import BCOO, BCSR
from jax.extend.core import jaxpr_as_fun
from jax.extend.core.primitives import remat_p
from jaxtyping import Array, ArrayLike, Float, Inexact, Int, Shaped

from jaxprune.compat import closed, kind_of, type_like

Unsupported = Literal["refuse", "dense"]
Indices: TypeAlias = Int[Array | np.ndarray, " _"]
Stored: TypeAlias = Shaped[np.ndarray, " nse"]
"""Values of the non-zeros, in host memory."""


class SparseUseError(TypeError):
    """A compressed leaf was used in a way that has no sparse form."""


def check_unsupported(unsupported: str) -> None:
    """Refuse any word but "refuse" and "dense".

    Raises:
        ValueError: another word.
    """
    if unsupported not in ("refuse", "dense"):
        raise ValueError(f'`unsupported` is "refuse" or "dense", {unsupported!r} arrived.')


def check_format(name: str, said: str = "There is no format") -> None:
    """Refuse a word that is neither in `FORMATS` nor "dense".

    Args:
        name: the word.
        said: how the message begins.

    Raises:
        ValueError: it is.
    """
    if name not in (*FORMATS, "dense"):
        raise ValueError(f"{said} {name!r}. There are: {', '.join(map(repr, (*FORMATS, 'dense')))}.")


def out_in(leaf_shape: tuple[int, ...], outputs_last: bool) -> tuple[int, int]:
    """(out, in) of a leaf, the window of a convolution counted with the inputs."""
    rest = leaf_shape[:-1] if outputs_last else leaf_shape[1:]
    return leaf_shape[-1 if outputs_last else 0], math.prod(rest)


def matrix_of(leaf: Shaped[np.ndarray, "*axes"], outputs_last: bool) -> Shaped[np.ndarray, "n_out n_in"]:
    """W (out, in) of a leaf in host memory."""
    channels_last = leaf if outputs_last else np.moveaxis(leaf, (1, 0), (-2, -1))
    return channels_last.reshape(out_in(leaf.shape, outputs_last)[::-1]).T


def index(array: Any) -> Int[Array, "..."]:
    """Indices as a format stores them.

    Raises:
        TypeError: they are no integers.
    """
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"Indices of a sparse weight are integers, {array.dtype} arrived.")
    return jnp.asarray(array, jnp.int32)  # Eigen's kernel takes int32, and half the bytes of int64


class SparseWeight(quax.ArrayValue):
    """A matrix of a model, compressed: looks like its leaf, holds its non-zeros.

    Subclasses say how (row, col) are packed: `parts`, `check_parts` and `coordinates`.

    Attributes:
        values: the stored weights, sorted by output, then input.
        leaf_shape: shape of the leaf this stands for.
        outputs_last: True if the leaf is (*window, in, out), False if it is (out, in, *window); a matrix has no window.
        convolves: whether the format has a convolution.
        lossy: whether the format rounds the weights.
        calibrated: whether it rounds the activations too, and so has to be told their range.
        by_output: whether the values lie in the order of outputs.
        name: the leaf's name, for messages.
        unsupported: "refuse", or "dense" to let operations without a sparse form have the dense leaf.

    Raises:
        ValueError: indices unsorted, doubled or out of range, or sizes that contradict each other.
        TypeError: parts of the wrong dtype, or traced ones, whose indices nobody can check.
    """

    values: Float[Array, " nse"] = eqx.field(converter=jnp.asarray)
    convolves: ClassVar[bool] = False
    lossy: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    stored_dtype: ClassVar[Any] = jnp.floating
    by_output: ClassVar[bool] = True

    leaf_shape: tuple[int, ...] = eqx.field(static=True, kw_only=True)
    outputs_last: bool = eqx.field(static=True, kw_only=True, default=True)
    name: str = eqx.field(static=True, kw_only=True, default="")
    unsupported: Unsupported = eqx.field(static=True, kw_only=True, default="refuse")

    @classmethod
    def pack(
        cls,
        values: Any,
        rows: Int[np.ndarray, " nse"],
        cols: Int[np.ndarray, " nse"],
        leaf_shape: tuple[int, ...],
        **fields: Any,
    ) -> "SparseWeight":
        """The weight with these sorted non-zeros; `fields` are those of `SparseWeight`.

        Raises:
            ValueError: the format does not hold such a pattern.
        """
        try:
            own = cls.parts(np.asarray(values), rows, cols, out_in(leaf_shape, fields.get("outputs_last", True)))
        except ValueError as error:
            raise ValueError(f"Leaf {fields.get('name', '')!r} has no such form: {error}") from None
        return cls(**own, leaf_shape=leaf_shape, **fields)

    @classmethod
    @abc.abstractmethod
    def parts(cls, values: Stored, rows: Indices, cols: Indices, sizes: tuple[int, int]) -> dict[str, Any]:
        """The format's own fields, in host memory, for the sorted non-zeros of a W of these sizes (out, in)."""

    @abc.abstractmethod
    def coordinates(self, xp: Any = jnp) -> tuple[Indices, Indices]:
        """Output and input index of every stored value; `xp` is numpy to stay in host memory, and compile nothing."""

    @abc.abstractmethod
    def check_parts(self) -> None:
        """Raises ValueError or TypeError where `coordinates` would mean nothing."""

    @property
    def stored(self) -> BCOO | BCSR:
        """W (out, in) as a `jax.experimental.sparse` array, stored zeros included."""
        indices = jnp.stack(self.coordinates(), axis=-1)
        known = {"indices_sorted": self.by_output, "unique_indices": True}
        return BCOO((self.values, indices), shape=self.sizes, **known)

    @classmethod
    def from_leaf(cls, leaf: Shaped[np.ndarray, "*axes"], *, outputs_last: bool = True, **own: Any) -> "SparseWeight":
        """The non-zeros of a leaf (*window, in, out), or (out, in, *window) without `outputs_last`, in host memory."""
        matrix = matrix_of(leaf, outputs_last)
        rows, cols = np.nonzero(matrix)
        return cls.pack(matrix[rows, cols], rows, cols, leaf.shape, outputs_last=outputs_last, **own)

    def __check_init__(self) -> None:
        check_unsupported(self.unsupported)
        parts = jax.tree.leaves(self)
        if any(isinstance(part, Tracer) for part in parts):
            raise TypeError(
                f"{self._who} is made of traced parts, so its indices cannot be checked. Make it outside `jit` and "
                f"pass it in as an argument; with other values: `weight.with_values(values)`."
            )
        if self.values.ndim != 1 or not jnp.issubdtype(self.values.dtype, self.stored_dtype):
            raise TypeError(
                f"{self._who} needs {self.stored_dtype.__name__} values of shape (nse,), "
                f"{jax.typeof(self.values).str_short()} arrived."
            )
        if len(self.leaf_shape) < 2 or max(*self.sizes, self.nse) >= 2**31:
            raise ValueError(
                f"{self._who} must be a matrix or a convolution kernel with sizes and nse below 2**31, "
                f"not {self.leaf_shape}."
            )
        self.check_parts()
        rows, cols = (np.asarray(part).astype(np.int64) for part in self.coordinates(np))
        if rows.shape != (self.nse,) or cols.shape != (self.nse,):
            raise ValueError(f"{self._who} has {self.nse} values, but {cols.size} input indices, which do not fit.")
        self.check_coordinates(rows, cols)

    def check_coordinates(self, rows: Int[np.ndarray, " _"], cols: Int[np.ndarray, " _"]) -> None:
        """Raises ValueError where such output and input indices are none, or lie in another order."""
        n_out, n_in = self.sizes
        if rows.size and not (rows.min() >= 0 and cols.min() >= 0 and rows.max() < n_out and cols.max() < n_in):
            raise ValueError(f"{self._who} has indices outside its {n_out} outputs and {n_in} inputs.")
        if not self.by_output:
            order = np.argsort(rows, kind="stable")  # inputs stay as they lie, to be looked at
            rows, cols = rows[order], cols[order]
        if np.any(np.diff(rows * n_in + cols) <= 0):
            raise ValueError(f"{self._who} must have its indices sorted by output, then input, each once.")

    def check_bounds(self, bounds: Any, n_runs: int, total: int, what: str, tiles: int = 1) -> None:
        """Refuses bounds of runs that do not climb from 0 to `total`, or of another number.

        Args:
            bounds: tile by tile, where each run begins and the last one ends; the next tile begins there.
            n_runs: in a tile.
            total: of what is in the runs.
            what: is in the runs, for the message.
            tiles: how many.

        Raises:
            ValueError: they do not.
        """
        bounds = np.asarray(bounds)
        n_bounds = tiles * (n_runs + 1)
        if bounds.shape == (n_bounds,):
            of_tiles = bounds.reshape(tiles, n_runs + 1)
            climbs = np.all(np.diff(bounds) >= 0) and np.array_equal(of_tiles[1:, 0], of_tiles[:-1, -1])
            if not tiles or (climbs and bounds[0] == 0 and bounds[-1] == total):
                return
        raise ValueError(
            f"{self._who} has {bounds.size} bounds and {total} {what}, which do not fit: it needs {n_bounds} run "
            f"bounds that climb from 0 to its {total} {what}."
        )

    @property
    def _who(self) -> str:
        return f"The {type(self).__name__} of leaf {self.name!r}"

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in), the shape of W."""
        return out_in(self.leaf_shape, self.outputs_last)

    @property
    def inputs_axis(self) -> int:
        """Axis of a matrix that is summed over."""
        return 0 if self.outputs_last else 1

    @property
    def nse(self) -> int:
        """Number of stored slots."""
        return self.values.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices."""
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in jax.tree.leaves(self))

    @classmethod
    def why_not(cls, matrix: Shaped[np.ndarray, "n_out n_in"]) -> str:
        """Why this matrix has no such form; "" if it has."""
        return ""

    def aval(self) -> ShapedArray:
        """Shape and dtype of the leaf this stands for."""
        return type_like(self.leaf_shape, self.values.dtype, self.values)

    def matrix(self) -> Float[Array, "n_out n_in"]:
        """W (out, in) as a dense array."""
        rows, cols = self.coordinates()
        zeros = jnp.zeros(self.sizes, self.values.dtype)
        # Set, not add as `todense` does: an addition on CPU flushes subnormal weights to zero.
        return zeros.at[rows, cols].set(self.values, unique_indices=True)

    @jax.jit  # one program a leaf, not one a step
    def decompress(self) -> Float[Array, "*axes"]:
        """The leaf as a dense array, bit for bit, except that a -0.0 comes back as 0.0."""
        if self.outputs_last:
            return self.matrix().T.reshape(self.leaf_shape)
        n_out, channels, *window = self.leaf_shape
        return jnp.moveaxis(self.matrix().reshape(n_out, *window, channels), -1, 1)

    def astype(self, dtype: Any) -> "SparseWeight":
        """The same weight for a leaf of another floating dtype."""
        return self.with_values(self.values.astype(dtype))

    def with_values(self, values: Inexact[Array, " nse"]) -> "SparseWeight":
        """The same pattern with other values."""
        return self.replace(values=values)

    def replace(self, **fields: Any) -> "SparseWeight":
        """The same weight with other fields, under tracing too: `indices` are trusted, not checked again."""
        new = object.__new__(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(new, field.name, fields.get(field.name, getattr(self, field.name)))
        return new

    def __getitem__(self, _: Any) -> Any:
        """Refused, as products are: only in `apply` a compressed leaf stands for its array."""
        raise SparseUseError(
            f"Leaf {self.name!r} is compressed and was used outside of `jaxprune.sparse.apply`, or by a function there "
            "that closes over it. Hand it in: `apply(lambda model, x: model(x))(model, x)`."
        )

    __matmul__ = __rmatmul__ = __getitem__

    def materialise(self) -> ArrayLike:
        """The dense leaf, if the weight is marked `unsupported="dense"`.

        Raises:
            SparseUseError: it is not.
        """
        return self.dense_for("an operation that wants a dense array")

    def dense_for(self, use: str) -> Shaped[Array, "..."]:
        """The same, with the use in the refusal.

        Args:
            use: what has no sparse form.

        Raises:
            SparseUseError: unless it is to be made dense.
        """
        if self.unsupported == "dense":
            return self.decompress()
        raise SparseUseError(
            f"Leaf {self.name!r} {self.leaf_shape} is compressed as {type(self).__name__} and was used by {use}, which "
            f"has no sparse form: only a product over its inputs without batch axes has one, in the portable formats "
            f"also one over its outputs, and in the native formats a convolution without groups. "
            f"Leave it dense with `compress(..., select=...)`, or have it decompressed at each such use with "
            f'`apply(apply_fn, unsupported="dense")`.'
        )

    @staticmethod
    def default(primitive: Any, values: Any, params: dict[str, Any]) -> Any:
        """What quax calls for a primitive without a rule: checkpoints are entered, most others refused or dense."""
        if primitive is lax.optimization_barrier_p:
            return lax.optimization_barrier(values)
        if primitive is remat_p:
            body = quax.quaxify(jaxpr_as_fun(closed(params["jaxpr"], ())))
            return jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])(*values)
        use = f"`{kind_of(primitive, params)}`"
        arrays = [v.dense_for(use) if isinstance(v, SparseWeight) else _dense(v) for v in values]
        return primitive.bind(*arrays, **params)


def _dense(value: Any) -> Any:
    return value.materialise() if isinstance(value, quax.Value) else value


FORMATS: dict[str, type[SparseWeight]] = {}
"""Format name -> class, each entered where it is; "dense" is not among them, a dense leaf stays an array."""
