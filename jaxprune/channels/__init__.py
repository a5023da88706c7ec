"""Structured pruning: what belongs together, and the smaller arrays that compute the same.

| module | holds |
|---|---|
| `union_find` | units: indices along axes that are the same, or must stay |
| `coupling_rules`, `reshapes` | what each operation says of the units of its operands and results |
| `walk`, `choices` | the units of a whole program; where channels lie if a reshape leaves it open |
| `coupling` | `couplings`: the channels of a model, and what goes with each |
| `granularity` | `Channels`, whose groups reach across leaves |
| `constant_rules`, `constant_propagation`, `liveness` | what a masked model still needs |
| `rewriting`, `compaction` | the program on smaller arrays; `compact` and `uncompact` |
| `widths`, `resizing` | `resized`, which gives a module back its numbers |
| `symmetry`, `regrouping`, `permutation` | channels that may change places, and a better order of them |

Single weights are none of its business, and no framework's layers are known by name.
"""

from jaxprune.channels.compaction import Compacted, apply_compacted, compact, uncompact
from jaxprune.channels.coupling import Couplings, couplings
from jaxprune.channels.granularity import Channels
from jaxprune.channels.permutation import Permuted, permute_channels, reorder
from jaxprune.channels.resizing import resized

__all__ = [
    "Channels",
    "Compacted",
    "Couplings",
    "Permuted",
    "apply_compacted",
    "compact",
    "couplings",
    "permute_channels",
    "reorder",
    "resized",
    "uncompact",
]
