"""Compressed params in the types of `jax.export`: programs that one process writes and another runs.

    checks = [jax.export.DisabledSafetyCheck.custom_call(call) for call in calls]
    exported = jax.export.export(jax.jit(apply(apply_fn)), disabled_checks=checks)(sparse_params, x)
    blob = exported.serialize()
    jax.export.deserialize(blob).call(sparse_params, x)          elsewhere, after `import jaxprune`

The calls are `jaxprune.native.TARGET` of the native formats, `jaxprune.native.TRANSPOSED` of those of bits where a
product is over their outputs, `jaxprune.native.CODES` of "int8", and jaxlib's "cpu_csr_sparse_dense_ffi" of "bcsr": jax
promises for its own old ones that later versions have them, and for no others. The other formats need no checks off.

A weight is written as its format's name and its static fields, in JSON; its arrays are arguments of the program.
"""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.export

from jaxprune.sparse import bits, blocks, int8, tiles  # noqa: F401  (they add their formats)
from jaxprune.sparse.formats import FORMATS, SparseWeight


def register(format: type[SparseWeight]) -> None:
    """Teaches `jax.export` to write and read the weights of a format; those in `FORMATS` it knows.

    Raises:
        ValueError: it knows this one, or another of its name.
    """
    jax.export.register_pytree_node_serialization(
        format,
        serialized_name=f"jaxprune.sparse.{format.__name__}",
        serialize_auxdata=_written,
        deserialize_auxdata=json.loads,
        from_children=partial(_read, format),
    )


def _written(static: Sequence[Any]) -> bytes:
    return json.dumps(list(static[1:])).encode()  # the first is Equinox's own


def _read(format: type[SparseWeight], aux_data: Any, children: Sequence[Any]) -> SparseWeight:
    """A weight with these fields, which is only asked for its structure."""
    weight = object.__new__(format)
    values = {True: iter(aux_data), False: iter(children)}
    for field in dataclasses.fields(format):
        value = next(values[bool(field.metadata.get("static", False))])
        object.__setattr__(weight, field.name, tuple(value) if isinstance(value, list) else value)
    return weight


for _format in FORMATS.values():
    register(_format)
