"""The model seen once: traced to a jaxpr, it says where every weight is used.

| module | holds |
|---|---|
| `paths` | the way of a leaf to the operation that consumes it |
| `sites` | `Site`, one use of one leaf, and the operation rebuilt from it |
| `finder` | `trace`, which walks the jaxpr and finds the sites |
"""

from jaxprune.tracing.finder import trace
from jaxprune.tracing.sites import Site

__all__ = ["Site", "trace"]
