"""What the tests of the traced models share: arrays, shapes, and what sites are."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def like(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def kinds(sites):
    return [(site.name, site.kind) for site in sites]
