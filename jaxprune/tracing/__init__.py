"""The model seen once: traced to a jaxpr, it says where every weight is used.

| module | holds |
|---|---|
| `paths` | the way of a leaf to the operation that consumes it |
| `sites` | `Site`, one use of one leaf, and the operation rebuilt from it |
| `transfer` | what one operation does with a leaf |
| `operations` | which of them work element by element, which change nothing, which move indices |
| `finder` | `trace`, which walks the jaxpr and finds the sites |
| `refusals` | params that are not consumed, uses that cannot be followed |
| `selection` | `weights_of` and `layout_of`: what the sites say of the leaves |
| `cost_model` | weights and multiply-adds of the sites, dense and left under masks |
| `activations` | bytes of activations alive at once |
| `inlined`, `symbolic` | a jaxpr without calls, and with numbers in the place of symbolic sizes |
| `features`, `outputs` | a product as one of matrices in the order of the leaf's view, and what its outputs become |
| `exponents`, `products` | the model computed anew: on numbers that cannot overflow, and with a tap on its products |
"""

from jaxprune.tracing.activations import peak_activations
from jaxprune.tracing.cost_model import Cost, Costs, byte_costs, costs, mac_costs
from jaxprune.tracing.finder import trace
from jaxprune.tracing.selection import layout_of, weights_of
from jaxprune.tracing.sites import Site

__all__ = [
    "Cost",
    "Costs",
    "Site",
    "byte_costs",
    "costs",
    "layout_of",
    "mac_costs",
    "peak_activations",
    "trace",
    "weights_of",
]
