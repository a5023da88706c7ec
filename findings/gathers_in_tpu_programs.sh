#!/usr/bin/env bash
# A program compiled for TPUs names one collective several times: whoever counts `all-gather` in its text counts too many.
#
# Two layers x + relu(x A) B, A (4096, 11008) and B sharded over both axes of a 4 x 4 slice, x over one: each of the four
# weights is gathered along one axis. A good guess is four all-gather in `compiled.as_text()`, or four pairs of
# all-gather-start and all-gather-done where they run beside other work.
#
# What was seen with jax 0.12.0.1 and libtpu for v5e, compiled without a TPU: six. The compiler spreads one gather over
# the products that it runs beside, and writes the same instruction, with the same channel_id, once in every fusion that
# it lasts through: first where a custom call AsyncCollectiveStart ends the fusion, then in each async_collective_fusion,
# last where AsyncCollectiveDone does. Only frontend_attributes={chain_id="0"} tells. There is no -start and no -done.
#
# So an instruction with a chain_id counts once for its channel and chain. With gradients it is eight for four, and of
# three layers thirteen for six.
#
# Needs Python 3.12 or later (PYTHON names another than python3) and 1.5 GB of disk; no TPU. Exits with 1 if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax[tpu]==0.12.0.1"

cat > "$folder/gathers.py" <<'PROGRAM'
import os
import re
import sys

described = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ.update({**described, "JAX_PLATFORMS": "cpu"})
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
mesh = Mesh(np.array(chips).reshape(4, 4), ("a", "b"))


def array(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def apply(weights, x):
    for A, B in weights:
        x = x + jax.nn.relu(x @ A) @ B
    return x


weights = [(array((4096, 11008), "a", "b"), array((11008, 4096), "b", "a"))] * 2
text = jax.jit(apply).lower(weights, array((256, 4096), "a")).compile().as_text()
gathers = [line for line in text.splitlines() if re.search(r" all-gather(-start)?\(", line)]
channels = {re.search(r"channel_id=(\d+)", line)[1] for line in gathers}
chained = [line for line in gathers if "chain_id=" in line]
starts = text.count('custom_call_target="AsyncCollectiveStart"')
print("jax", jax.__version__, "- all-gather in the text:", len(gathers), "channels:", len(channels),
      "instructions of a chain:", len(chained), "chains:", starts, "-start:", text.count("all-gather-start("))
sys.exit(0 if (len(channels), starts) == (4, 1) and len(gathers) == 3 + len(chained) > 4 else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/gathers.py" || { echo "changed: gathers are written otherwise"; exit 1; }
echo "as described"
