"""Params of any framework, drawn by NumPy: its initializers would be compiled for every shape, so they only tell it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def drawn(shapes, scale=0.5, seed=0):
    """Noise in place of every `jax.ShapeDtypeStruct` of a tree, zeros for vectors, a key for keys; the rest stays."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        noise = scale * rng.normal(size=leaf.shape) if leaf.ndim > 1 else np.zeros(leaf.shape)
        return jax.device_put(np.asarray(noise, leaf.dtype))

    return jax.tree.map(draw, shapes)


def drawn_nnx(make):
    """The NNX module that `make()` would make."""
    graph, shapes = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, drawn(shapes))
