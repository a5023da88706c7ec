"""The model seen once: traced to a jaxpr, it says where every weight is used.

| module | holds |
|---|---|
| `paths` | the way of a leaf to the operation that consumes it |
| `sites` | `Site`, one use of one leaf, and the operation rebuilt from it |
| `uses` | what one operation does with a leaf |
| `operations` | which of them work element by element, which change nothing |
| `finder` | `trace`, which walks the jaxpr and finds the sites |
| `refusals` | params that are not consumed, uses that cannot be followed |
| `selection` | `weights_of` and `layout_of`: what the sites say of the leaves |
| `costs` | weights and multiply-adds of the sites, dense and left under masks |
| `activations` | bytes of activations alive at once |
| `inlined`, `symbolic` | a jaxpr without calls, and with numbers in the place of symbolic sizes |
| `exponents`, `products` | the model computed anew: on numbers that cannot overflow, and with a tap on its products |
"""

from jaxprune.tracing.finder import trace
from jaxprune.tracing.selection import layout_of, weights_of
from jaxprune.tracing.sites import Site

__all__ = ["Site", "layout_of", "trace", "weights_of"]
