"""Arithmetic that does not depend on the order of terms, on sharding, or on float32's 24 bits.

Sums and roundings (`numerics`), the k-th largest of many without a sort (`ranking`), 64-bit integers where jax has 32
(`wide`), and on what mesh all of it is done (`meshes`). Arrays, or pytrees of them, go in and come out: nothing here
knows of methods, masks or models.
"""

from jaxprune.exact.ranking import kth_largest, top_k_mask

__all__ = ["kth_largest", "top_k_mask"]
