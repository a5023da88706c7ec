"""Structured pruning: what belongs together, and the smaller arrays that compute the same.

`couplings` reads from a traced function which channels live or die together, by the `rules` of each operation;
`liveness` and `constants` say what a masked model still needs; `compaction` makes it smaller, `resizing` gives a module
back its numbers, `permutation` puts channels in a better order. Single weights are none of its business, and no
framework's layers are known by name.
"""
