#!/usr/bin/env bash
# On CPU meshes a product of `jax.experimental.sparse` keeps a sharded batch in one case of four: BCOO with automatic axes.
#
# A sparse W^T (32, 64) times a batch (64, 16) that lies on four devices along the batch. Every column of the result
# needs its own column of the batch alone. A good guess is what a dense W^T does, which is nothing: each device computes
# four columns, no communication, and the result lies as the batch did.
#
# What was seen with jaxlib 0.10.2 and 0.12.0.1 alike:
#
#     axes of the mesh                     dense        BCOO                        BCSR
#     automatic                            4 columns    4 columns                   16 columns, an all-gather
#     explicit (what `make_mesh` makes)    4 columns    ValueError: incompatible    16 columns, an all-gather
#                                                       types for broadcasting
#
# BCSR is a custom call, of which the partitioner knows nothing: it gathers the batch and has every device compute all of
# it, without a word, so that four devices take as long as one. BCOO is written in operations that are partitioned, but
# broadcasts to a type without a sharding, which explicit axes refuse. Inside of `jax.shard_map` both work, and each
# device has its columns.
#
# Needs Python 3.12 or later (PYTHON names another than python3). Exits with 1 if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/meshes.py" <<'PROGRAM'
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental import sparse
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

rng = np.random.default_rng(0)
transposed = np.where(rng.random((32, 64)) < 0.2, rng.normal(size=(32, 64)), 0).astype(np.float32)
forms = {"dense": jnp.asarray(transposed), "BCOO": sparse.BCOO.fromdense(transposed), "BCSR": sparse.BCSR.fromdense(transposed)}
batch = rng.normal(size=(64, 16)).astype(np.float32)


def columns(form, kind):
    """Of the result, how many each device has; and whether the batch is gathered."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        x = jax.device_put(batch, NamedSharding(mesh, P(None, "rows")))
        try:
            compiled = jax.jit(lambda w, x: w @ x).lower(forms[form], x).compile()
        except ValueError as error:
            return "refused" if "Incompatible types for broadcasting" in str(error) else str(error)
        y = compiled(forms[form], x)
        np.testing.assert_allclose(y, transposed @ batch, rtol=1e-4, atol=1e-4)
        return y.addressable_shards[0].data.shape[1], "all-gather" in compiled.as_text()


def in_shard_map(form):
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    f = jax.shard_map(lambda x: forms[form] @ x, mesh=mesh, in_specs=P(None, "rows"), out_specs=P(None, "rows"))
    y = jax.jit(f)(batch)
    np.testing.assert_allclose(y, transposed @ batch, rtol=1e-4, atol=1e-4)
    return y.addressable_shards[0].data.shape[1]


found = {(form, kind.name): columns(form, kind) for kind in (AxisType.Auto, AxisType.Explicit) for form in forms}
mapped = [in_shard_map(form) for form in forms]
print(jaxlib.__version__, found, mapped)
wanted = {
    ("dense", "Auto"): (4, False), ("BCOO", "Auto"): (4, False), ("BCSR", "Auto"): (16, True),
    ("dense", "Explicit"): (4, False), ("BCOO", "Explicit"): "refused", ("BCSR", "Explicit"): (16, True),
}
raise SystemExit(0 if found == wanted and mapped == [4, 4, 4] else 1)
PROGRAM
for version in 0.10.2 0.12.0.1; do
  "${PYTHON:-python3}" -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "jax==$version" "jaxlib==$version"
  JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/meshes.py" || { echo "changed: with $version"; exit 1; }
done
echo "as described"
