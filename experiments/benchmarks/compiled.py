r"""What compilers make of masks, steps and sparse products for accelerators that are not here.

    python experiments/benchmarks/compiled.py tpu                  against compiled.json; fails where it differs
    python experiments/benchmarks/compiled.py tpu cuda --write     fill in compiled.json anew
    python experiments/benchmarks/compiled.py --markdown           compiled.json as a table
    python experiments/benchmarks/compiled.py tpu --only 'step*' --text DIRECTORY    the compiled programs, to be read

Nothing runs and nothing is timed: a program is compiled for a described machine, a v5e of 4 x 4 chips or one H100, and
read. Neither machine nor driver is needed, only the plugin that compiles, each in an environment of its own:
`pip install "jax[tpu]==0.12.0.1"` (1.3 GB), `pip install "jax[cuda13]==0.12.0.1"` (4.4 GB; it says that cuInit failed).

Masks and steps are of two gated MLPs (4096 -> 11008 -> 4096), on the TPU sharded over ("fsdp", "tp"); sparse products
of an MLP (1024 -> 4096 -> 1024), 90 % sparse, on one chip. All float32; bytes are those of one chip. An operation
counts once for each place in the program, also where that is a loop; sorts of a few numbers do not count. The largest
collective is the one whose result has the most bytes: a leaf has 172 MiB, 10.8 a chip.
"""

import argparse
import fnmatch
import importlib.util
import json
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxprune as jp

EXPECTED = Path(__file__).with_name("compiled.json")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
HOST = ("infeed", "outfeed", "send", "recv")
OPERATIONS = ("sort", "gather", "scatter", "while", "conditional")
COLUMNS = (
    *("program", "collectives", "largest MiB", "custom calls", "loops, sorts, gathers"),
    *("moved", "temporaries MiB", "out MiB"),
)
FEW = 4096  # numbers whose sort is none of a leaf
NEARLY = (1.05, 1)  # sizes that count as the same: so many times, and so many more

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "H100, described"
"""

METHODS = {
    "Element, Global": jp.Method(),
    "Uniform": jp.Method(distribution=jp.Uniform()),
    "ERK": jp.Method(distribution=jp.ERK()),
    "PerOutput": jp.Method(distribution=jp.PerOutput()),
    "NM(2, 4)": jp.Method(distribution=jp.NM(2, 4)),
    "Block(128, 128), Global": jp.Method(granularity=jp.Block(128, 128)),
    "Output(), Global": jp.Method(granularity=jp.Output()),
}
TRANSFORMATIONS = {
    "adam": optax.adam(1e-3),
    "prune(adam)": jp.prune(optax.adam(1e-3), jp.Method(), sparsity=jp.cubic(0.9, begin=0, end=1000)),
    "prune(adam, packed)": jp.prune(
        optax.adam(1e-3), jp.Method(), sparsity=jp.cubic(0.9, begin=0, end=1000), packed=True
    ),
}
FORMATS = ("bcoo", "bcsr", "block")

# Where programs are compiled for: a TPU's 16 chips, or one GPU.


def why_missing(target: str) -> str:
    """Why nothing can be compiled for "tpu" or "cuda" here, or ""."""
    plugins = {"tpu": ("libtpu",), "cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin")}[target]
    if any(importlib.util.find_spec(plugin) for plugin in plugins):
        return ""
    extra = {"tpu": "tpu", "cuda": "cuda13"}[target]
    return f'no plugin that compiles for it: pip install "jax[{extra}]=={jax.__version__}"'


def mesh_of(target: str) -> Mesh:
    """The described machine's devices, as ("fsdp", "tp")."""
    if target == "tpu":
        described = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
        os.environ.update({**described, "TPU_WORKER_HOSTNAMES": "localhost"})
        chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
        return Mesh(np.array(chips).reshape(4, 4), ("fsdp", "tp"))
    gpus = topologies.get_topology_desc("", platform="cuda", topology="1x1x1", target_config=H100).devices
    return Mesh(np.array(gpus[:1]).reshape(1, 1), ("fsdp", "tp"))


def on(mesh: Mesh, leaf: Any, *spec: str | None) -> jax.ShapeDtypeStruct:
    """An array that lies there, in shape only."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


# What is compiled. A program is a function and its arguments.


class Program(NamedTuple):
    """What is compiled: a function, its arguments, those it may overwrite, and what its results should lie like."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    donated: tuple[int, ...] = ()
    like: Any = None


def programs(target: str) -> dict[str, Callable[[Mesh], Program]]:
    """All programs by name; they are put together when called."""
    every = {f"masks: {name}": lambda mesh, name=name: masks_program(mesh, METHODS[name]) for name in METHODS}
    every |= {
        f"step: {name}": lambda mesh, name=name: step_program(mesh, TRANSFORMATIONS[name]) for name in TRANSFORMATIONS
    }
    return every | {f"sparse: {name}": lambda mesh, name=name: sparse_program(mesh, name) for name in FORMATS}


def gated_mlps(mesh: Mesh, layers: int = 2, width: int = 4096, hidden: int = 11008) -> Any:
    """Weights, in shape only."""
    wide, narrow = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((width, hidden), (hidden, width)))
    layer = {"gate": on(mesh, wide, "fsdp", "tp"), "up": on(mesh, wide, "fsdp", "tp")}
    return {f"mlp_{i}": {**layer, "down": on(mesh, narrow, "tp", "fsdp")} for i in range(layers)}


def apply_gated(params: Any, x: jax.Array) -> jax.Array:
    for layer in params.values():
        x = x + (jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]
    return x


def masks_program(mesh: Mesh, method: jp.Method) -> Program:
    """`compute_masks` with a traced sparsity."""
    params = gated_mlps(mesh)
    if isinstance(method.distribution, jp.NM):
        return Program(lambda params: jp.compute_masks(method, params), (params,), like=params)
    share = on(mesh, jax.ShapeDtypeStruct((), jnp.float32))
    return Program(lambda *args: jp.compute_masks(method, *args), (params, share), like=params)


def step_program(mesh: Mesh, tx: optax.GradientTransformation) -> Program:
    """A step on 256 rows; the state lies like the params, what is packed where packing puts it."""
    params = gated_mlps(mesh)
    x = on(mesh, jax.ShapeDtypeStruct((256, 4096), jnp.float32), "fsdp")
    by_shape = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(params)}
    state = jax.tree.map(lambda leaf: on(mesh, leaf, *by_shape.get(leaf.shape, ())), jax.eval_shape(tx.init, params))
    masks = optax.tree.get(state, "masks", None)
    if masks is not None and jax.tree.leaves(masks)[0].dtype == jnp.uint8:
        alive = jax.tree.map(lambda leaf: on(mesh, leaf.update(dtype=jnp.bool), *by_shape[leaf.shape]), params)
        where = jax.jit(jp.pack_masks).lower(alive).compile().output_shardings
        packed = jax.tree.map(lambda leaf, there: leaf.update(sharding=there), masks, where)
        state = state._replace(masks=packed)

    def step(params: Any, state: Any, x: jax.Array) -> Any:
        grads = jax.grad(lambda params: jnp.mean(jnp.square(apply_gated(params, x))))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Program(step, (params, state, x), donated=(0, 1), like=(params, state))


def sparse_program(mesh: Mesh, format: str, width: int = 1024, hidden: int = 4096) -> Program:
    """`sparse.apply` of an MLP, 64 rows, on the first chip alone."""
    chip = Mesh(mesh.devices[:1, :1], mesh.axis_names)
    rng = np.random.default_rng(0)
    shapes = {"up": (width, hidden), "down": (hidden, width)}
    params = {name: {"kernel": jnp.asarray(rng.standard_normal(shape, np.float32))} for name, shape in shapes.items()}
    granularity = jp.Block(64, 64) if format == "block" else jp.Element()
    pruned = jp.apply_masks(params, jp.compute_masks(jp.Method(granularity=granularity), params, 0.9))
    compressed = jax.tree.map(lambda leaf: on(chip, leaf), jp.sparse.compress(pruned, format))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]

    x = on(chip, jax.ShapeDtypeStruct((64, width), jnp.float32))
    return Program(jp.sparse.apply(apply), (compressed, x))


# What is read from the compiled program.


def read(program: Program, compiled: Any) -> dict[str, Any]:
    """Counts of operations by kind, MiB of one chip, and how many results do not lie where what they resemble lies."""
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    calls = dict(sorted(Counter(re.findall(r'custom_call_target="([^"]+)"', text)).items()))
    found: dict[str, Any] = {
        "collectives": collectives(text),
        "calls": calls,
        "host": counted(text, HOST) | {name: count for name, count in calls.items() if "callback" in name},
        "largest_mib": max((mebibytes(size) for size, _ in results(text, COLLECTIVES)), default=0.0),
        "operations": operations(text),
        "fusions": len(re.findall(r" fusion\(", text)),
        "arguments_mib": mebibytes(memory.argument_size_in_bytes),
        "outputs_mib": mebibytes(memory.output_size_in_bytes),
        "temporaries_mib": mebibytes(memory.temp_size_in_bytes),
    }
    if program.like is not None:
        there = zip(jax.tree.leaves(compiled.output_shardings), jax.tree.leaves(program.like), strict=True)
        found["moved"] = sum(not out.is_equivalent_to(leaf.sharding, leaf.ndim) for out, leaf in there)
    return found


def counted(text: str, names: tuple[str, ...]) -> dict[str, int]:
    """How often each operation stands in the text; of one in two halves the first counts."""
    found = Counter(re.findall(rf" ({'|'.join(names)})(?:-start)?\(", text))
    return {name: found[name] for name in names if found[name]}


def collectives(text: str) -> dict[str, int]:
    """Likewise; what a TPU runs beside other work stands in each fusion that it lasts through, and is a chain then."""
    lines = [line for line in text.splitlines() if counted(line, COLLECTIVES)]
    chained = [re.search(r"channel_id=\d+|$", line)[0] + re.search(r'chain_id="\d+"|$', line)[0] for line in lines]
    whole = {place: line for place, line in enumerate(lines) if "chain_id" not in chained[place]}
    each = whole | {chain: line for chain, line in zip(chained, lines, strict=True) if "chain_id" in chain}
    return counted("\n".join(each.values()), COLLECTIVES)


def operations(text: str) -> dict[str, int]:
    """How often other operations stand there, sorts those of more than a few numbers."""
    found = counted(text, OPERATIONS)
    found["sort"] = sum(numbers > FEW for _, numbers in results(text, ("sort",)))
    return {name: count for name, count in found.items() if count}


def results(text: str, names: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """(bytes, numbers) of the arrays that come out of these operations."""
    for line in re.findall(rf" = (.*) (?:{'|'.join(names)})(?:-start)?\(", text):
        for kind, sides in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", line):
            numbers = math.prod(int(side) for side in sides.split(",") if side)
            yield numbers * max(int(kind.lstrip("abcdefghijklmnopqrstuvwxyz") or 8) // 8, 1), numbers


def mebibytes(size: int) -> float:
    return round(size / 2**20, 2)


def rows(target: str, only: str = "*", text: Path | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every program whose name matches, compiled and read; the programs' texts go to a directory."""
    mesh = mesh_of(target)
    for name, build in programs(target).items():
        if fnmatch.fnmatch(name, only):
            yield name, row(mesh, build, text and text / f"{target} {name.replace(':', '')}.txt")


def row(mesh: Mesh, build: Callable[[Mesh], Program], text: Path | None = None) -> dict[str, Any]:
    """A program compiled and read; where it cannot be, why not."""
    with warnings.catch_warnings():
        # Expected: products of the portable formats are lowered where cuSPARSE is not.
        warnings.filterwarnings("ignore", message="This program is lowered for CUDA")
        program = build(mesh)
        try:
            compiled = jax.jit(program.fn, donate_argnums=program.donated).lower(*program.args).compile()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            return {"fails": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    if text is not None:
        text.write_text(compiled.as_text())
    return read(program, compiled)


# What is expected.


def expected() -> dict[str, Any]:
    """{"jax": version, "rows": {target: {program: row}}}."""
    return json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {"jax": jax.__version__, "rows": {}}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Where a row is not the one expected: counts and what is called are equal, bytes and fusions nearly so."""
    pairs = {key: (found.get(key), wanted.get(key)) for key in sorted(found.keys() | wanted.keys())}
    return [f"{key}: {have}, expected {want}" for key, (have, want) in pairs.items() if not alike(key, have, want)]


def alike(key: str, have: Any, want: Any) -> bool:
    if have is None or want is None or key in ("collectives", "host", "operations", "moved", "fails"):
        return have == want
    if key == "calls":
        return have.keys() == want.keys()
    low, high = sorted((have, want))
    return high <= low * NEARLY[0] + NEARLY[1]


def markdown(table: dict[str, Any]) -> str:
    """The table, a section for each target."""
    lines = [f"Compiled with jax {table['jax']}, not run, not timed."]
    for target, found in sorted(table["rows"].items()):
        machine = {"tpu": "TPU v5e 4 x 4, bytes of one chip", "cuda": "one H100"}[target]
        lines += ["", f"**{machine}**", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---|---|---:|---|---|---:|---:|---:|"]
        lines += [f"| {' | '.join([name, *cells(found[name])])} |" for name in found]
    return "\n".join(lines)


def cells(found: dict[str, Any]) -> list[str]:
    if "fails" in found:
        return [f"does not compile: {found['fails']}", *[""] * 6]
    called = ", ".join(found["calls"]) or "none"
    largest, *sizes = (f"{found[key]:.0f}" for key in ("largest_mib", "temporaries_mib", "outputs_mib"))
    moved = str(found.get("moved", "-"))
    return [in_words(found["collectives"]), largest, called, in_words(found["operations"]), moved, *sizes]


def in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description="Programs compiled for accelerators that are not here.")
    parser.add_argument("targets", nargs="*", choices=["tpu", "cuda"], metavar="tpu|cuda")
    parser.add_argument("--only", default="*", help="names of programs, with * and ?")
    parser.add_argument("--write", action="store_true", help="take what was found as what is expected")
    parser.add_argument("--markdown", action="store_true", help="print what is expected as a table")
    parser.add_argument("--text", type=Path, help="directory for the compiled programs' text")
    arguments = parser.parse_args()

    table, failed = expected(), False
    for target in arguments.targets:
        if missing := why_missing(target):
            sys.exit(f"{target}: {missing}")
        before, names = table["rows"].get(target, {}), programs(target)
        there = {name: before[name] for name in names if name in before}
        for name, found in rows(target, arguments.only, arguments.text):
            different = differences(found, there.get(name, {}))
            failed = failed or bool(different)
            print(f"{target} {name}: {'; '.join(different) or 'as expected'}", flush=True)
            there[name] = found
        table = {"jax": jax.__version__, "rows": {**table["rows"], target: there}}
    if arguments.write:
        EXPECTED.write_text(json.dumps(table, indent=1) + "\n")
    if arguments.markdown:
        print(markdown(table))
    if failed and not arguments.write:
        sys.exit(1)


if __name__ == "__main__":
    main()
