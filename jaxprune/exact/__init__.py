"""Arithmetic that does not depend on the order of terms, on sharding, or on float32's 24 bits.

Sums and roundings (`numerics`), the k-th largest of many without a sort (`ranking`), 64-bit integers where jax has 32
(`wide`). Plain arrays go in and come out: nothing here knows of params, leaves or methods.
"""
